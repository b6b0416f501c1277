"""Tasks: which columns of a record mean what, and how records become a :class:`Dataset`.

Every task is a frozen dataclass with ``kind``, ``num_labels``, ``label_names`` and
``encode(records, tokenizer, max_length)``. Token classification is in ``tokens.py``, span
question answering in ``spans.py``, language models in ``lm.py`` and ``conversations.py``,
sequence to sequence in ``seq2seq.py``, images in ``images.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from steppe.data.columns import assemble, check_names, class_names, classes, texts
from steppe.data.conversations import Chat, Instruction
from steppe.data.dataset import Dataset
from steppe.data.errors import DataError, column, listing, row_name, shorten
from steppe.data.images import ImageClassification
from steppe.data.lm import CausalLM
from steppe.data.masking import Masking
from steppe.data.seq2seq import Seq2Seq
from steppe.data.spans import SpanQA
from steppe.data.text import Tokenizer
from steppe.data.tokens import Scheme, TokenClassification

Records = Sequence[dict[str, Any]]

__all__ = [
    "CausalLM",
    "Chat",
    "Classification",
    "ImageClassification",
    "Instruction",
    "MaskedLM",
    "PairClassification",
    "Regression",
    "Seq2Seq",
    "SpanQA",
    "Task",
    "TokenClassification",
    "default",
]


@dataclass(frozen=True)
class Classification:
    """A text into one of several classes.

    Attributes:
      labels: class names in order; see :meth:`from_records` to gather them.
      text, label: columns. A label is a class name or an integer.
    """

    labels: tuple[str, ...]
    text: str = "text"
    label: str = "label"
    kind: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        check_names(self.labels)

    @classmethod
    def from_records(
        cls, records: Records, *, text: str = "text", label: str = "label"
    ) -> Classification:
        """The task with the classes that occur in the records (see :func:`class_names`)."""
        return cls(class_names(records, label), text, label)

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names in order."""
        return self.labels

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """Encodes records; longer texts are cut to `max_length` tokens and counted in ``cut``.

        Raises:
          DataError: a missing column or a bad label (the row is named), or `max_length` is more
            than the model's positions.
        """
        labels = classes(records, self.label, self.labels)
        encodings = tokenizer.encode_batch(texts(records, self.text, "text"), max_length=max_length)
        return assemble(self.kind, records, encodings, tokenizer, labels)


@dataclass(frozen=True)
class PairClassification:
    """Two texts into one of several classes: inference, paraphrase, fact checking.

    Attributes:
      labels: class names in order.
      first, second, label: columns.
    """

    labels: tuple[str, ...]
    first: str = "first"
    second: str = "second"
    label: str = "label"
    kind: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        check_names(self.labels)

    @classmethod
    def from_records(
        cls, records: Records, *, first: str = "first", second: str = "second", label: str = "label"
    ) -> PairClassification:
        """The task with the classes that occur in the records (see :func:`class_names`)."""
        return cls(class_names(records, label), first, second, label)

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names in order."""
        return self.labels

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """As :meth:`Classification.encode`; the longer text of a pair is cut first."""
        labels = classes(records, self.label, self.labels)
        encodings = tokenizer.encode_batch(
            texts(records, self.first, "first"),
            texts(records, self.second, "second"),
            max_length=max_length,
        )
        return assemble(self.kind, records, encodings, tokenizer, labels)


@dataclass(frozen=True)
class Regression:
    """A text, or a pair of texts, to one number.

    Attributes:
      text, target: columns.
      second: column of the second text, for similarity; None for one text.
    """

    text: str = "text"
    target: str = "score"
    second: str | None = None
    kind: ClassVar[str] = "regression"
    num_labels: ClassVar[int] = 1
    label_names: ClassVar[tuple[str, ...]] = ()

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """Encodes records; targets become float32.

        Raises:
          DataError: a missing column or a target that is not a finite number (the row is named).
        """
        targets = np.zeros(len(records), np.float32)
        for row, record in enumerate(records):
            value = column(record, self.target, row, option="target")
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise DataError(
                    f"{row_name(row, record)}: column {self.target!r} must be a finite number, "
                    f"got {shorten(value)}"
                )
            targets[row] = number
        pairs = None if self.second is None else texts(records, self.second, "second")
        first = texts(records, self.text, "text")
        encodings = tokenizer.encode_batch(first, pairs, max_length=max_length)
        return assemble(self.kind, records, encodings, tokenizer, targets)


@dataclass(frozen=True)
class MaskedLM:
    """Text whose masked tokens are predicted; the masks are drawn when a batch is made.

    Attributes:
      text: column.
      share, replaced, random: see :class:`steppe.data.masking.Masking`.
    """

    text: str = "text"
    share: float = 0.15
    replaced: float = 0.8
    random: float = 0.1
    kind: ClassVar[str] = "mlm"
    num_labels: ClassVar[int] = 0
    label_names: ClassVar[tuple[str, ...]] = ()

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """Encodes records.

        Raises:
          DataError: a missing column (the row is named), or the tokenizer has no mask token.
        """
        masking = Masking(
            mask_id=tokenizer.mask_id,
            vocab_size=tokenizer.vocab_size,
            special=tuple(number for number in tokenizer.special if number >= 0),
            share=self.share,
            replaced=self.replaced,
            random=self.random,
        )
        encodings = tokenizer.encode_batch(texts(records, self.text, "text"), max_length=max_length)
        return assemble(self.kind, records, encodings, tokenizer, None, masking=masking)


Task = (
    Classification
    | PairClassification
    | Regression
    | TokenClassification
    | SpanQA
    | MaskedLM
    | CausalLM
    | Chat
    | Instruction
    | Seq2Seq
    | ImageClassification
)


def default(address: str, records: Records) -> Task:
    """The task that an ``asset:`` part is made for.

    Raises:
      DataError: another kind of address; name a task instead.
    """
    scheme, _, name = address.partition(":")
    if scheme != "asset":
        raise DataError(f"only asset: addresses have a default task, not {address!r}; name a task")
    from steppe.data.assets import readers

    _, part = readers.part(name)
    kind: str = part.kind
    if kind == "classification":
        return Classification(part.labels)
    if kind == "regression":
        return Regression()
    if kind == "mlm":
        return MaskedLM()
    if kind == "span":
        return SpanQA()
    if kind == "lm":
        return _language(part.columns)
    if kind == "seq2seq":
        return Seq2Seq()
    if kind == "image":
        return (
            ImageClassification(part.labels)
            if part.labels
            else ImageClassification.from_records(records)
        )
    if kind != "token":
        raise DataError(f"{address!r} is of kind {kind!r}, which has no default task; name one")
    scheme_name: Scheme = (
        "iob2" if any(tag.startswith("B-") for r in records for tag in r["tags"]) else "plain"
    )
    return TokenClassification.from_records(records, scheme=scheme_name)


def _language(columns: Sequence[str]) -> CausalLM | Chat | Instruction:
    """By the columns: messages make chats, a prompt with its answer too, text is read as it is."""
    if "messages" in columns:
        return Chat()
    if {"prompt", "answer"} <= set(columns):
        return Instruction()
    if "text" in columns:
        return CausalLM()
    raise DataError(f"columns {listing(columns)} hold no messages, prompt and answer, or text")
