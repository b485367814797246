"""Attribution of time to scopes, and traces of a tiny model that viewers read."""

import gzip
import json
import types

import jax
import pytest

from benchmarks import trace
from benchmarks.trace import Interval, Program
from convert.hf_to_flax import convert
from qs_jax import presets
from qs_jax.config import AMQConfig, FusionConfig, HaltingConfig, QuickSilverConfig
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


def test_time_is_split_among_what_runs_and_the_rest_is_idle():
    intervals = [
        Interval(0, 4, "attn"),
        Interval(2, 6, "mlp"),  # two at a time from 2 to 4
        Interval(8, 9, "mlp"),
        Interval(9, 9, "head"),
    ]
    found = trace.attribute(intervals, total=10)
    assert found == {"attn": 3, "mlp": 4, "idle": 3}


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("jit(f)/while/body/Block/attn/Block.qkv/dot_general", "attn"),
        ("jit(f)/while/body/Block/attn/kv_write/dynamic_update_slice", "kv_write"),
        ("jit(f)/while/body/Block/mlp/Block.mlp/down/dot_general", "mlp"),
        ("jit(f)/while/body/halt/cond/signals/head/dot_general", "signals"),
        ("jit(f)/Block/attn_norm/mul", "other"),
        ("", "other"),
    ],
)
def test_the_scope_of_an_operation(path, component):
    assert trace.scope_of(path) == component


def test_loops_are_no_operations_of_their_own():
    text = """
  %while.3 = (f32[2]{0}, s32[]) while(%tuple.1), metadata={op_name="jit(f)/mlp/while"}
  ROOT %dot.40 = f32[224,256]{1,0} dot(%a, %b), metadata={op_name="jit(f)/mlp/dot_general"}
  %copy.2 = f32[2]{0} copy(%x)
"""
    assert trace.parse_program(text).components == {
        "while.3": None,
        "dot.40": "mlp",
        "copy.2": "other",
    }


PROGRAM = """HloModule jit_f
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %make.1 = f32[4]{0} fusion(%p), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/attn/exp"}
  %bitcast.2 = f32[2,2]{1,0} bitcast(%make.1)
  %product = f32[2,2]{1,0} dot(%bitcast.2, %w), metadata={op_name="jit(f)/mlp/dot_general"}
}
"""


def test_readers_are_found_through_other_names():
    assert trace.parse_program(PROGRAM).readers["make.1"] == {"product"}


@pytest.mark.parametrize(
    ("end_of_make", "expected"),
    [
        (45, {"attn": 12, "mlp": 20}),  # ended late, by the thread that ran the product meanwhile
        (11, {"attn": 11, "mlp": 20}),
        (5, {"attn": 8, "mlp": 20}),  # its own event knows better
    ],
)
def test_an_operation_is_over_when_a_reader_begins(end_of_make, expected):
    events = [
        _event("make.1", 0, 8, _p=1),
        _event("product", 12, 20),
        _event("make.1", 100, 0, _p=2),  # another round, not followed by a product
        types.SimpleNamespace(
            name="end: make.1", start_ns=end_of_make, duration_ns=0, stats={"_c": 1}
        ),
    ]
    planes = [types.SimpleNamespace(lines=[types.SimpleNamespace(events=events)])]
    intervals = trace.read_intervals(planes, {"jit_f": trace.parse_program(PROGRAM)})
    found = trace.attribute(intervals, total=200)
    assert {name: found[name] for name in expected} == expected


def _event(name: str, start: float, duration: float, **stats):
    stats |= {"hlo_module": "jit_f", "hlo_op": name}
    return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats)


def test_instructions_are_told_apart_by_their_program():
    events = [_event("dot.1", start, 2) for start in (0, 5, 9)]
    for event, module in zip(events, ("jit_a", "jit_b", "jit_c"), strict=True):
        event.stats["hlo_module"] = module
    programs = {"jit_a": Program({"dot.1": "mlp"}, {}), "jit_b": Program({"dot.1": "attn"}, {})}
    planes = [types.SimpleNamespace(lines=[types.SimpleNamespace(events=events)])]
    found = trace.read_intervals(planes, programs)
    assert [(part.component, part.start) for part in found] == [("mlp", 0), ("attn", 5)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the command on a model of three layers; its folder."""
    folder = tmp_path_factory.mktemp("trace")
    convert(str(write_folder(folder / "hf", llama_tensors()[0])), folder / "ckpt")

    def run(name, qs):
        preset = presets.save(folder / f"{name}.json", qs)
        command = ["--ckpt", str(folder / "ckpt"), "--out", str(folder / name), "--preset"]
        trace.main([*command, str(preset), "--prompt", "16", "--new-tokens", "5"])
        return folder / name

    return run


def test_the_command_finds_the_scopes_and_viewers_can_read_its_files(run, capsys):
    out = run("cheap", CHEAP)
    printed = capsys.readouterr().out
    content = json.loads((out / "scopes.json").read_text())
    assert content["settings"]["decode_steps"] == 3
    for phase, seconds in content["seconds"].items():
        assert set(seconds) <= set(trace.COMPONENTS)
        assert all(seconds[scope] > 0 for scope in ("attn", "mlp", "kv_write", "signals", "halt"))
        assert not {"fuse", "amq"} & set(seconds), "these mechanisms are off"
        (plane,) = (out / phase).rglob("*.xplane.pb")
        (events,) = (out / phase).rglob("*.trace.json.gz")
        assert str(events) in printed
        data = jax.profiler.ProfileData.from_file(str(plane))
        operations = [
            stats["hlo_op"]
            for profile_plane in data.planes
            for line in profile_plane.lines
            for event in line.events
            if "hlo_op" in (stats := dict(event.stats))
        ]
        content_of_plane = plane.read_bytes()  # xprof reads the scopes from the program in it
        assert all(f"/{scope}/".encode() in content_of_plane for scope in ("attn", "halt"))
        with gzip.open(events) as file:
            shown = json.load(file)["traceEvents"]
        assert {event.get("name") for event in shown} >= set(operations[:50])
        steps = [event for event in shown if event.get("name") == "decode"]
        assert len(steps) == (3 if phase == "decode" else 0)


@pytest.mark.slow
def test_every_scope_is_in_both_phases(run):
    seconds = json.loads((run("everything", EVERYTHING) / "scopes.json").read_text())["seconds"]
    for phase in ("prefill", "decode"):
        assert all(seconds[phase][scope] > 0 for scope in ALL)


def test_mistakes_are_one_line():
    with pytest.raises(SystemExit, match=r"error: .*is not a folder"):
        trace.main(["--ckpt", "/nowhere", "--out", "x"])
