"""Attribution of time to scopes, and traces of a tiny model that viewers read."""

import gzip
import json
import types

import jax
import pytest

from benchmarks import trace
from benchmarks.trace import Interval
from qs_jax import presets
from qs_jax.config import AMQConfig, HaltingConfig, QuickSilverConfig
from qs_jax.errors import CheckpointError

# The scopes that the contract names but "fuse": fusion of new tokens runs without a KV cache.
SCOPES = ("attn", "mlp", "kv_write", "signals", "halt", "amq")
NO_FUSION = QuickSilverConfig(
    halting=HaltingConfig(drift="relative", tau_drift=0.5, tau_halt=1.0),
    amq=AMQConfig(layer=1, entropy="vocab", group=8, execution="int8"),
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
        ("jit(f)/Block/attn/Block.light/light/dot_general", "light"),
        ("jit(f)/Block/attn_norm/mul", "other"),
        ("", "other"),
    ],
)
def test_the_scope_of_an_operation(path, component):
    assert trace.scope_of(path) == component


PROGRAM = """HloModule jit_f
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %make.1 = f32[4]{0} fusion(%p), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/attn/exp"}
  %bitcast.2 = f32[2,2]{1,0} bitcast(%make.1)
  %while.3 = (f32[2]{0}, s32[]) while(%tuple.1), metadata={op_name="jit(f)/mlp/while"}
  ROOT %product = f32[2,2]{1,0} dot(%bitcast.2, %w), metadata={op_name="jit(f)/mlp/dot_general"}
}
"""


def test_loops_are_no_operations_and_readers_are_found_through_other_names():
    program = trace.parse_program(PROGRAM)
    expected = {"make.1": "attn", "bitcast.2": "other", "while.3": None, "product": "mlp"}
    assert program.components == expected
    assert program.readers["make.1"] == {"product"}


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
    planes = [_plane("/host:CPU", events), _plane("/device:GPU:0", [])]
    intervals = trace.read_intervals(planes, {"jit_f": trace.parse_program(PROGRAM)})
    found = trace.attribute(intervals, total=200)
    assert {name: found[name] for name in expected} == expected


def test_on_gpus_the_operations_are_those_of_the_device():
    """Kernels have names of their own; launches on the host name the same operations."""
    kernels = [
        _event("make.1", 10, 8, name="ignored"),
        _event("product", 20, 30),
        _event("while.3", 60, 5, name="jit(f)/mlp/while"),  # the loop's copy of its condition
        _event("gemm.9", 70, 5, name="jit(f)/head/dot_general"),  # not in the program's text
        _event("gemm.9", 80, 7, tf_op="XlaModule"),
        types.SimpleNamespace(name="MemcpyD2H", start_ns=90, duration_ns=5, stats={}),
    ]
    for kernel in kernels:
        kernel.name = "some_kernel"
    launches = [_event("make.1", 0, 50), _event("product", 50, 50)]
    planes = [_plane("/host:CPU", launches), _plane("/device:GPU:0", kernels)]
    intervals = trace.read_intervals(planes, {"jit_f": trace.parse_program(PROGRAM)})
    found = trace.attribute(intervals, total=100)
    assert found == {"attn": 8, "mlp": 35, "head": 5, "other": 7, "idle": 45}


def _plane(name: str, events):
    return types.SimpleNamespace(name=name, lines=[types.SimpleNamespace(events=events)])


def _event(name: str, start: float, duration: float, /, **stats):
    stats |= {"hlo_module": "jit_f", "hlo_op": name}
    return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats)


@pytest.mark.slow
def test_the_command_finds_the_scopes_and_viewers_can_read_its_files(
    tiny_checkpoint, tmp_path, capsys
):
    preset, out = presets.save(tmp_path / "mechanisms.json", NO_FUSION), tmp_path / "out"
    command = ["--ckpt", str(tiny_checkpoint), "--out", str(out), "--preset", str(preset)]
    trace.main([*command, "--prompt", "16", "--new-tokens", "5"])
    printed = capsys.readouterr().out
    content = json.loads((out / "scopes.json").read_text())
    assert content["settings"]["decode_steps"] == 3
    for phase, seconds in content["seconds"].items():
        assert set(seconds) <= set(trace.COMPONENTS)
        assert all(seconds[scope] > 0 for scope in SCOPES)
        (plane,) = (out / phase).rglob("*.xplane.pb")
        (events,) = (out / phase).rglob("*.trace.json.gz")
        assert str(events) in printed
        # xprof reads the scopes from the program in the file.
        assert all(f"/{scope}/".encode() in plane.read_bytes() for scope in ("attn", "halt"))
        with gzip.open(events) as file:
            shown = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert shown.count("decode") == (3 if phase == "decode" else 0)
        data = jax.profiler.ProfileData.from_file(str(plane))
        events = (event for plane in data.planes for line in plane.lines for event in line.events)
        operations = [stats["hlo_op"] for e in events if "hlo_op" in (stats := dict(e.stats))]
        assert set(shown) >= set(operations[:50])


def test_mistakes_are_errors_of_the_library():
    with pytest.raises(CheckpointError, match="is not a folder"):
        trace.main(["--ckpt", "/nowhere", "--out", "x"])
