"""Packing: documents of many lengths into rows of one length, with their boundaries kept.

Whole documents go into the row that they fill best, longest first (best-fit decreasing;
Ding et al. 2024, arXiv 2404.10830), or are joined and cut every ``row_length`` tokens. Each
piece of a document is a segment, numbered from 1 in its row (0 is padding): attention stays
inside a segment and positions start again at 0 in each. The loss on the prompt of long
samples is that of Xiong et al., NAACL 2024, arXiv 2309.16039.

The packing depends on nothing but the lengths, so a row is the same in every epoch and on
every process; the epochs differ in the order of the rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64

from steppe.data.dataset import Ragged
from steppe.data.errors import DataError

Method = Literal["best_fit", "concat"]
Overflow = Literal["split", "cut", "drop"]


@dataclass(frozen=True)
class Packing:
    """Which piece of which document stands in which row. Made by :func:`pack`.

    Attributes:
      row_length: tokens that a row has room for.
      document, start, stop: [P] the pieces in the order of the rows: tokens [start, stop) of a
        document.
      fresh: [P] the piece's first token that is in no earlier piece of its document.
      row_starts: [R + 1] row r holds the pieces [row_starts[r], row_starts[r + 1]).
      documents: how many were given.
      cut: documents that are in several pieces, or cut to one.
      dropped: documents longer than a row that were left out.
      lost: tokens that are in no row.
    """

    row_length: int
    document: Int64[np.ndarray, " p"]
    start: Int64[np.ndarray, " p"]
    stop: Int64[np.ndarray, " p"]
    fresh: Int64[np.ndarray, " p"]
    row_starts: Int64[np.ndarray, " r_plus_1"]
    documents: int
    cut: int
    dropped: int
    lost: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> int:
        """Tokens in the rows, without padding; shared ones as often as they occur."""
        return int((self.stop - self.start).sum())

    @property
    def padding(self) -> float:
        """Share of the rows that is padding, in [0, 1)."""
        return 1 - self.tokens / (self.rows * self.row_length)

    def documents_of(self, row: int) -> Int64[np.ndarray, " k"]:
        """The documents of a row, in the order of its segments."""
        return self.document[self.row_starts[row] : self.row_starts[row + 1]]

    def __str__(self) -> str:
        kept = self.documents - self.dropped
        text = f"{kept} documents in {self.rows} rows of {self.row_length} tokens"
        text += f", {self.padding:.1%} padding"
        if self.cut:
            text += f"; {self.cut} documents cut ({len(self.document)} pieces in all)"
        if self.dropped:
            text += f"; {self.dropped} left out"
        if self.lost:
            text += f"; {self.lost} tokens in no row"
        return text


def pack(
    lengths: Sequence[int] | Int[np.ndarray, " n"],
    row_length: int,
    *,
    method: Method = "best_fit",
    overflow: Overflow = "split",
    overlap: int = 0,
    alone: Sequence[bool] | Bool[np.ndarray, " n"] | None = None,
) -> Packing:
    """Packs documents into rows. Deterministic; O(n log n + n R) at worst, R = `row_length`.

    Args:
      lengths: tokens of each document.
      row_length: tokens of a row.
      method: "best_fit" keeps documents whole where they fit in a row; "concat" joins all and
        cuts every `row_length` tokens, so that only the last row has padding.
      overflow: what becomes of a document longer than a row: "split" into pieces (a last piece
        of one token, which predicts nothing, is left out), "cut" to its first `row_length`
        tokens, or "drop" it. "concat" splits by itself and takes no other.
      overlap: tokens that neighbouring pieces of a split document share. They give context to
        the later piece and count as targets in the earlier one only; with 1 or more, every
        token but the document's first is predicted exactly once.
      alone: documents that share their row with no other.

    Returns:
      The pieces by row; in a row, and from row to row, in the order of the documents.

    Raises:
      DataError: no documents, an empty one, a bad option, or nothing left.
    """
    sizes = np.asarray(lengths, np.int64)
    check_options(method, overflow, overlap, alone is not None and bool(np.any(alone)))
    _check(sizes, row_length, overlap)
    long = sizes > row_length
    if method == "concat":
        document, start, stop, starts = _concat(sizes, row_length)
        split = len(document) - len(sizes)
        cut = len(np.unique(document[np.flatnonzero(start > 0)])) if split else 0
        return Packing(row_length, document, start, stop, start, starts, len(sizes), cut, 0, 0)
    pieces = [
        (number, *piece)
        for number, size in enumerate(sizes.tolist())
        for piece in _pieces(size, row_length, overflow, overlap)
    ]
    if not pieces:
        raise DataError(
            f"all {len(sizes)} documents are longer than the row of {row_length} tokens and "
            "overflow='drop' leaves none; raise the length or use overflow='split'"
        )
    table = np.asarray(pieces, np.int64)
    single = None if alone is None else np.asarray(alone, bool)[table[:, 0]]
    rows = _best_fit(table[:, 2] - table[:, 1], row_length, single)
    table = table[np.concatenate(rows)]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    document, start, stop, fresh = table.T
    dropped = int(long.sum()) if overflow == "drop" else 0
    lost = int(sizes.sum() - (stop - fresh).sum())
    return Packing(
        row_length,
        document,
        start,
        stop,
        fresh,
        starts,
        len(sizes),
        int(long.sum()) - dropped,
        dropped,
        lost,
    )


def check_options(method: str, overflow: str, overlap: int, apart: bool) -> None:
    """Raises DataError unless the options of :func:`pack` exist and go together.

    Args:
      apart: whether some documents are to share their row with no other.
    """
    if method not in ("best_fit", "concat"):
        raise DataError(f"method must be 'best_fit' or 'concat', got {method!r}")
    if overflow not in ("split", "cut", "drop"):
        raise DataError(f"overflow must be 'split', 'cut' or 'drop', got {overflow!r}")
    if overlap < 0:
        raise DataError(f"overlap must be >= 0 tokens, got {overlap}")
    if method == "concat" and (overflow != "split" or overlap or apart):
        raise DataError(
            "method='concat' cuts documents wherever a row ends: it takes no overflow, overlap, "
            "rows of one document or documents alone; use method='best_fit'"
        )


def _check(sizes: np.ndarray, row_length: int, overlap: int) -> None:
    if row_length < 2:
        raise DataError(f"row_length must be >= 2 tokens, got {row_length}")
    if overlap >= row_length:
        raise DataError(
            f"overlap must be less than the {row_length} tokens of a row, got {overlap}"
        )
    if not len(sizes):
        raise DataError("cannot pack without documents")
    if sizes.min() < 1:
        raise DataError(f"document {int(sizes.argmin())} is empty; drop it")


def _pieces(
    size: int, row_length: int, overflow: Overflow, overlap: int
) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first token that no earlier piece has) of the pieces of one document."""
    if size <= row_length or overflow == "cut":
        yield 0, min(size, row_length), 0
    elif overflow == "split":
        start = fresh = 0
        while fresh < size:
            stop = min(start + row_length, size)
            if stop - start > 1:
                yield start, stop, fresh
            start, fresh = stop - overlap, stop


def _best_fit(sizes: np.ndarray, row_length: int, alone: np.ndarray | None) -> list[np.ndarray]:
    """The pieces of every row; a row takes the longest piece left that fills it best."""
    rows: list[list[int]] = []
    rooms: list[int] = []  # the different amounts of room that open rows have, increasing
    open_rows: dict[int, list[int]] = {}
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        single = alone is not None and bool(alone[piece])
        at = len(rooms) if single else bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
            rows[row].append(piece)
        else:
            room, row = row_length, len(rows)
            rows.append([piece])
        left = room - size
        if left and not single:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(row)
    rows = sorted(sorted(row) for row in rows)
    return [np.asarray(row) for row in rows]


def _concat(sizes: np.ndarray, row_length: int) -> tuple[np.ndarray, ...]:
    """Pieces of the documents joined and cut every row_length tokens, and where rows start."""
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    row_cuts = np.arange(0, total, row_length)
    begin = np.union1d(row_cuts, ends - sizes)
    end = np.append(begin[1:], total)
    document = np.searchsorted(ends, begin, side="right")
    offset = (ends - sizes)[document]
    starts = np.append(np.searchsorted(begin, row_cuts), len(begin))
    return document, begin - offset, end - offset, starts.astype(np.int64)


class Rows(NamedTuple):
    """Packed tokens, not yet padded; row r of each has the same length.

    Attributes:
      input_ids: int32.
      segment_ids: int32, 1 for the first segment of a row.
      label_mask: uint8, 1 where a token counts as a target: 0 on the first of each segment
        (nothing before it predicts it), on shared tokens, and where `masks` has 0.
    """

    input_ids: Ragged
    segment_ids: Ragged
    label_mask: Ragged


def rows_of(
    documents: Sequence[np.ndarray], packing: Packing, masks: Sequence[np.ndarray] | None = None
) -> Rows:
    """The tokens of the rows.

    Args:
      documents: token ids of each.
      packing: of their lengths.
      masks: per document, 1 where a token counts as a target; None: every token.
    """
    ids, targets, lengths = [], [], packing.stop - packing.start
    places = zip(packing.document, packing.start, packing.stop, packing.fresh)
    for document, start, stop, fresh in places:
        ids.append(np.asarray(documents[document][start:stop], np.int32))
        mask = np.ones(stop - start, np.uint8)
        if masks is not None:
            mask = np.asarray(masks[document][start:stop] != 0, np.uint8)
        mask[: max(fresh - start, 1)] = 0
        targets.append(mask)
    firsts = np.repeat(packing.row_starts[:-1], np.diff(packing.row_starts))
    number = np.arange(len(lengths)) - firsts + 1  # of the segment in its row
    ends = np.concatenate([[0], np.cumsum(lengths)])
    starts = ends[packing.row_starts].astype(np.int64)
    return Rows(
        Ragged(np.concatenate(ids), starts),
        Ragged(np.repeat(number, lengths).astype(np.int32), starts),
        Ragged(np.concatenate(targets), starts),
    )


def pack_documents(
    documents: Sequence[Sequence[int] | np.ndarray],
    row_length: int,
    *,
    pad_id: int = 0,
    masks: Sequence[Sequence[int] | np.ndarray] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Packs token ids into one batch with a row a row: the whole path in one call.

    Args:
      documents: token ids of each, the end token included.
      row_length: T.
      pad_id: fills the padding of ``input_ids``.
      masks: per document, 1 where a token counts as a target; None: every token.
      **options: as :func:`pack`.

    Returns:
      ``input_ids, attention_mask, segment_ids, position_ids, labels`` int32 [R, T] and
      ``label_mask`` float32 [R, T].

    Raises:
      DataError: as :func:`pack`; a mask of another length than its document.
    """
    held = [np.asarray(document, np.int32) for document in documents]
    weights = None if masks is None else [np.asarray(mask) for mask in masks]
    if weights is not None and [len(m) for m in weights] != [len(d) for d in held]:
        raise DataError("masks must be as many and as long as the documents")
    packing = pack([len(document) for document in held], row_length, **options)
    rows = rows_of(held, packing, weights)
    shape = (packing.rows, row_length)
    ids = np.full(shape, pad_id, np.int32)
    labels, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for row in range(packing.rows):
        length = len(rows.input_ids[row])
        ids[row, :length] = labels[row, :length] = rows.input_ids[row]
        segments[row, :length] = rows.segment_ids[row]
        mask[row, :length] = rows.label_mask[row]
    return {
        "input_ids": ids,
        "attention_mask": (segments > 0).astype(np.int32),
        "segment_ids": segments,
        "position_ids": restarting_positions(segments),
        "labels": labels,
        "label_mask": mask,
    }


def restarting_positions(segment_ids: Int[np.ndarray, "b t"]) -> Int[np.ndarray, "b t"]:
    """Positions that start at 0 in every segment; 0 on padding."""
    step = np.arange(segment_ids.shape[1], dtype=np.int32)
    new = np.ones(segment_ids.shape, bool)
    new[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = np.maximum.accumulate(np.where(new, step, 0), axis=1)
    return np.where(segment_ids > 0, step - first, 0).astype(np.int32)


def long_sft_mask(is_long: Any, prompt_mask: Any, answer_mask: Any, pad_mask: Any) -> Any:
    """Which tokens count in the tuning on short and long samples together.

    ``m_t = a_t`` in a short sample and ``m_t = p_t or a_t`` in a long one, never on padding:
    the loss on the long prompt keeps the long-context ability (arXiv 2309.16039, section 2.2).
    To weigh tokens alike, divide by the sum of the mask over the whole batch, not by row.

    Args:
      is_long: [B] non-zero for long samples.
      prompt_mask, answer_mask: [B, T] non-zero on the tokens of the prompt (the chat template's
        own included) and of the answers.
      pad_mask: [B, T] non-zero on padding.

    Returns:
      float32 [B, T], an array of the library of the arguments (numpy or jax).

    Raises:
      DataError: shapes that do not fit.
    """
    is_long, prompt_mask, answer_mask, pad_mask = (
        np.asarray(part) if isinstance(part, (list, tuple)) else part
        for part in (is_long, prompt_mask, answer_mask, pad_mask)
    )
    shapes = {np.shape(prompt_mask), np.shape(answer_mask), np.shape(pad_mask)}
    if len(shapes) != 1 or np.shape(is_long) != next(iter(shapes))[:1]:
        raise DataError(
            f"prompt_mask {np.shape(prompt_mask)}, answer_mask {np.shape(answer_mask)} and "
            f"pad_mask {np.shape(pad_mask)} must be [B, T], is_long {np.shape(is_long)} [B]"
        )
    long = (is_long != 0)[:, None]
    counted = (answer_mask != 0) | ((prompt_mask != 0) & long)
    return (counted & (pad_mask == 0)).astype("float32")
