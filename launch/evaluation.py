"""``steppe evaluate``: an exported model on any data, in or out of its domain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from steppe.data import batches, splits
from steppe.data.text import Tokenizer
from steppe.launch import config as config_
from steppe.launch import machine, outputs, setup
from steppe.launch.config import DataConfig, EvaluateConfig
from steppe.models import pretrained
from steppe.train import evaluate


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

    folder = Path(config.model)
    trained = folder / "model" if (folder / "config.json").is_file() else folder
    own: DataConfig | None = None
    if not config.model.startswith("asset:") and (folder / "model").is_dir():
        own = config_.read(folder).data
        origin = setup.origin(str(trained))
    else:
        origin = setup.origin(config.model)
    data = _data(config.data, own, config.model)
    loaded = pretrained.load(origin.weights)
    head = loaded.model.config.head
    if head is None:
        raise ValueError(
            f"model {config.model!r} has no head to evaluate; fine-tune it first, "
            "or give the folder of a run"
        )
    task, dataset = _dataset(data, config, origin, loaded)
    if task.kind != head.kind:
        raise ValueError(
            f"the model has a {head.kind} head, but data.task gives a {task.kind} task"
        )
    if task.kind in ("classification", "token") and task.num_labels != head.num_labels:
        raise ValueError(
            f"the model knows {head.num_labels} classes ({', '.join(loaded.labels or ())}), the "
            f"data has {task.num_labels} ({', '.join(task.label_names)}); name them in the "
            "model's order with --data.classes"
        )
    passes = batches.evaluate(dataset, config.batch_size, buckets=setup.buckets(data))
    result = evaluate.run(loaded.model, loaded.params, passes, task)
    intervals = outputs.interval(result, task.kind)
    found: dict[str, Any] = {
        "model": config.model,
        "data": {"source": data.source, "split": config.split, "examples": len(dataset)},
        "task": {"kind": task.kind, "label_names": list(task.label_names)},
        "metrics": result.metrics,
        "intervals": intervals,
        "versions": machine.versions(),
    }
    table = Table(f"{data.source}, {config.split}", "", box=None, header_style="bold")
    for name, value in result.metrics.items():
        interval = intervals.get(name)
        spread = f"   95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        table.add_row(name, f"{value:,.4f}{spread}" if name != "examples" else f"{int(value):,}")
    Console().print(table)
    if config.out:
        print(outputs.write_json(Path(config.out), found))
    return found


def _data(given: DataConfig, own: DataConfig | None, name: str) -> DataConfig:
    """The run's settings, with whatever was given on top."""
    if own is None:
        if not given.source:
            raise ValueError(
                f"{name!r} is not a run folder; say what to evaluate: --data.source ..."
            )
        return given
    blank = DataConfig(source="")
    changed = {
        f.name: getattr(given, f.name)
        for f in dataclasses.fields(DataConfig)
        if getattr(given, f.name) != getattr(blank, f.name)
    }
    return dataclasses.replace(own, **changed)


def _dataset(
    data: DataConfig, config: EvaluateConfig, origin: setup.Origin, loaded: pretrained.Loaded
) -> tuple[Any, Any]:
    bare = loaded.model.config
    setup.check_fit(data, bare.max_length)
    tokenizer = Tokenizer.from_dir(origin.tokenizer)
    setup.check_vocabulary(tokenizer, bare.vocab_size, origin.tokenizer)
    found = setup.records(data)
    names = data.classes or _named(loaded.labels)
    task = setup.task(dataclasses.replace(data, classes=names), found)
    if config.split == "all":
        rows = found
    else:
        shares = dict(zip(setup.SPLITS, data.fractions, strict=True))
        rows = splits.by_hash(found, shares)[config.split]
    return task, task.encode(rows, tokenizer, data.max_length)


def _named(labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """The model's class names, unless they are the placeholders of an unnamed head."""
    if labels is None or all(label.startswith("LABEL_") for label in labels):
        return ()
    return labels
