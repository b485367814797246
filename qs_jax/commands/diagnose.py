"""`python -m qs_jax diagnose`: which tokens a preset hurts, and what protecting them recovers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from qs_jax.commands.maps import find_maps
from qs_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qs_jax.config import Config
    from qs_jax.diagnostics import Diagnosis, Flags, Suspect
    from qs_jax.models import Params

_CONTINUATION = 128
_ROWS = {
    "perplexity": ("perplexity", "{:.4g}"),
    "kl": ("KL from the dense model, nats", "{:.2e}"),
    "top1_agreement": ("same likeliest token as dense", "{:.1%}"),
    "layer_tokens_saved": ("layer-tokens saved, simulated", "{:.1%}"),
}


class Found(NamedTuple):
    """What a run found.

    Attributes:
      diagnosis: Of the preset.
      flags: Tokens over the thresholds.
      suspects: What to protect; None if it was not asked for.
      after: Summary of the re-run with them protected; None without suspects.
    """

    diagnosis: Diagnosis
    flags: Flags
    suspects: list[Suspect] | None
    after: dict[str, float] | None


@dataclasses.dataclass
class Diagnose:
    """Say which tokens of a text a preset hurts, and what to protect."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    text: str
    """The text itself, or a file that holds it."""
    preset: str
    """Mechanisms to run: a name, or FILE.json."""
    out: Path
    """Everything measured, as JSON."""
    suggest_protect: Path | None = None
    """Also write the preset with the suggested protect_ids, ready for --preset, and run it; maps it
    reads are written beside it."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Mechanisms act on every token, or on the prompt only. By default on every token, unless the
    preset can act on prompts only."""
    continuation_tokens: int | None = None
    """Under continuation: the last tokens, which are scored; by default 128, or a quarter of a
    text of less than 512."""
    limit_tokens: int = 512
    """Take the first N tokens of the text."""
    percentile: float = 95.0
    """Flag tokens whose drift index or attribution score is above this percentile of the text."""
    max_protect: int = 16
    """Suggest at most N ids."""
    show: int = 20
    """Rows of the table of tokens; the file has all."""
    kv_maps: Path | None = None
    """Maps of the "extrapolate" policy; by default those beside the preset's file, or
    kv_maps.safetensors in the checkpoint folder."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    overwrite: bool = False
    """Replace --out and --suggest-protect."""

    def run(self) -> None:
        """Check, compare, suggest, write, report."""
        from qs_jax.checkpoint import load, load_tokenizer
        from qs_jax.evaluation.journal import write_json

        self._check()
        tokenizer = load_tokenizer(self.ckpt)
        ids, left_out = self._ids(tokenizer)
        params, model = load(self.ckpt, dtype=self.dtype)
        cfg = self._config(model, len(ids))
        maps, _ = find_maps(cfg, self.ckpt, self.kv_maps, self.preset)
        if maps is not None:
            params["kv_maps"] = maps
        found = self._diagnose(params, ids, cfg, tokenizer)
        write_json(self.out, content(found, cfg, tokenizer, Path(self.preset).name, left_out))
        self._report(found, tokenizer, left_out)

    def _check(self) -> None:
        for option, path in (("--out", self.out), ("--suggest-protect", self.suggest_protect)):
            if path is None:
                continue
            if not path.parent.is_dir():
                raise InputError(f"{option} {path}: there is no folder {path.parent}.")
            if path.is_dir():
                raise InputError(f"{option} {path} is a folder; name a file in it.")
            if path.exists() and not self.overwrite:
                raise InputError(f"{path} exists: name another {option}, or pass --overwrite.")
        if self.suggest_protect is not None and self.suggest_protect.suffix != ".json":
            raise InputError("--suggest-protect is a preset: its name must end in .json.")
        for name in ("limit_tokens", "max_protect", "show"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1.")

    def _ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
        """Tokens that are run, and how many more the text has."""
        from qs_jax.evaluation.datasets import read_text

        try:
            is_file = Path(self.text).is_file()
        except OSError:  # too long for a name
            is_file = False
        text = read_text(self.text).text if is_file else self.text
        ids = list(tokenizer(text, verbose=False).input_ids)
        if len(ids) < 2:
            raise InputError(f"the text has {len(ids)} token(s); there is nothing to predict.")
        return ids[: self.limit_tokens], max(len(ids) - self.limit_tokens, 0)

    def _config(self, model: Any, tokens: int) -> Config:
        from qs_jax import Config, presets

        continued = self.continuation_tokens
        if continued is None:
            continued = max(min(_CONTINUATION, tokens // 4), 1)
        quicksilver = presets.by_name(self.preset, model)
        return Config(
            model,
            quicksilver,
            protocol=self.protocol,
            continuation_tokens=continued,
            engine="masked",
        )

    def _diagnose(
        self, params: Params, ids: list[int], cfg: Config, tokenizer: PreTrainedTokenizerBase
    ) -> Found:
        from qs_jax import diagnostics, presets

        diagnosis = diagnostics.diagnose(params, [ids], cfg)
        flags = diagnostics.flag(diagnosis, percentile=self.percentile)
        if self.suggest_protect is None:
            return Found(diagnosis, flags, None, None)
        suspects = diagnostics.suggest_protect(diagnosis, flags, cfg, limit=self.max_protect)
        if not suspects:
            return Found(diagnosis, flags, suspects, None)
        assert cfg.quicksilver is not None
        before = diagnosis.summary()
        after_cfg = diagnostics.protected(cfg, suspects, {})
        after = diagnostics.diagnose(params, [ids], after_cfg).summary()
        about = {
            "preset": Path(self.preset).name,
            "tokens": [_told(suspect, tokenizer) for suspect in suspects],
            "on_the_text_they_come_from": {"before": before, "after": after},
        }
        chosen = diagnostics.protected(cfg, suspects, about)
        assert chosen.quicksilver is not None
        presets.save(self.suggest_protect, chosen.quicksilver, cfg.model)
        if cfg.quicksilver.kv_skip is not None and cfg.quicksilver.kv_skip.policy == "extrapolate":
            params["kv_maps"].save(presets.maps_path(self.suggest_protect))
        return Found(diagnosis, flags, suspects, after)

    def _report(self, found: Found, tokenizer: PreTrainedTokenizerBase, left_out: int) -> None:
        from rich.console import Console

        console = Console(highlight=False)
        cut = f" (the first {self.limit_tokens}; {left_out} more were left out)" if left_out else ""
        tokens = int(found.diagnosis.lengths[0])
        console.print(summary_table(found, f"{Path(self.preset).name}, {tokens} tokens{cut}"))
        if not found.diagnosis.touched.any():
            console.print("The preset touched no token of this text.", soft_wrap=True)
        console.print(token_table(found, tokenizer, self.show))
        if found.suspects is not None and self.suggest_protect is not None:
            if not found.suspects:
                console.print("There is nothing to protect: no flagged token was touched.")
            else:
                listed = ", ".join(
                    f"{suspect.token} {tokenizer.decode([suspect.token])!r}"
                    for suspect in found.suspects
                )
                console.print(f"protect_ids: {listed}", markup=False, soft_wrap=True)
                console.print(
                    f"They are in {self.suggest_protect}; check it on other text with "
                    "`qs_jax evaluate --preset`.",
                    markup=False,
                    soft_wrap=True,
                )
        console.print(f"everything: {self.out}", markup=False, soft_wrap=True)


def _told(suspect: Suspect, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "id": suspect.token,
        "text": tokenizer.decode([suspect.token]),
        "flagged": suspect.count,
        "attribution": suspect.attribution,
        "drift_index": suspect.drift,
    }


def token_rows(
    diagnosis: Diagnosis, flags: Flags, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Every token of the first row, in plain JSON types, by position."""
    record, ids = diagnosis.record, diagnosis.tokens[0]
    touched, least_bits = diagnosis.touched[0], record.bits[:, 0].min(0)
    return [
        {
            "position": at,
            "id": int(ids[at]),
            "text": tokenizer.decode([int(ids[at])]),
            "layers_run": int(record.depth[0, at]),
            "representative": int(record.representative[0, at]),
            "bits": int(least_bits[at]),
            "touched": bool(touched[at]),
            "drift_index": float(diagnosis.token_drift[0, at]),
            "relative_index": float(diagnosis.relative_index[-1, 0, at]),
            "attribution": float(diagnosis.attribution[0, at]),
            "flagged_by_drift": bool(flags.by_drift[0, at]),
            "flagged_by_attribution": bool(flags.by_attribution[0, at]),
            "scored": bool(diagnosis.mask[0, at]),
            "kl": float(diagnosis.kl[0, at]),
        }
        for at in range(int(diagnosis.lengths[0]))
    ]


def content(
    found: Found, cfg: Config, tokenizer: PreTrainedTokenizerBase, preset: str, left_out: int
) -> dict[str, Any]:
    """What the file holds."""
    from qs_jax.evaluation.perplexity import git_hash, versions

    diagnosis, flags = found.diagnosis, found.flags
    assert cfg.quicksilver is not None
    protect = None
    if found.suspects is not None:
        protect = {
            "protect_ids": [suspect.token for suspect in found.suspects],
            "tokens": [_told(suspect, tokenizer) for suspect in found.suspects],
            "after": found.after,
        }
    return {
        "summary": diagnosis.summary(),
        "thresholds": {
            "drift_index": flags.drift_threshold,
            "attribution": flags.attribution_threshold,
        },
        "protect": protect,
        "tokens": token_rows(diagnosis, flags, tokenizer),
        "drift_index": diagnosis.drift_index[:, 0].astype(float).tolist(),
        "relative_index": diagnosis.relative_index[:, 0].astype(float).tolist(),
        "simulated": True,
        "config": {
            "preset": preset,
            "protocol": cfg.effective_protocol,
            "continuation_tokens": cfg.continuation_tokens,
            "tokens_left_out": left_out,
            "dtype": cfg.model.dtype,
            "quicksilver": cfg.quicksilver.to_dict(),
        },
        "model": cfg.model.to_dict(),
        "versions": versions(),
        "git": git_hash(),
    }


def summary_table(found: Found, title: str) -> Any:
    """Dense, the preset, and the preset with protected ids, side by side."""
    from rich.table import Table

    before = found.diagnosis.summary()
    columns = {"dense": {"perplexity": before["dense_perplexity"]}, "preset": before}
    if found.after is not None:
        columns["protected"] = found.after
    table = Table(title=title)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for key, (label, form) in _ROWS.items():
        cells = [form.format(values[key]) if key in values else "" for values in columns.values()]
        table.add_row(label, *cells)
    return table


def token_table(found: Found, tokenizer: PreTrainedTokenizerBase, show: int) -> Any:
    """Flagged tokens, the most blamed first."""
    from rich.table import Table
    from rich.text import Text

    rows = token_rows(found.diagnosis, found.flags, tokenizer)
    flagged = [row for row in rows if row["flagged_by_drift"] or row["flagged_by_attribution"]]
    flagged.sort(key=lambda row: -row["attribution"])
    more = f", the first {show}" if len(flagged) > show else ""
    table = Table(title=f"{len(flagged)} flagged tokens, by attribution{more}")
    table.caption = "flags: D drift index, A attribution"
    table.add_column("at", justify="right")
    table.add_column("token", no_wrap=True)
    for column in ("layers\nrun", "bits", "drift\nindex", "relative", "attribution"):
        table.add_column(column, justify="right")
    table.add_column("flags")
    for row in flagged[:show]:
        fused = " fused" if row["representative"] != row["position"] else ""
        table.add_row(
            str(row["position"]),
            Text(repr(row["text"])),
            f"{row['layers_run']}{fused}",
            str(row["bits"]) if row["bits"] < 16 else "",
            f"{row['drift_index']:.4g}",
            f"{row['relative_index']:.1%}",
            f"{row['attribution']:.2e}",
            "D" * row["flagged_by_drift"] + "A" * row["flagged_by_attribution"],
        )
    return table
