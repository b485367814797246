"""`python -m qs_jax tasks`: GLUE and SuperGLUE classification, the dense model against a preset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qs_jax.checkpoint import read_manifest
from qs_jax.commands.options import ScoringOptions, print_table
from qs_jax.config import QuickSilverConfig
from qs_jax.config.fields import NonNegative, Positive, Seed, Share
from qs_jax.errors import InputError
from qs_jax.evaluation.classification import measure_heads
from qs_jax.evaluation.datasets import is_name
from qs_jax.evaluation.heads import Head
from qs_jax.evaluation.tasks import TASKS, Examples, read_examples
from qs_jax.files import write_json
from qs_jax.load import load_tokenizer


@dataclasses.dataclass(kw_only=True)
class Tasks(ScoringOptions):
    """Measure classification tasks: the dense model against a preset on the same examples."""

    tasks: tuple[str, ...]
    """Among mnli, qnli, sst2, cola, rte, boolq."""
    data: str
    """A folder that holds e.g. sst2.jsonl or sst2.dev.jsonl, one such file, or hub."""
    limit: Positive | None = None
    """Draw so many examples of each task; by default all."""
    seed: Seed = 0
    """Of the draw and of --head linear's split."""
    head: str = "none"
    """none: by the likelihood of label words, through lm-evaluation-harness. linear: a head fitted
    on the dense model's states of a share of the examples, evaluated on the others. DIR: one made
    by convert.hf_to_flax --classifier."""
    train_share: Share = 0.5
    """--head linear: share of the examples it is fitted on."""
    l2: NonNegative = 0.1
    """--head linear: weight of the squared weights, on the scale of standardised states."""
    batch_size: Positive = 16
    """Rows scored at a time."""

    def run(self) -> None:
        """Check, score, write, report."""
        write_json(self.out, results := self.measure())
        self._print(results)

    def measure(self) -> dict[str, Any]:
        """Run all tasks; the results of each by name under "tasks", and all settings."""
        self.check_out()
        stored = not is_name(self.head, ("none", "linear"))
        devices = self.local_devices()
        cfg = self.config(engine=self.engine)
        assert cfg.quicksilver is not None
        maps, digest = self.find_maps(cfg)
        examples = self._read_examples()
        if self.head == "none":
            from qs_jax.evaluation.harness import measure_words

            names = "ckpt engine dtype batch_size devices allow_other_weights".split()
            settings = {name: getattr(self, name) for name in names}
            settings |= {"ckpt": str(self.folder), "protocol": cfg.effective_protocol}
            mechanisms = {"preset": self.preset, "kv_maps": self.kv_maps}
            mechanisms = None if cfg.quicksilver.is_off else mechanisms
            tasks = measure_words(settings, mechanisms, examples)
        else:
            head = self._load_head() if stored else None
            settings = {name: getattr(self, name) for name in "train_share seed l2".split()}
            settings |= {"head": head, "batch_size": self.batch_size, "devices": devices}
            tokenizer = load_tokenizer(self.folder)
            tasks = measure_heads(self.load(maps, devices), cfg, examples, tokenizer, **settings)
        names = "batch_size train_share l2 limit seed".split()
        others = {name: getattr(self, name) for name in names}
        config = self.settings(cfg, head=Path(self.head).name, kv_maps_sha256=digest, **others)
        simulated = self.engine == "masked" and not cfg.quicksilver.is_off
        return {"tasks": tasks, "config": config, "simulated": simulated, **self.origin(cfg)}

    def _read_examples(self) -> dict[str, Examples]:
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise InputError(f"--tasks {' '.join(unknown)}: the tasks are {', '.join(TASKS)}.")
        if Path(self.data).is_file() and len(set(self.tasks)) > 1:
            raise InputError(f"{self.data} is one file; for several tasks give their folder.")
        rest = (self.data, self.limit, self.seed)
        return {name: read_examples(TASKS[name], *rest) for name in self.tasks}

    def _load_head(self) -> Head:
        head = Head.load(Path(self.head))
        if head.backbone != read_manifest(self.folder)["model"].get("weights"):
            other = f"the head in {self.head} was trained with another model than {self.ckpt}"
            raise InputError(f"{other}: give the same folder as --ckpt and --head.")
        return head

    def _print(self, results: dict[str, Any]) -> None:
        config, tasks = results["config"], results["tasks"]
        columns, rows = ["task", "metric", "dense"], []
        if any("quicksilver" in task for task in tasks.values()):
            how = "simulated" if results["simulated"] else "counted"
            columns += [config["preset"], "change", "McNemar p", f"FLOPs saved, {how}"]
        for name, task in tasks.items():
            rows.append([f"{name}\n{task['examples']:,}", task["metric"], _cell(task["dense"])])
            if "quicksilver" in task:
                change, saved = task["difference"], task["quicksilver"]["saved"]
                rows[-1] += [_cell(task["quicksilver"]), _cell(change, "+")]
                rows[-1] += [f"{change['mcnemar_p']:.2g}", f"{saved['exact_flops_saved']:.1%}"]
        title = f"95 % intervals · {config['protocol']} · head: {config['head']}"
        print_table(title, columns, rows, lines=True)
        preset = QuickSilverConfig.from_dict(config["quicksilver"])
        for name, task in tasks.items():
            if task["truncated"]:
                print(f"{name}: {task['truncated']} prompt(s) were cut to fit the model")
            if task.get("quicksilver", {}).get("idle"):
                continued = config["protocol"] == "continuation"
                prompts = [round(task["mean_prompt_tokens"])] * continued
                print(f"{name}: {preset.explain_idle(prompts)}")
        print(f"results are in {self.out}")


def _cell(result: dict[str, Any], sign: str = "") -> str:
    """A value, its interval on a second line."""
    if result["interval"] is None:
        return f"{result['value']:{sign}.3f}"
    low, high = result["interval"]
    return f"{result['value']:{sign}.3f}\n{low:{sign}.3f} to {high:{sign}.3f}"
