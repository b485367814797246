"""Every result is whole: a full disk, a failed rename or a kill leaves what was there before."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import environment, tables
from convert.flax_to_hf import export
from convert.hf_to_flax import convert
from convert.sources import read_object
from qs_jax import InputError, OutputError, QuickSilverError, presets, report
from qs_jax.calibration.observe import Observed
from qs_jax.calibration.search import Calibration
from qs_jax.checkpoint import MANIFEST, read_manifest
from qs_jax.commands.calibrate import Calibrate
from qs_jax.commands.diagnose import Diagnose
from qs_jax.commands.evaluate import Evaluate
from qs_jax.commands.report import Report
from qs_jax.commands.tasks import Tasks
from qs_jax.evaluation import journal
from qs_jax.evaluation.datasets import json_records
from qs_jax.evaluation.heads import Head
from qs_jax.files import write_json, write_whole
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.testing import tiny_model
from tests.convert.folders import llama_tensors, write_folder
from tests.report.support import SEARCH, written

MODEL = tiny_model()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What the writers read, in version 0 and 1."""
    folder = tmp_path_factory.mktemp("sources")
    for version in (0, 1):
        write_folder(folder / f"hf-{version}", llama_tensors(version)[0])
        front = [SEARCH["front"][0] | {"saving": 0.1 + version / 10}]
        written(folder / f"{version}.search.json", SEARCH | {"front": front})
    return folder


def preset(version):
    return presets.small_cache(tiny_model(num_layers=6 + version))


def maps(version):
    shape = (3, 1, MODEL.hidden_size + 1, 2 * MODEL.kv_size)
    return KVMaps(jnp.full(shape, float(version)), layers=(1,), features=("state",))


def save_head(path, version, sources):
    weights = np.full((8, 32), float(version), np.float32)
    Head(weights, np.ones(8, np.float32), tuple("abcdefgh")).save(path.parent)


def save_calibration(path, version, sources):
    seen = Observed(1, {"drift": np.full((3, 10), float(version))}, 0.0, 0.0)
    Calibration(preset(version), {"kv_maps": maps(version)}, (), (), (), seen).save(path, MODEL)


def write_diagnosis(path, version, sources):
    safe = path.with_name("safe.json")
    command = Diagnose(ckpt=path, text="", preset="off", out=path, suggest_protect=safe)
    command._write({"version": version}, preset(version), MODEL, maps(version))


def write_table(path, version, sources):
    if not path.exists():
        with write_whole(path) as (staged,):
            staged.write_text("<!-- table: x -->\n<!-- end -->\n" + 300 * "text ")
    tables.replace_tables(path, {"x": str(version)})


def run_report(path, version, sources):
    search, folder = sources / f"{version}.search.json", path.parent / "figures"
    Report(out=path, search=search, figures=folder, overwrite=True).run()


# Whatever writes a result: a version of it, to a path and beside it.
WRITERS = {
    "json": lambda path, version, _: write_json(path, {"version": version, "text": 300 * "x"}),
    "benchmark": lambda path, version, _: environment.write("", {"version": version}, path),
    "table": write_table,
    "preset": lambda path, version, _: presets.save(path, preset(version)),
    "maps": lambda path, version, _: maps(version).save(path),
    "head": save_head,
    "page": lambda path, version, _: report.write(report.Report(f"{version}", {}), path),
    "calibration": save_calibration,
    "diagnosis": write_diagnosis,
    "report": run_report,
    "checkpoint": lambda path, version, sources: convert(
        str(sources / f"hf-{version}"), path, overwrite=True
    ),
}


def content(folder):
    """Everything below a folder."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {name: path.is_file() and path.read_bytes() for name, path in paths.items()}


@contextlib.contextmanager
def full_disk(size=200):
    """The kernel refuses to let files grow beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def before_renames(monkeypatch):
    """In a block, calls something before each rename into place or out of it."""

    @contextlib.contextmanager
    def patched(do):
        with monkeypatch.context() as patch:
            for rename in (os.rename, os.replace):

                def wrapped(source, target, rename=rename):
                    if Path(source).parent.name == "new" or Path(target).parent.name == "old":
                        do()
                    rename(source, target)

                patch.setattr(os, rename.__name__, wrapped)
            yield

    return patched


@pytest.mark.parametrize("name", WRITERS)
def test_a_failure_changes_nothing(name, sources, tmp_path, before_renames):
    write, target, calls = WRITERS[name], tmp_path / "result", []
    with full_disk(), pytest.raises(OutputError, match="Nothing was changed"):
        write(target, 0, sources)
    assert content(tmp_path) == {}
    with before_renames(lambda: calls.append(None)):
        write(target, 0, sources)
    old = content(tmp_path)
    with full_disk(), pytest.raises(OutputError, match=r"File too large|os error 27"):
        write(target, 1, sources)
    assert content(tmp_path) == old
    failing, done = 0, False
    while not done:  # at the first rename, and at later ones
        calls.clear()

        def fail(calls=calls, failing=failing):
            calls.append(None)
            if len(calls) == failing + 1:
                raise KeyboardInterrupt if failing % 2 else OSError(5, "Input/output error")

        try:
            with before_renames(fail):
                write(target, 1, sources)
            done = True
        except (OutputError, KeyboardInterrupt):
            assert content(tmp_path) == old
            failing = 2 * failing + 1
    assert failing > 0
    assert content(tmp_path) != old
    assert set(content(tmp_path)) == set(old)


@pytest.fixture(scope="module")
def dead_pid():
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", WRITERS)
def test_the_next_run_puts_back_what_a_killed_one_moved(
    name, sources, tmp_path, before_renames, dead_pid
):
    """Images of the disk before each rename are found by a run that fails."""
    write, disk, images = WRITERS[name], tmp_path / "disk", []
    disk.mkdir()
    write(disk / "result", 0, sources)
    old = content(disk)

    def take_image():
        images.append(shutil.copytree(disk, tmp_path / f"image-{len(images)}"))

    with before_renames(take_image):
        write(disk / "result", 1, sources)
    assert images
    for image in images:
        for left in [*image.rglob(f".qs-*-{os.getpid()}-*")][::-1]:
            left.rename(left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead_pid}-")))
        with full_disk(), pytest.raises(OutputError):
            write(image / "result", 1, sources)
        assert content(image) == old


def test_a_living_process_keeps_what_it_is_writing(tmp_path):
    with write_whole(tmp_path / "a") as (one,):
        one.write_text("one")
        write_json(tmp_path / "a", {})
        (stage,) = tmp_path.glob(".qs-*")
        parents = stage.rename(str(stage).replace(f"-{os.getpid()}-", f"-{os.getppid()}-"))
        write_json(tmp_path / "a", {})
        parents.rename(stage)
    assert content(tmp_path) == {"a": b"one"}


NAMES = ["[a-z]*?.json", "-x.json", "two\nlines  .json", "ä😀.json", "\udcff.json"]
NAMES.append(250 * "x" + ".json")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_patterns(name, tiny_checkpoint, tmp_path, monkeypatch):
    """Glob characters, a dash, a line end, other scripts, no UTF-8, 255 bytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("mine")
    for version in (0, 1):
        write_json(Path(name), {"name": name, "version": version})
    assert json.loads(Path(name).read_bytes()) == {"name": name, "version": 1}
    report.write(report.Report(name, {"preset": name}), Path(name))
    os.remove(name)
    export(tiny_checkpoint, name)
    assert (Path(name) / "model.safetensors").is_file()
    assert sorted(os.listdir()) == sorted(["a.json", name])
    assert (tmp_path / "a.json").read_text() == "mine"


def test_links_modes_and_things_that_are_no_files(tmp_path):
    real = tmp_path / "real" / "a.json"
    write_json(real, {})
    real.chmod(0o600)
    link = tmp_path / "link.json"
    link.symlink_to(real)
    write_json(link, {"new": 1})
    assert link.is_symlink()
    assert json.loads(real.read_text()) == {"new": 1}
    assert real.stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="of another kind"):
        write_json(tmp_path / "pipe", {})
    with pytest.raises(OutputError, match="of another kind"):
        write_json(tmp_path / "real", {})
    assert sorted(os.listdir(tmp_path)) == ["link.json", "pipe", "real"]
    with pytest.raises(ZeroDivisionError), write_whole(tmp_path / "x" / "y" / "z"):
        print(1 / 0)
    assert not (tmp_path / "x").exists()


CHECKED = [
    (Evaluate, {"out": "."}, "--out . is a folder"),
    (Calibrate, {"out": ""}, "--out . is a folder"),
    (Tasks, {"out": ".."}, "--out .. is a folder"),
    (Report, {"out": "/"}, "--out / is a folder"),
    (Report, {"out": "nowhere/a.html"}, "there is no folder nowhere"),
    (Report, {"out": "data.json/a.html"}, "there is no folder data.json"),
    (Report, {"out": 256 * "x"}, "at most 255 bytes"),
    (Calibrate, {"out": 250 * "x"}, "at most 255 bytes"),
    (Evaluate, {"out": 250 * "x"}, "at most 255 bytes"),
    (Report, {"out": "pipe"}, "a device or a pipe"),
    (Report, {"out": "data.json"}, "data.json exists: name another --out, or pass --overwrite"),
    (Evaluate, {"out": "old"}, "old.partial exists: name another --out, or pass --overwrite"),
    (Calibrate, {"out": "old"}, "old.search.json exists"),
    (Calibrate, {"out": "older"}, "older.kv_maps.safetensors exists"),
    (Diagnose, {"suggest_protect": "older.json"}, "older.kv_maps.safetensors exists"),
    (Diagnose, {"suggest_protect": "./a.json"}, "--suggest-protect a.json is also --out"),
    (Report, {"figures": "data.json"}, "there is no folder data.json"),
    (Report, {"figures": "drawn"}, "off.kv_writes.svg exists: name another --figures"),
    (Report, {"figures": "new", "preset": ("x/a.json", "y/a.json")}, "is also --figures"),
    (Report, {"figures": "new", "preset": (250 * "x",)}, "at most 255 bytes"),
    (Report, {"figures": ".", "out": "off.kv_writes.svg"}, "is also --out"),
    (Report, {"out": "data.json", "text": "data.json", "overwrite": True}, "is also --text"),
    (Report, {"out": "link", "results": ("data.json",), "overwrite": True}, "also --results"),
    (Evaluate, {"out": "data.json", "overwrite": True}, "--out data.json is also --data"),
    (Diagnose, {"out": "link", "preset": "data.json", "overwrite": True}, "also --preset"),
]


@pytest.mark.parametrize(("command", "changes", "message"), CHECKED)
def test_outputs_are_checked_before_the_work(command, changes, message, tmp_path, monkeypatch):
    """There is no checkpoint here, so that nothing can have been computed."""
    monkeypatch.chdir(tmp_path)
    for name in ("data.json", "old.partial", "old.search.json", "older.kv_maps.safetensors"):
        Path(name).write_text("mine")
    Path("drawn").mkdir()
    Path("drawn/off.kv_writes.svg").write_text("mine")
    Path("link").symlink_to("data.json")
    os.mkfifo("pipe")
    before = sorted(tmp_path.rglob("*"))
    given = {"ckpt": "nowhere", "out": "a.json"}
    given |= {
        Evaluate: {"data": "data.json"},
        Calibrate: {"data": ("data.json",), "max_ppl_increase": 1.0},
        Tasks: {"data": "data.json", "tasks": ("sst2",)},
        Diagnose: {"text": "a text", "preset": "off"},
        Report: {"text": "a text", "preset": ("off",)},
    }[command]
    given |= changes
    for name in {"ckpt", "out", "figures", "suggest_protect"} & set(given):
        given[name] = Path(given[name])
    given |= {"results": (Path("data.json"),)} if "results" in given else {}
    with pytest.raises(InputError) as caught:
        command(**given).run()
    assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("data.json").read_text() == "mine"


def is_complete(path):
    journal.is_complete(path, {})
    raise InputError("complete")


JSON_READERS = {
    "manifest": lambda path: read_manifest(path.rename(path.with_name(MANIFEST)).parent),
    "preset": lambda path: presets.load(path, MODEL),
    "results": report.read_results,
    "search": report.read_front,
    "config": lambda path: read_object(path),
    "resumed": is_complete,
    "lines": lambda path: list(json_records(path)),
}
NOT_JSON = {
    '{"a": ' * 50_000: "nested too deep",
    '{"a": 1, "a": 2}': "'a' is given twice",
    '{"a": NaN}': "NaN is not JSON",
    '{"a": -Infinity}': "-Infinity is not JSON",
}


@pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: text[:16])
@pytest.mark.parametrize("name", JSON_READERS)
def test_json_is_read_strictly(tmp_path, name, text):
    path = tmp_path / "any.json"
    path.write_text(text)
    message = "not a results file" if name == "resumed" else NOT_JSON[text]
    with pytest.raises(QuickSilverError, match=message):
        JSON_READERS[name](path)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    path = presets.save(tmp_path / "preset.json", presets.paper(MODEL))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert presets.load(path, MODEL) == presets.paper(MODEL)
