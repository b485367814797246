"""The pages: links and commands hold, tables are short, and no page outgrows its reader."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import overview
from benchmarks.tables import markdown
from qs_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page):
    """A page without code blocks."""
    return FENCE.sub("", text_of(page))


def anchors_of(page):
    """Anchors of its headings, as forges and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip()) for text in plain}


def test_all_pages_together_are_a_short_book():
    """Code and tables count; the bars between cells do not."""
    words = (word for page in NAMES for word in text_of(page).split())
    assert sum(re.search(r"\w", word) is not None for word in words) <= 15_000


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target.resolve().relative_to(ROOT)), link


@pytest.mark.parametrize("page", NAMES)
def test_tables_fit_a_screen(page):
    for table in re.findall(r"(?:^\|.*\n)+", prose_of(page), re.MULTILINE):
        assert len(table.splitlines()) - 2 <= 12, table


def commands():
    """Every `python -m ...` of the pages, once for each module and subcommand, with its flags."""
    found: dict[tuple[str, str], set[str]] = {}
    for page in NAMES:
        for block in re.findall(r"^```\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(
                    r"python -m ((?:qs_jax|convert|benchmarks|examples)\S*)", line
                ):
                    words = shlex.split(line[match.end() :], comments=True)
                    own = match[1] == "qs_jax" and words[0]
                    flags = {word for word in words if word.startswith("--")}
                    found.setdefault((match[1], own or ""), set()).update(flags)
    return sorted((*key, sorted(flags)) for key, flags in found.items())


@pytest.mark.parametrize(("module", "command", "flags"), commands())
def test_commands_have_the_flags_that_pages_show(module, command, flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    if module == "qs_jax.lm_eval":
        pytest.skip("its options are the harness's, which is not installed here")
    main = cli.main if module == "qs_jax" else importlib.import_module(_file(module)).main
    arguments = [command, "--help"] if command else ["--help"]
    if module == "benchmarks.pages":
        assert not flags, "it has no options"
        return
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(arguments))
    assert not ended.value.code
    shown = capsys.readouterr().out
    for flag in flags:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), flag


def _file(module):
    """The module that a package runs as."""
    return f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module


def sentences(page):
    """Sentences of running text: no code, no tables, no addresses of links."""
    text = re.sub(r"^\|.*$", "\n", prose_of(page), flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", " ", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-#\d])", text):
        yield from re.split(r"(?<=[.:!?]) +(?=[A-Z*\[])", " ".join(paragraph.split()))


def test_no_sentence_of_the_readme_has_more_than_two_numbers():
    for sentence in sentences("README.md"):
        numbers = re.findall(r"(?<![\w.-])[+-]?\d[\d,.]*", sentence)
        assert len(numbers) <= 2, sentence


def test_figures_of_the_readme_are_those_of_the_files():
    """Its prose rounds; the table beside it is made from the same files."""
    found, text = overview.results(), " ".join(text_of("README.md").split())
    balanced = found["verified"]["balanced"]
    assert "more than a fifth of the prompt's time" in text
    assert 0.2 < balanced["measured_time_saved"] < 0.25
    assert "within a budget of +0.2 perplexity" in text
    assert balanced["upper_bound"] <= 0.2
    cost, windows = f"{balanced['ppl_increase']:+.2f}", balanced["windows"]
    assert f"Verified on {windows} windows, it costs {cost}." in text
    front = found["prompt_front"]
    shown, windows = front["rows"]["light: balanced"], front["about"]["windows"]
    told = f"On the {windows} windows of this picture, it costs {shown['ppl_increase']:+.2f}."
    assert told in text
    assert f"dense perplexity {front['dense_perplexity']:.1f}" in text
    assert "decoding of one row three times as fast" in text
    assert 2.5 < found["latency"]["decode_ours_over_hf"] < 3.5
    assert f"<!-- table: overview -->\n{markdown(overview.table(found))}\n" in text_of("README.md")
