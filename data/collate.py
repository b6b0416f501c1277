"""Length buckets and padding: examples to batches of a few static shapes.

Every distinct (batch, length) shape costs one compilation. Examples are padded to the
smallest of a few bucket lengths, so the number of shapes is at most the number of buckets.
Examples with a source and a target have buckets of pairs (source, target) that grow in both,
so a bucket's batches still fit into the next. Packed rows and images have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from steppe.data.dataset import Dataset, Ragged
from steppe.data.errors import DataError
from steppe.data.packing import restarting_positions

Batch = dict[str, np.ndarray]
# What one batch is padded to: a length; (source, target); (height, width, channels).
Size = int | tuple[int, ...]


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
    return tuple(int(sizes[pick]) * multiple for pick in _best_tops(below, sizes, count))


def _best_tops(below: np.ndarray, sizes: np.ndarray, count: int) -> list[int]:
    """Which of increasing sizes to keep so that rounding up to them costs least.

    Args:
      below: [len(sizes) + 1] examples in the first j sizes.
      sizes: what an example costs that is padded to it.
      count: how many may be kept.
    """
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
        chosen.append(end - 1)
        end = int(pick[end - 1])
    return sorted(chosen)


def resolve_buckets(
    dataset: Dataset, buckets: Sequence[Size] | int | None, *, multiple: int = 8
) -> tuple[Size, ...]:
    """Bucket sizes as given, or chosen for the data set (an int is how many; None is 4).

    With targets the buckets are pairs (source, target); a single length stands for both. Packed
    rows always have their own length and images their own size, whatever is given.

    Raises:
      DataError: not increasing, or an example is longer than the longest (it is named).
    """
    if dataset.pixel_values is not None:
        return (tuple(dataset.pixel_values.shape[1:]),)
    if dataset.packing is not None:
        return (dataset.packing.row_length,)
    if dataset.target_lengths is not None:
        return _resolve_pairs(dataset, dataset.target_lengths, buckets, multiple)
    if buckets is None or isinstance(buckets, int):
        count = 4 if buckets is None else buckets
        return choose_buckets(dataset.lengths, count, multiple)
    if not all(np.ndim(length) == 0 for length in buckets):
        raise DataError(
            f"a {dataset.kind!r} data set has one length an example, but buckets holds "
            f"{list(buckets)}; give single lengths"
        )
    chosen = tuple(int(length) for length in buckets)  # type: ignore[arg-type]
    if not chosen or chosen[0] < 1 or any(a >= b for a, b in pairwise(chosen)):
        raise DataError(f"buckets must be increasing lengths >= 1, got {list(buckets)}")
    longest = int(dataset.lengths.argmax())
    if dataset.lengths[longest] > chosen[-1]:
        raise DataError(
            f"example {longest} (id {dataset.ids[longest]!r}) has {dataset.lengths[longest]} "
            f"tokens, the longest bucket {chosen[-1]}; add a bucket or lower max_length"
        )
    return chosen


def choose_pairs(
    sources: Int[np.ndarray, " n"],
    targets: Int[np.ndarray, " n"],
    count: int = 4,
    multiple: int = 8,
) -> tuple[tuple[int, int], ...]:
    """At most `count` (source, target) buckets that grow in both lengths.

    Examples are ordered by ``max(source, target x mean source / mean target)``, the length that
    both have at the usual ratio. The candidates are the sizes that hold the first k of them,
    k = 1..N; of these the best are kept, by the dynamic programme of :func:`choose_buckets`.

    Raises:
      DataError: count or multiple below 1.
    """
    if count < 1 or multiple < 1:
        raise DataError(f"count and multiple must be >= 1, got {count} and {multiple}")
    joint = np.maximum(sources, targets * (sources.mean() / targets.mean()))
    order = np.argsort(joint, kind="stable")
    chain = np.stack([np.maximum.accumulate(lengths[order]) for lengths in (sources, targets)], 1)
    pairs, counts = np.unique(-(-chain // multiple) * multiple, axis=0, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    tops = _best_tops(below, pairs.sum(axis=1), count)
    return tuple((int(pairs[top, 0]), int(pairs[top, 1])) for top in tops)


def _resolve_pairs(
    dataset: Dataset, targets: np.ndarray, buckets: Sequence[Size] | int | None, multiple: int
) -> tuple[Size, ...]:
    if buckets is None or isinstance(buckets, int):
        count = 4 if buckets is None else buckets
        return choose_pairs(dataset.lengths, targets, count, multiple)
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in buckets]
    grows = all(a[0] <= b[0] and a[-1] <= b[-1] and a != b for a, b in pairwise(pairs))
    if not pairs or not grows or any(len(p) != 2 or min(p) < 1 for p in pairs):
        raise DataError(
            "buckets must be lengths >= 1, or pairs (source, target) that increase in both, "
            f"got {list(buckets)}"
        )
    for name, lengths, limit in (
        ("source", dataset.lengths, pairs[-1][0]),
        ("target", targets, pairs[-1][1]),
    ):
        longest = int(lengths.argmax())
        if lengths[longest] > limit:
            raise DataError(
                f"example {longest} (id {dataset.ids[longest]!r}) has {lengths[longest]} {name} "
                f"tokens, the longest bucket {limit}; add a bucket or lower max_length"
            )
    return tuple(pairs)


def buckets_of(dataset: Dataset, buckets: Sequence[Size]) -> np.ndarray:
    """Index of the smallest bucket that holds each example: [N]."""
    if dataset.pixel_values is not None:
        return np.zeros(len(dataset), np.int64)
    if dataset.target_lengths is None:
        return bucket_of(dataset.lengths, buckets)  # type: ignore[arg-type]
    sources, targets = np.asarray(buckets).T
    return np.maximum(
        bucket_of(dataset.lengths, sources), bucket_of(dataset.target_lengths, targets)
    )


def bucket_of(lengths: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """Index of the smallest bucket that holds each length."""
    return np.searchsorted(np.asarray(buckets), lengths, side="left")


def collate(
    dataset: Dataset,
    rows: np.ndarray,
    length: Size,
    *,
    seed: int = 0,
    epoch: int = 0,
    train: bool = True,
) -> Batch:
    """Makes one batch.

    Args:
      rows: example indices [B]; -1 makes a padding row: all weights 0 there.
      length: T, at least the longest of the examples; (S, U) for a data set with targets; of no
        effect for images.
      seed, epoch: choose the masks of a MaskedLM data set and the augmentation of images;
        without effect on other kinds.
      train: whether images are augmented.

    Returns:
      ``input_ids, attention_mask[, token_type_ids]`` int32 [B, T], ``labels``, ``label_mask``
      float32, ``example_index`` int32 [B]. Packed rows also have ``segment_ids`` and
      ``position_ids``; targets are ``labels`` [B, U]; images have ``pixel_values`` uint8
      [B, H, W, 3] in place of tokens. A padding row attends to its first token, so that no
      attention is over nothing.
    """
    held = [(place, int(row)) for place, row in enumerate(rows) if row >= 0]
    if dataset.input_ids is None:
        return _images(dataset, rows, held, seed=seed, epoch=epoch, train=train)
    width, target = (length, length) if isinstance(length, int) else (length[0], length[-1])
    size = len(rows)
    ids = np.full((size, width), dataset.pad_id, np.int32)
    attention = np.zeros((size, width), np.int32)
    attention[:, 0] = 1
    batch: Batch = {"input_ids": ids, "attention_mask": attention}
    for place, row in held:
        tokens = dataset.input_ids[row]
        ids[place, : len(tokens)] = tokens
        attention[place, : len(tokens)] = 1
    if dataset.token_type_ids is not None:
        batch["token_type_ids"] = _padded(dataset.token_type_ids, held, size, width, np.int32)
    if dataset.segment_ids is not None:
        segments = _padded(dataset.segment_ids, held, size, width, np.int32)
        batch["position_ids"] = restarting_positions(segments)
        segments[:, 0] = 1  # a padding row is one segment of one token
        batch["segment_ids"] = segments
    batch["labels"], batch["label_mask"] = _labels(dataset, held, size, target)
    if dataset.masking is not None:
        for place, row in held:
            tokens = dataset.input_ids[row]
            corrupted, labels, mask = dataset.masking(tokens, seed=seed, epoch=epoch, index=row)
            ids[place, : len(tokens)] = corrupted
            batch["labels"][place, : len(tokens)] = labels
            batch["label_mask"][place, : len(tokens)] = mask
    batch["example_index"] = np.asarray(rows, np.int32)
    return batch


def _images(
    dataset: Dataset,
    rows: np.ndarray,
    held: list[tuple[int, int]],
    *,
    seed: int,
    epoch: int,
    train: bool,
) -> Batch:
    if dataset.pixel_values is None:
        raise DataError("the data set has neither input_ids nor pixel_values")
    pixels = np.zeros((len(rows), *dataset.pixel_values.shape[1:]), np.uint8)
    for place, row in held:
        image = dataset.pixel_values[row]
        if train and dataset.augment is not None:
            image = dataset.augment(image, seed=seed, epoch=epoch, index=row)
        pixels[place] = image
    labels, mask = _labels(dataset, held, len(rows), 0)
    index = np.asarray(rows, np.int32)
    return {"pixel_values": pixels, "labels": labels, "label_mask": mask, "example_index": index}


def _labels(
    dataset: Dataset, held: list[tuple[int, int]], size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    if dataset.labels is None:  # mlm: filled in by the masking
        return np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
    if isinstance(dataset.labels, Ragged):
        labels = _padded(dataset.labels, held, size, length, np.int32)
        if dataset.label_mask is not None:
            return labels, _padded(dataset.label_mask, held, size, length, np.float32)
        if dataset.kind != "seq2seq":
            raise DataError(f"a {dataset.kind!r} data set with a label a token needs a label_mask")
        counted = np.zeros((size, length), np.float32)
        for place, row in held:
            counted[place, : len(dataset.labels[row])] = 1.0
        return labels, counted
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
      shapes: batches of each (batch size, length), (batch size, source, target) or (batch size,
        height, width, channels).
      tokens, padded: tokens of the examples, and of the batches with their padding, targets
        included; for images, images.
    """

    shapes: dict[tuple[int, ...], int]
    tokens: int
    padded: int

    def __str__(self) -> str:
        parts = [f"{'x'.join(map(str, s))}: {n}" for s, n in sorted(self.shapes.items())]
        waste = 1 - self.tokens / self.padded
        return f"{len(parts)} shapes ({', '.join(parts)} batches), {waste:.0%} padding"
