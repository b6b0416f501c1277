"""Heads stay with their tasks: one merged trunk, N heads, one folder.

What is merged is the trunk, everything but the leaves below ``head``. The folder is a model
without a head that every reader of the ecosystem opens, and beside it

  heads.json               for every task: kind of head, number of labels, names of the classes
  heads/TASK.safetensors   that head's tensors, named as the family's files name them
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from steppe.models import pretrained, tree, weights
from steppe.models.families import family as family_of
from steppe.models.heads import HeadConfig
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train.evaluate import runner

HEADS, FOLDER = "heads.json", "heads"
LONGEST = 200  # bytes of a task's name; files have 255, endings and scratch names included
HEAD = "head"
CURE = "merge the models again, or copy the file anew from where the folder came"


@dataclass(frozen=True)
class Head:
    """One task's head.

    Attributes:
      config: what it is.
      params: the tree below ``head``.
      labels: names of its classes, or None.
    """

    config: HeadConfig
    params: Params
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class MultiHead:
    """A merged trunk with a head for every task.

    Attributes:
      config: the network's configuration without a head.
      trunk: its parameters.
      heads: task -> head.
    """

    config: Any
    trunk: Params
    heads: Mapping[str, Head]

    def model(self, task: str) -> tuple[Model, Params]:
        """The model and the parameters of one task; the trunk is shared, not copied.

        Raises:
          ValueError: there is no head of this name; those that are there get listed.
        """
        if task not in self.heads:
            raise ValueError(f"no head for {task!r}; there are {', '.join(self.heads) or 'none'}")
        head = self.heads[task]
        model = self.config.with_head(head.config).build()
        params = tree.merge(self.trunk, {HEAD: head.params} if head.params else {})
        tree.same_structure(params, model.abstract(), (f"the head {task!r} on the trunk", "it"))
        return model, params


def split(params: Mapping[str, Any]) -> tuple[Params, Params]:
    """(trunk, tree below ``head``); the second is empty for a model without a head."""
    return {name: part for name, part in params.items() if name != HEAD}, dict(params.get(HEAD, {}))


def gather(
    config: Any,
    trunk: Params,
    models: Mapping[str, tuple[Any, Mapping[str, Any]]],
    labels: Mapping[str, Sequence[str] | None] | None = None,
) -> MultiHead:
    """A merged trunk with the heads of the models that it was merged from.

    Args:
      config: configuration of any of the models; its head is dropped.
      trunk: merged parameters without a head.
      models: task -> (the model's configuration, its parameters).
      labels: task -> names of the classes.

    Raises:
      ValueError: a model has no head.
    """
    found = {}
    for task, (own, params) in models.items():
        if own.head is None:
            raise ValueError(f"the model of {task!r} has no head to keep")
        names = (labels or {}).get(task)
        found[task] = Head(own.head, split(params)[1], None if names is None else tuple(names))
    return MultiHead(config.with_head(None), trunk, found)


def save(
    directory: str | os.PathLike[str],
    merged: MultiHead,
    *,
    tokenizer_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes the folder, atomically; an earlier one of the same heads is replaced.

    Raises:
      FileExistsError: the folder holds other files.
      ValueError: a name cannot be a file's, or a head is not of this trunk.
    """
    target = Path(directory)
    family = family_of(merged.config.family)
    for task in merged.heads:
        check_name(task)
        merged.model(task)
    keep = (
        HEADS,
        FOLDER,
        "config.json",
        pretrained.PREPROCESSOR,
        weights.SINGLE,
        weights.SHARDED,
        *pretrained.TOKENIZER_FILES,
        *(p.name for p in target.glob("model-*-of-*.safetensors")),
    )
    with weights.atomic_directory(target, keep) as scratch:
        inner = scratch / ".trunk"
        model = merged.config.build()
        pretrained.save(inner, model, merged.trunk, tokenizer_dir=tokenizer_dir)
        for file in inner.iterdir():
            file.rename(scratch / file.name)
        inner.rmdir()
        tensors = {}
        for task, head in merged.heads.items():
            config = merged.config.with_head(head.config)
            leaves = tree.flatten({HEAD: head.params}) if head.params else {}
            tensors[task] = {
                name.tensor: name.join([np.asarray(leaves[name.path])])
                for name in family.heads[head.config.kind].of(config)
                if name.path in leaves
            }
        write(scratch, {task: describe(h.config, h.labels) for task, h in merged.heads.items()},
              tensors)  # fmt: skip
    return target


def describe(config: HeadConfig, labels: Sequence[str] | None) -> dict[str, Any]:
    """The entry of ``heads.json``."""
    return {**dataclasses.asdict(config), "labels": None if labels is None else list(labels)}


def write(
    folder: Path,
    entries: Mapping[str, Mapping[str, Any]],
    tensors: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Writes ``heads.json`` and the tensors of every head into an existing folder."""
    from safetensors.numpy import save_file

    (folder / FOLDER).mkdir(exist_ok=True)
    for task, held in tensors.items():
        arrays = {name: np.asarray(value, order="C") for name, value in held.items()}
        save_file(arrays, folder / FOLDER / f"{task}.safetensors", {"format": "pt"})
    (folder / HEADS).write_text(json.dumps(entries, indent=2) + "\n", "utf-8")


def stored(config: Any, family: Any) -> dict[str, tuple[Any, str, tuple[int, ...]]]:
    """The tensors of a network's head in a file: name -> (its map, path below ``head``, shape).

    Args:
      config: configuration of the network with the head.
      family: the model family, which names the tensors.
    """
    wanted = tree.flatten(config.build().abstract())
    top = HEAD + tree.SEPARATOR
    return {
        name.tensor: (
            name,
            name.path.removeprefix(top),
            tuple(name.stored_shape(wanted[name.path].shape)),
        )
        for name in family.heads[config.head.kind].of(config)
        if name.path in wanted and name.path.startswith(top)
    }


def check_name(task: str) -> None:
    """Raises a ValueError for a task that cannot be the name of a file."""
    plain = task and Path(task).name == task and not task.startswith(".") and task.isprintable()
    if not plain or len(task.encode("utf-8", "replace")) > LONGEST:
        shown = task if len(task) <= 40 else task[:40] + "..."
        raise ValueError(
            f"a task's name must be able to name a file (at most {LONGEST} bytes, no folder, no "
            f"dot in front, nothing that does not print), got {shown!r}"
        )


def load(
    directory: str | os.PathLike[str], *, dtype: Any = "float32", plan: Any = None
) -> MultiHead:
    """Reads a folder that :func:`save` or ``stream.merge`` wrote.

    Args:
      dtype: of the floating-point parameters.
      plan: places the trunk's leaves; heads are replicated by it.

    Raises:
      FileNotFoundError: no such folder, no ``heads.json``, a head's file is missing.
      ValueError: ``heads.json`` is damaged, a head lacks a tensor or has one of another shape.
    """
    path = Path(directory).expanduser()
    trunk = pretrained.load(path, head=None, dtype=dtype, plan=plan)
    listing = path / HEADS
    if not listing.is_file():
        raise FileNotFoundError(f"{path} holds no {HEADS}; open it as a single model instead")
    entries = _entries(listing)
    config = trunk.model.config
    family = family_of(config.family)
    found = {}
    for task, entry in entries.items():
        check_name(task)
        if entry.get("kind") is None:
            raise ValueError(f"{listing} does not say what kind of head {task!r} has; add 'kind'")
        labels = entry.get("labels")
        fields = {f.name: entry[f.name] for f in dataclasses.fields(HeadConfig) if f.name in entry}
        try:
            own = HeadConfig(**fields)
            family.head(own.kind, own.num_labels, own.drop)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{listing}: the head {task!r} is damaged ({error}); {CURE}"
            ) from error
        file = path / FOLDER / f"{task}.safetensors"
        store = weights.Safetensors([file])
        shapes = store.shapes()
        leaves = {}
        for tensor, (name, path_, expected) in stored(config.with_head(own), family).items():
            if tuple(shapes.get(tensor, ())) != expected:
                raise ValueError(
                    f"{file}: tensor {tensor!r} must have shape {expected}, "
                    f"got {shapes.get(tensor, 'none')}"
                )
            values = store.read(tensor)
            if name.codec is not None:
                values = name.codec.load(values)
            elif name.transposed:
                values = values.T
            leaves[path_] = jnp.asarray(np.array(values), jnp.dtype(dtype))
        params = tree.unflatten(leaves)
        if plan is not None and params:
            params = plan.place({HEAD: params})[HEAD]
        found[task] = Head(own, params, None if labels is None else tuple(labels))
    return MultiHead(config, trunk.params, found)


def _entries(listing: Path) -> dict[str, dict[str, Any]]:
    """What ``heads.json`` says of every task.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        found = json.loads(listing.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{listing} is damaged ({error}); {CURE}") from error
    if not isinstance(found, dict) or not all(isinstance(e, dict) for e in found.values()):
        raise ValueError(f"{listing} is damaged (it must hold an object a task); {CURE}")
    return found


def evaluate(
    merged: MultiHead,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    tasks: Mapping[str, Any],
    **options: Any,
) -> dict[str, runner.EvalResult]:
    """Evaluates every task that batches are given for, with its own head.

    Args:
      batches: task -> batches, as ``evaluate.run`` takes them.
      tasks: task -> the data's description, as ``evaluate.run`` takes it.
      **options: passed on to ``evaluate.run``.

    Raises:
      ValueError: batches of a task that has no head or no description.
    """
    results = {}
    for task, given in batches.items():
        if task not in tasks:
            raise ValueError(f"batches are given for {task!r}, but no description of the task")
        model, params = merged.model(task)
        results[task] = runner.run(model, params, given, tasks[task], **options)
    return results
