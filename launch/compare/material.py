"""The data of a comparison: splits of a source, draws of training examples, wrong labels."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from steppe.data import splits
from steppe.launch import setup
from steppe.launch.compare.settings import Cell, CompareConfig
from steppe.launch.config import DataConfig


@dataclass(frozen=True)
class Source:
    """One source, read and divided.

    Attributes:
      task: from ``steppe.data.tasks``.
      settings: data settings for it.
      rows: records that training examples are drawn from.
      valid, test: encoded; the same for all trials.
    """

    task: Any
    settings: DataConfig
    rows: list[dict[str, Any]]
    valid: Any
    test: Any


class Material:
    """Reads every source once."""

    def __init__(self, config: CompareConfig, origin: setup.Origin, bare: Any) -> None:
        """
        Args:
          origin, bare: where the model is and its configuration without a head.
        """
        self.config = config
        self._origin, self._bare = origin, bare
        self.source = functools.lru_cache(maxsize=None)(self._source)
        self.whole = functools.lru_cache(maxsize=None)(self._whole)
        # One cell and seed at a time, as the schedule has them.
        self.draw = functools.lru_cache(maxsize=1)(self._draw)

    def settings(self, address: str, found: list[dict[str, Any]]) -> DataConfig:
        """Data settings of a source; groups are kept together where it has them."""
        base = self.config.base.data
        group = base.group if found and base.group in found[0] else ""
        return dataclasses.replace(base, source=address, group=group)

    def _source(self, address: str) -> Source:
        found = setup.records(dataclasses.replace(self.config.base.data, source=address))
        settings = self.settings(address, found)
        tokenizer = setup.fitting(settings, self._origin, self._bare)
        task = setup.task(settings, found, getattr(self._bare, "image_size", 224))
        parts = setup.divide(settings, found)
        parts["valid"] = setup.first(parts["valid"], self.config.valid_limit)

        def encode(name: str) -> Any:
            return setup.encode(task, parts[name], tokenizer, settings, training=False)

        return Source(task, settings, parts["train"], encode("valid"), encode("test"))

    def _whole(self, address: str) -> tuple[Any, Any]:
        """Task and encoded examples of a source that nothing is trained on."""
        found = setup.records(dataclasses.replace(self.config.base.data, source=address))
        settings = self.settings(address, found)
        tokenizer = setup.fitting(settings, self._origin, self._bare)
        task = setup.task(settings, found, getattr(self._bare, "image_size", 224))
        few = setup.first(found, self.config.transfer_limit)
        return task, setup.encode(task, few, tokenizer, settings, training=False)

    def open(self) -> None:
        """Reads everything, so that a mistake is found before anything is trained.

        Raises:
          ValueError, OSError: a source that cannot be read, or is too small.
        """
        for cell in self.config.cells():
            self._large_enough(cell)
        for address in self.config.transfer:
            self.whole(address)

    def _large_enough(self, cell: Cell) -> Source:
        source = self.source(cell.source)
        if self.config.per_class:
            name, rows = min(classes(source).items(), key=lambda pair: len(pair[1]))
            if cell.size > len(rows):
                raise ValueError(
                    f"sizes={cell.size} is more than the {len(rows)} training examples of class "
                    f"{name!r} of {cell.source}; take fewer"
                )
        elif cell.size > len(source.rows):
            raise ValueError(
                f"sizes={cell.size} is more than the {len(source.rows)} training examples of "
                f"{cell.source}; 0 takes all"
            )
        return source

    def _draw(self, cell: Cell, seed: int) -> setup.Data:
        """The data of all trials of a cell and seed.

        Raises:
          ValueError: the source has fewer training examples than the cell asks for.
        """
        source = self._large_enough(cell)
        rows = setup.first(source.rows, cell.size)
        if self.config.per_class:
            each = (drawn(of, cell.size, f"draw {seed}") for of in classes(source).values())
            chosen = {str(row["id"]) for few in each for row in few}
            rows = [row for row in source.rows if str(row["id"]) in chosen]
        elif self.config.resample and cell.size:
            rows = drawn(source.rows, cell.size, f"draw {seed}")
        tokenizer = setup.fitting(source.settings, self._origin, self._bare)
        train = setup.encode(source.task, rows, tokenizer, source.settings, training=True)
        if cell.noise:
            labels = wrong_labels(train.labels, train.ids, source.task.num_labels, cell.noise, seed)
            train = dataclasses.replace(train, labels=labels)
        parts = {"train": train, "valid": source.valid, "test": source.test}
        return setup.Data(source.task, tokenizer, parts, cell.source)


def classes(source: Source) -> dict[str, list[dict[str, Any]]]:
    """The training rows of a source by their label."""
    out: dict[str, list[dict[str, Any]]] = {}
    for row in source.rows:
        out.setdefault(str(row[source.settings.label]), []).append(row)
    return out


def drawn(rows: list[dict[str, Any]], count: int, salt: str) -> list[dict[str, Any]]:
    """``count`` rows by the hash of their ids, in the order of the data; another salt, others."""
    places = [splits.position(str(row["id"]), salt) for row in rows]
    chosen = sorted(sorted(range(len(rows)), key=places.__getitem__)[:count])
    return [rows[i] for i in chosen]


def wrong_labels(labels: np.ndarray, ids: Any, classes: int, share: float, seed: int) -> np.ndarray:
    """Labels of which a share is replaced by another class, each with the same probability.

    Args:
      labels: [N] class numbers.
      ids: of the examples; which are replaced, and by what, depends on them and the seed only.
      classes: number of classes.
      share: of the labels, rounded to a whole number of examples.
    """
    places = np.array([splits.position(str(i), f"wrong {seed}") for i in ids])
    which = np.argsort(places, kind="stable")[: round(share * len(ids))]
    steps = [1 + int(splits.position(str(ids[i]), f"class {seed}") * (classes - 1)) for i in which]
    out = np.array(labels)
    out[which] = (out[which] + np.array(steps, out.dtype)) % classes
    return out
