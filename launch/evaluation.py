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

    own = own_data(config.model)
    origin = setup.origin(config.model if own is None else str(Path(config.model) / "model"))
    data = config.data if config.data.source or own is None else own
    if not data.source:
        raise ValueError(
            f"{config.model!r} is not a run folder; say what to evaluate: --data.source ..."
        )
    split: str = config.split
    if split == "auto":
        # The hash split of another source would be a tenth of it, and means nothing there.
        split = "test" if own is not None and own.source == data.source else "all"
    loaded = pretrained.load(origin.weights)
    head = loaded.model.config.head
    if head is None:
        raise ValueError(
            f"model {config.model!r} has no head to evaluate; fine-tune it first, "
            "or give the folder of a run"
        )
    task, dataset = _dataset(data, split, origin, loaded)
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
        "data": {"source": data.source, "split": split, "examples": len(dataset)},
        "task": {"kind": task.kind, "label_names": list(task.label_names)},
        "metrics": result.metrics,
        "intervals": intervals,
        "versions": machine.versions(),
    }
    table = Table(f"{data.source}, {split}", "", box=None, header_style="bold")
    for name, value in result.metrics.items():
        interval = intervals.get(name)
        spread = f"   95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        table.add_row(name, f"{value:,.4f}{spread}" if name != "examples" else f"{int(value):,}")
    Console().print(table)
    if config.out:
        print(outputs.write_json(Path(config.out), found))
    return found


def own_data(model: str) -> DataConfig | None:
    """The data settings of a run folder; None for anything else."""
    folder = Path(model)
    if model.startswith("asset:") or not (folder / "model").is_dir():
        return None
    return config_.read(folder).data


def _dataset(
    data: DataConfig, split: str, origin: setup.Origin, loaded: pretrained.Loaded
) -> tuple[Any, Any]:
    bare = loaded.model.config
    setup.check_fit(data, bare.max_length)
    tokenizer = Tokenizer.from_dir(origin.tokenizer)
    setup.check_vocabulary(tokenizer, bare.vocab_size, origin.tokenizer)
    found = setup.records(data)
    names = data.classes or _named(loaded.labels)
    task = setup.task(dataclasses.replace(data, classes=names), found)
    if split == "all":
        rows = found
    else:
        shares = dict(zip(setup.SPLITS, data.fractions, strict=True))
        rows = splits.by_hash(found, shares)[split]
    return task, task.encode(rows, tokenizer, data.max_length)


def _named(labels: tuple[str, ...] | None) -> tuple[str, ...]:
    """The model's class names, unless they are the placeholders of an unnamed head."""
    if labels is None or all(label.startswith("LABEL_") for label in labels):
        return ()
    return labels
