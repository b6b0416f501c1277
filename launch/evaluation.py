"""``steppe evaluate``: an exported model on any data, in or out of its domain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from steppe.data import batches
from steppe.data.text import Tokenizer
from steppe.launch import config as config_
from steppe.launch import kinds, machine, opening, outputs, scoring, setup
from steppe.launch.config import DataConfig, EvaluateConfig
from steppe.launch.pieces import rows_of
from steppe.models import pretrained


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates, prints a table, and writes ``config.out`` where it is given.

    A run folder brings its own data settings, task and class names; another ``data.source``
    is read with the same columns and task unless they are given too.

    Raises:
      ValueError: the model has no head, its classes are not those of the data, or no data is
        named for a model that is not a run; and whatever is wrong with the data.
      FileNotFoundError: no such model.
    """
    from rich.console import Console
    from rich.table import Table

    own = own_data(config.model)
    origin = opening.resolve(config.model)
    data = config.data if config.data.source or own is None else own
    if not data.source:
        raise ValueError(
            f"{config.model!r} is not a run folder; say what to evaluate: --data.source ..."
        )
    split: str = config.split
    if split == "auto":
        # The hash split of another source would be a tenth of it, and means nothing there.
        split = "test" if own is not None and own.source == data.source else "all"
    loaded = opening.with_output(origin.weights, data.task)
    head = loaded.model.config.head
    if head is None:
        raise ValueError(
            f"model {config.model!r} has no head to evaluate; fine-tune it first, "
            "or give the folder of a run"
        )
    if head.kind == "classification":
        loaded = opening.one_task(loaded, config.task, lambda: _classes(data))
        head = loaded.model.config.head
    tokenizer = setup.fitting(data, origin, pretrained.load_config(origin.weights))
    task, dataset = encoded(data, split, tokenizer, loaded)
    if kinds.head_of(task.kind) != head.kind:
        raise ValueError(
            f"the model has a {head.kind} head, but data.task gives a {task.kind} task"
        )
    if task.kind in ("classification", "token") and task.num_labels != head.num_labels:
        raise ValueError(
            f"the model knows {head.num_labels} classes ({', '.join(loaded.labels or ())}), the "
            f"data has {task.num_labels} ({', '.join(task.label_names)}); name them in the "
            "model's order with --data.classes"
        )
    rows = rows_of(loaded.model.config, task.kind, data.max_length, config.batch_size)
    passes = batches.evaluate(dataset, rows, buckets=setup.buckets(data))
    result = scoring.run(
        loaded.model,
        loaded.params,
        passes,
        task,
        dataset,
        tokenizer,
        data,
        count=config.samples,
        tokens=config.sample_tokens,
    )
    intervals = outputs.interval(result, task.kind)
    found: dict[str, Any] = {
        "model": config.model,
        "data": {"source": data.source, "split": split, "examples": len(dataset)},
        "task": {"kind": task.kind, "label_names": list(task.label_names)},
        "metrics": result.metrics,
        "intervals": intervals,
        "versions": machine.versions(),
    }
    if result.generated is not None:
        found["samples"] = scoring.side_by_side(result, {})
    table = Table(f"{data.source}, {split}", "", box=None, header_style="bold")
    for name, value in result.metrics.items():
        interval = intervals.get(name)
        spread = f"   95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        table.add_row(name, f"{int(value):,}" if name in _COUNTS else f"{value:,.4f}{spread}")
    Console().print(table)
    if config.out:
        print(outputs.write_json(Path(config.out), found))
    return found


_COUNTS = ("examples", "tokens", "generated")


def defaults(model: str) -> EvaluateConfig:
    """The settings that a run folder brings; those of any other model are the plain ones."""
    data = own_data(model)
    if data is None:
        return EvaluateConfig(model)
    if data.task != "seq2seq":
        return EvaluateConfig(model, data)
    # Translations are judged by their texts: as many are written as in the run.
    run = config_.read(Path(model))
    return EvaluateConfig(model, data, samples=run.samples, sample_tokens=max(1, run.sample_tokens))


def own_data(model: str) -> DataConfig | None:
    """The data settings of a run folder; None for anything else."""
    folder = Path(model)
    if model.startswith("asset:") or not (folder / "model").is_dir():
        return None
    return config_.read(folder).data


def encoded(
    data: DataConfig, split: str, tokenizer: Tokenizer | None, loaded: pretrained.Loaded
) -> tuple[Any, Any]:
    """The task of the data and its examples: a split, or ``all`` of them.

    Classes that the settings do not name are those of the model.
    """
    found = setup.records(data)
    names = data.classes or _named(loaded.labels)
    size = getattr(loaded.model.config, "image_size", 224)
    task = setup.task(dataclasses.replace(data, classes=names), found, size)
    if split == "all":
        rows = setup.first(found, data.eval_limit)
    else:
        rows = setup.divide(data, found)[split]
    return task, setup.encode(task, rows, tokenizer, data, training=False)


def _classes(data: DataConfig) -> set[str]:
    """Names of the data's classes."""
    rows = [] if data.classes else setup.records(data)
    return set(data.classes) or {str(row[data.label]) for row in rows if data.label in row}


def _named(labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """The model's class names, unless they are the placeholders of an unnamed head."""
    if labels is None or all(label.startswith("LABEL_") for label in labels):
        return ()
    return labels
