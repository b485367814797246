"""Energy: CodeCarbon's own arithmetic at a given power, the message without it, and a short run."""

import json
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import carbon
from qs_jax.errors import InputError

WATTS = 100


def test_a_given_power_times_the_share_the_process_kept_busy():
    """In joules; emissions follow the country's mean, which is about 0.04 to 0.06 kg/kWh there."""
    pytest.importorskip("codecarbon")
    tracker = carbon.make_tracker("FRA", WATTS)
    tracker.start_task()
    began, before = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < 1.5:
        pass
    spent = time.process_time() - before
    found = carbon.read_energy(tracker.stop_task())
    assert found["cpu_joules"] == pytest.approx(WATTS * spent / psutil.cpu_count(), rel=0.3)
    total = sum(found[f"{part}_joules"] for part in ("cpu", "ram", "gpu"))
    assert found["joules"] == pytest.approx(total)
    assert found["seconds"] == pytest.approx(1.5, abs=0.5)
    assert 0.02 < found["grams_co2"] / found["joules"] * 3.6e3 < 0.1
    assert f"by cpu_load, {WATTS} W" in carbon.describe_sources(tracker)["cpu"]
    tracker.start_task()
    time.sleep(0.5)
    assert carbon.read_energy(tracker.stop_task())["cpu_joules"] < 0.2 * found["cpu_joules"]


def test_a_country_that_is_none():
    pytest.importorskip("codecarbon")
    with pytest.raises(InputError, match="no country 'Atlantis'"):
        carbon.make_tracker("Atlantis", WATTS)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    message = r"^energy is measured with CodeCarbon: install qs-jax\[carbon\]\.$"
    with pytest.raises(InputError, match=message):
        carbon.main(["--ckpt", "x"])


class Tracker:
    """Each task costs a joule more than the one before."""

    turns, _hardware = 0, ()

    def get_detected_hardware(self):
        return {}

    def start_task(self):
        self.turns += 1

    def stop_task(self):
        kwh = {"cpu_energy": 7 / 3.6e6, "gpu_energy": 0.0, "ram_energy": 1 / 3.6e6}
        total = (8 + self.turns) / 3.6e6
        return SimpleNamespace(energy_consumed=total, duration=2.0, emissions=5e-5, **kwh)


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_a_short_run(tiny_checkpoint, tmp_path, monkeypatch, capsys, real):
    """Turns of D B D B D, and so on: with the stand-in, B costs what the turns around it do."""
    if real:
        pytest.importorskip("codecarbon")
    else:
        monkeypatch.setattr(carbon, "make_tracker", lambda *_: Tracker())
    out = tmp_path / "carbon.json"
    command = ["--ckpt", str(tiny_checkpoint), "--presets", "balanced", "--prompt", "48"]
    command += ["--new-tokens", "4", "--seconds", "0.5", "--country", "FRA", "--out", str(out)]
    carbon.main(command)
    content = json.loads(out.read_text())
    for entry in content["rows"].values():
        assert entry["joules"] > 0
        assert entry["joules_per_token"] == pytest.approx(entry["joules"] / (4 * 52))
        assert entry["grams_co2_per_new_token"] == pytest.approx(entry["grams_co2"] / (4 * 4))
    over = content["rows"]["balanced"]["joules_over_dense"]
    assert 0.1 < over < 10
    assert content["rows"]["dense"]["joules_over_dense"] == 1
    printed = capsys.readouterr().out
    assert "| balanced |" in printed
    assert ("CPU by cpu_load" if real else "RAM by its size") in printed
