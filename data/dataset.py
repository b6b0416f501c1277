"""Encoded examples: ragged token ids in one flat array, labels, and the way back to records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from steppe.data.errors import DataError

if TYPE_CHECKING:
    from steppe.data.packing import Packing

Labels = np.ndarray


class Example(TypedDict):
    """One example, not padded."""

    input_ids: Int32[np.ndarray, " t"] | None
    token_type_ids: Int32[np.ndarray, " t"] | None
    labels: Any
    label_mask: Any
    record: int


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array; row i is ``flat[starts[i] : starts[i + 1]]``."""

    flat: np.ndarray
    starts: Int64[np.ndarray, " n_plus_1"]

    @classmethod
    def pack(cls, rows: Iterable[Sequence[Any] | np.ndarray], dtype: Any) -> Ragged:
        """Packs rows; each may also hold tuples of equal length."""
        held = [np.asarray(row, dtype) for row in rows]
        starts = np.zeros(len(held) + 1, np.int64)
        np.cumsum([len(row) for row in held], out=starts[1:])
        return cls(np.concatenate(held) if held else np.zeros(0, dtype), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> Int64[np.ndarray, " n"]:
        """Length of every row."""
        return np.diff(self.starts)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Encoded examples of one task.

    Attributes:
      kind: the task's kind.
      input_ids: token ids, special tokens included, not padded; None for images.
      token_type_ids: 0 or 1 a token; None where the model has no token types.
      labels: by kind: classification int32 [N]; regression float32 [N]; span int32 [N, 2];
        token: :class:`Ragged` int32 a token; mlm: None, made with the batch; lm: the
        ``input_ids`` themselves; seq2seq: :class:`Ragged` int32, the target's tokens.
      label_mask: token and lm: :class:`Ragged` 0/1 a token, 1 where a label counts; None
        elsewhere: all count.
      record_index: the record that each example comes from (a span record, or a long document,
        may give several); of a packed row the first, ``packing`` knows all.
      ids: the records' ids, one an example.
      records: the records themselves, for reports and text metrics.
      pad_id: fills the padding of ``input_ids``.
      cut: number of examples that did not fit in ``max_length`` and were cut.
      masking: mlm only: makes inputs and labels of a row from (seed, epoch, example index).
      offsets: span only: (start, end) characters in the context of each token, (0, 0) for
        tokens that are no context.
      dropped: number of records that give no example.
      packing: packed lm only: which documents stand in which row, numbered as the records.
      segment_ids: packed lm only: number of its document in the row for each token, from 1.
      pixel_values: images only: uint8 [N, H, W, 3].
      augment: images only: ``(pixels, seed=, epoch=, index=) -> pixels``, for training batches.
      lengths: tokens of each example (of the source, where there is a target); 1 for an image.
    """

    kind: str
    input_ids: Ragged | None
    labels: Labels | Ragged | None
    ids: Sequence[str]
    records: Sequence[dict[str, Any]]
    record_index: Int64[np.ndarray, " n"]
    pad_id: int
    token_type_ids: Ragged | None = None
    label_mask: Ragged | None = None
    masking: Any = None
    offsets: Ragged | None = None
    cut: int = 0
    dropped: int = 0
    packing: Packing | None = None
    segment_ids: Ragged | None = None
    pixel_values: UInt8[np.ndarray, "n h w 3"] | None = None
    augment: Any = None
    lengths: Int64[np.ndarray, " n"] = field(init=False)

    def __post_init__(self) -> None:
        if self.input_ids is not None:
            lengths = self.input_ids.lengths
        elif self.pixel_values is not None:
            lengths = np.ones(len(self.pixel_values), np.int64)
        else:
            raise DataError("a data set needs input_ids or pixel_values")
        if not len(lengths):
            raise DataError("the data set is empty: no record gave an example")
        object.__setattr__(self, "lengths", lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def target_lengths(self) -> Int64[np.ndarray, " n"] | None:
        """Tokens of each target, where the target is a text of its own; else None."""
        if self.kind == "seq2seq" and isinstance(self.labels, Ragged):
            return self.labels.lengths
        return None

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        labels = None if self.labels is None else self.labels[index]
        return {
            "input_ids": None if self.input_ids is None else self.input_ids[index],
            "token_type_ids": None if self.token_type_ids is None else self.token_type_ids[index],
            "labels": labels,
            "label_mask": 1.0 if self.label_mask is None else self.label_mask[index],
            "record": int(self.record_index[index]),
        }

    def content(self) -> Iterator[np.ndarray]:
        """The arrays that say what is learnt: inputs, labels, masks, for a fingerprint."""
        parts: list[Ragged | np.ndarray | None] = [self.input_ids, self.pixel_values]
        if self.labels is not self.input_ids:
            parts.append(self.labels)
        if self.kind == "lm":  # there the mask says which part of a text is learnt
            parts += [self.segment_ids, self.label_mask]
        for part in parts:
            if isinstance(part, Ragged):
                yield from (part.flat, part.starts)
            elif part is not None:
                yield np.asarray(part)

    def record(self, index: int) -> dict[str, Any]:
        """The record that an example comes from."""
        return self.records[int(self.record_index[index])]
