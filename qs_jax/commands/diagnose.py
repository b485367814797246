"""`python -m qs_jax diagnose`: tokens that a preset hurts, and the effect of protecting them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qs_jax import diagnostics, presets
from qs_jax.commands.options import TextOptions, print_table
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.config.fields import Percentile, Positive, Several
from qs_jax.diagnostics import Diagnosis, Flags
from qs_jax.diagnostics.diagnosis import check_mechanisms
from qs_jax.errors import InputError
from qs_jax.files import write_json, write_whole
from qs_jax.load import load_tokenizer
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.models import Params

_ROWS = {
    "perplexity": ("perplexity", "{:.4g}"),
    "kl": ("KL from the dense model, nats", "{:.2e}"),
    "top1_agreement": ("same likeliest token as dense", "{:.1%}"),
    "layer_tokens_saved": ("layer-tokens saved, simulated", "{:.1%}"),
}
_TOKEN_COLUMNS = ("at", "token", "layers\nrun", "bits", "drift\nindex", "attribution", "flagged by")
_SHOWN = 20  # rows of the table of tokens


@dataclasses.dataclass(kw_only=True)
class Diagnose(TextOptions):
    """Name the tokens of a text that a preset hurts, and suggest which to protect."""

    text: str = dataclasses.field()
    """The text itself, or the name of a file that holds it; - reads standard input."""
    preset: str = dataclasses.field()
    """Mechanisms to run: a name, or FILE.json."""
    limit_tokens: Several | None = 512
    """Take the first tokens of the text only."""
    suggest_protect: Path | None = None
    """Also write the preset with the suggested protect_ids, ready for --preset, and run it; maps it
    reads are written beside it."""
    percentile: Percentile = 95.0
    """Flag tokens whose drift index or attribution score is above this percentile of the text."""
    max_protect: Positive = 16
    """Suggest at most N ids."""

    def targets(self) -> list[tuple[str, Path]]:
        """The results, the preset to suggest, and its maps."""
        if (preset := self.suggest_protect) is None:
            return super().targets()
        paths = (preset, presets.maps_path(preset))
        return [*super().targets(), *(("--suggest-protect", path) for path in paths)]

    def run(self) -> None:
        """Check, compare, suggest, write, report."""
        if self.suggest_protect is not None and self.suggest_protect.suffix != ".json":
            raise InputError("--suggest-protect is a preset: its name must end in .json.")
        self.check_out()
        tokenizer = load_tokenizer(self.folder)
        ids, left_out = self.encode_text(tokenizer)
        cfg = self.config(continuation_tokens=self.scored_tokens(len(ids)), engine="masked")
        check_mechanisms(cfg)
        maps, _ = self.find_maps(cfg)
        params = self.load(maps)
        diagnosis = diagnostics.diagnose(params, [ids], cfg)
        flags = diagnostics.flag(diagnosis, percentile=self.percentile)
        content = diagnostics.describe(diagnosis, flags, tokenizer)
        content["protect"], safer = self._protect(params, cfg, diagnosis, flags, tokenizer)
        content["config"] = self.settings(
            cfg, continuation_tokens=cfg.continuation_tokens, tokens_left_out=left_out
        )
        self._write(content | self.origin(cfg), safer, cfg.model, maps)
        self._print(content)

    def _protect(
        self, params: Params, cfg: Config, diagnosis: Diagnosis, flags: Flags, tokenizer: Any
    ) -> tuple[dict[str, Any] | None, QuickSilverConfig | None]:
        """The suspects and the text under the preset that protects them, and that preset."""
        if self.suggest_protect is None:
            return None, None
        suspects = diagnostics.suggest_protect(diagnosis, flags, cfg, limit=self.max_protect)
        tokens = [suspect.describe(tokenizer) for suspect in suspects]
        protect = {"protect_ids": [suspect.token for suspect in suspects], "tokens": tokens}
        if not suspects:
            return protect | {"after": None}, None
        safer = diagnostics.protected(cfg, suspects, {})
        after = diagnostics.diagnose(params, diagnosis.tokens, safer).summary()
        about = {"preset": Path(self.preset).name, "tokens": tokens}
        about["on_the_text_they_come_from"] = {"before": diagnosis.summary(), "after": after}
        safer = diagnostics.protected(cfg, suspects, about)
        return protect | {"after": after}, safer.quicksilver

    def _write(
        self,
        content: dict[str, Any],
        safer: QuickSilverConfig | None,
        model: ModelConfig,
        maps: KVMaps | None,
    ) -> None:
        """Write the results and, where one is suggested, the preset and its maps: all or none."""
        count = 1 if safer is None else 2 if maps is None else 3
        with write_whole(*(path for _, path in self.targets()[:count])) as (out, *suggested):
            write_json(out, content)
            if safer is not None:
                presets.save(suggested[0], safer, model)
            if maps is not None and len(suggested) > 1:
                maps.save(suggested[1])

    def _print(self, content: dict[str, Any]) -> None:
        summary, protect = content["summary"], content["protect"] or {"tokens": [], "after": None}
        columns = {"dense": {"perplexity": summary["dense_perplexity"]}, "preset": summary}
        if protect["after"] is not None:
            columns["protected"] = protect["after"]
        rows = [
            [label, *(form.format(of[key]) if key in of else "" for of in columns.values())]
            for key, (label, form) in _ROWS.items()
        ]
        left_out = content["config"]["tokens_left_out"]
        title = f"{content['config']['preset']}, {len(content['tokens'])} tokens"
        print_table(title + (f" ({left_out} left out)" if left_out else ""), ("", *columns), rows)
        if not any(row["touched"] for row in content["tokens"]):
            print("The preset touched no token of this text.")
        flagged = [row for row in content["tokens"] if row["flagged_by"]]
        flagged.sort(key=lambda row: -row["attribution"])
        title = f"{len(flagged)} flagged tokens by attribution, {_SHOWN} at most"
        print_table(title, _TOKEN_COLUMNS, map(_cells, flagged[:_SHOWN]))
        for token in protect["tokens"]:
            print(f"protect {token['id']} {token['text']!r}")
        if protect["tokens"]:
            print(f"wrote {self.suggest_protect}; check it on other text with `evaluate`")
        elif self.suggest_protect is not None:
            print("There is nothing to protect: no flagged token was touched.")
        print(f"wrote {self.out}")


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    fused = " fused" if row["representative"] != row["position"] else ""
    drift = f"{row['drift_index']:.4g} ({row['relative_index']:.1%})"
    cells = (row["position"], repr(row["text"]), f"{row['layers_run']}{fused}")
    cells += (row["bits"] if row["bits"] < 16 else "", drift, f"{row['attribution']:.2e}")
    return *cells, " ".join(row["flagged_by"])
