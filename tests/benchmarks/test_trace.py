"""Traces of a tiny model: files that viewers read, every scope in them, and what is missing."""

import gzip
import json
from pathlib import Path

import jax
import pytest

import qs_jax
from benchmarks import components, trace
from convert.hf_to_flax import convert
from qs_jax import presets
from qs_jax.config import AMQConfig, FusionConfig, HaltingConfig, QuickSilverConfig
from qs_jax.testing import tiny_model
from tests.convert.folders import llama_tensors, write_folder

# The scopes that the contract names.
ALL = ("attn", "mlp", "kv_write", "signals", "halt", "fuse", "amq")


CHEAP = QuickSilverConfig(
    halting=HaltingConfig(drift="relative", tau_drift=0.5, entropy=None, layers=(1,))
)
EVERYTHING = QuickSilverConfig(
    halting=HaltingConfig(drift="relative", tau_drift=0.5, tau_halt=1.0),
    fusion=FusionConfig(tau_fuse=0.5, distance="relative"),
    amq=AMQConfig(layer=1, entropy="vocab", group=8, execution="fake"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the command on a model of three layers; its exit code and folder."""
    folder = tmp_path_factory.mktemp("trace")
    convert(str(write_folder(folder / "hf", llama_tensors()[0])), folder / "ckpt")

    def run(name, qs):
        preset = presets.save(folder / f"{name}.json", qs)
        command = ["--ckpt", str(folder / "ckpt"), "--out", str(folder / name), "--preset"]
        command += [str(preset), "--prompt", "16", "--new-tokens", "5", "--batch-size", "2"]
        return trace.main(command), folder / name

    return run


@pytest.fixture(scope="module")
def traced(run):
    return run("cheap", CHEAP)


def scopes_of(out):
    return json.loads((out / "scopes.json").read_text())["seconds"]


def test_the_command_finds_the_scopes_and_writes_what_it_prints(traced):
    code, out = traced
    assert code == 0
    content = json.loads((out / "scopes.json").read_text())
    assert content["settings"]["decode_steps"] == 3
    for seconds in content["seconds"].values():
        assert set(seconds) <= set(components.COMPONENTS)
        for scope in ("attn", "mlp", "kv_write", "signals", "halt"):
            assert seconds[scope] > 0
        assert not {"fuse", "amq"} & set(seconds), "these mechanisms are off"


@pytest.mark.slow
def test_every_scope_is_in_both_phases(run):
    code, out = run("everything", EVERYTHING)
    assert code == 0
    for phase in ("prefill", "decode"):
        assert all(scopes_of(out)[phase][scope] > 0 for scope in ALL)


def test_the_files_are_what_the_viewers_read(traced):
    _, out = traced
    told = "\n".join(trace.how_to_open(out))
    for phase in ("prefill", "decode"):
        (plane,) = (out / phase).rglob("*.xplane.pb")
        (events,) = (out / phase).rglob("*.trace.json.gz")
        assert str(events) in told
        data = jax.profiler.ProfileData.from_file(str(plane))
        operations = [
            stats["hlo_op"]
            for profile_plane in data.planes
            for line in profile_plane.lines
            for event in line.events
            if "hlo_op" in (stats := dict(event.stats))
        ]
        assert operations
        content = plane.read_bytes()  # xprof reads the scopes from the program kept in it
        assert all(f"/{scope}/".encode() in content for scope in ("attn", "mlp", "halt", "signals"))
        with gzip.open(events) as file:
            shown = json.load(file)["traceEvents"]
        assert {event.get("name") for event in shown} >= set(operations[:50])
        steps = [event for event in shown if event.get("name") == "decode"]
        assert len(steps) == (3 if phase == "decode" else 0)
    assert f"--logdir {out / 'prefill'} " in told


def test_what_is_expected_follows_the_preset():
    model = tiny_model(num_layers=8)
    on_prompts = qs_jax.Config(model, presets.balanced(model))
    assert set(trace.expected_scopes(on_prompts, "prefill")) == {*ALL} - {"fuse", "amq"}
    assert set(trace.expected_scopes(on_prompts, "decode")) == {"attn", "mlp", "kv_write"}
    assert trace.expected_scopes(qs_jax.Config(model), "prefill") == ("attn", "mlp", "kv_write")
    everything = qs_jax.Config(model, presets.by_name("paper-bits-vocab", model))
    found = {"decode": dict.fromkeys(ALL, 1.0) | {"fuse": 0.0}}
    assert trace.missing_scopes(found, everything) == ["decode: fuse"]
    assert not trace.missing_scopes({"decode": dict.fromkeys(ALL, 1.0)}, everything)


def test_a_missing_scope_is_an_error(monkeypatch, tmp_path, capsys):
    model = tiny_model()
    monkeypatch.setattr(qs_jax, "load", lambda *_, **__: (None, model))
    seconds = {"attn": 1.0, "mlp": 1.0}

    def capture(params, tokens, cfg, folder: Path):
        (folder / "x").mkdir(parents=True)
        for phase in ("prefill", "decode"):
            (folder / phase).mkdir()
            (folder / phase / "vm.trace.json.gz").touch()
        return {"prefill": dict(seconds), "decode": seconds | {"kv_write": 1.0}}

    monkeypatch.setattr(trace, "capture", capture)
    command = ["--ckpt", "x", "--out", str(tmp_path / "out"), "--preset", "off"]
    assert trace.main(command) == 1
    assert "prefill: kv_write\n" in capsys.readouterr().err


def test_mistakes_are_one_line(capsys):
    assert trace.main(["--ckpt", "/nowhere", "--out", "x"]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_instructions_are_told_apart_by_their_program():
    class Event:
        def __init__(self, module, start):
            self.name, self.start_ns, self.duration_ns = "dot.1", start, 2
            self.stats = [("hlo_module", module), ("hlo_op", "dot.1")]

    class Line:
        events = (Event("jit_a", 0), Event("jit_b", 5), Event("jit_c", 9))

    class Plane:
        lines = (Line,)

    programs = {
        name: components._Program({"dot.1": component}, {})
        for name, component in (("jit_a", "mlp"), ("jit_b", "attn"))
    }
    found = components._intervals([Plane], programs)
    assert [(part.component, part.start) for part in found] == [("mlp", 0), ("attn", 5)]
