"""Sequence to sequence: a source text and the target text to be generated from it.

Both end with the tokenizer's end token: where its own special tokens do not close a text (the
Marian vocabularies have no such template), the end token is appended. What a decoder starts
with is the model's own affair: ``labels`` are the target as it is to be produced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from steppe.data.columns import texts
from steppe.data.dataset import Dataset, Ragged
from steppe.data.lm import check_document, end_id, special_ids, token_ids
from steppe.data.text import Tokenizer

Records = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Seq2Seq:
    """A text into another: translation, summaries, queries.

    Attributes:
      source, target: columns.
      source_prefix: put before every source, such as "translate English to German: ".
      max_target: longest target in tokens; None: as the source, `max_length`.
    """

    source: str = "source"
    target: str = "target"
    source_prefix: str = ""
    max_target: int | None = None
    kind: ClassVar[str] = "seq2seq"
    num_labels: ClassVar[int] = 0
    label_names: ClassVar[tuple[str, ...]] = ()

    def encode(
        self,
        records: Records,
        tokenizer: Tokenizer,
        max_length: int,
        target_tokenizer: Tokenizer | None = None,
    ) -> Dataset:
        """Encodes records; sources and targets that are too long are cut before their end token.

        Args:
          max_length: longest source in tokens.
          target_tokenizer: of the targets, where it is another one.

        Raises:
          DataError: a missing column, an empty source or target (the row is named), no end
            token, or a length that is more than the model's positions.
        """
        writer = tokenizer if target_tokenizer is None else target_tokenizer
        limit = max_length if self.max_target is None else self.max_target
        sources, cut = self._side(records, tokenizer, max_length, self.source, self.source_prefix)
        targets, cut_targets = self._side(records, writer, limit, self.target, "")
        return Dataset(
            kind=self.kind,
            input_ids=Ragged.pack(sources, np.int32),
            labels=Ragged.pack(targets, np.int32),
            ids=[str(record["id"]) for record in records],
            records=records,
            record_index=np.arange(len(records)),
            pad_id=tokenizer.pad_id,
            cut=int((cut | cut_targets).sum()),
        )

    def _side(
        self, records: Records, tokenizer: Tokenizer, max_length: int, name: str, prefix: str
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Token ids of one column, closed by the end token, and which were cut."""
        option = "source" if name == self.source else "target"
        found = texts(records, name, option)
        for row, value in enumerate(found):
            if not value.strip():
                check_document(np.zeros(0), frozenset(), records, row, name)
        tokenizer.check_length(max_length)
        end, special = end_id(tokenizer), special_ids(tokenizer)
        closed = tokenizer.encode_batch(["a"])[0]["input_ids"][-1:] == [end]
        rows, cuts = [], np.zeros(len(records), bool)
        prefixed = [prefix + value for value in found]
        for row, (ids, cut) in enumerate(token_ids(tokenizer, prefixed, max_length)):
            check_document(ids, special, records, row, name)
            if not closed:
                cut = cut or len(ids) == max_length
                ids = np.append(ids[: max_length - 1], np.int32(end))
            rows.append(ids)
            cuts[row] = cut
        return rows, cuts
