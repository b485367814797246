"""Energy: CodeCarbon's own arithmetic at a given power, the message without it, and a short run."""

import builtins
import json
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


def test_without_the_extra_one_line_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("codecarbon"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    message = r"error: energy is measured with CodeCarbon: install qs-jax\[carbon\]\."
    with pytest.raises(SystemExit, match=message):
        carbon.main(["--ckpt", "x"])


class Meters:
    """Gives every call its own joules; each turn costs a joule a call more."""

    method, country = {"cpu": "estimated"}, "FRA"

    def __init__(self, *_, **__):
        self.turns = 0

    def measure(self, call):
        call()
        self.turns += 1
        return Energy(2.0, 8.0 + self.turns, 7.0, 0.0, 1.0, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_a_short_run(tmp_path, monkeypatch, real):
    """Turns of D B D B D, and so on: with the stand-in, B costs what the turns around it do."""
    if real:
        pytest.importorskip("codecarbon")
    else:
        monkeypatch.setattr(carbon, "Meter", Meters)
    convert(str(write_folder(tmp_path / "hf", llama_tensors()[0])), tmp_path / "ckpt")
    page = tmp_path / "page.md"
    page.write_text("# Energy\n<!-- table: carbon -->\n<!-- end -->\n")
    monkeypatch.setattr(carbon, "PAGE", page)
    out = tmp_path / "carbon.json"
    command = ["--ckpt", str(tmp_path / "ckpt"), "--presets", "balanced", "--prompt", "48"]
    command += ["--new-tokens", "4", "--seconds", "0.5", "--country", "FRA", "--out", str(out)]
    carbon.main(command)
    content = json.loads(out.read_text())
    for entry in content["rows"].values():
        parts = [entry[f"{part}_joules"] for part in ("cpu", "ram", "gpu")]
        assert entry["joules"] > 0
        assert not real or entry["joules"] == pytest.approx(sum(parts), rel=0.05)
        assert entry["joules_per_token"] == pytest.approx(entry["joules"] / (4 * 52))
        assert entry["grams_co2_per_new_token"] == pytest.approx(entry["grams_co2"] / (4 * 4))
    over = content["rows"]["balanced"]["joules_over_dense"]
    assert 0.1 < over < 10
    assert content["rows"]["dense"]["joules_over_dense"] == 1
    assert "| balanced |" in page.read_text()
    assert ("CodeCarbon" if real else "CPU estimated") in page.read_text()
