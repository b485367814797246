"""`python -m qs_jax evaluate`: perplexity of a checkpoint on a text, and what a preset saves."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qs_jax.commands.maps import find_maps
from qs_jax.errors import InputError

if TYPE_CHECKING:
    import jax

    from qs_jax.config import Config
    from qs_jax.evaluation.journal import Journal
    from qs_jax.evaluation.perplexity import Windows
    from qs_jax.evaluation.processes import Processes
    from qs_jax.mechanisms.kv_maps import KVMaps
    from qs_jax.models import Params

_SAVED = {
    "layer_tokens_saved": "layer-tokens saved",
    "exact_flops_saved": "FLOPs saved (exact count)",
    "paper_flops_saved": "FLOPs saved (the paper's count)",
    "kv_bytes_saved": "KV bytes saved",
}


class Job(NamedTuple):
    """A run with everything but the weights.

    Attributes:
      cfg: Model, mechanisms, protocol.
      windows: What to score.
      maps: For the "extrapolate" policy.
      identity: What makes two runs the same; all of it is in the results.
      extra: Further facts for the results, which follow from these.
    """

    cfg: Config
    windows: Windows
    maps: KVMaps | None
    identity: dict[str, Any]
    extra: dict[str, Any]


@dataclasses.dataclass
class Evaluate:
    """Measure perplexity in fixed windows, and what a preset saves."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    data: str
    """wikitext-103, c4, or a file: .jsonl, .jsonl.gz, .json.gz (field "text"), or plain text."""
    out: Path
    """Results, as JSON; finished batches of an unfinished run are in OUT.partial."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Score every position; or let mechanisms act on a prompt and score what follows. By default
    teacher-forced, unless the preset can act on prompts only."""
    seq_len: int = 512
    """Tokens of each window."""
    batch_size: int = 8
    """Windows scored at a time."""
    preset: str = "off"
    """Mechanisms to run: a name, or FILE.json; off is the dense model."""
    engine: Literal["masked", "compact"] = "masked"
    """masked computes everything and selects: savings are simulated. compact makes the same
    decisions and computes active tokens only; AMQ in presets runs where int8 is faster, or not."""
    limit_windows: int | None = None
    """Score the first N windows only."""
    continuation_tokens: int = 128
    """Under continuation: the last tokens of each window, which are scored."""
    devices: str = "1"
    """Local devices that share each batch: a number, or all."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to share the batches among several processes; they all get the same
    options but --process-id, and process 0 writes --out."""
    num_processes: int = 1
    """How many processes there are."""
    process_id: int = 0
    """Which of them this is, from 0."""
    kv_maps: Path | None = None
    """Maps of the "extrapolate" policy; by default those beside the preset's file, or
    kv_maps.safetensors in the checkpoint folder."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    resume: bool = False
    """Continue a run that was killed; the results are those of a run that was not."""
    overwrite: bool = False
    """Replace --out, and forget an unfinished run."""

    def run(self) -> None:
        """Check, score, write, report."""
        from qs_jax.evaluation.processes import connect, explained

        processes = connect(self.coordinator, self.num_processes, self.process_id)
        with explained(processes):
            self._run(processes)

    def _run(self, processes: Processes) -> None:
        from qs_jax.checkpoint import load
        from qs_jax.engine.devices import local_devices
        from qs_jax.evaluation.journal import Journal, check_target, is_complete, write_json
        from qs_jax.evaluation.perplexity import results

        own = self.out.with_name(self.out.name + processes.suffix)
        for out in dict.fromkeys((self.out, own)):
            check_target(out, resume=self.resume, overwrite=self.overwrite)
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}.")
        devices = local_devices(self.devices)
        job = self._job()
        complete = self.resume and is_complete(self.out, job.identity)
        if processes.gather([{"complete": complete}])[0]["complete"]:
            print(f"{self.out} is complete; it was left as it is.")
            return
        with Journal(own, job.identity, resume=self.resume) as journal:
            params, _ = load(self.ckpt, dtype=self.dtype)
            if job.maps is not None:
                params["kv_maps"] = job.maps
            rate = self._score(params, job, journal, devices, processes)
            entries = processes.gather(journal.entries)
            measured = results(entries, engine=None if _is_dense(job.cfg) else self.engine)
            if processes.index == 0:
                write_json(self.out, measured | job.extra | job.identity)
            processes.gather([])  # nobody forgets before it is written
            journal.remove()
        if processes.index == 0:
            self._report(measured, job, rate, len(devices))

    def _job(self) -> Job:
        """Everything that can be wrong is looked at here, before the weights are read."""
        from qs_jax import Config, ModelConfig, load_tokenizer, presets
        from qs_jax.checkpoint import choose_dtype, read_manifest
        from qs_jax.evaluation.perplexity import check_width, git_hash, read_windows, versions

        manifest = read_manifest(self.ckpt)
        model = ModelConfig.from_dict(manifest["model"])
        model = model.replace(dtype=choose_dtype(self.dtype, model))
        quicksilver = presets.by_name(self.preset, model)
        cfg = Config(
            model=model,
            quicksilver=quicksilver,
            protocol=self.protocol,
            continuation_tokens=self.continuation_tokens,
            engine=self.engine,
        )
        check_width(self.seq_len, cfg)
        maps, maps_hash = find_maps(cfg, self.ckpt, self.kv_maps, self.preset)
        tokenizer = load_tokenizer(self.ckpt)
        text, windows = read_windows(self.data, tokenizer, self.seq_len, self.limit_windows)
        check_width(windows.tokens_WT.shape[1], cfg)
        config = self._settings(cfg) | {
            "data": text.name,
            "data_sha256": text.sha256,
            "tokens_sha256": windows.sha256,
            "kv_maps_sha256": maps_hash,
        }
        identity = {
            "config": dict(sorted(config.items())),
            "model": {
                "source": manifest["source"],
                "config": model.to_dict(),
                "fingerprint": manifest["params"],
            },
            "versions": versions(),
            "git": git_hash(),
        }
        told = {
            "characters": len(text.text),
            "joined": text.joined,
            "tokens": windows.tokens_in_text,
            "tokens_left_over": windows.left_over,
        }
        return Job(cfg, windows, maps, identity, {"text": told})

    def _settings(self, cfg: Config) -> dict[str, Any]:
        """The options that decide the numbers; paths go by their last name."""
        import jax

        assert cfg.quicksilver is not None
        continued = cfg.effective_protocol == "continuation"
        return {
            "backend": jax.default_backend(),
            "batch_size": self.batch_size,
            "continuation_tokens": cfg.continuation_tokens if continued else None,
            "dtype": cfg.model.dtype,
            "engine": self.engine,
            "limit_windows": self.limit_windows,
            "preset": Path(self.preset).name,
            "protocol": cfg.effective_protocol,
            "quicksilver": cfg.quicksilver.to_dict(),
            "seq_len": self.seq_len,
        }

    def _score(
        self,
        params: Params,
        job: Job,
        journal: Journal,
        devices: tuple[jax.Device, ...],
        processes: Processes,
    ) -> float | None:
        """Score what the journal does not have yet, with a bar on standard error.

        Returns:
          Tokens a second, of the batches after the first, which compiles; None without any.
        """
        from tqdm import tqdm

        from qs_jax.evaluation.perplexity import exp, mean_nll, score_windows

        done = sum(len(entry["tokens"]) for entry in journal.entries)
        windows = len(job.windows.tokens_WT)
        mine = processes.share(range(-(-windows // self.batch_size)))
        total = sum(min(self.batch_size, windows - at * self.batch_size) for at in mine)
        batches = score_windows(
            params,
            job.windows,
            job.cfg,
            batch_size=self.batch_size,
            batches=mine[len(journal.entries) :],
            devices=devices if len(devices) > 1 else None,
        )
        began, timed = 0.0, 0
        try:
            with tqdm(total=total, initial=done, unit="window", desc="evaluating") as bar:
                for entry in batches:
                    journal.append(entry)
                    if began:
                        timed += len(entry["tokens"])
                    began = began or time.perf_counter()
                    perplexity = exp(mean_nll(journal.entries)) or float("inf")
                    bar.set_postfix_str(f"perplexity {perplexity:.2f}", refresh=False)
                    bar.update(len(entry["tokens"]))
        except KeyboardInterrupt:
            if journal.entries:
                print(f"finished batches are in {journal.path}; --resume goes on", file=sys.stderr)
            raise
        tokens = timed * job.windows.tokens_WT.shape[1]
        return tokens / (time.perf_counter() - began) if timed else None

    def _report(self, measured: dict[str, Any], job: Job, rate: float | None, devices: int) -> None:
        """Print the table of what was measured."""
        from rich.console import Console
        from rich.table import Table

        config = job.identity["config"]
        table = Table(title=f"{config['data']} · {config['protocol']}", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("perplexity", _told(measured["perplexity"]))
        if measured["perplexity_interval"] is not None:
            low, high = measured["perplexity_interval"]
            table.add_row("95 % interval over windows", f"{_told(low)} to {_told(high)}")
        width = job.windows.tokens_WT.shape[1]
        table.add_row("windows", f"{measured['windows']:,} of {width} tokens")
        table.add_row("tokens scored", f"{measured['tokens_scored']:,}")
        if rate is not None:
            each = f", {rate / devices:,.0f} on each of {devices} devices" if devices > 1 else ""
            table.add_row("tokens per second", f"{rate:,.0f}{each} (first batch not counted)")
        table.add_row("preset", config["preset"])
        if not _is_dense(job.cfg):
            how = "simulated" if measured["simulated"] else "counted"
            for name, label in _SAVED.items():
                table.add_row(f"{label}, {how}", f"{measured[name]:.1%}")
        table.add_row("results", str(self.out))
        Console().print(table)


def _is_dense(cfg: Config) -> bool:
    return cfg.quicksilver is None or cfg.quicksilver.is_off


def _told(perplexity: float | None) -> str:
    return "beyond float64" if perplexity is None else f"{perplexity:,.4g}"
