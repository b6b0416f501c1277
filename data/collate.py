"""Length buckets and padding: examples to batches of a few static shapes.

Every distinct (batch, length) shape costs one compilation. Examples are padded to the
smallest of a few bucket lengths, so the number of shapes is at most the number of buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from steppe.data.dataset import Dataset, Ragged
from steppe.data.errors import DataError

Batch = dict[str, np.ndarray]


def choose_buckets(
    lengths: Int[np.ndarray, " n"] | Sequence[int], count: int = 4, multiple: int = 8
) -> tuple[int, ...]:
    """The at most `count` bucket lengths that give the fewest padded tokens.

    Exact, by dynamic programming over the multiples of `multiple` up to the longest example.

    Raises:
      DataError: no lengths, or `count` or `multiple` below 1.
    """
    if count < 1 or multiple < 1:
        raise DataError(f"count and multiple must be >= 1, got {count} and {multiple}")
    if not len(lengths):
        raise DataError("cannot choose buckets without examples")
    steps = -(-np.maximum(np.asarray(lengths), 1) // multiple)
    held = np.bincount(steps)
    sizes = np.flatnonzero(held)  # only lengths that occur can be the top of a good bucket
    below = np.concatenate([[0], np.cumsum(held[sizes])])
    # cost[j]: padded tokens of the first j sizes; the last bucket is sizes[j - 1].
    cost = np.concatenate([[0.0], np.full(len(sizes), np.inf)])
    picks: list[np.ndarray] = []
    for _ in range(min(count, len(sizes))):
        table = cost[:, None] + (below[None, 1:] - below[:, None]) * sizes[None, :]
        table[np.arange(len(cost))[:, None] > np.arange(len(sizes))[None, :]] = np.inf
        pick = table.argmin(axis=0)
        better = table[pick, np.arange(len(sizes))]
        cost = np.concatenate([[0.0], better])
        picks.append(pick)
    chosen = []
    end = len(sizes)
    for pick in reversed(picks):
        if end == 0:
            break
        chosen.append(int(sizes[end - 1]) * multiple)
        end = int(pick[end - 1])
    return tuple(sorted(chosen))


def resolve_buckets(
    dataset: Dataset, buckets: Sequence[int] | int | None, *, multiple: int = 8
) -> tuple[int, ...]:
    """Bucket lengths as given, or chosen for the data set (an int is how many; None is 4).

    Raises:
      DataError: not increasing, or an example is longer than the longest (it is named).
    """
    if buckets is None or isinstance(buckets, int):
        count = 4 if buckets is None else buckets
        return choose_buckets(dataset.lengths, count, multiple)
    chosen = tuple(int(length) for length in buckets)
    if not chosen or chosen[0] < 1 or any(a >= b for a, b in pairwise(chosen)):
        raise DataError(f"buckets must be increasing lengths >= 1, got {list(buckets)}")
    longest = int(dataset.lengths.argmax())
    if dataset.lengths[longest] > chosen[-1]:
        raise DataError(
            f"example {longest} (id {dataset.ids[longest]!r}) has {dataset.lengths[longest]} "
            f"tokens, the longest bucket {chosen[-1]}; add a bucket or lower max_length"
        )
    return chosen


def bucket_of(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """Index of the smallest bucket that holds each length."""
    return np.searchsorted(np.asarray(buckets), lengths, side="left")


def collate(
    dataset: Dataset, rows: np.ndarray, length: int, *, seed: int = 0, epoch: int = 0
) -> Batch:
    """Makes one batch.

    Args:
      rows: example indices [B]; -1 makes a padding row: all weights 0 there.
      length: T, at least the longest of the examples.
      seed, epoch: choose the masks of a MaskedLM data set; without effect on other kinds.

    Returns:
      ``input_ids, attention_mask[, token_type_ids]`` int32 [B, T], ``labels``, ``label_mask``
      float32, ``example_index`` int32 [B]. A padding row attends to its first token, so that
      no attention is over nothing.
    """
    size = len(rows)
    held = [(place, int(row)) for place, row in enumerate(rows) if row >= 0]
    ids = np.full((size, length), dataset.pad_id, np.int32)
    attention = np.zeros((size, length), np.int32)
    attention[:, 0] = 1
    batch: Batch = {"input_ids": ids, "attention_mask": attention}
    for place, row in held:
        tokens = dataset.input_ids[row]
        ids[place, : len(tokens)] = tokens
        attention[place, : len(tokens)] = 1
    if dataset.token_type_ids is not None:
        batch["token_type_ids"] = _padded(dataset.token_type_ids, held, size, length, np.int32)
    batch["labels"], batch["label_mask"] = _labels(dataset, held, size, length)
    if dataset.masking is not None:
        for place, row in held:
            tokens = dataset.input_ids[row]
            corrupted, labels, mask = dataset.masking(tokens, seed=seed, epoch=epoch, index=row)
            ids[place, : len(tokens)] = corrupted
            batch["labels"][place, : len(tokens)] = labels
            batch["label_mask"][place, : len(tokens)] = mask
    batch["example_index"] = np.asarray(rows, np.int32)
    return batch


def _labels(
    dataset: Dataset, held: list[tuple[int, int]], size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    if dataset.labels is None:  # mlm: filled in by the masking
        return np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
    if isinstance(dataset.labels, Ragged):
        if dataset.label_mask is None:
            raise DataError(f"a {dataset.kind!r} data set with a label a token needs a label_mask")
        labels = _padded(dataset.labels, held, size, length, np.int32)
        return labels, _padded(dataset.label_mask, held, size, length, np.float32)
    labels = np.zeros((size, *dataset.labels.shape[1:]), dataset.labels.dtype)
    mask = np.zeros(size, np.float32)
    for place, row in held:
        labels[place] = dataset.labels[row]
        mask[place] = 1.0
    return labels, mask


def _padded(
    rows: Ragged, held: list[tuple[int, int]], size: int, length: int, dtype: type
) -> np.ndarray:
    out: np.ndarray = np.zeros((size, length), dtype)
    for place, row in held:
        values = rows[row]
        out[place, : len(values)] = values
    return out


@dataclass(frozen=True)
class ShapeReport:
    """What a choice of buckets costs in one pass.

    Attributes:
      shapes: batches of each (batch size, length).
      tokens, padded: tokens of the examples, and of the batches with their padding.
    """

    shapes: dict[tuple[int, int], int]
    tokens: int
    padded: int

    def __str__(self) -> str:
        parts = [f"{b}x{t}: {n}" for (b, t), n in sorted(self.shapes.items())]
        waste = 1 - self.tokens / self.padded
        return f"{len(parts)} shapes ({', '.join(parts)} batches), {waste:.0%} padding"
