"""The page of the paper's tables: complete, up to date, and right for small made-up results."""

import re
from pathlib import Path

import pytest

from benchmarks import environment, paper_cells, paper_quotes, paper_tables, paper_words
from benchmarks.linguistics_tables import PAPER_HALTED

PAGE = Path(__file__).parents[2] / "docs" / "paper-tables.md"


def lines_of(table):
    """Cells of each line below the head, by column."""
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert all(len(line) == len(head) for line in lines)
    return [dict(zip(head, line, strict=True)) for line in lines]


def row(name, settings="balanced", kind="isolated", **more):
    """A row of benchmarks.ablation."""
    base = {
        "name": name,
        "mechanisms": name.replace("+", ""),
        "kind": kind,
        "settings": settings,
        "sweep": None,
        "whole": False,
        "data": "wikitext",
        "ppl": 17.5,
        "dense_ppl": 17.0,
        "ppl_increase": 0.5,
        "interval": [0.25, 0.75],
        "exact_flops_saved": 0.125,
        "paper_flops_saved": 0.25,
        "paper_flops_saved_16bit": 0.375,
        "layer_tokens_saved": 0.0,
        "kv_bytes_saved": 0.5,
        "kv_bytes_allocated_saved": None,
        "time_saved": None,
        "timed_mechanisms": None,
    }
    return base | more


def ablated(*rows, **more):
    return {"ablation": {"about": {"texts": {"wikitext": {}, "c4": {}}}, "rows": rows} | more}


def test_every_table_is_on_the_page_as_the_result_files_have_it():
    text = PAGE.read_text(encoding="utf-8")
    shown = dict(re.findall(r"<!-- table: ([^\n]+) -->\n(.*?)<!-- end -->", text, re.DOTALL))
    made = dict(paper_tables.render(paper_tables.read(environment.RESULTS)))
    assert shown == {name: f"{table}\n" for name, table in made.items()}
    headings = " ".join(re.findall(r"^## Tables? (.*?):", text, re.MULTILINE))
    assert sorted(map(int, re.findall(r"\d+", headings))) == list(range(1, 14))


def test_without_any_results_cells_name_the_command():
    made = dict(paper_tables.render({}))
    needed = {
        "tables 2, 8, 12": "linguistics",
        "tables 3, 10": "ablation",
        "table 4": "tasks",
        "table 5": "ablation",
        "table 7": "latency",
        "tables 9, 13": "linguistics",
        "table 11": "ablation",
        "synergy": "ablation",
        "c4": "ablation",
        "headline": "calibration",
        "emissions": "carbon",
    }
    for name, file in needed.items():
        assert f"not measured: `{paper_cells.COMMANDS[file]}`" in made[name], name
    assert made["sources"].count("not measured yet") == len(paper_cells.COMMANDS)


@pytest.mark.parametrize("file", paper_cells.COMMANDS)
def test_an_unfinished_file_is_no_crash(file):
    for content in ({}, {"rows": {}, "about": {"model": "m"}}, {"corpora": {"treebank": {}}}):
        assert "not measured" in dict(paper_tables.render({file: content}))["sources"]


def test_ablation_stands_beside_the_papers_figures():
    timed = {"time_saved": 0.0625, "kv_bytes_allocated_saved": 0.4, "timed_mechanisms": "HKF"}
    results = ablated(
        row("H"),
        row("H", data="c4", exact_flops_saved=0.9),
        row("H+K+F+Q", "aggressive", "cumulative", whole=True, **timed),
    )
    first, second = lines_of(paper_cells.ablation(results))
    assert [first[name] for name in ("technique", "", "paper: FLOPs")] == [
        "token halting",
        "isolated",
        "22%",
    ]
    assert first["exact FLOPs saved"] == "12.5%"
    assert first["perplexity increase"] == "+0.50 (+0.25 to +0.75)"
    assert "--timed-settings balanced" in first["time saved"]
    assert (second["technique"], second["paper: speedup"]) == ("+ quantization", "49%")
    assert (second["time saved"], second["allocated"]) == ("6.2%, without Q", "40.0%")


def test_rounding_is_no_increase():
    assert paper_cells.increase(row("H", ppl_increase=-2e-6, interval=[-8e-5, 7e-5])) == "0.00"
    shown = paper_cells.increase(row("H", ppl_increase=0.0, interval=[-0.01, 0.01]))
    assert shown == "+0.00 (-0.01 to +0.01)"
    assert paper_cells.increase(row("H", ppl=None, ppl_increase=None)) == "beyond float64"
    assert paper_cells.increase(row("H", ppl=400.0, ppl_increase=383.0)) == "+383"


def test_the_sentence_says_what_the_papers_thresholds_did():
    rows = [row(letter, "paper", kv_bytes_saved=0.0) for letter in "HKF"]
    assert "nothing halts and nothing fuses" in paper_words.ablation(ablated(*rows))
    rows[2] |= {"layer_tokens_saved": 0.02}
    said = paper_words.ablation(ablated(*rows))
    assert "nothing halts" not in said
    assert "2.0% of the layers" in said


def test_the_papers_synergy_is_negative_by_its_own_figures():
    """18 + 11 + 23 + 15 = 67, 22 + 15 + 30 + 19 = 86, 18.1 + 9.4 + 12.6 + 26.4 = 66.5."""
    figures = {"exact_flops_saved": 0.3, "paper_flops_saved": 0.4, "time_saved": None}
    entry = {
        "settings": "balanced",
        "name": "H+K",
        "data": "c4",
        "whole": figures | {"ppl_increase": 0.5},
        "sum_of_parts": figures | {"exact_flops_saved": 0.35, "ppl_increase": 0.25},
    }
    lines = lines_of(paper_cells.synergy({"ablation": {"synergy": [entry]}}))
    found = [(line["alone, added up"], line["together"], line["synergy"]) for line in lines]
    assert found == [
        ("86.0%", "60.0%", "-26.0 points"),
        ("67.0%", "49.0%", "-18.0 points"),
        ("66.5%", "47.2%", "-19.3 points"),
        ("35.0%", "30.0%", "-5.0 points"),
        ("40.0%", "40.0%", "+0.0 points"),
        ("+0.25", "+0.50", "+0.25"),
    ]


def test_bits_and_texts():
    name = "2/4/8 bits (1.0, 2.3)"
    results = ablated(row(name, "paper", "sweep", sweep="bits"), row("H+K", data="c4", whole=True))
    dense = {"nll": [10.0, 20.0], "tokens": [10, 10]}
    key = "bits | adaptive, nats (1.0, 2.3) | teacher-forced"
    results["mechanisms"] = {"rows": {"presets | off | teacher-forced": dense, key: dense}}
    line = lines_of(paper_cells.bits(results))[2]
    assert line["paper: FLOPs saved"] == "39.6%"
    assert line["ours: paper's account, 16 bit"] == "37.5%"
    assert line["ours, rotated: increase, teacher-forced"] == "none"
    assert "not measured" in lines_of(paper_cells.bits(results))[3]["ours: exact FLOPs"]
    (text,) = lines_of(paper_cells.texts(results))
    assert (text["text"], text["dense perplexity"]) == ("c4", "17.00")


def test_components_are_the_papers_parts_and_a_rest():
    dense = {"embed": 0.001, "attn": 0.05, "mlp": 0.04, "head": 0.004, "idle": 0.005}
    parts = {"dense prefill": dense, "aggressive, prefill": dense | {"attn": 0.02, "fuse": 0.01}}
    lines = {
        line["milliseconds"]: line
        for line in lines_of(paper_cells.components({"latency": {"components": parts}}))
    }
    saved = "ours: saved by `aggressive`"
    assert lines["self-attention"]["ours: dense prefill"] == "50.0"
    assert lines["self-attention"][saved] == "60.0%"
    assert lines["everything else"]["ours: dense prefill"] == "9.0"
    assert (lines["total"]["ours: dense prefill"], lines["total"][saved]) == ("100.0", "20.0%")
    assert lines["total"]["paper: saved"] == "39.7%"
    assert "not measured" in lines["total"]["ours: balanced, prefill"]


def test_halting_by_class_and_its_sentence():
    def entry(by_middle, depth):
        share = {"hits": 1, "count": 40, "share": by_middle, "interval": [0.1, 0.3]}
        return {"halted": share, "halted_by_middle": share, "mean_depth": depth}

    classes = {name: entry(0.2, 24.0) for name in PAPER_HALTED}
    classes["Determiners (DT)"] = entry(0.25, 21.5)
    run = {"middle_layer": 15, "halting": {"paper": classes}}
    rows = {"percentiles | percentiles, H+K | teacher-forced": run}
    results = {"linguistics": {"corpora": {"treebank": {"rows": rows}}}}
    first = lines_of(paper_cells.halting(results))[0]
    assert first["paper, by layer 15"] == "91.4%"
    assert first["its percentiles, by layer 15"] == "25.0% (10.0% to 30.0%)"
    assert "not measured" in first["paper's thresholds"]
    assert "not measured" in paper_words.halting(results)
    assert "not measured" in first["`balanced`: mean depth"]
    rows |= {"paper | paper | teacher-forced": run, "presets | balanced | continuation": run}
    assert lines_of(paper_cells.halting(results))[0]["`balanced`: mean depth"] == "21.5"
    said = paper_words.halting(results)
    assert (
        "1 stop earlier: determiners after layer 21.5 in the mean, content words after 24" in said
    )
    assert "25.0% of a class halt at most" in said
    assert "1 of the 5 classes of function words" in said
    assert "(25.0% of determiners, 20.0% of content words)" in said


def test_tasks_of_several_runs():
    def task(value):
        return {"value": value, "interval": [value - 0.125, value + 0.125]}

    one = {"examples": 40, "dense": task(0.5), "quicksilver": task(0.375) | {"saved": {}}}
    one["difference"] = task(-0.125)
    run = {"tasks": {"rte": one}, "config": {"preset": "balanced", "head": "none"}}
    for content in (run, {"runs": {"zero-shot": run}}):
        line = lines_of(paper_cells.tasks({"tasks": content}))[-1]
        assert (line["task"], line["paper: change"]) == ("RTE", "-0.9")
        assert (line["run"], line["examples"]) == ("balanced, head none", "40")
        assert line["ours: dense"] == "50.0 (37.5 to 62.5)"
        assert line["ours: change"] == "-12.5 (-25.0 to +0.0)"


def test_the_sentence_of_table_five():
    words = [" ".join(part.split()) for part in paper_quotes.SENTENCE_5.split()]
    tokens = [
        {"text": f" {word}", "depth": 6, "kv_layers": 6, "bits": 8, "fused_into": None}
        for word in words
    ]
    tokens[2] |= {"depth": 3, "fused_into": 3}
    tokens[1] |= {"depth": 2, "kv_layers": 2}
    results = {"ablation": {"walkthrough": {"layers": 6, "tokens": tokens}}}
    lines = lines_of(paper_cells.walkthrough(results))
    assert (lines[1]["token"], lines[1]["paper: halted at"]) == ("`is`", "20")
    assert (lines[2]["fused into"], lines[2]["layers run"]) == ("`long`", "3")
    assert "33 tokens 1 halt and 1 are fused" in paper_words.walkthrough(results)


def test_what_calibration_verified_is_found_wherever_it_stands():
    verified = {"exact_flops_saved": 0.26, "paper_flops_saved": 0.25, "ppl_increase": 0.125}
    for content in (
        {"preset": {"provenance": {"verified": verified}}},
        {"runs": {"calibrated": {"provenance": {"verified": verified}}}},
    ):
        line = lines_of(paper_tables.headline({"calibration": content}))[1]
        assert line["FLOPs saved"] == "26.0% exact, 25.0% by the paper's account"
        assert (line["perplexity increase"], line["time saved"]) == ("+0.12", "not timed")


def test_emissions_by_energy_over_dense():
    rows = {
        "dense": {"grams_co2_per_new_token": 0.5},
        "balanced": {
            "grams_co2_per_new_token": 0.45,
            "joules_over_dense": 0.875,
            "joules_over_dense_range": [0.75, 1.0],
        },
    }
    *quoted, dense, balanced = lines_of(paper_cells.emissions({"carbon": {"rows": rows}}))
    assert quoted[-1]["saved"] == "43.1%"  # as the paper says
    assert (dense["saved"], dense["range of turns"]) == ("0.0%", "")
    assert (balanced["saved"], balanced["range of turns"]) == ("12.5%", "0.0% to 25.0%")


def test_a_calibration_is_one_row_and_its_texts_are_its_sources():
    found = {
        "exact_flops_saved": 0.125,
        "paper_flops_saved": 0.25,
        "ppl_increase": 0.1,
        "upper_bound": 0.15,
    }
    calibrated = {
        "data": ["a.txt, of somewhere: windows 0 to 3 searched", "b.jsonl: windows 4 to 9"],
        "balanced": {"verified": found},
        "search": {"preset": {"provenance": {"verified": found}}, "verified": [found]},
    }
    tasks = {"rte": {"data": {"name": "rte.jsonl"}}}
    results = {
        "calibration": calibrated,
        "tasks": {"zero-shot": {"model": {"source": "a model"}, "tasks": tasks}},
    }
    assert [line["FLOPs saved"] for line in lines_of(paper_tables.headline(results))] == [
        "39.6%",
        "12.5% exact, 25.0% by the paper's account",
    ]
    made = {line["file"]: line for line in lines_of(paper_tables.sources(results))}
    assert made["`calibration.json`"]["made with"] == "a.txt, b.jsonl"
    assert (made["`tasks.json`"]["model"], made["`tasks.json`"]["made with"]) == (
        "a model",
        "rte.jsonl",
    )


def test_a_file_of_several_commits_names_them_all():
    groups = {"a": {"commit": "one"}, "b": {"commit": "two"}, "c": {"commit": "one"}}
    mixed = {"groups": groups, "components_about": {"commit": "three"}}
    last = {"environment": {"commit": "two"}}
    told = lines_of(paper_tables.sources({"latency": mixed | last, "ablation": last}))
    told = {row["file"]: row["made with"] for row in told}
    assert told["`latency.json`"] == "commit one, commit two, commit three"
    assert told["`ablation.json`"] == "commit two"
