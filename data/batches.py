"""Batches in a global order that depends only on (data set, batch size, seed, buckets).

The order of an epoch is a pure function, :meth:`Plan.epoch`: permute the examples, deal them
to length buckets, cut each bucket into batches, pass what is left over to the next longer
bucket, pad the last batch of the longest, shuffle the batches. Every example comes exactly
once an epoch. Batch number n is therefore known without having made the n before it: the
state of an iterator is one number, resume is exact, and a process among several takes its
own rows of the same global batches.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from steppe.data.collate import Batch, ShapeReport, Size, buckets_of, collate, resolve_buckets
from steppe.data.dataset import Dataset
from steppe.data.errors import DataError

Backend = Literal["numpy", "grain"]
State = dict[str, int]


@runtime_checkable
class Batches(Protocol):
    """An iterator over batches that can say where it is and go there.

    Attributes:
      shapes: all (batch size, length) that it can give, before the split over processes; with
        targets (batch size, source, target), for images (batch size, height, width, channels).
    """

    shapes: frozenset[tuple[int, ...]]

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> State:
        """A few integers: what has been given so far."""
        ...

    def set_state(self, state: State) -> None:
        """Continues from a state, bitwise as if never interrupted."""
        ...


class Plan:
    """Which examples, padded to which length, make each batch.

    Attributes:
      buckets: padded lengths, see :func:`steppe.data.collate.resolve_buckets`.
      steps_per_epoch: batches in one pass; the same in every epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        buckets: Sequence[Size] | int | None,
        seed: int | None,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be >= 1, got {batch_size}")
        if seed is not None and not 0 <= seed < 2**63:
            raise DataError(f"seed must be in [0, 2**63), got {seed}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.buckets = resolve_buckets(dataset, buckets)
        self.seed = seed
        self._bucket = buckets_of(dataset, self.buckets)
        # Caching on the instance: lru_cache on the method would keep all plans alive.
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self.steps_per_epoch = len(self.epoch(0)[0])

    @property
    def shapes(self) -> frozenset[tuple[int, ...]]:
        """All (batch size, length) of a pass; see :class:`Batches`."""
        return frozenset((self.batch_size, *_sizes(held)) for held in self.epoch(0)[1])

    @cached_property
    def content(self) -> int:
        """Checksum of what is learnt: inputs, labels and masks."""
        value = 0
        for part in self.dataset.content():
            value = zlib.crc32(np.ascontiguousarray(part).data, value)
        return value

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Example indices [steps, B] (-1 is padding) and sizes of one epoch.

        The sizes are lengths [steps], or [steps, 2] for (source, target) and [steps, 3] for
        images.
        """
        order = np.arange(len(self.dataset))
        generator = None
        if self.seed is not None:
            generator = np.random.Generator(
                np.random.Philox(np.random.SeedSequence((self.seed, epoch)))
            )
            order = generator.permutation(order)
        rows: list[np.ndarray] = []
        rest = np.zeros(0, order.dtype)
        for number in range(len(self.buckets)):
            mine = np.concatenate([rest, order[self._bucket[order] == number]])
            whole = len(mine) // self.batch_size * self.batch_size
            rows.append(mine[:whole].reshape(-1, self.batch_size))
            rest = mine[whole:]
            if number == len(self.buckets) - 1 and len(rest):
                last = np.full((1, self.batch_size), -1, order.dtype)
                last[0, : len(rest)] = rest
                rows.append(last)
        table = np.concatenate(rows)
        # A batch needs no more than the bucket of its longest row (the last one was passed on).
        need = np.where(table >= 0, self._bucket[table], 0).max(axis=1)
        held = np.asarray(self.buckets)[need]
        if generator is not None:
            shuffle = generator.permutation(len(table))
            table, held = table[shuffle], held[shuffle]
        return table, held

    def batch(self, number: int, rows: slice | np.ndarray) -> Batch:
        """Batch `number` of the endless sequence, or the given rows of it."""
        epoch, step = divmod(number, self.steps_per_epoch)
        table, sizes = self.epoch(epoch)
        size = _sizes(sizes[step])
        return collate(
            self.dataset,
            table[step][rows],
            size if len(size) > 1 else size[0],
            seed=self.seed or 0,
            epoch=epoch,
            train=self.seed is not None,
        )

    def report(self) -> ShapeReport:
        """Shapes and padding of one pass."""
        counts = Counter((self.batch_size, *_sizes(size)) for size in self.epoch(0)[1])
        tokens, batches = int(self.dataset.lengths.sum()), sum(counts.values())
        if self.dataset.pixel_values is not None:
            return ShapeReport(dict(counts), tokens, batches * self.batch_size)
        if self.dataset.target_lengths is not None:
            tokens += int(self.dataset.target_lengths.sum())
        padded = sum(shape[0] * sum(shape[1:]) * count for shape, count in counts.items())
        return ShapeReport(dict(counts), tokens, padded)


def _sizes(held: np.ndarray) -> tuple[int, ...]:
    """One batch's size as plain integers."""
    return tuple(int(size) for size in np.atleast_1d(held))


def train(
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    buckets: Sequence[Size] | int | None = None,
    backend: Backend = "numpy",
    process_index: int = 0,
    process_count: int = 1,
    rows: np.ndarray | None = None,
) -> TrainBatches:
    """Endless shuffled batches for training.

    Args:
      batch_size: global: rows of all processes together.
      seed: of the order, of the masks of MaskedLM and of the augmentation of images.
      buckets: padded lengths, or how many to choose (default 4), see
        :func:`steppe.data.collate.resolve_buckets`.
      backend: "numpy" makes a batch when asked; "grain" prefetches on threads. Same batches.
      process_index, process_count: this process gets the contiguous rows
        ``[index * B / count, (index + 1) * B / count)`` of every global batch.
      rows: in their place, numbers of the rows of every global batch that this process gets.

    Raises:
      DataError: bad sizes, an example longer than the longest bucket, or `batch_size` not
        divisible by `process_count`.
    """
    plan = Plan(dataset, batch_size, buckets, seed)
    own = _share(batch_size, process_index, process_count) if rows is None else rows
    if backend == "grain":
        from steppe.data.prefetch import GrainBatches

        return GrainBatches(plan, own)
    if backend != "numpy":
        raise DataError(f"backend must be 'numpy' or 'grain', got {backend!r}")
    return TrainBatches(plan, own)


def evaluate(
    dataset: Dataset,
    batch_size: int,
    *,
    buckets: Sequence[Size] | int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """One pass in order of length bucket; the last batch is padded with weight-0 rows.

    ``for`` starts over each time; after ``set_state`` go on with ``next``. ``example_index`` in
    each batch says which example is where.

    Raises:
      DataError: as :func:`train`.
    """
    plan = Plan(dataset, batch_size, buckets, None)
    return EvalBatches(plan, _share(batch_size, process_index, process_count))


def _share(batch_size: int, index: int, count: int) -> slice:
    if not 0 <= index < count:
        raise DataError(f"process_index must be in [0, {count}), got {index}")
    if batch_size % count:
        raise DataError(
            f"batch_size {batch_size} is not divisible by the {count} processes; "
            f"use {batch_size // count * count or count} or {(batch_size // count + 1) * count}"
        )
    rows = batch_size // count
    return slice(index * rows, (index + 1) * rows)


class TrainBatches:
    """Endless batches; implements :class:`Batches`. Made by :func:`train`."""

    def __init__(self, plan: Plan, rows: slice | np.ndarray) -> None:
        self.plan = plan
        self.shapes = plan.shapes
        self.steps_per_epoch = plan.steps_per_epoch
        self._rows = rows
        self._next = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.plan.batch(self._next, self._rows)
        self._next += 1
        return batch

    def get_state(self) -> State:
        """Batches given so far, and what the order depends on."""
        return {"batch": self._next, **_identity(self.plan)}

    def set_state(self, state: State) -> None:
        """Continues after ``state["batch"]`` batches.

        Raises:
          DataError: the state is of another seed, batch size or data set, so that the order
            would differ.
        """
        self._next = checked(state, self.plan)


class EvalBatches:
    """Batches of one pass; implements :class:`Batches`. Made by :func:`evaluate`."""

    def __init__(self, plan: Plan, rows: slice) -> None:
        self.plan = plan
        self.shapes = plan.shapes
        self._rows = rows
        self._next = 0

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        self._next = 0
        return self

    def __next__(self) -> Batch:
        if self._next >= len(self):
            raise StopIteration
        batch = self.plan.batch(self._next, self._rows)
        self._next += 1
        return batch

    def get_state(self) -> State:
        """Batches given so far, and what the order depends on."""
        return {"batch": self._next, **_identity(self.plan)}

    def set_state(self, state: State) -> None:
        """Continues after ``state["batch"]`` batches; raises as :meth:`TrainBatches.set_state`."""
        self._next = checked(state, self.plan)


def _identity(plan: Plan) -> dict[str, int]:
    """What the order depends on, as integers that are cheap to compare."""
    fingerprint = zlib.crc32(plan.dataset.lengths.astype("<i8").tobytes())
    fingerprint = zlib.crc32(np.asarray(plan.buckets, "<i8").tobytes(), fingerprint)
    return {
        "seed": -1 if plan.seed is None else plan.seed,
        "batch_size": plan.batch_size,
        "examples": len(plan.dataset),
        "lengths": fingerprint,
        "content": plan.content,
    }


def checked(state: State, plan: Plan) -> int:
    """The position that a state holds, if it was made with the same order.

    Raises:
      DataError: it was not; names what differs.
    """
    for name, value in _identity(plan).items():
        if state.get(name) != value:
            what = "lengths or buckets" if name == "lengths" else name
            raise DataError(
                f"the saved data state has another {what} ({state.get(name)}, here {value}): the "
                "order of the batches would differ; resume with the same data and settings"
            )
    if state.get("batch", -1) < 0:
        raise DataError(f"the saved data state has no position 'batch' >= 0: {state}")
    return state["batch"]
