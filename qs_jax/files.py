"""Results that are written whole, renamed into place at the end; and JSON that is read strictly."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from qs_jax.errors import InputError, OutputError

_LONGEST_NAME = 255  # bytes


@contextlib.contextmanager
def write_whole(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Paths to write to, one for each target; they become the targets together as the block ends.

    Each has the name of its target and may become a file or a folder. Missing parents are made, a
    symbolic link stays one, and what a killed process left of the same targets is cleared up. After
    a failure every target is what it was. A kill amid the renames of several can leave the first
    one missing; the next call puts the old ones back.

    Raises:
      OutputError: The file system refused something.
    """
    places = [Path(os.path.realpath(target)) for target in targets]
    stages: dict[Path, Path] = {}  # a hidden folder in each parent
    made: list[Path] = []
    try:
        for place in places:
            if (parent := place.parent) not in stages:
                made = [each for each in (parent, *parent.parents) if not each.exists()] + made
                parent.mkdir(parents=True, exist_ok=True)
                stages[parent] = _make_stage(place)
        staged = tuple(stages[place.parent] / "new" / place.name for place in places)
        yield staged
        _move_into_place(list(zip(staged, places, strict=True)))
        for part in ("new", "old"):  # all without the first: that is the sign that all is done
            for stage in stages.values():
                shutil.rmtree(stage / part, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OutputError) and error.__cause__) or error
        first, *others = map(str, targets)
        named = f"{first} and {len(others)} more" if others else first
        kept = [stage / "old" for stage in stages.values() if any((stage / "old").glob("*"))]
        after = f"The old is in {kept[0]}" if kept else "Nothing was changed"
        raise OutputError(f"{named} cannot be written: {reason}. {after}.") from reason
    finally:
        for stage in stages.values():
            if not any((stage / "old").glob("*")):  # else it could not be put back
                shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it is in use, or gone
                folder.rmdir()


def user_cache() -> Path:
    """The library's place in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qs-jax"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented UTF-8 JSON with a final newline, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with write_whole(path) as (staged,):
        # Names of files that are not UTF-8 hold surrogates; JSON has escapes for them.
        staged.write_bytes(text.encode("utf-8", "backslashreplace"))


def read_json(path: Path) -> Any:
    """The value in a JSON file; OSError, or ValueError as of `parse_json`."""
    return parse_json(path.read_text(encoding="utf-8-sig"))


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for a key given twice, NaN, infinity, deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is given twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def check_targets(
    targets: Iterable[tuple[str, Path]],
    *,
    overwrite: bool = False,
    advice: str = "pass --overwrite",
    reads: Iterable[tuple[str, Path]] = (),
    makes: Path | None = None,
) -> None:
    """Refuse, before the work, files that cannot be written or may not be replaced.

    Args:
      targets: The option and the path of each file to be written.
      overwrite: Files that exist may be replaced.
      advice: What to do about those that exist.
      reads: Options and paths that are read; what is no file plays no part.
      makes: A folder that is made where it is missing.
    """
    taken = {os.path.realpath(path): option for option, path in reads if os.path.isfile(path)}
    for option, path in targets:
        named, parent = f"{option} {path}", path.parent
        if parent == makes:
            parent = next(folder for folder in path.parents if folder.exists())
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            raise InputError(f"{named}: a name has at most {_LONGEST_NAME} bytes.")
        if path.is_dir():
            raise InputError(f"{named} is a folder; name a file in it.")
        if not parent.is_dir():
            raise InputError(f"{named}: there is no folder {parent}.")
        if path.exists() and not path.is_file():
            raise InputError(f"{named} is a device or a pipe; name a file.")
        if not all(os.access(each, os.W_OK) for each in (parent, path) if each.exists()):
            raise InputError(f"{named}: there is no permission to write it.")
        if (place := os.path.realpath(path)) in taken:
            raise InputError(f"{named} is also {taken[place]}: name another file.")
        taken[place] = option
        if path.exists() and not overwrite:
            raise InputError(
                f"{path} exists: name another {option}, or {advice}. Nothing was changed."
            )


def _make_stage(place: Path) -> Path:
    """A new hidden folder beside a target, with folders for the new and the old."""
    prefix = f".qs-{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:12]}-"
    for left in [path for path in place.parent.iterdir() if path.name.startswith(prefix)]:
        _clear_abandoned(left, int(left.name.removeprefix(prefix).partition("-")[0]))
    stage = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place.parent))
    for name in ("new", "old"):
        (stage / name).mkdir()
    return stage


def _clear_abandoned(stage: Path, pid: int) -> None:
    """Remove the folder of a process that has ended, after putting back what it moved aside."""
    # In containers that start again a dead process had the number of this one.
    before = pid == os.getpid() and stage.stat().st_mtime < psutil.Process().create_time()
    if psutil.pid_exists(pid) and not before:
        return
    new, old = stage / "new", stage / "old"
    if new.is_dir() and old.is_dir():
        for path in [*old.iterdir()]:
            if os.path.lexists(place := stage.parent / path.name):
                os.rename(place, new / path.name)
            os.rename(path, place)
    shutil.rmtree(stage, ignore_errors=True)


def _move_into_place(moves: list[tuple[Path, Path]]) -> None:
    """Rename each staged path to its place, the first one last; undo everything if one fails."""
    for staged, place in moves:
        for path in (path for path in (staged, *staged.rglob("*")) if path.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if place.exists() and place.is_file() != staged.is_file():
            raise FileExistsError(f"{place} is of another kind")
        if place.is_file():
            shutil.copymode(place, staged)
    if len(moves) == 1 and not moves[0][1].is_dir():
        os.replace(*moves[0])
        return
    aside = [(place, staged.parents[1] / "old" / place.name) for staged, place in moves]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in [each for each in aside if each[0].exists()] + moves[::-1]:
            done.append((source, target))
            os.rename(source, target)
    except BaseException:
        for source, target in reversed(done):
            if not source.exists():
                os.rename(target, source)
        raise
