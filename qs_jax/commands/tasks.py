"""`python -m qs_jax tasks`: GLUE and SuperGLUE classification, the dense model against a preset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qs_jax.commands.maps import find_maps
from qs_jax.errors import InputError

if TYPE_CHECKING:
    from qs_jax.config import Config
    from qs_jax.evaluation.heads import Head
    from qs_jax.evaluation.tasks import Examples


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
    """none: by the likelihood of label words, through lm-evaluation-harness. linear: a head fitted
    on frozen states of a share of the examples, evaluated on the others. DIR: one made by
    convert.classifier."""
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
    """Rows scored at a time."""
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
      InputError: A task is unknown, or its data or head cannot be used; lm-evaluation-harness is
        needed and not installed.
    """
    from qs_jax import Config, presets
    from qs_jax.checkpoint import choose_dtype, read_manifest
    from qs_jax.config import ModelConfig
    from qs_jax.engine.devices import local_devices
    from qs_jax.evaluation.journal import check_target
    from qs_jax.evaluation.perplexity import git_hash, versions

    check_target(options.out, overwrite=options.overwrite)
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}.")
    local_devices(options.devices)
    manifest = read_manifest(options.ckpt)
    model = ModelConfig.from_dict(manifest["model"])
    model = model.replace(dtype=choose_dtype(options.dtype, model))
    quicksilver = presets.by_name(options.preset, model)
    cfg = Config(model, quicksilver, protocol=options.protocol, engine=options.engine)
    examples = _read_all(options)
    by_words = options.head == "none"
    tasks = _ask_words(options, cfg, examples) if by_words else _run_heads(options, cfg, examples)
    return {
        "tasks": tasks,
        "config": _settings(options, cfg),
        "simulated": options.engine == "masked" and not quicksilver.is_off,
        "model": {
            "source": manifest["source"],
            "config": model.to_dict(),
            "fingerprint": manifest["params"],
        },
        "versions": versions(),
        "git": git_hash(),
    }


def _read_all(options: Tasks) -> dict[str, Examples]:
    from qs_jax.evaluation.tasks import TASKS, read_examples

    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown or not options.tasks:
        raise InputError(f"--tasks {' '.join(unknown)}: the tasks are {', '.join(TASKS)}.")
    if Path(options.data).is_file() and len(set(options.tasks)) > 1:
        raise InputError(f"{options.data} is one file; for several tasks give their folder.")
    return {
        name: read_examples(TASKS[name], options.data, options.limit, options.seed)
        for name in options.tasks
    }


def _ask_words(
    options: Tasks, cfg: Config, examples: dict[str, Examples]
) -> dict[str, dict[str, Any]]:
    """All tasks by label words, one model after the other."""
    from qs_jax.evaluation.classification import task_results
    from qs_jax.evaluation.harness import ask_harness
    from qs_jax.evaluation.tasks import TASKS

    assert cfg.quicksilver is not None
    settings: dict[str, Any] = {
        "ckpt": str(options.ckpt),
        "protocol": cfg.effective_protocol,
        "engine": options.engine,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "devices": options.devices,
    }
    answers = [ask_harness(settings, examples)]
    if not cfg.quicksilver.is_off:
        mechanisms = {"preset": options.preset, "kv_maps": options.kv_maps}
        answers.append(ask_harness(settings | mechanisms, examples))
    results = {}
    for name, given in examples.items():
        dense, about = answers[0][name]
        other = answers[1][name][0] if len(answers) > 1 else None
        measured = task_results(TASKS[name], given.labels, dense, other)
        results[name] = _describe(given) | about | measured
    return results


def _run_heads(
    options: Tasks, cfg: Config, examples: dict[str, Examples]
) -> dict[str, dict[str, Any]]:
    """All tasks with a stored head, or one fitted on a share of each task's examples."""
    from qs_jax import load, load_tokenizer
    from qs_jax.engine.devices import local_devices, replicate
    from qs_jax.evaluation.classification import (
        encode_examples,
        encoder_of,
        last_states,
        task_results,
        with_head,
    )
    from qs_jax.evaluation.heads import fit_head
    from qs_jax.evaluation.tasks import TASKS, split_examples

    linear, devices = options.head == "linear", local_devices(options.devices)
    stored = None if linear else _stored_head(options)
    maps, _ = find_maps(cfg, options.ckpt, options.kv_maps, options.preset)
    params, _ = load(options.ckpt, dtype=options.dtype)
    if maps is not None:
        params["kv_maps"] = maps
    shared: dict[str, Any] = {"batch_size": options.batch_size}
    if len(devices) > 1:
        params, shared["devices"] = replicate(params, devices), devices
    # The same protocol, so that the same positions are read.
    off = cfg.replace(quicksilver=None, protocol=cfg.effective_protocol)
    tokenizer, room = load_tokenizer(options.ckpt), cfg.model.max_positions - 1
    results = {}
    for name, given in examples.items():
        task, about = TASKS[name], {}
        encode = encoder_of(task, tokenizer, bare=not linear and options.head_input == "pair")
        if linear:
            train, given = split_examples(task, given, options.train_share, options.seed)
            rows, _ = encode_examples(task, train, encode, room)
            fit_cfg = off if options.fit_on == "dense" else cfg
            states_ED, _ = last_states(params, fit_cfg, rows, title=f"{name}, features", **shared)
            head, fit = fit_head(states_ED, train.labels, task.labels, l2=options.l2)
            about = {"fit": fit, "train": _describe(train)["data"]}
        else:
            assert stored is not None
            head = stored.for_task(task)
        rows, cut = encode_examples(task, given, encode, room)
        dense = with_head(params, off, rows, head, title=f"{name}, dense", **shared)
        other = None
        if cfg.quicksilver is not None and not cfg.quicksilver.is_off:
            other = with_head(params, cfg, rows, head, title=f"{name}, preset", **shared)
        about |= {"truncated": cut, "mean_prompt_tokens": sum(map(len, rows)) / len(rows)}
        measured = task_results(task, given.labels, dense, other)
        results[name] = _describe(given) | about | measured
    return results


def _describe(examples: Examples) -> dict[str, Any]:
    used = len(examples.items)
    data = {"name": examples.name, "rows": examples.rows, "used": used, "sha256": examples.sha256}
    return {"data": data}


def _stored_head(options: Tasks) -> Head:
    from qs_jax.checkpoint import read_manifest
    from qs_jax.evaluation.heads import Head

    head = Head.load(Path(options.head))
    if head.backbone != read_manifest(options.ckpt)["params"]:
        raise InputError(
            f"the head in {options.head} was trained with another model than {options.ckpt}: a "
            "sequence classifier brings its own; give the same folder as --ckpt and --head."
        )
    return head


def _settings(options: Tasks, cfg: Config) -> dict[str, Any]:
    """The options that decide the numbers; paths go by their last name."""
    import jax

    assert cfg.quicksilver is not None
    _, maps_hash = find_maps(cfg, options.ckpt, options.kv_maps, options.preset)
    names = "batch_size engine head_input fit_on train_share l2 limit seed".split()
    return {name: getattr(options, name) for name in names} | {
        "backend": jax.default_backend(),
        "dtype": cfg.model.dtype,
        "head": Path(options.head).name,
        "preset": Path(options.preset).name,
        "protocol": cfg.effective_protocol,
        "quicksilver": cfg.quicksilver.to_dict(),
        "kv_maps_sha256": maps_hash,
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
        cells = [f"{name}\n{task['examples']:,}", task["metric"], with_interval(task["dense"])]
        if compared:
            change, saved = task["difference"], task["quicksilver"]["saved"]
            cells += [with_interval(task["quicksilver"]), with_interval(change, "+")]
            cells += [f"{change['mcnemar_p']:.2g}", f"{saved['exact_flops_saved']:.1%}"]
        table.add_row(*cells)
    console = Console()
    console.print(table)
    for name, task in results["tasks"].items():
        if task["truncated"]:
            console.print(f"{name}: {task['truncated']} prompt(s) were cut to fit the model")
    print(f"results are in {out}")  # rich would break a long path


def with_interval(result: dict[str, Any], sign: str = "") -> str:
    """A value of a results file, its interval on a second line."""
    if result["interval"] is None:
        return f"{result['value']:{sign}.3f}"
    low, high = result["interval"]
    return f"{result['value']:{sign}.3f}\n{low:{sign}.3f} to {high:{sign}.3f}"
