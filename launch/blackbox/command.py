"""``steppe blackbox``: frozen model + a few examples -> a prompt, and what it is worth.

RUN/config.json          resolved settings
RUN/generations.jsonl    losses of every candidate, a line a generation
RUN/metrics.jsonl        a row a generation and a row a trial on the development examples
RUN/model/               the prompt with its fixed head, which ``steppe evaluate`` opens
RUN/results.json, predictions.jsonl, report.html
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steppe.data import batches as batches_
from steppe.launch import config as config_
from steppe.launch import finetune, machine, outputs, scoring, setup
from steppe.launch.blackbox import opened as opened_
from steppe.launch.blackbox import search
from steppe.launch.blackbox.opened import Opened
from steppe.launch.blackbox.settings import BlackboxConfig
from steppe.launch.compare import folders
from steppe.models import pretrained, tree
from steppe.train import evaluate, loop, metrics
from steppe.train.types import Params

RESULTS = "results.json"


def run(config: BlackboxConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in results.json.

    Raises:
      FileExistsError: the run folder holds another run.
      Interrupted: stopped by Ctrl-C or SIGTERM; finished generations are kept.
      FloatingPointError: no candidate of a generation had a loss.
    """
    from rich.console import Console

    from steppe.launch.progress import Progress

    console = Console(stderr=True)
    folder = config.run
    finetune.check_folder(config, folder, BlackboxConfig.fixed, read)
    begin = time.perf_counter()
    opened = opened_.open_all(config)
    count = search.total(config, opened.shape[0])
    _describe(console, config, opened, count, folder)
    if config.dry_run:
        return {}
    space, hats = opened_.space(config, opened)
    timings = {"setup_s": time.perf_counter() - begin}
    outputs.write_json(folder / finetune.CONFIG, config_.to_dict(config))
    begin = time.perf_counter()
    try:
        with (
            folders.terminable(),
            Progress(count * config.popsize, console) as progress,
        ):
            writers = [metrics.JsonLines(folder / "metrics.jsonl"), progress]
            found = search.run(config, opened, space, folder, writers)
        done = _finished(folder, found)
        if done is None:
            timings["train_s"] = time.perf_counter() - begin
            done = _finish(config, opened, found, hats, folder, command, timings)
        else:
            console.print("the run is complete: nothing is left to do", style="dim")
    except KeyboardInterrupt:
        raise loop.Interrupted(
            f"interrupted; the finished generations are in {folder / search.FILE}. "
            "Give the same command with --resume to go on"
        ) from None
    from steppe.launch import report

    report.write(folder)
    Console().print(report.summary(folder))
    return done


def read(folder: Path) -> BlackboxConfig:
    """The settings of a run folder of this command.

    Raises:
      ValueError: its config.json is damaged, or of another command.
    """
    found: BlackboxConfig = folders.read(folder, BlackboxConfig)
    return found


def _finished(folder: Path, found: search.Found) -> dict[str, Any] | None:
    """What results.json holds, where the search made no step since and it is whole."""
    if found.passes[0]:
        return None
    try:
        held = json.loads((folder / RESULTS).read_text("utf-8"))
        same = held["search"]["generations"] == found.generations
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return held if same and (folder / "model").is_dir() else None


def _finish(
    config: BlackboxConfig,
    opened: Opened,
    found: search.Found,
    hats: np.ndarray,
    folder: Path,
    command: Sequence[str],
    timings: dict[str, float],
) -> dict[str, Any]:
    """Scores the chosen prompt, fits the baselines, exports, writes."""
    begin = time.perf_counter()
    params = opened.with_prompt(found.chosen.rows)
    scored = {split: score(config, opened, params, split) for split in ("valid", "test")}
    test = scored["test"]
    rows = outputs.predictions(test, opened.splits["test"], config.data)
    outputs.write_predictions(folder / "predictions.jsonl", rows)
    opened_.export(opened, config, found.chosen.rows, folder / "model")
    timings["evaluate_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    before = score(config, opened, opened.params, "test").metrics
    baselines = _baselines(config, opened) if config.baselines else {}
    baselines["the same without a prompt"] = {"accuracy": before["accuracy"]}
    timings["baselines_s"] = time.perf_counter() - begin
    chosen = found.chosen
    result: dict[str, Any] = {
        "task": {
            "kind": opened.task.kind,
            "label_names": list(opened.task.label_names),
        },
        "metrics": {split: result.metrics for split, result in scored.items()},
        "baselines": baselines,
        "before": {"test": before},
        "intervals": outputs.interval(test, opened.task.kind),
        "command": shlex.join(command),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "data": {
            "source": config.data.source,
            "licence": setup.licence(config.data.source),
            **{name: len(dataset) for name, dataset in opened.splits.items()},
        },
        "model": {
            "name": opened.origin.name,
            "licence": opened.origin.licence,
            "parameters": tree.count(opened.params),
            "trainable": int(np.prod(opened.shape)),
        },
        "optimiser": {"method": describe(config)},
        "search": {
            "method": config.method,
            "prompts": list(opened.shape),
            "rank": config.rank,
            "generations": found.generations,
            "calls": found.generations * config.popsize,
            "failed": found.failed,
            "chosen_at": chosen.calls,
            "dev": {"accuracy": chosen.accuracy, "loss": chosen.loss},
            "best_loss": [float(v) for v in np.asarray(found.state.search.best_value)],
            "sigma": [float(v) for v in np.asarray(found.state.search.sigma)],
            "spread": [float(v) for v in hats],
            "head": opened.head,
            "held_out": None if opened.means is None else opened.means.held_out,
        },
        "timings": timings,
    }
    outputs.write_json(folder / RESULTS, result)
    return result


def describe(config: BlackboxConfig) -> str:
    """The method in a line."""
    name = {"bbt": "BBT", "bbtv2": "BBTv2"}[config.method]
    return (
        f"{name}: CMA-ES with {config.popsize} candidates in {config.rank} dimensions, "
        f"{config.loss} on {config.shots} examples a class; no gradients"
    )


def score(config: BlackboxConfig, opened: Opened, params: Params, split: str) -> Any:
    """The evaluation of a split under some parameters, an ``EvalResult``."""
    return scoring.run(
        opened.model,
        params,
        _passes(config, opened, split),
        opened.task,
        opened.splits[split],
        opened.tokenizer,
        config.data,
        plan=opened.plan,
    )


def _passes(config: BlackboxConfig, opened: Opened, split: str) -> Any:
    size = opened.plan.data_size * max(1, 64 // opened.plan.data_size)
    return batches_.evaluate(opened.splits[split], size, buckets=setup.buckets(config.data))


def _baselines(config: BlackboxConfig, opened: Opened) -> dict[str, dict[str, float]]:
    """Majority class, and logistic regression on the frozen features of the same shots."""
    frozen = pretrained.load(opened.origin.weights, head=None)

    def feats(split: str) -> Any:
        return evaluate.features(frozen.model, frozen.params, _passes(config, opened, split))

    train, dev, test = feats("train"), feats("dev"), feats("test")
    fitted = evaluate.logistic_regression(
        (train.x, train.labels), (dev.x, dev.labels), num_labels=opened.task.num_labels
    )
    return {
        "majority class": {"accuracy": evaluate.majority(train.labels, test.labels).accuracy},
        "frozen features + logistic regression": {
            "accuracy": evaluate.accuracy(fitted.predict(test.x), test.labels)
        },
    }


def _describe(
    console: Any, config: BlackboxConfig, opened: Opened, count: int, folder: Path
) -> None:
    layers, length, width = opened.shape
    shape = ", ".join(f"{k}={v}" for k, v in opened.plan.mesh.shape.items())
    sizes: Mapping[str, Any] = {n: len(d) for n, d in opened.splits.items()}
    counts = ", ".join(f"{n} {size}" for n, size in sizes.items())
    console.print(
        f"[bold]{opened.origin.name}[/bold] on [bold]{config.data.source}[/bold] ({counts})"
    )
    console.print(f"scores: {opened.head}", highlight=False)
    every = "one prompt" if layers == 1 else f"{layers} prompts"
    console.print(
        f"{every} of {length} x {width} in {config.rank} dimensions; "
        f"{count * config.popsize:,} forward passes of {len(opened.splits['train'])} examples on "
        f"mesh {shape}; run folder {folder}",
        highlight=False,
    )
    unused = config.budget - count * config.popsize
    if unused:
        console.print(f"{unused} forward passes of the budget make no whole round", style="dim")
    cut = sum(getattr(d, "cut", 0) for d in opened.splits.values())
    if cut:
        console.print(f"{cut} examples were cut to {config.data.max_length} tokens", style="yellow")
