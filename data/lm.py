"""Causal language modelling: documents, chats and instructions to rows of tokens.

``labels`` are the inputs and ``label_mask[t]`` says whether token t, predicted from those
before it, counts: never the first token of a document. Documents end with the tokenizer's end
token. Training packs documents into rows of one length (see ``packing``); the form for
evaluation, ``unpacked()``, has one document an example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from steppe.data.columns import texts
from steppe.data.dataset import Dataset
from steppe.data.errors import DataError, row_name
from steppe.data.packing import Method, Overflow, check_options, pack, rows_of
from steppe.data.text import Tokenizer

Records = Sequence[dict[str, Any]]

# Texts that are encoded at a time: their offsets take far more memory than their ids.
_CHUNK = 1024


def token_ids(
    tokenizer: Tokenizer, found: Sequence[str], max_length: int | None = None
) -> Iterator[tuple[np.ndarray, bool]]:
    """Ids (int32, with the tokenizer's own special tokens) of each text, and whether it was cut."""
    for start in range(0, len(found), _CHUNK):
        chunk = tokenizer.encode_batch(found[start : start + _CHUNK], max_length=max_length)
        for encoding in chunk:
            yield np.asarray(encoding["input_ids"], np.int32), encoding["cut"]


def end_id(tokenizer: Tokenizer, end: str | None = None) -> int:
    """Id of the token that ends a text.

    Args:
      end: the token; None: the tokenizer's own.

    Raises:
      DataError: the tokenizer has none, or does not know `end`.
    """
    if end is not None:
        found = tokenizer.backend.token_to_id(end)
        if found is None:
            raise DataError(f"end {end!r} is not a token of the tokenizer; give one that it has")
        return int(found)
    if tokenizer.eos_id < 0:
        where = "" if tokenizer.source is None else f" in {tokenizer.source}"
        raise DataError(
            f"the tokenizer{where} has no end token, which a text to be generated must end with; "
            "name one as eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_id


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that are no part of a text: all special tokens but the unknown one."""
    added = tokenizer.backend.get_added_tokens_decoder()
    named = {number for number, token in added.items() if token.special}
    named |= {*tokenizer.special, *tokenizer.stop_ids, tokenizer.bos_id}
    return frozenset(named - {tokenizer.special.unk, -1})


def check_document(
    ids: np.ndarray, special: frozenset[int], records: Records, row: int, name: str
) -> None:
    """Raises DataError, naming the row and column, where the ids hold no token of a text."""
    if not len(ids) or special.issuperset(ids.tolist()):
        what = "only special tokens" if len(ids) and records[row][name].strip() else "no text"
        raise DataError(
            f"{row_name(row, records[row])}: column {name!r} holds {what}; "
            "drop the row or fill it in"
        )


@dataclass(frozen=True)
class CausalLM:
    """Text whose every token is predicted from those before it.

    Attributes:
      text: column; one document a record.
      packed: several documents a row, see ``packing.pack``; False: one an example.
      method, overflow, overlap: as ``packing.pack`` (unpacked: the last two).
      end: the token that ends a document; None: the tokenizer's own.
    """

    text: str = "text"
    packed: bool = True
    method: Method = "best_fit"
    overflow: Overflow = "split"
    overlap: int = 0
    end: str | None = None
    kind: ClassVar[str] = "lm"
    num_labels: ClassVar[int] = 0
    label_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_options(self.method, self.overflow, self.overlap, not self.packed)

    def unpacked(self) -> CausalLM:
        """The same task with one document an example, for evaluation."""
        return dataclasses.replace(self, packed=False, method="best_fit")

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """Encodes records.

        Args:
          max_length: tokens of a row; longer documents are split, cut or dropped.

        Raises:
          DataError: a missing column, an empty document or one of special tokens only (the row
            is named), no end token, or `max_length` is more than the model's positions.
        """
        tokenizer.check_length(max_length)
        end, special = end_id(tokenizer, self.end), special_ids(tokenizer)
        documents = []
        found = texts(records, self.text, "text")
        for row, (ids, _) in enumerate(token_ids(tokenizer, found)):
            check_document(ids, special, records, row, self.text)
            documents.append(ids if ids[-1] == end else np.append(ids, np.int32(end)))
        return assemble_rows(
            records,
            tokenizer,
            documents,
            None,
            max_length,
            packed=self.packed,
            method=self.method,
            overflow=self.overflow,
            overlap=self.overlap,
        )


def assemble_rows(
    records: Records,
    tokenizer: Tokenizer,
    documents: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None,
    max_length: int,
    *,
    packed: bool,
    kept: np.ndarray | None = None,
    cut: int = 0,
    alone: np.ndarray | None = None,
    **options: Any,
) -> Dataset:
    """A Dataset of kind "lm" from token ids.

    Args:
      documents: token ids of each, special tokens included.
      masks: per document, 1 where a token counts as a target; None: every token.
      packed: several documents a row; False: each piece of a document in a row of its own.
      kept: the record of each document; None: they are as many, in the same order.
      cut: documents that were cut before.
      alone, **options: as ``packing.pack``.

    Raises:
      DataError: no document.
    """
    lengths = [len(document) for document in documents]
    if not packed:
        alone = np.ones(len(documents), bool)
    if lengths:
        packing = pack(lengths, max_length, alone=alone, **options)
    else:
        raise DataError("the data set is empty: no record gave an example")
    rows = rows_of(documents, packing, masks)
    owner = np.arange(len(documents)) if kept is None else kept
    first = owner[packing.document[packing.row_starts[:-1]]]
    left_out = len(records) - len(documents)
    cut += packing.cut
    packing = dataclasses.replace(
        packing,
        document=owner[packing.document],
        documents=len(records),
        dropped=packing.dropped + left_out,
        cut=cut,
    )
    return Dataset(
        kind="lm",
        input_ids=rows.input_ids,
        labels=rows.input_ids,
        label_mask=rows.label_mask,
        ids=[str(records[int(row)]["id"]) for row in first],
        records=records,
        record_index=first,
        pad_id=tokenizer.pad_id,
        cut=cut,
        dropped=packing.dropped,
        packing=packing if packed else None,
        segment_ids=rows.segment_ids if packed else None,
    )
