"""`python -m qs_jax evaluate`: perplexity of a checkpoint on a text, and savings of a preset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qs_jax.commands.options import ScoringOptions, print_table
from qs_jax.config import Config
from qs_jax.config.fields import Count, Positive, Several
from qs_jax.errors import InputError
from qs_jax.evaluation import journal
from qs_jax.evaluation.datasets import Text
from qs_jax.evaluation.passkey import compare_passkeys, make_passkeys
from qs_jax.evaluation.perplexity import Windows, check_width, evaluate, read_windows
from qs_jax.evaluation.processes import Processes, connect
from qs_jax.files import write_json
from qs_jax.load import load_tokenizer

_SAVED = {
    "layer_tokens_saved": "layer-tokens saved",
    "exact_flops_saved": "FLOPs saved (exact count)",
    "paper_flops_saved": "FLOPs saved (the paper's count)",
    "kv_bytes_saved": "KV bytes saved",
}


@dataclasses.dataclass(kw_only=True)
class Evaluate(ScoringOptions):
    """Measure perplexity in fixed windows, and the savings of a preset."""

    data: str
    """wikitext-103, c4, or a file: .jsonl or .json (field "text"), or plain text; .gz too."""
    out: Path
    """Results, as JSON; finished batches of an unfinished run are in OUT.partial."""
    seq_len: Several = 512
    """Tokens of each window."""
    limit_windows: Positive | None = None
    """Score the first N windows only."""
    continuation_tokens: Positive = 128
    """Under continuation: the last tokens of each window, which are scored."""
    passkeys: Count = 0
    """Also hide so many keys in prompts as long as a window, one each, and count those that the
    dense model and the preset find; on the fast engines, where these run the preset."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to share the batches among several processes; they all get the same
    options but --process-id, and process 0 writes --out."""
    num_processes: Positive = 1
    """How many processes there are."""
    process_id: Count = 0
    """Which of them this is, from 0."""
    resume: bool = False
    """Continue a run that was killed; the results are those of a run that was not."""

    def targets(self) -> list[tuple[str, Path]]:
        """The results, and the journals that are there until they are written."""
        outs = (self.out, self._journal_out())
        paths = dict.fromkeys((self.out, *map(journal.partial_path, outs)))
        return [("--out", path) for path in paths]

    def _journal_out(self) -> Path:
        suffix = Processes(self.process_id, self.num_processes).suffix
        return self.out.parent / f"{self.out.name}{suffix}"

    def run(self) -> None:
        """Check, score, write, report."""
        processes = connect(self.coordinator, self.num_processes, self.process_id)
        if self.resume and self.overwrite:
            raise InputError("--resume continues a run and --overwrite starts it anew: give one.")
        advice = "pass --overwrite to start anew or --resume to go on where it stands"
        self.check_out(overwrite=self.resume or self.overwrite, advice=advice)
        devices = self.local_devices()
        cfg = self.config(continuation_tokens=self.continuation_tokens, engine=self.engine)
        check_width(self.seq_len, cfg)
        maps, digest = self.find_maps(cfg)
        tokenizer = load_tokenizer(self.folder)
        text, windows = read_windows(self.data, tokenizer, self.seq_len, self.limit_windows)
        width = windows.tokens_WT.shape[1]
        check_width(width, cfg)
        self.warn_of_length(cfg, width)
        prompts = make_passkeys(tokenizer, [width], count=self.passkeys)
        identity = self._identity(cfg, text, windows, digest)
        complete = self.resume and journal.is_complete(self.out, identity)
        if processes.gather([{"complete": complete}])[0]["complete"]:
            print(f"{self.out} is complete; it was left as it is.")
            return
        with journal.Journal(self._journal_out(), identity, resume=self.resume) as batches:
            sharing = {"journal": batches, "processes": processes}
            settings: dict[str, Any] = {"batch_size": self.batch_size, "progress": True}
            settings["devices"] = devices
            params = self.load(maps, devices)
            results = evaluate(params, windows, cfg, **settings, **sharing)
            if prompts:  # in every process: none waits long for another
                asked = (params, cfg.replace(engine="auto"), tokenizer, prompts)
                results["passkeys"] = compare_passkeys(*asked, **settings).to_dict()
            counts = {"characters": len(text.text), "documents": text.documents}
            counts |= {"tokens": windows.tokens_in_text, "tokens_left_over": windows.left_over}
            if processes.index == 0:
                write_json(self.out, results | {"text": counts} | identity)
            processes.gather([])  # nobody forgets before it is written
            batches.remove()
        if processes.index == 0:
            self._print(results, cfg, f"{text.name} · {cfg.effective_protocol}", width)

    def _identity(
        self, cfg: Config, text: Text, windows: Windows, digest: str | None
    ) -> dict[str, Any]:
        """Everything that two runs must share to be the same run; it is in the results."""
        continued = cfg.effective_protocol == "continuation"
        scored = cfg.continuation_tokens if continued else None
        names = "batch_size limit_windows passkeys seq_len".split()
        given = {name: getattr(self, name) for name in names}
        given |= {"continuation_tokens": scored, "kv_maps_sha256": digest, "data": text.name}
        given |= {"data_sha256": text.sha256, "tokens_sha256": windows.sha256}
        settings = self.settings(cfg, **given)
        return {"config": dict(sorted(settings.items())), **self.origin(cfg)}

    def _print(self, results: dict[str, Any], cfg: Config, title: str, width: int) -> None:
        rows = {"perplexity": _number(results["perplexity"])}
        if results["perplexity_interval"] is not None:
            ends = map(_number, results["perplexity_interval"])
            rows["95 % interval over windows"] = " to ".join(ends)
        rows["windows"] = f"{results['windows']:,} of {width} tokens"
        rows["tokens scored"] = f"{results['tokens_scored']:,}"
        rows["preset"] = Path(self.preset).name
        if cfg.quicksilver and not cfg.quicksilver.is_off:
            how = "simulated" if results["simulated"] else "counted"
            rows |= {f"{_SAVED[key]}, {how}": f"{results[key]:.1%}" for key in _SAVED}
            if cfg.effective_protocol == "continuation":
                share = results["summary"]["prefill"]["exact_flops_saved"]
                rows[f"of the prompts' FLOPs, {how}"] = f"{share:.1%}"
        if found := results.get("passkeys"):
            dense, preset = (found["both"] + found[f"only_{who}"] for who in ("dense", "preset"))
            rows[f"passkeys found of {found['prompts']}"] = f"{dense} dense, {preset} preset"
            rows["passkeys lost"] = f"{found['only_dense']} (McNemar p {found['mcnemar_p']:.2g})"
        print_table(title, (), [*rows.items(), ("results", self.out)])
        if results["idle"]:
            print(results["idle"])


def _number(perplexity: float | None) -> str:
    return "beyond float64" if perplexity is None else f"{perplexity:,.4g}"
