"""Generated tables are those of the result files, and the table helper."""

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import mechanisms, pages, paper_tables
from benchmarks.environment import result
from benchmarks.tables import markdown, percent, replace_tables

ROOT = Path(__file__).parents[2]


def lines_of(table):
    """Cells of each line, the head first."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    del lines[1]
    return [[cell.strip() for cell in line] for line in lines]


MECHANISMS = ("halting", "kv-skipping", "fusion", "quantization", "light-layers")
PAGES = {str(path.relative_to(ROOT)): names for path, names in pages.pages().items()}


@pytest.fixture(scope="module")
def made():
    return pages.tables()


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_on_a_page_are_those_of_the_result_files(page, tmp_path, made):
    assert made.keys() >= set(PAGES[page])
    text = (ROOT / page).read_text(encoding="utf-8")
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    replace_tables(tmp_path / "page.md", made)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text


def test_every_table_has_a_page(made):
    assert made.keys() == {name for names in PAGES.values() for name in names}


@pytest.mark.parametrize("page", MECHANISMS)
def test_a_mechanism_has_one_small_table_and_one_picture(page):
    text = (ROOT / f"docs/mechanisms/{page}.md").read_text(encoding="utf-8")
    assert len(PAGES[f"docs/mechanisms/{page}.md"]) == 1
    assert re.findall(r"!\[.*\]\((.*)\)", text) == [f"../images/{page}.svg"]


def test_the_pictures_are_those_of_the_result_files(tmp_path):
    pytest.importorskip("matplotlib")
    made_with = re.compile("Matplotlib v[^,]*")
    pages.draw(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {*MECHANISMS, "front"}
    for drawn in tmp_path.iterdir():
        text = drawn.read_text(encoding="utf-8")
        kept = (ROOT / "docs/images" / drawn.name).read_text(encoding="utf-8")
        assert "perplexity increase" in text
        if made_with.findall(text) == made_with.findall(kept):  # another version draws otherwise
            assert text == kept, f"{drawn.name}: python -m benchmarks.pages"


def test_every_table_of_the_paper_has_a_short_one():
    text = (ROOT / "docs/paper-tables.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^## Tables? (.*?):", text, re.MULTILINE))
    assert sorted(map(int, re.findall(r"\d+", headings))) == list(range(1, 14))
    for name, table in paper_tables.render().items():
        head, *lines = lines_of(table)
        assert 2 < len(lines) < 13, name
        assert all(len(line) == len(head) for line in lines)
        assert f"<!-- table: {name} -->" in text


def test_figures_stand_beside_the_papers():
    made = paper_tables.render()
    whole = lines_of(made["table 11"])[-1]
    row = next(
        row
        for row in result("ablation")["rows"]
        if (row["settings"], row["name"], row["kind"]) == ("all four", "H+K+F+Q", "cumulative")
        and row["data"] == "wikitext"
    )
    assert whole[:4] == ["H+K+F+Q, cumulative", "49%", "60%", "+0.22"]
    assert whole[6] == percent(row["exact_flops_saved"])
    assert whole[-1] == percent(row["time_saved"]) + "*"  # its bits were left out
    bits = lines_of(made["tables 3, 10"])[2]
    assert bits[:3] == ["2/4/8 (1.0, 2.3)", "+0.1", "39.6%"]
    assert lines_of(made["table 7"])[1][1:3] == ["2.3", "2.3"]


def test_a_table_is_put_between_its_markers_and_others_stay(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- table: one -->\nold\n<!-- end -->\n<!-- table: two -->\n<!-- end -->\n"
    )
    table = markdown(pd.DataFrame({"": ["x"], "ms": ["1.0"]}))
    assert table == "| | ms |\n|:---|---:|\n| x | 1.0 |"
    replace_tables(page, {"one": table, "three": "nowhere"})
    assert page.read_text() == (
        f"a\n<!-- table: one -->\n{table}\n<!-- end -->\n<!-- table: two -->\n<!-- end -->\n"
    )


@pytest.mark.parametrize(
    ("change", "cell"),
    [
        ({"ppl_increase": -2e-6, "interval": [-8e-5, 7e-5]}, "0.00"),
        ({"ppl_increase": 0.0, "interval": [-0.01, 0.01]}, "+0.00 (-0.01 to +0.01)"),
        ({"ppl_increase": None, "interval": None}, "beyond float64"),
        ({"ppl": 400.0, "ppl_increase": 383.0, "interval": None}, "+383"),
    ],
)
def test_rounding_is_no_increase(change, cell):
    assert mechanisms.increase({"ppl": 17.5, "dense_ppl": 17.0} | change) == cell
