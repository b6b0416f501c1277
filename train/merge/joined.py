"""One head for all tasks of a merged model: its classes side by side.

  logits [B, C_1 + ... + C_N] = h W + b,    W = [W_1 ... W_N], b = [b_1 ... b_N]

Heads of one linear layer on the same trunk are columns of one: nothing is added, and every task's
logits are those of its own head, up to the order of a sum. What knows models with one head (a
student cut from it, distillation, quantization, a folder for ``transformers``) then takes a model
that serves several tasks. The classes are called TASK/CLASS, so that a folder that keeps its
classes' names says what its columns are.

Which columns a row is about is the column ``task`` of a batch, see ``train.continual.classes``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from steppe.models.heads import HeadConfig
from steppe.models.tree import Params
from steppe.train.merge.heads import HEAD, MultiHead

BETWEEN = "/"


@dataclass(frozen=True)
class Joined:
    """What the columns of a joined head are.

    Attributes:
      config: of the network, with the joined head.
      classes: task -> names of its classes, in the order of the columns.
    """

    config: Any
    classes: Mapping[str, tuple[str, ...]]

    @property
    def labels(self) -> tuple[str, ...]:
        """TASK/CLASS of every column."""
        return tuple(
            f"{task}{BETWEEN}{name}" for task, names in self.classes.items() for name in names
        )

    @property
    def groups(self) -> tuple[int, ...]:
        """Number of the task of every column, for ``train.continual.classes.grouped``."""
        return tuple(n for n, names in enumerate(self.classes.values()) for _ in names)

    def columns(self, task: str) -> slice:
        """The columns of a task.

        Raises:
          ValueError: there is no such task.
        """
        if task not in self.classes:
            raise ValueError(f"no head for {task!r}; there are {', '.join(self.classes)}")
        start = 0
        for name, classes in self.classes.items():
            if name == task:
                break
            start += len(classes)
        return slice(start, start + len(self.classes[task]))

    def config_of(self, task: str) -> Any:
        """The network with the head of one task alone."""
        at = self.columns(task)
        own = dataclasses.replace(self.config.head, num_labels=at.stop - at.start)
        return self.config.with_head(own)

    def alone(self, task: str, params: Params) -> Params:
        """The parameters of one task's model; the trunk is shared, not copied."""
        at = self.columns(task)
        out = {name: leaf[..., at] for name, leaf in params[HEAD]["out"].items()}
        return {**params, HEAD: {**params[HEAD], "out": out}}


def join(merged: MultiHead) -> tuple[Joined, Params]:
    """A merged model as one model whose logits are those of all tasks.

    Raises:
      ValueError: a head that is none of classes, or has a layer of its own before the last one,
        which no column can hold; class names that hold a slash; no head at all.
    """
    if not merged.heads:
        raise ValueError("there is no head to join: the merged model holds a trunk alone")
    classes, drops = {}, []
    for task, head in merged.heads.items():
        config = head.config
        if config.kind != "classification" or config.transform is not None:
            what = f"a {config.kind} head" if config.kind != "classification" else "a hidden layer"
            raise ValueError(
                f"the head of {task!r} has {what}; only linear layers over classes can be joined, "
                "such as those that follow a pooler"
            )
        names = head.labels or tuple(map(str, range(config.num_labels)))
        if any(BETWEEN in name for name in (task, *names)):
            raise ValueError(
                f"names of tasks and classes must hold no slash, got {task!r}, {names}"
            )
        classes[task] = tuple(names)
        drops.append(config.drop)
    total = sum(map(len, classes.values()))
    made = Joined(
        merged.config.with_head(HeadConfig("classification", total, drop=max(drops))), classes
    )
    parts = [head.params["out"] for head in merged.heads.values()]
    out = {name: jnp.concatenate([part[name] for part in parts], -1) for name in parts[0]}
    return made, {**merged.trunk, HEAD: {"out": out}}


def read(model: Any, labels: Sequence[str] | None) -> Joined:
    """What the columns of a model are that was saved with the labels of :class:`Joined`.

    Args:
      model: it, or its configuration.

    Raises:
      ValueError: other labels, or another number of them than the head's.
    """
    config = getattr(model, "config", model)
    named = tuple(labels or ())
    head = config.head
    if head is None or head.num_labels != len(named) or not all(BETWEEN in n for n in named):
        raise ValueError(
            f"the labels must be one TASK{BETWEEN}CLASS for every column of the head, got "
            f"{', '.join(named) or 'none'}"
        )
    classes: dict[str, list[str]] = {}
    for name in named:
        task, _, of = name.partition(BETWEEN)
        if task in classes and list(classes)[-1] != task:
            raise ValueError(f"the columns of {task!r} must stand side by side, got {named}")
        classes.setdefault(task, []).append(of)
    return Joined(config, {task: tuple(names) for task, names in classes.items()})
