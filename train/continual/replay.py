"""Replay: some examples of every earlier task among those of the current one.

Which examples are remembered depends on their ids and the seed only, so a stream that is gone on
with remembers the same ones.

Chaudhry et al. 2019, On Tiny Episodic Memories in Continual Learning, arXiv 1902.10486.

Deviations: the memory is joined to the task's data and drawn with it, an example once an epoch;
published variants draw half of every batch from the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from steppe.data import splits
from steppe.data.dataset import Dataset, Ragged


def remember(dataset: Dataset, count: int, seed: int = 0) -> Dataset:
    """``count`` examples by the hash of their ids, in the order of the data; all where it is less.

    Raises:
      ValueError: count < 1.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    places = [splits.position(str(i), f"memory {seed}") for i in dataset.ids]
    chosen = sorted(sorted(range(len(places)), key=places.__getitem__)[:count])
    return taken(dataset, chosen)


def taken(dataset: Dataset, rows: Sequence[int]) -> Dataset:
    """Some examples of a data set of texts with one label each.

    Raises:
      ValueError: another kind of data.
    """
    _check(dataset)
    index = np.asarray(rows, np.int64)
    labels: Any = dataset.labels
    return dataclasses.replace(
        dataset,
        input_ids=_pick(dataset.input_ids, index),
        token_type_ids=_pick(dataset.token_type_ids, index),
        labels=np.asarray(labels)[index],
        ids=[dataset.ids[i] for i in index],
        record_index=dataset.record_index[index],
    )


def joined(parts: Sequence[Dataset]) -> Dataset:
    """Data sets of texts with one label each as one, in this order; labels mean the same in all.

    Raises:
      ValueError: none, other kinds of data, or texts that were encoded in different ways.
    """
    if not parts:
        raise ValueError("parts must hold at least one data set, got none")
    first = parts[0]
    for part in parts:
        _check(part)
        typed = part.token_type_ids is not None
        if part.pad_id != first.pad_id or typed != (first.token_type_ids is not None):
            raise ValueError("the data sets were encoded by different tokenizers; use one for all")
    counts = np.cumsum([0, *(len(part.records) for part in parts[:-1])])
    labels: list[Any] = [part.labels for part in parts]
    return dataclasses.replace(
        first,
        input_ids=_concatenated([part.input_ids for part in parts]),
        token_type_ids=_concatenated([part.token_type_ids for part in parts]),
        labels=np.concatenate(labels),
        ids=[i for part in parts for i in part.ids],
        records=[record for part in parts for record in part.records],
        record_index=np.concatenate(
            [part.record_index + count for part, count in zip(parts, counts, strict=True)]
        ),
        cut=sum(part.cut for part in parts),
        dropped=sum(part.dropped for part in parts),
    )


def _check(dataset: Dataset) -> None:
    if dataset.kind not in ("classification", "regression") or dataset.input_ids is None:
        raise ValueError(
            f"replay takes texts with one label each, got examples of kind {dataset.kind!r}"
            + (" without tokens" if dataset.input_ids is None else "")
        )


def _pick(rows: Ragged | None, index: np.ndarray) -> Ragged | None:
    if rows is None:
        return None
    return Ragged.pack([rows[int(i)] for i in index], rows.flat.dtype)


def _concatenated(rows: Sequence[Ragged | None]) -> Ragged | None:
    held = [part for part in rows if part is not None]
    if not held:
        return None
    lengths = np.concatenate([part.lengths for part in held])
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Ragged(np.concatenate([part.flat for part in held]), starts)
