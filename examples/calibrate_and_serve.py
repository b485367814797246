"""Calibrate a preset to a budget, save it, load it again, and serve it over HTTP.

    python -m examples.calibrate_and_serve --ckpt DIR --data FILE --preset mine.json
    curl -N localhost:8000/generate -d '{"prompt": "Once upon a time", "stream": true}'

`POST /generate` takes "prompt", "max_new_tokens", "temperature", "seed" and "stream". It answers
with JSON, or with `"stream": true` as server-sent events: one `data: {"text": ...}` for each piece,
and `data: {"done": true, ...}` at the end. Calls wait for each other: there is one model. Needs the
extra `serve`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

import qs_jax
from examples.text import LIGHTHOUSE
from qs_jax import calibration, presets
from qs_jax.errors import InputError, exit_code
from qs_jax.text import TextStream, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qs_jax.models import Params

FIELDS = {"prompt": str, "max_new_tokens": int, "temperature": (int, float), "seed": int}
FIELDS |= {"stream": bool}


@dataclasses.dataclass
class Arguments:
    """Calibrate once, then serve."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    preset: Path = Path("calibrated.json")
    """Made if it is not there yet."""
    data: Path | None = None
    """Text file to calibrate on; by default a short text of ours, which is too little for use."""
    max_ppl_increase: float = 0.2
    """The budget."""
    seq_len: int = 96
    """Tokens of each window of the text."""
    continuation_tokens: int = 24
    """The last of them, which are scored."""
    max_evaluations: int = 8
    """Candidates measured."""
    max_new_tokens: int = 64
    """Longest answer a caller may ask for, in tokens."""
    host: str = "127.0.0.1"
    """Where to listen."""
    port: int = 8000
    """Likewise; 0 takes a free one."""


def make_preset(args: Arguments, params: Params, model: qs_jax.ModelConfig, ids: list[int]) -> None:
    """Calibrate on the windows of a text and save the result.

    Raises:
      InputError: The text has fewer than the four windows that a search and its check need.
    """
    whole = len(ids) // args.seq_len
    if whole < 4:
        raise InputError(f"the text has {whole} windows of {args.seq_len} tokens; four are needed.")
    windows_WT = np.array(ids[: whole * args.seq_len], np.int32).reshape(whole, args.seq_len)
    cfg = qs_jax.Config(
        model, protocol="continuation", continuation_tokens=args.continuation_tokens
    )
    found = calibration.calibrate(
        params,
        windows_WT,
        cfg,
        max_ppl_increase=args.max_ppl_increase,
        max_evaluations=args.max_evaluations,
        timed_runs=0,
        fusion=False,
    )
    presets.save(args.preset, found, model)


class Model:
    """A loaded model that answers one request at a time."""

    def __init__(
        self, params: Params, tokenizer: PreTrainedTokenizerFast, cfg: qs_jax.Config
    ) -> None:
        self._params, self._tokenizer, self._cfg = params, tokenizer, cfg
        self._lock = threading.Lock()

    def start(self, request: dict[str, Any]) -> TextStream:
        """Check a request; what is wrong with it comes out here, not in the middle of an answer.

        Raises:
          QuickSilverError: A field is missing, unknown or out of range, or the prompt too long.
        """
        for name, value in request.items():
            if name not in FIELDS:
                raise InputError(f"unknown field {name!r}; known: {', '.join(FIELDS)}.")
            if not isinstance(value, FIELDS[name]):
                raise InputError(f"the field {name!r} is of the wrong type.")
        changes = {name: request[name] for name in ("temperature", "seed") if name in request}
        count = request.get("max_new_tokens", self._cfg.max_new_tokens)
        if count > self._cfg.max_new_tokens:
            raise InputError(f"max_new_tokens is at most {self._cfg.max_new_tokens} here.")
        cfg = self._cfg.replace(max_new_tokens=count, **changes)
        ids = encode_prompt(self._tokenizer, request.get("prompt", ""))
        return TextStream(self._params, self._tokenizer, ids, cfg)

    def pieces(self, stream: TextStream) -> Iterator[str]:
        """The text of an answer as it comes."""
        with self._lock:
            yield from stream.texts


def make_app(model: Model) -> Any:
    """The web application."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    def events(stream: TextStream) -> Iterator[str]:
        for text in model.pieces(stream):
            yield f"data: {json.dumps({'text': text})}\n\n"
        yield f"data: {json.dumps({'done': True, 'new_tokens': stream.new_tokens})}\n\n"

    async def generate(request: Request) -> Response:
        try:
            fields = await request.json()
            if not isinstance(fields, dict):
                raise InputError("the request must be a JSON object.")
            stream = await run_in_threadpool(model.start, fields)
        except ValueError as error:  # JSON's own too, and InputError is one
            return JSONResponse({"error": str(error)}, status_code=400)
        if fields.get("stream", False):
            return StreamingResponse(events(stream), media_type="text/event-stream")
        text = await run_in_threadpool(lambda: "".join(model.pieces(stream)))
        return JSONResponse({"text": text, "new_tokens": stream.new_tokens})

    return Starlette(routes=[Route("/generate", generate, methods=["POST"])])


def prepare(args: Arguments) -> Model:
    """Load the checkpoint, calibrate if there is no preset yet, load the preset."""
    params, model = qs_jax.load(args.ckpt)
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    if not args.preset.exists():
        text = LIGHTHOUSE if args.data is None else args.data.read_text(encoding="utf-8")
        make_preset(args, params, model, tokenizer(text, verbose=False).input_ids)
    quicksilver = presets.load(args.preset, model)
    told = quicksilver.provenance.get("verified") or {}
    print(f"{args.preset}: {'nothing fits the budget' if quicksilver.is_off else told}")
    cfg = qs_jax.Config(model, quicksilver, max_new_tokens=args.max_new_tokens)
    return Model(params, tokenizer, cfg)


def main(argv: list[str] | None = None) -> None:
    """Calibrate or load, then listen."""
    args = tyro.cli(Arguments, prog="python -m examples.calibrate_and_serve", args=argv)
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise SystemExit(
            "error: serving needs Starlette and uvicorn: install qs-jax[serve]."
        ) from None
    uvicorn.run(make_app(prepare(args)), host=args.host, port=args.port)


if __name__ == "__main__":
    sys.exit(exit_code(main))
