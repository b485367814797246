"""Energy: CodeCarbon's own arithmetic at a given power, turns in order, and the table."""

import builtins
import json
import sys
import time

import psutil
import pytest

from benchmarks import carbon
from convert.hf_to_flax import convert
from qs_jax.accounting.carbon import Energy, Meter
from qs_jax.errors import InputError
from tests.convert.folders import llama_tensors, write_folder

WATTS = 100


def test_a_given_power_times_the_share_the_process_kept_busy():
    """In joules; emissions follow the country's mean, which is about 0.04 to 0.06 kg/kWh there."""
    pytest.importorskip("codecarbon")
    meter, spent = Meter("FRA", cpu_watts=WATTS), 0.0

    def busy():
        nonlocal spent
        began, before = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < 1.5:
            pass
        spent = time.process_time() - before

    found = meter.measure(busy)
    assert found.cpu_joules == pytest.approx(WATTS * spent / psutil.cpu_count(), rel=0.3)
    total = found.cpu_joules + found.ram_joules + found.gpu_joules
    assert found.joules == pytest.approx(total)
    assert found.seconds == pytest.approx(1.5, abs=0.5)
    assert 0.02 < found.grams_co2 / found.joules * 3.6e3 < 0.1
    assert "no counters" in meter.method["cpu"]
    assert f"{WATTS} W (given)" in meter.method["cpu"]
    idle = meter.measure(lambda: time.sleep(0.5))
    assert idle.cpu_joules < 0.2 * found.cpu_joules


def test_a_country_that_is_none():
    pytest.importorskip("codecarbon")
    with pytest.raises(InputError, match="no country 'Atlantis'"):
        Meter("Atlantis", cpu_watts=WATTS)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("codecarbon"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert carbon.main(["--ckpt", "x"]) == 1
    assert capsys.readouterr().err == (
        "error: energy is measured with CodeCarbon: install qs-jax[carbon].\n"
    )


class Meters:
    """Gives every call its own joules, and drifts: each turn costs a joule a call more."""

    def __init__(self):
        self.joules = {"dense": 10.0, "half": 5.0}
        self.turns, self.called = [], None

    def call(self, name):
        def call():
            self.called = name

        return call

    def measure(self, call):
        call()
        joules = self.joules[self.called] + len(self.turns)
        self.turns.append(self.called)
        return Energy(2.0, joules, joules - 1, 0.0, 1.0, joules / 100)


def test_every_turn_of_a_preset_stands_between_two_dense_ones():
    meter = Meters()
    calls = {name: meter.call(name) for name in ("dense", "half")}
    turns = carbon.interleave(meter, calls, rounds=2, seconds=0)
    assert meter.turns == ["dense", "half", "dense", "half", "dense"]
    # Dense turns cost 10, 12, 14; the preset's 6 and 8 are compared with 11 and 13.
    assert [entry["joules_over_dense"] for entry in turns["half"]] == [6 / 11, 8 / 13]
    row = carbon.row(turns["half"], tokens=70, new_tokens=7)
    assert row["joules"] == 7
    assert row["joules_per_token"] == 0.1
    assert row["grams_co2_per_new_token"] == pytest.approx(0.01)
    assert row["joules_over_dense"] == pytest.approx((6 / 11 + 8 / 13) / 2)
    assert row["joules_over_dense_range"] == [6 / 11, 8 / 13]


def test_a_turn_repeats_the_call_and_divides():
    meter, count = Meters(), 0

    def call():
        nonlocal count
        count += 1
        meter.called = "dense"
        time.sleep(0.01)

    found = carbon.turn(meter, call, seconds=0.05)
    assert found["calls"] == count > 1
    assert found["joules"] == pytest.approx(10 / count)


def test_the_table_says_how_it_is_known():
    meter = Meters()
    calls = {name: meter.call(name) for name in ("dense", "half")}
    turns = carbon.interleave(meter, calls, rounds=2, seconds=0)
    about = {"method": {"cpu": "estimated"}, "rounds": 2, "seconds_a_turn": 0, "country": "FRA"}
    about |= {"model": "m", "dtype": "float32", "batch_size": 1, "prompt": 60, "new_tokens": 10}
    made = {"processor": "p", "cores": 2, "packages": {"jax": "0"}, "commit": "c"}
    rows = {name: carbon.row(found, 70, 10) for name, found in turns.items()}
    text = carbon.table({"about": about, "rows": rows, "environment": made})
    assert "| dense | 0.1714 | 92% | 1 |" in text
    assert "| half | 0.1000 | 86% | 0.580 (0.545 to 0.615) | 1 | 7 | 2.00 |" in text
    assert "CPU estimated. Medians of 2 turns" in text


@pytest.mark.slow
def test_a_short_real_run(tmp_path):
    pytest.importorskip("codecarbon")
    convert(str(write_folder(tmp_path / "hf", llama_tensors()[0])), tmp_path / "ckpt")
    page = tmp_path / "page.md"
    page.write_text("# Energy\n<!-- table: carbon -->\n<!-- end -->\n")
    out = tmp_path / "carbon.json"
    command = ["--ckpt", str(tmp_path / "ckpt"), "--presets", "balanced", "--prompt", "48"]
    command += ["--new-tokens", "4", "--rounds", "1", "--seconds", "1.5", "--country", "FRA"]
    assert carbon.main([*command, "--out", str(out), "--docs", str(page)]) == 0
    content = json.loads(out.read_text())
    for entry in content["rows"].values():
        assert entry["joules"] > 0
        parts = [entry[f"{part}_joules"] for part in ("cpu", "ram", "gpu")]
        assert entry["joules"] == pytest.approx(sum(parts), rel=0.05)
        assert entry["joules_per_token"] == pytest.approx(entry["joules"] / (4 * 52))
    assert 0 < content["rows"]["balanced"]["joules_over_dense"] < 10
    assert content["about"]["method"].keys() >= {"cpu", "ram"}
    assert "| balanced |" in page.read_text()
    assert "CodeCarbon" in page.read_text()
    assert "codecarbon" in sys.modules
