"""`python -m qs_jax tasks`: GLUE and SuperGLUE classification, the dense model against a preset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qs_jax.commands.maps import find_maps
from qs_jax.errors import InputError

if TYPE_CHECKING:
    import jax
    from transformers import PreTrainedTokenizerBase

    from qs_jax.config import Config
    from qs_jax.evaluation.classification import Outcome, Runner
    from qs_jax.evaluation.heads import Head
    from qs_jax.evaluation.prompts import Prompts
    from qs_jax.evaluation.tasks import Examples, Task
    from qs_jax.models import Params


@dataclasses.dataclass
class Tasks:
    """Measure classification tasks: the dense model against a preset on the same examples."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    tasks: tuple[str, ...]
    """Among mnli, qnli, sst2, cola, rte, boolq."""
    data: str
    """A folder that holds e.g. sst2.jsonl or sst2.dev.jsonl, one such file, or hub."""
    out: Path
    """Results, as JSON."""
    preset: str = "off"
    """Mechanisms to compare with the dense model: a name, or FILE.json; off measures the dense
    model alone."""
    limit: int | None = None
    """Draw so many examples of each task; by default all."""
    seed: int = 0
    """Of the draw and of --head linear's split."""
    head: str = "none"
    """none: by the likelihood of label words. linear: a head fitted on frozen states of a share of
    the examples, evaluated on the others. DIR: one made by convert.classifier."""
    normalize: Literal["sum", "length", "pmi"] = "sum"
    """Without a head: score a word by its log-likelihood, by that of its tokens on average, or by
    what the prompt adds to it; the results hold all three."""
    head_input: Literal["pair", "prompt"] = "pair"
    """--head DIR: feed it the bare text or pair of texts, or the task's prompt."""
    fit_on: Literal["dense", "preset"] = "dense"
    """--head linear: whose states it is fitted on; both models are evaluated with the same head."""
    train_share: float = 0.5
    """--head linear: share of the examples it is fitted on."""
    l2: float = 0.1
    """--head linear: weight of the squared weights, on the scale of standardised states."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Mechanisms act on every token, or on the prompt only. By default on every token, unless the
    preset can act on prompts only."""
    engine: Literal["masked", "compact"] = "masked"
    """masked computes everything and selects: savings are simulated. compact makes the same
    decisions and computes active tokens only."""
    batch_size: int = 16
    """Rows scored at a time; without a head an example is a row for each label word."""
    devices: str = "1"
    """Local devices that share each batch: a number, or all."""
    kv_maps: Path | None = None
    """Maps of the "extrapolate" policy; by default those beside the preset's file, or
    kv_maps.safetensors in the checkpoint folder."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    overwrite: bool = False
    """Replace --out."""

    def run(self) -> None:
        """Check, score, write, report."""
        from qs_jax.evaluation.journal import write_json

        results = measure(self)
        write_json(self.out, results)
        report(results, self.out)


def measure(options: Tasks) -> dict[str, Any]:
    """Run all tasks.

    Returns:
      "tasks", by name: what `task_results` returns, the examples' source and what was cut; and all
      settings.

    Raises:
      InputError: A task is unknown, or its data, words or head cannot be used.
    """
    from qs_jax import Config, load, load_tokenizer, presets
    from qs_jax.checkpoint import choose_dtype, read_manifest
    from qs_jax.config import ModelConfig
    from qs_jax.evaluation.perplexity import git_hash, versions

    devices = _checked(options)
    manifest = read_manifest(options.ckpt)
    model = ModelConfig.from_dict(manifest["model"])
    model = model.replace(dtype=choose_dtype(options.dtype, model))
    quicksilver = presets.by_name(options.preset, model)
    cfg = Config(model, quicksilver, protocol=options.protocol, engine=options.engine)
    maps, maps_hash = find_maps(cfg, options.ckpt, options.kv_maps, options.preset)
    tokenizer = load_tokenizer(options.ckpt)
    chosen = _chosen(options)
    head = _stored_head(options, manifest)
    examples = {name: _read(options, task) for name, task in chosen.items()}
    heads = {name: head and head.for_task(task) for name, task in chosen.items()}
    params, _ = load(options.ckpt, dtype=options.dtype)
    if maps is not None:
        params["kv_maps"] = maps
    job = _Job(options, params, cfg, tokenizer, devices if len(devices) > 1 else None)
    measured = {n: job.run(chosen[n], examples[n], heads[n]) for n in chosen}
    return {
        "tasks": measured,
        "config": _settings(options, cfg) | {"kv_maps_sha256": maps_hash},
        "simulated": options.engine == "masked" and not quicksilver.is_off,
        "model": {
            "source": manifest["source"],
            "config": model.to_dict(),
            "fingerprint": manifest["params"],
        },
        "versions": versions(),
        "git": git_hash(),
    }


@dataclasses.dataclass
class _Job:
    """What all tasks share."""

    options: Tasks
    params: Params
    cfg: Config
    tokenizer: PreTrainedTokenizerBase
    devices: tuple[jax.Device, ...] | None

    def run(self, task: Task, examples: Examples, head: Head | None) -> dict[str, Any]:
        """One task, with bars on standard error."""
        from qs_jax.evaluation.classification import task_results

        options, about = self.options, {}
        train, test = None, examples
        if options.head == "linear":
            from qs_jax.evaluation.tasks import split_examples

            train, test = split_examples(task, examples, options.train_share, options.seed)
            head, about = self._fitted(task, train)
        prompts = self._encoded(task, test)
        dense = self._outcome(task, prompts, head, dense=True)
        other = None if self._is_off else self._outcome(task, prompts, head, dense=False)
        way = options.normalize if head is None else "head"
        data = {"name": test.name, "rows": test.rows, "sha256": test.sha256}
        if train is not None:
            data |= {"train_examples": len(train.items), "train_sha256": train.sha256}
        results = task_results(task, test.labels, dense, other, way)
        told = {"data": data, "truncated": prompts.truncated, "template": task.template}
        told["mean_prompt_tokens"] = sum(map(len, prompts.rows)) / len(prompts.rows)
        if head is None:
            from qs_jax.evaluation.prompts import word_tokens

            ids = word_tokens(task, self.tokenizer)
            told["words"] = dict(zip(task.words, ids, strict=True))
        return told | results | ({"fit": about} if about else {})

    @property
    def _is_off(self) -> bool:
        return self.cfg.quicksilver is None or self.cfg.quicksilver.is_off

    def _encoded(self, task: Task, examples: Examples) -> Prompts:
        from qs_jax.evaluation.prompts import (
            encode_examples,
            pair_encoder,
            prompt_encoder,
            word_tokens,
        )

        options, room = self.options, 1
        bare = options.head not in ("none", "linear") and options.head_input == "pair"
        if options.head == "none":
            room = max(map(len, word_tokens(task, self.tokenizer)))
        encode = (pair_encoder if bare else prompt_encoder)(task, self.tokenizer)
        return encode_examples(task, examples, encode, self.cfg.model.max_positions - room)

    def _outcome(self, task: Task, prompts: Prompts, head: Head | None, dense: bool) -> Outcome:
        from qs_jax.evaluation.classification import with_head, zero_shot
        from qs_jax.evaluation.prompts import word_tokens

        rows = len(prompts.rows)
        if head is None and any(len(word) > 1 for word in word_tokens(task, self.tokenizer)):
            rows *= len(task.words)
        with self._runner(f"{task.name}, {'dense' if dense else 'preset'}", rows, dense) as runner:
            if head is not None:
                return with_head(runner, prompts, head)
            return zero_shot(runner, task, prompts, self.tokenizer)

    def _fitted(self, task: Task, train: Examples) -> tuple[Head, dict[str, Any]]:
        from qs_jax.evaluation.heads import fit_head

        prompts = self._encoded(task, train)
        dense = self.options.fit_on == "dense"
        with self._runner(f"{task.name}, features", len(prompts.rows), dense) as runner:
            states_ED, _ = runner.last_states(prompts.rows)
        return fit_head(states_ED, train.labels, task.labels, l2=self.options.l2)

    def _runner(self, title: str, rows: int, dense: bool) -> _Running:
        from qs_jax.evaluation.classification import Runner

        cfg = self.cfg
        if dense:  # the same protocol, so that the same positions are read
            cfg = cfg.replace(quicksilver=None, protocol=cfg.effective_protocol)
        runner = Runner(self.params, cfg, self.options.batch_size, self.devices)
        return _Running(runner, title, rows)


@dataclasses.dataclass
class _Running:
    """A runner with a bar on standard error."""

    runner: Runner
    title: str
    rows: int

    def __enter__(self) -> Runner:
        from tqdm import tqdm

        self.bar = tqdm(total=self.rows, unit="row", desc=self.title)
        return dataclasses.replace(self.runner, advance=self.bar.update)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _checked(options: Tasks) -> tuple[jax.Device, ...]:
    """The devices, if there are so many and the results can be written."""
    from qs_jax.engine.devices import local_devices

    if options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder; name a file in it.")
    if not options.out.parent.is_dir():
        raise InputError(f"--out {options.out}: there is no folder {options.out.parent}.")
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out} exists: pass --overwrite to replace it.")
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}.")
    return local_devices(options.devices)


def _chosen(options: Tasks) -> dict[str, Task]:
    from qs_jax.evaluation.tasks import TASKS

    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown or not options.tasks:
        raise InputError(f"--tasks {' '.join(unknown)}: the tasks are {', '.join(TASKS)}.")
    if Path(options.data).is_file() and len(set(options.tasks)) > 1:
        raise InputError(f"{options.data} is one file; for several tasks give their folder.")
    return {name: TASKS[name] for name in options.tasks}


def _read(options: Tasks, task: Task) -> Examples:
    from qs_jax.evaluation.tasks import read_examples

    return read_examples(task, options.data, options.limit, options.seed)


def _stored_head(options: Tasks, manifest: dict[str, Any]) -> Head | None:
    from qs_jax.evaluation.heads import Head

    if options.head in ("none", "linear"):
        return None
    head = Head.load(Path(options.head))
    if head.backbone != manifest["params"]:
        raise InputError(
            f"the head in {options.head} was trained with another model than {options.ckpt}: a "
            "sequence classifier brings its own; give the same folder as --ckpt and --head."
        )
    return head


def _settings(options: Tasks, cfg: Config) -> dict[str, Any]:
    """The options that decide the numbers; paths go by their last name."""
    import jax

    assert cfg.quicksilver is not None
    linear, none = options.head == "linear", options.head == "none"
    return {
        "backend": jax.default_backend(),
        "batch_size": options.batch_size,
        "dtype": cfg.model.dtype,
        "engine": options.engine,
        "fit_on": options.fit_on if linear else None,
        "head": Path(options.head).name,
        "head_input": None if none else "prompt" if linear else options.head_input,
        "l2": options.l2 if linear else None,
        "limit": options.limit,
        "normalize": options.normalize if none else None,
        "preset": Path(options.preset).name,
        "protocol": cfg.effective_protocol,
        "quicksilver": cfg.quicksilver.to_dict(),
        "seed": options.seed,
        "train_share": options.train_share if linear else None,
    }


def report(results: dict[str, Any], out: Path) -> None:
    """Print the table of what was measured."""
    from rich.console import Console
    from rich.table import Table

    config = results["config"]
    title = f"95 % intervals · {config['protocol']} · head: {config['head']}"
    table = Table(title=title, show_lines=True)
    compared = any("quicksilver" in task for task in results["tasks"].values())
    columns = ["task", "metric", "dense"]
    if compared:
        how = "simulated" if results["simulated"] else "counted"
        columns += [config["preset"], "change", "McNemar p", f"FLOPs saved, {how}"]
    for name in columns:
        table.add_column(name)
    for name, task in results["tasks"].items():
        cells = [f"{name}\n{task['examples']:,}", task["metric"], told(task["dense"])]
        if compared:
            change, saved = task["difference"], task["quicksilver"]["saved"]
            cells += [told(task["quicksilver"]), told(change, "+"), f"{change['mcnemar_p']:.2g}"]
            exact, paper = (f"{saved[f'{n}_flops_saved']:.1%}" for n in ("exact", "paper"))
            cells.append(f"{exact}\n{paper} by the paper's count")
        table.add_row(*cells)
    console = Console()
    console.print(table)
    cut = {name: task["truncated"] for name, task in results["tasks"].items() if task["truncated"]}
    for name, count in cut.items():
        console.print(f"{name}: {count} example(s) lost the end of their passage to fit the model")
    print(f"results are in {out}")  # rich would break a long path


def told(result: dict[str, Any], sign: str = "") -> str:
    """A value of a results file, its interval on a second line."""
    if result["interval"] is None:
        return f"{result['value']:{sign}.3f}"
    low, high = result["interval"]
    return f"{result['value']:{sign}.3f}\n{low:{sign}.3f} to {high:{sign}.3f}"
