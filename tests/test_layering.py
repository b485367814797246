"""Imports point down DESIGN's list of rooms, and no modules import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import qs_jax

ROOMS = (  # from the top down
    "__init__ cli __main__ lm_eval testing > commands > report > diagnostics > calibration > "
    "evaluation > text load > accounting > engine > mechanisms > models > "
    "presets checkpoint record state config errors files jax_settings timing compilation_cache"
)
FLOOR = {room: depth for depth, rooms in enumerate(ROOMS.split(">")) for room in rooms.split()}


def modules():
    root = Path(qs_jax.__file__).parents[1]
    names = {path.relative_to(root).with_suffix(""): path for path in root.glob("qs_jax/**/*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in names.items()}


def imports_of(path, known):
    """Modules of this package that a file imports anywhere, functions and type checks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in inner)


def test_imports_point_down_and_in_no_circle():
    known = modules()
    graph = {name: set(imports_of(path, known)) for name, path in known.items()}
    floor = {name: FLOOR[[*name.split("."), "__init__"][1]] for name in known}
    assert not [(a, b) for a, found in graph.items() for b in found if floor[b] < floor[a]]
    TopologicalSorter(graph).prepare()  # raises where there is a circle
    others = {f"qs_jax.engine.{n}" for n in ("prompt", "decode", "cache", "generate", "score")}
    assert not graph["qs_jax.engine.masked"] & others
