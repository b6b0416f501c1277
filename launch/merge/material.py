"""The data of the tasks: scores of a split, and batches for methods that need some."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steppe.data import batches, collate
from steppe.data.text import Tokenizer
from steppe.launch import kinds, outputs, scoring, setup
from steppe.launch.config import DataConfig
from steppe.launch.merge.inputs import Part
from steppe.launch.pieces import rows_of
from steppe.models import pretrained
from steppe.models.model import Model
from steppe.models.tree import Params

# Metrics of which less is better.
LESS = ("perplexity", "loss")
# What a network reads; labels are never among them.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
ADAPTABLE = ("classification", "token")


@dataclass(frozen=True)
class Task:
    """One task: its data, encoded, and how it is scored.

    Attributes:
      name: of the task.
      kind: of the task, such as classification.
      metric: the one that stands for the task; less: whether a smaller value is better.
      data: settings.
      description: from ``steppe.data.tasks``.
      splits: split -> Dataset.
      rows: examples of a forward pass.
    """

    name: str
    kind: str
    metric: str
    less: bool
    data: DataConfig
    description: Any
    tokenizer: Tokenizer | None
    splits: Mapping[str, Any]
    rows: int

    def score(self, model: Model, params: Params, split: str) -> dict[str, float]:
        """Metrics of a split, names sorted as ``evaluate.run`` gives them."""
        passes = batches.evaluate(self.splits[split], self.rows, buckets=setup.buckets(self.data))
        dataset = self.splits[split]
        found = scoring.run(
            model, params, passes, self.description, dataset, self.tokenizer, self.data
        )
        return {name: float(value) for name, value in found.metrics.items()}

    def ratio(self, value: float, reference: float) -> float:
        """A score relative to a reference: 1 = as good, less = worse; NaN of a negative one."""
        above, below = (reference, value) if self.less else (value, reference)
        return above / below if below and reference >= 0 else float("nan")

    def draws(self, split: str, size: int, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
        """Batch number n of an endless, shuffled sequence of inputs of one shape, no labels."""
        dataset = self.splits[split]
        if getattr(dataset, "augment", None) is not None:
            dataset = dataclasses.replace(dataset, augment=None)
        plan = batches.Plan(dataset, size, self._length(dataset), seed)

        def one(number: int) -> dict[str, np.ndarray]:
            batch = plan.batch(number, slice(None))
            return {name: batch[name] for name in (*INPUTS, "example_index") if name in batch}

        return one

    def some(self, count: int, size: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """``count`` training examples in full batches of one shape, with labels where a
        regression needs them, and for texts to be written with the mask of what is written."""
        dataset = self.splits["train"]
        order = np.random.default_rng(seed).permutation(len(dataset))[:count]
        size = min(size, len(order))
        length = self._length(dataset)
        shape = batches.Plan(dataset, size, length, None).buckets[-1]
        more = {"regression": ("labels",), "seq2seq": ("labels", "label_mask")}
        names = (*INPUTS, *more.get(self.kind, ()))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            batch = collate.collate(dataset, rows, shape, seed=seed, epoch=0, train=False)
            yield {name: batch[name] for name in names if name in batch}

    def _length(self, dataset: Any) -> tuple[int, ...] | None:
        """The one padded length that holds all examples: one program whatever is drawn."""
        sizes = setup.buckets(self.data)
        if sizes is None:
            return None
        longest = int(dataset.lengths.max())
        return (min((s for s in sizes if s >= longest), default=sizes[-1]),)


def open_task(part: Part) -> Task:
    """Reads and encodes the data of a task, after checking it against the model's head.

    Raises:
      ValueError: the model has no head, or one of another task or other classes than the data;
        and whatever is wrong with the data.
    """
    assert part.data is not None
    loaded = pretrained.load(part.folder)
    head = loaded.model.config.head
    if head is None:
        raise ValueError(
            f"the model of {part.name} ({part.given}) has no head, so it cannot be scored; "
            "fine-tune it on its task, or merge the trunks alone with models that are no runs"
        )
    data = part.data
    named = tuple(loaded.labels or ())
    if not data.classes and named and not all(label.startswith("LABEL_") for label in named):
        data = dataclasses.replace(data, classes=named)
    bare = pretrained.load_config(part.folder)
    try:
        made = setup.prepare(data, setup.origin(str(part.folder)), bare)
    except (ValueError, KeyError) as error:
        reason = error.args[0] if error.args else error
        raise ValueError(
            f"the data of {part.name} ({data.source}) cannot be read as its task: {reason}"
        ) from error
    task = made.task
    if head.kind != kinds.head_of(task.kind):
        raise ValueError(
            f"the model of {part.name} has a {head.kind} head, but its data ({data.source}) is "
            f"a {task.kind} task; give the data that it was fine-tuned on"
        )
    if task.kind in ("classification", "token") and task.num_labels != head.num_labels:
        raise ValueError(
            f"the model of {part.name} knows {head.num_labels} classes "
            f"({', '.join(named)}), its data ({data.source}) has {task.num_labels} "
            f"({', '.join(task.label_names)})"
        )
    metric = outputs.HEADLINE[task.kind]
    rows = rows_of(loaded.model.config, task.kind, data.max_length)
    return Task(
        part.name,
        task.kind,
        metric,
        metric in LESS,
        data,
        task,
        made.tokenizer,
        made.splits,
        rows,
    )


def check_adaptable(tasks: Sequence[Task]) -> None:
    """
    Raises:
      ValueError: a task whose answers are no classes, so that they have no entropy.
    """
    for task in tasks:
        if task.kind not in ADAPTABLE:
            raise ValueError(
                f"{task.name} is a {task.kind} task; adaptation lowers the entropy of classes, "
                f"which {' and '.join(ADAPTABLE)} tasks have"
            )
