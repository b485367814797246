"""One command on one GPU: parity with the CPU, times, attention, a trace, and torch.

`python -m benchmarks.gpu --out FILE` writes FILE row by row and prints its tables; a row that
fails or is not run holds the reason. benchmarks/gpu/README.md says what to install on a machine
without network.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from benchmarks import environment
from benchmarks.gpu.models import FULL, TINY
from benchmarks.gpu.rows import Run, reason_of, tables
from benchmarks.gpu.sections import Bench
from qs_jax.compilation_cache import enable_compilation_cache
from qs_jax.errors import InputError, exit_code
from qs_jax.files import read_json

# In the order they run: the long last section gets what time is left.
SECTIONS = {
    "parity": Bench.parity,
    "embedded": Bench.embedded,
    "attention": Bench.attention,
    "trace": Bench.trace,
    "torch": Bench.torch,
    "llama-7b": Bench.llama,
}


@dataclasses.dataclass
class Arguments:
    """Measure what one GPU does, within a few minutes."""

    out: Path
    """JSON file, rewritten after every row; the trace goes into a folder beside it."""
    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    sections: tuple[str, ...] = tuple(SECTIONS)
    """Sections to run."""
    max_minutes: float = 8.0
    """Rows that would end later are not begun."""
    tiny: bool = False
    """Small sizes, and a small model for the one with random weights: a try without a GPU."""


def measure(args: Arguments) -> None:
    """Run the sections; what one of them raises is its reason, and the next one goes on."""
    if unknown := set(args.sections) - set(SECTIONS):
        raise InputError(f"unknown sections {sorted(unknown)}; known: {', '.join(SECTIONS)}.")
    environment.check_out(args.out)
    # torch gets what is left of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")
    enable_compilation_cache()
    sizes = TINY if args.tiny else FULL
    about = {"model": args.ckpt.name, "sections": list(args.sections), "tiny": args.tiny}
    about |= {"max_minutes": args.max_minutes, "rounds": sizes.rounds, "text": "LIGHTHOUSE"}
    run = Run(args.out, 60 * args.max_minutes, about)
    bench = Bench(run, args.ckpt, sizes, args.out.with_suffix(".trace"))
    for name in args.sections:
        try:
            SECTIONS[name](bench)
        except Exception as error:  # the sections after it are worth their time
            run.note(name, "section", {"reason": reason_of(error)})
    run.close()


def run(args: Arguments) -> None:
    """Measure and print the tables."""
    measure(args)
    for name, table in tables(read_json(args.out)).items():
        print(f"\n{name}\n{table}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("gpu", Arguments, run, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
