"""``steppe evaluate`` of a merged folder: one task by its name, or all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steppe.data import batches
from steppe.launch import config as config_
from steppe.launch import evaluation, kinds, machine, opening, outputs, scoring, setup
from steppe.launch.config import DataConfig, EvaluateConfig
from steppe.launch.pieces import rows_of
from steppe.models import pretrained
from steppe.train.merge import heads

RESULT = "merge.json"


@dataclass(frozen=True)
class MergedConfig(EvaluateConfig):
    """``steppe evaluate`` of a merged model: its tasks with their own heads.

    Attributes:
      task: the one to evaluate; empty = all. Other data than the task's own needs it.
    """

    task: str = ""


def is_merged(model: str) -> bool:
    """Whether a folder holds a trunk with several heads."""
    return not model.startswith("asset:") and (Path(model) / heads.HEADS).is_file()


def run(config: MergedConfig) -> dict[str, Any]:
    """Evaluates, prints a table a task, and writes ``config.out`` where it is given.

    Raises:
      ValueError: no task of this name; no data is known for a task; data of other classes.
    """
    from rich.console import Console

    folder = Path(config.model)
    merged = heads.load(folder)
    own = data_of(folder)
    if config.task and config.task not in merged.heads:
        raise ValueError(f"no task {config.task!r} in {folder}; it has {', '.join(merged.heads)}")
    if config.data.source and not config.task and len(merged.heads) > 1:
        raise ValueError(f"say which task the data is of: --task, one of {', '.join(merged.heads)}")
    names = [config.task] if config.task else list(merged.heads)
    found: dict[str, Any] = {}
    for name in names:
        data = _settings(config.data, own.get(name))
        if data is None:
            raise ValueError(
                f"{folder} does not say what data {name} is of; give it: --task {name} "
                "--data.source ..."
            )
        split: str = config.split
        if split == "auto":
            same = name in own and own[name].source == data.source
            split = "test" if same else "all"
        found[name] = _one(config, merged, name, data, split)
        Console().print(_table(name, found[name]))
    result = {"model": config.model, "tasks": found, "versions": machine.versions()}
    if config.out:
        print(outputs.write_json(Path(config.out), result))
    return result


def _settings(given: DataConfig, own: DataConfig | None) -> DataConfig | None:
    """The data to evaluate on: what is given, the rest as the task's own; None without any."""
    if own is None:
        return given if given.source else None
    plain = EvaluateConfig("").data
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(DataConfig)
        if getattr(given, field.name) != getattr(plain, field.name)
    }
    return dataclasses.replace(own, **changed)


def data_of(folder: Path) -> dict[str, DataConfig]:
    """The data settings of the tasks that ``steppe merge`` has left; empty where it has not."""
    file = folder / RESULT
    try:
        told = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    found = {}
    for task in told.get("tasks", []) if isinstance(told, Mapping) else []:
        if not isinstance(task, Mapping):
            raise ValueError(f"{file} is damaged (tasks must hold objects, got {task!r})")
        if task.get("data"):
            found[str(task["name"])] = config_.from_dict(DataConfig, task["data"])
    return found


def _one(
    config: MergedConfig, merged: heads.MultiHead, name: str, data: DataConfig, split: str
) -> dict[str, Any]:
    model, params = merged.model(name)
    head = merged.heads[name]
    origin = opening.resolve(config.model)
    tokenizer = setup.fitting(data, origin, pretrained.load_config(origin.weights))
    named = pretrained.Loaded(model, params, Path(config.model), labels=head.labels)
    task, dataset = evaluation.encoded(data, split, tokenizer, named)
    if kinds.head_of(task.kind) != head.config.kind:
        raise ValueError(
            f"{name} has a {head.config.kind} head, but its data gives a {task.kind} task"
        )
    if task.kind in ("classification", "token") and task.num_labels != head.config.num_labels:
        raise ValueError(
            f"{name} knows {head.config.num_labels} classes ({', '.join(head.labels or ())}), "
            f"the data has {task.num_labels} ({', '.join(task.label_names)}); name them in the "
            "model's order with --data.classes"
        )
    rows = rows_of(model.config, task.kind, data.max_length, config.batch_size)
    passes = batches.evaluate(dataset, rows, buckets=setup.buckets(data))
    result = scoring.run(
        model,
        params,
        passes,
        task,
        dataset,
        tokenizer,
        data,
        count=config.samples,
        tokens=config.sample_tokens,
    )
    return {
        "data": {"source": data.source, "split": split, "examples": len(dataset)},
        "task": {"kind": task.kind, "label_names": list(task.label_names)},
        "metrics": result.metrics,
        "intervals": outputs.interval(result, task.kind),
    }


def _table(name: str, found: Mapping[str, Any]) -> Any:
    from rich.table import Table

    where = found["data"]
    title = f"{name}: {where['source']}, {where['split']}"
    table = Table(title, "", box=None, header_style="bold")
    for metric, value in found["metrics"].items():
        whole = metric in ("examples", "tokens", "generated")
        table.add_row(metric, f"{int(value):,}" if whole else f"{value:,.4f}")
    return table
