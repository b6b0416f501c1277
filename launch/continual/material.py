"""The tasks of a stream, encoded, with one numbering of all their classes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from steppe.data import tasks
from steppe.data.text import Tokenizer
from steppe.launch import setup
from steppe.launch.config import DataConfig
from steppe.launch.continual.settings import ContinualConfig, short


@dataclass(frozen=True)
class Material:
    """All data of a run.

    Attributes:
      names: of the tasks.
      task: a task with the classes of all of them.
      groups: task of every class; None where the head is shared.
      train, test: a data set a task; labels number the classes of ``task``.
      tokenizer: what encoded them.
      settings: of the first task's data.
    """

    names: tuple[str, ...]
    task: Any
    groups: tuple[int, ...] | None
    train: tuple[Any, ...]
    test: tuple[Any, ...]
    tokenizer: Tokenizer | None
    settings: DataConfig


def read(config: ContinualConfig, origin: setup.Origin, bare: Any) -> Material:
    """Reads and encodes every task.

    Args:
      origin, bare: where the model is, and its configuration without a head.

    Raises:
      ValueError, OSError: data that cannot be read, or that the model does not serve.
    """
    made, parts, settings = [], [], []
    for address in config.tasks:
        own = dataclasses.replace(config.data, source=address)
        found = setup.records(own)
        group = own.group if found and own.group in found[0] else ""
        own = dataclasses.replace(own, group=group)
        settings.append(own)
        made.append(setup.task(own, found))
        parts.append(setup.divide(own, found))
    tokenizer = setup.fitting(settings[0], origin, bare)
    names = tuple(map(short, config.tasks))
    classes, groups, places = _classes(config, names, [task.label_names for task in made])
    train: list[Any] = []
    test: list[Any] = []
    for task, own, split, place in zip(made, settings, parts, places, strict=True):
        for name, out in (("train", train), ("test", test)):
            data = setup.encode(task, split[name], tokenizer, own, training=name == "train")
            labels = np.asarray(place, np.int32)[data.labels]
            out.append(dataclasses.replace(data, labels=labels))
    whole = tasks.Classification(classes, text=config.data.text, label=config.data.label)
    return Material(names, whole, groups, tuple(train), tuple(test), tokenizer, settings[0])


def _classes(
    config: ContinualConfig, names: tuple[str, ...], labels: list[tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[int, ...] | None, list[list[int]]]:
    """Classes of the head, the task of each, and for every task the numbers of its classes."""
    if config.heads == "shared":
        union = tuple(dict.fromkeys(label for own in labels for label in own))
        return union, None, [[union.index(label) for label in own] for own in labels]
    classes: list[str] = []
    groups: list[int] = []
    places: list[list[int]] = []
    for number, (name, own) in enumerate(zip(names, labels, strict=True)):
        places.append(list(range(len(classes), len(classes) + len(own))))
        classes += [f"{name}/{label}" for label in own]
        groups += [number] * len(own)
    return tuple(classes), tuple(groups), places
