"""`python -m qs_jax calibrate`: the preset that saves most within a quality budget."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic import Field

from qs_jax.calibration import Calibration, search
from qs_jax.calibration.climb import Probe, Task
from qs_jax.calibration.families import halting_layers
from qs_jax.calibration.fit_light import PRICES
from qs_jax.calibration.fit_maps import check_fit, fit_kv_maps
from qs_jax.calibration.search import LIGHT_SHARES, result_files
from qs_jax.commands.options import FileOptions, print_table
from qs_jax.config import Config, KVSkipConfig, ModelConfig
from qs_jax.config.fields import Above0, Count, Positive, Probability, Several, Share, parse
from qs_jax.config.mechanisms import Score
from qs_jax.errors import InputError
from qs_jax.evaluation.passkey import compare_passkeys, make_passkeys
from qs_jax.evaluation.perplexity import check_width, read_windows
from qs_jax.load import load_tokenizer
from qs_jax.mechanisms.kv_maps import FEATURES, PROMPT_FEATURES, KVMaps, feature_count


@dataclasses.dataclass(kw_only=True)
class Calibrate(FileOptions):
    """Find the preset that saves most within a quality budget, and check it on other text."""

    preset: tyro.conf.Suppress[str] = "off"
    data: Annotated[tuple[str, ...], Field(min_length=1)]
    """Each wikitext-103, c4, or a file: .jsonl or .json (field "text"), or plain text; .gz too.
    Windows of several texts take turns, and the budget is for all together."""
    max_ppl_increase: Above0
    """The budget: perplexity above the dense model's, bounded with --confidence."""
    out: Path
    """The preset, as JSON; the measurements and the maps it reads are written beside it."""
    protocol: Literal["teacher-forced", "continuation"] = "continuation"
    """continuation: mechanisms act on prompts; teacher-forced: on every token."""
    objective: Literal["exact_flops", "time", "paper_flops", "layer_tokens", "kv_bytes"] = (
        "exact_flops"
    )
    """Cost to reduce; time is measured on this machine, by runs of the prompt engine and of the
    dense model in turn."""
    windows: Several = 16
    """Windows to search on."""
    verify_windows: Several = 32
    """Windows after those, to verify on: the more, the closer the bound."""
    fit_windows: Count = 96
    """Windows after those, to fit light layers or the maps of the "extrapolate" policy on; 0 takes
    maps beside the checkpoint, if there are any. Nothing is fitted with --kv-maps."""
    seq_len: Annotated[tuple[Several, ...], Field(min_length=1)] = (512,)
    """Tokens of each window. Of further lengths, longer each, windows after all others verify."""
    long_windows: Several = 16
    """Windows of each further length."""
    passkeys: Count = 32
    """Passkeys of each length that a preset must not lose; 0 leaves them out."""
    continuation_tokens: Positive = 128
    """Under continuation: the last tokens of each window, which are scored."""
    batch_size: Positive = 4
    """Windows at a time."""
    confidence: Share = 0.95
    """Of the bound that must stay within the budget."""
    layers: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """Layers at which tokens may halt; eight from 0.4 of the depth on by default."""
    also: tuple[str, ...] = ()
    """Other texts, on the first --verify-windows windows of which the preset must stay within the
    budget too."""
    fit_data: tuple[str, ...] = ()
    """More text to fit the maps on, whole: files as for --data."""
    features: tuple[Literal["state", "embedding", "previous", "neurons"], ...] | None = None
    """Inputs of the maps (docs/mechanisms/kv-skipping.md); by default all the protocol allows."""
    rank: Count = 256
    """Of "extrapolate": numbers of the code that the maps of all deeper layers share; 0, or a model
    with no more features than that, reads the features."""
    policies: tuple[str, ...] | None = None
    """Families to try: light (layers), and the KV policies of quotas: skip, propagate, extrapolate,
    or the MODULE:NAME of your own. By default skip for kv_bytes, else light where layers are
    fitted, under continuation; else skip, and extrapolate where there are maps."""
    score: str = "attention"
    """What quotas rank tokens by: attention, drift, entropy, random, or the MODULE:NAME of your
    own. With another than attention, light layers are not tried by default."""
    light_from: Annotated[tuple[Several, ...], Field(min_length=1)] | None = None
    """First light layers to try; 0.4 and 0.53 of the depth by default."""
    prices: Annotated[tuple[Above0, ...], Field(min_length=1)] = PRICES
    """Least gains worth the work of a layer: each gives light layers of other sizes, the higher the
    smaller."""
    light_shares: Annotated[tuple[Probability, ...], Field(min_length=1)] = LIGHT_SHARES
    """Shares of a prompt's tokens that run light: the others, which later ones are expected to
    attend most, run whole."""
    max_evaluations: Positive = 60
    """Candidates measured for each KV policy."""
    candidates: Positive = 4
    """Candidates of the front to verify."""
    timed_runs: Count = 3
    """Runs of the winner and of the dense model, in turn, for the measured time; 0 for none."""

    def targets(self) -> list[tuple[str, Path]]:
        """The preset, and what is written beside it."""
        return [("--out", path) for path in result_files(self.out)]

    def run(self) -> None:
        """Check, search, write, report."""
        self.check_out()
        cfg = self.config(continuation_tokens=self.continuation_tokens)
        for length in self.seq_len:
            check_width(length, cfg)
        if list(self.seq_len) != sorted(set(self.seq_len)):
            raise InputError(f"--seq-len must name rising lengths, got {self.seq_len}.")
        families = self._families()
        fit = self._fit_settings(cfg.model)
        maps = self.kv_maps and KVMaps.load(self.kv_maps)
        if maps is not None:
            maps.check(cfg.model)
        tokenizer = load_tokenizer(self.folder)
        names, windows = self._windows(tokenizer)
        first, rest = windows[0], windows[1:]
        needed = self.windows + self.verify_windows
        also = self._read_more(self.also, tokenizer, self.verify_windows)
        fitting = self._read_more(
            self.fit_data, tokenizer, texts={", ".join(names): first[needed:]}
        )
        params = self.load(maps)
        if maps is None and self.fit_windows and "extrapolate" in families:
            fit |= {"model": cfg.model, "data": ", ".join(fitting)}
            maps = fit_kv_maps(params, np.concatenate([*fitting.values()]), **fit)
            params = {**params, "kv_maps": maps}
        given = "max_ppl_increase objective confidence layers max_evaluations candidates"
        given += " batch_size timed_runs light_from prices light_shares score"
        settings = {name: getattr(self, name) for name in given.split()}
        settings |= {"also": also, "data": names, "progress": True, "policies": families}
        settings |= {"verify_share": self.verify_windows / needed, "longer": rest}
        if "light" in families:
            settings["fit_tokens"] = np.concatenate([*fitting.values()])
        if self.passkeys and self.protocol == "continuation":
            settings["probe"] = self._probe(tokenizer)
        calibration = search(params, first[:needed], cfg, **settings)
        files = calibration.save(self.out, cfg.model)
        self._print(calibration)
        for path in files:
            print(f"wrote {path}")

    def _families(self) -> tuple[str, ...]:
        """What to try."""
        fits = self.kv_maps is None and self.fit_windows > 0
        score = parse("--score", self.score, Score)
        if self.policies is not None:
            for policy in {*self.policies} - {"light", "attended"}:
                KVSkipConfig(policy)
            if "light" in self.policies and not fits:
                raise InputError(
                    "light layers are fitted anew: without --kv-maps, on --fit-windows."
                )
            return self.policies
        if self.objective == "kv_bytes":
            return ("skip",)
        if fits and self.protocol == "continuation" and score == "attention":
            return ("light",)
        return ("skip", "extrapolate") if fits or self.kv_maps else ("skip",)

    def _windows(self, tokenizer: Any) -> tuple[list[str], list[np.ndarray]]:
        """Names of the texts; windows of each length, which do not overlap those of another."""
        texts = len(self.data)
        for option in ("windows", "verify_windows", "fit_windows", "long_windows"):
            if getattr(self, option) % texts:
                flag = f"--{option.replace('_', '-')}"
                raise InputError(
                    f"{flag} must be a multiple of {texts}, as many as there are texts."
                )
        counts = [self.windows + self.verify_windows + self.fit_windows]
        counts += [self.long_windows] * (len(self.seq_len) - 1)
        counts = [count // texts for count in counts]
        needed = sum(map(operator.mul, counts, self.seq_len))
        names, found = [], [list[np.ndarray]() for _ in counts]
        for data in self.data:
            text, cut = read_windows(data, tokenizer, 2, -(-needed // 2))
            ids = cut.tokens_WT.reshape(-1)
            names.append(data if text.name in names else text.name)
            for at, (length, count) in enumerate(zip(self.seq_len, counts, strict=True)):
                whole = min(len(ids) // length, count)
                if whole < count:
                    raise InputError(
                        f"{text.name} has {whole} windows of {length} tokens where {count} were "
                        f"asked for{', after all others' if at else ''}."
                    )
                found[at].append(ids[: count * length].reshape(count, length))
                ids = ids[count * length :]
        return names, [np.stack(parts, axis=1).reshape(-1, parts[0].shape[1]) for parts in found]

    def _probe(self, tokenizer: Any) -> Probe:
        """A function that looks for passkeys in prompts as long as a task's windows."""
        prompts = {
            length: make_passkeys(tokenizer, [length], count=self.passkeys)
            for length in self.seq_len
        }

        def probe(params: Any, cfg: Config, task: Task) -> dict[str, Any]:
            length = task.tokens_WT.shape[1]
            asked = (params, cfg, tokenizer, prompts[length])
            found = compare_passkeys(*asked, batch_size=self.batch_size)
            pairs = found.by_length()[length]
            return {"lost": pairs["only_dense"]} | pairs

        return probe

    def _read_more(
        self, paths: Iterable[str], tokenizer: Any, limit: int | None = None, texts: Any = None
    ) -> dict[str, np.ndarray]:
        """`texts` and windows of further files, by name; by path where two have the same name."""
        texts = {} if texts is None else texts
        for path in paths:
            text, cut = read_windows(path, tokenizer, self.seq_len[0], limit)
            texts[path if text.name in texts else text.name] = cut.tokens_WT
        return texts

    def _fit_settings(self, model: ModelConfig) -> dict[str, Any]:
        """Settings of `fit_kv_maps`, checked."""
        barred = () if self.protocol == "continuation" else PROMPT_FEATURES
        features = self.features or tuple(name for name in FEATURES if name not in barred)
        layers = check_fit(self.layers or halting_layers(model), features, None, model)
        rank = self.rank if 0 < self.rank < feature_count(features, model) else None
        # Sums of products as large as the maps' are slow to add up: larger batches, fewer sums.
        settings = {"layers": layers, "features": features, "rank": rank}
        return settings | {"batch_size": 4 * self.batch_size, "progress": True}

    def _print(self, calibration: Calibration) -> None:
        """Print the measurements on the verification windows."""
        columns = "family, tokens, perplexity, bound, KL, agree, lost, saved, kept".split(", ")
        rows = []
        for entry in calibration.verified:
            bound, retrieval = entry["upper_bound"], entry.get("retrieval")
            row = [entry["family"], str(entry.get("seq_len", self.seq_len[0]))]
            row += [f"{entry['ppl_increase']:+.3f}", "none" if bound is None else f"{bound:+.3f}"]
            row += [f"{entry['kl']:.4f}", f"{entry['agreement']:.1%}"]
            row += ["" if retrieval is None else str(retrieval["lost"])]
            row += [f"{entry['prompt_exact_flops_saved']:.1%}"]
            rows.append([*row, "yes" if entry["within_budget"] else "no"])
        title = "candidates on the verification windows: passkeys lost, prompt FLOPs saved"
        print_table(title, columns, rows)
        verified = calibration.preset.provenance["verified"]
        if calibration.preset.is_off:
            print(verified["reason"])
        elif verified["measured_time_saved"] is not None:
            print(f"time saved here, measured: {verified['measured_time_saved']:.1%}")
