"""Records and log-probabilities written down once: a change of the code must not move them.

`python -m tests.goldens CHECKPOINT` writes `tests/goldens.npz` anew: only where behaviour is meant
to change. Tiny models run in float64, where no order of sums decides a comparison; the embedded
model in float32, but in float64 where a preset quantises: a state near the edge between two codes
falls either side with the order of sums.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qs_jax
from qs_jax import presets
from qs_jax.config import Config, ModelConfig
from tests.engine.contract import CASES, model_of, params_under
from tests.oracle.comparison import COUNTED, MEASURED
from tests.support import row_of

FILE = Path(__file__).with_name("goldens.npz")
LENGTHS, PROMPTS = (26, 19), (16, 12)
EMBEDDED = ("off", "paper", "balanced", "small-cache")
FAST = ("balanced", "small-cache")  # the fast engines score them
NEW_TOKENS = 8
# Rows for the embedded model; the last 32 tokens of the first 160 are the continuation.
TEXTS = (
    "The ferry left the harbour a little after six, while the lamps on the pier were still lit. "
    "Three passengers stood at the rail: a teacher who was going home, a boy with a cello case, "
    "and an old man who had not crossed the water in forty years. The wind came from the north. "
    "Nobody spoke until the island could be seen, a low grey line with one white house, and then "
    "they all began to talk at once, about the weather, about the price of bread, and about the "
    "storm of the year before, which had taken the roof of the school and half of the orchard. "
    "The captain, who had heard all of it many times, lit his pipe and kept the bow on the light. "
    "When they landed, the teacher counted her bags, the boy carried his cello up the stone "
    "steps, and the old man stayed behind on the wet boards until the ferry had gone again.",
    "To convert a temperature from Celsius to Fahrenheit, multiply it by nine, divide the result "
    "by five, and add thirty-two. In Python this is one line: def to_fahrenheit(celsius): return "
    "celsius * 9 / 5 + 32. The inverse subtracts first: def to_celsius(fahrenheit): return "
    "(fahrenheit - 32) * 5 / 9. Both functions take a number and return a float, and a test can "
    "check that one undoes the other: assert to_celsius(to_fahrenheit(100.0)) == 100.0. Water "
    "freezes at 0 degrees Celsius, which is 32 degrees Fahrenheit, and boils at 100 degrees "
    "Celsius, which is 212 degrees Fahrenheit; the two scales agree at minus forty degrees. "
    "Kelvin has the same steps as Celsius but starts at absolute zero, so 0 K is -273.15 degrees.",
)

Golden = dict[str, np.ndarray]


def tiny(name: str) -> Golden:
    """Scores of two rows of random tokens on a tiny model, by the masked engine."""
    kind, qs, protocol = CASES[name]
    with jax.enable_x64(True):
        model = model_of(kind, dtype="float64")
        cfg = Config(model, qs, protocol=protocol, engine="masked")
        given = {"prompt_lengths": PROMPTS} if protocol == "continuation" else {}
        return scores_of(qs_jax.score(params_under(cfg), tiny_rows(model), cfg, **given))


def tiny_rows(model: ModelConfig) -> list[list[int]]:
    """The rows of `tiny`."""
    return [row_of(model, width) for width in LENGTHS]


def embedded(params: Any, model: ModelConfig, tokens_BT: np.ndarray, name: str) -> Golden:
    """Scores of each engine that runs a preset, and new tokens."""
    qs, found = presets.by_name(name, model), {}
    with jax.enable_x64(qs.amq is not None):
        if qs.amq is not None:
            model = model.replace(dtype="float64")
            params = jax.tree.map(lambda leaf: leaf.astype("float64"), params)
        for engine in ("masked", "compact")[: 1 + (name in FAST)]:
            cfg = Config(model, qs, engine=engine, continuation_tokens=32)
            scores = scores_of(qs_jax.score(params, tokens_BT, cfg))
            found |= {f"{engine}.{part}": array for part, array in scores.items()}
        cfg = Config(model, qs, max_new_tokens=NEW_TOKENS, eos_token_ids=())
        out = qs_jax.generate(params, tokens_BT[:, :128], cfg)
    return found | {"new.tokens": out.tokens, "new.logprobs": out.logprobs}


def embedded_tokens(tokenizer: Any) -> np.ndarray:
    """`TEXTS` as token ids `[2, 160]`."""
    return np.array([tokenizer(text).input_ids[:160] for text in TEXTS], np.int32)


def scores_of(scores: qs_jax.ScoreOutput, rows: slice = slice(None)) -> Golden:
    """What a golden holds of some rows of a score."""
    found = {"logprobs": scores.logprobs[rows]}
    if scores.record is not None:
        arrays = {name: getattr(scores.record, name) for name in (*COUNTED, *MEASURED)}
        # Layers come first, but for what is said of a token once.
        found |= {name: a[:, rows] if a.ndim == 3 else a[rows] for name, a in arrays.items()}
    return found


def assert_golden(name: str, found: Golden, atol: float) -> None:
    """Decisions are those of the fixture, numbers are within `atol` of them."""
    expected = read(name)
    assert found.keys() == expected.keys()
    for part, array in expected.items():
        message = f"{name}, {part}"
        if part.rpartition(".")[2] in (*MEASURED, "logprobs"):
            np.testing.assert_allclose(found[part], array, atol=atol, rtol=1e-4, err_msg=message)
        else:
            np.testing.assert_array_equal(found[part], array, err_msg=message)


def read(name: str) -> Golden:
    """What the fixture holds of one case; scores of engines that no longer run it left out."""
    unread = () if name.removeprefix("embedded-") in FAST else ("compact.",)
    with np.load(FILE) as content:
        found = {key.removeprefix(f"{name}/"): key for key in content if key.startswith(f"{name}/")}
        return {part: content[key] for part, key in found.items() if not part.startswith(unread)}


def _small(array: np.ndarray) -> np.ndarray:
    """The same numbers in fewer bytes."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array if array.dtype == bool else array.astype(np.int16 if array.max() < 2**15 else int)


def _all(checkpoint: Path) -> Iterator[tuple[str, Callable[[], Golden]]]:
    for name in CASES:
        yield name, lambda name=name: tiny(name)
    params, model = qs_jax.load(checkpoint, dtype="float32")
    tokens_BT = embedded_tokens(qs_jax.load_tokenizer(checkpoint))
    for name in EMBEDDED:
        yield f"embedded-{name}", lambda name=name: embedded(params, model, tokens_BT, name)


def main(checkpoint: str) -> None:
    """Write the fixture anew, with the embedded model in this checkpoint."""
    content: Golden = {}
    for name, measure in _all(Path(checkpoint)):
        content |= {f"{name}/{part}": _small(array) for part, array in measure().items()}
        print(name, flush=True)
    about = json.dumps({"jax": jax.__version__, "numpy": np.__version__})
    np.savez_compressed(FILE, about=np.array(about), **content)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
