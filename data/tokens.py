"""Token classification: word tags to labels on the first sub-word of each word.

Words are joined with single spaces and encoded as running text, so that every tokenizer
sees what it was trained on; characters lead from tokens back to words. The first token of a
word carries its label, all others are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from steppe.data.columns import assemble, check_names
from steppe.data.dataset import Dataset, Ragged
from steppe.data.errors import DataError, column, listing, row_name, shorten
from steppe.data.text import Encoding, Tokenizer

Records = Sequence[dict[str, Any]]
Scheme = Literal["iob2", "plain"]


def check_iob2(tags: Sequence[str]) -> None:
    """Checks that tags are valid IOB2: ``O``, ``B-type``, and ``I-type`` inside such an entity.

    Raises:
      DataError: names the word, the tag and the cure.
    """
    before = "O"
    for position, tag in enumerate(tags):
        prefix, dash, name = tag.partition("-")
        if tag != "O" and (prefix not in ("B", "I") or not dash or not name):
            raise DataError(
                f"tag {tag!r} of word {position} is not IOB2 (O, B-type or I-type); "
                "use scheme='plain' for tags that are not entities"
            )
        if prefix == "I" and before.partition("-")[::2] not in (("B", name), ("I", name)):
            raise DataError(
                f"tag {tag!r} of word {position} follows {before!r}: in IOB2 an entity begins "
                "with B-; convert the tags with tokens.to_iob2"
            )
        before = tag


def to_iob2(tags: Sequence[str]) -> list[str]:
    """Turns IOB1 tags, or ones with stray ``I-``, into IOB2: every entity begins with ``B-``."""
    fixed: list[str] = []
    before = "O"
    for tag in tags:
        name = tag.partition("-")[2]
        opens = tag.startswith("I-") and (before == "O" or before.partition("-")[2] != name)
        fixed.append(f"B-{name}" if opens else tag)
        before = tag
    return fixed


@dataclass(frozen=True)
class TokenClassification:
    """One tag a word: named entities, parts of speech.

    Attributes:
      labels: tag names in order.
      words, tags: columns: lists of equal length.
      scheme: "iob2" checks entity tags, "plain" takes any.
    """

    labels: tuple[str, ...]
    words: str = "words"
    tags: str = "tags"
    scheme: Scheme = "plain"
    kind: ClassVar[str] = "token"

    def __post_init__(self) -> None:
        check_names(self.labels)
        if self.scheme not in ("iob2", "plain"):
            raise DataError(f"scheme must be 'iob2' or 'plain', got {self.scheme!r}")

    @classmethod
    def from_records(
        cls,
        records: Records,
        *,
        words: str = "words",
        tags: str = "tags",
        scheme: Scheme = "plain",
    ) -> TokenClassification:
        """The task with the tags that occur; with IOB2, ``O`` first and both ends of each type.

        A type that occurs only as ``B-`` also gets its ``I-``: longer ones may follow.
        """
        names: set[str] = set()
        for row, record in enumerate(records):
            names.update(_strings(record, tags, row, "tags"))
        if scheme == "plain":
            return cls(tuple(sorted(names)), words, tags, scheme)
        kinds = sorted({name.partition("-")[2] for name in names} - {""})
        entity = [f"{prefix}-{kind}" for kind in kinds for prefix in "BI"]
        odd = sorted(names - {"O", *entity})
        if odd:
            raise DataError(f"tags {listing(odd)} are not IOB2; use scheme='plain'")
        return cls(("O", *entity), words, tags, scheme)

    @property
    def num_labels(self) -> int:
        """Number of tags."""
        return len(self.labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Tag names in order."""
        return self.labels

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """Encodes records; words beyond `max_length` tokens are dropped and counted in ``cut``.

        A word that gives no token (a lone control character) has no label.

        Raises:
          DataError: a missing column, unequal lengths, an unknown or ill-placed tag; names the row.
        """
        index = {name: number for number, name in enumerate(self.labels)}
        sentences: list[list[str]] = []
        numbers: list[np.ndarray] = []
        for row, record in enumerate(records):
            words = _strings(record, self.words, row, "words")
            tags = _strings(record, self.tags, row, "tags")
            where = row_name(row, record)
            if len(words) != len(tags) or not words:
                raise DataError(
                    f"{where}: {len(words)} {self.words} but {len(tags)} {self.tags}; "
                    "they must be as many, and at least one"
                )
            for position, tag in enumerate(tags):
                if tag not in index:
                    raise DataError(
                        f"{where}: tag {tag!r} of word {position} is not among the labels "
                        f"{listing(self.labels)}"
                    )
            if self.scheme == "iob2":
                try:
                    check_iob2(tags)
                except DataError as error:
                    raise DataError(f"{where}: {error}") from None
            sentences.append(words)
            numbers.append(np.asarray([index[tag] for tag in tags], np.int32))
        encodings = tokenizer.encode_batch([" ".join(w) for w in sentences], max_length=max_length)
        labels, masks = [], []
        for words, tags_of_words, encoding in zip(sentences, numbers, encodings):
            firsts = first_tokens(words, encoding)
            label = np.zeros(len(encoding["input_ids"]), np.int32)
            mask = np.zeros(len(label), np.uint8)
            kept = firsts >= 0
            label[firsts[kept]] = tags_of_words[kept]
            mask[firsts[kept]] = 1
            labels.append(label)
            masks.append(mask)
        return assemble(
            self.kind,
            records,
            encodings,
            tokenizer,
            Ragged.pack(labels, np.int32),
            label_mask=Ragged.pack(masks, np.uint8),
        )


def first_tokens(words: Sequence[str], encoding: Encoding) -> np.ndarray:
    """For each word the position of its first token, or -1 where it has none (cut, or no text).

    Args:
      encoding: of the words joined with single spaces.
    """
    owner = np.full(sum(map(len, words)) + len(words), -1)
    start = 0
    for number, word in enumerate(words):
        owner[start : start + len(word)] = number
        start += len(word) + 1
    firsts = np.full(len(words), -1)
    for token, (begin, end) in enumerate(encoding["offsets"]):
        if encoding["sequence_ids"][token] is None or end <= begin:
            continue
        # A token may begin with the space before its word: its last character decides.
        word_number = owner[end - 1]
        if word_number >= 0 and firsts[word_number] < 0:
            firsts[word_number] = token
    return firsts


def _strings(record: dict[str, Any], name: str, row: int, option: str) -> list[str]:
    value = column(record, name, row, option=option)
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise DataError(
            f"{row_name(row, record)}: column {name!r} must be a list of text, got {shorten(value)}"
        )
    return list(value)
