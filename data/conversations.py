"""Tuning on chats: what the assistant says is learnt, what it is told is only read.

A record is a list of messages, or a prompt and an answer that make two of them. The chat
template writes them as one text; the loss counts on the tokens of the answers, with the token
that ends each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np

from steppe.data import chat
from steppe.data.dataset import Dataset
from steppe.data.errors import DataError, column, row_name, shorten
from steppe.data.lm import assemble_rows
from steppe.data.packing import long_sft_mask
from steppe.data.text import Tokenizer

Records = Sequence[dict[str, Any]]
Loss = Literal["answers", "all"]


@dataclass(frozen=True)
class Conversations:
    """What :class:`Chat` and :class:`Instruction` share.

    Attributes:
      packed: several chats a row, see ``packing.pack``; False: one an example.
      overflow: a chat longer than a row is "cut" to its first tokens, or "drop"ped.
      loss: "answers" counts the tokens of the answers, "all" all but the first.
      template: Jinja source, or a name in ``chat.TEMPLATES``; None: the tokenizer's own.
      long_from: a chat of at least so many tokens is a long sample: a row of its own, and the
        prompt counts too (``packing.long_sft_mask``). None: there are none.
    """

    packed: bool = dataclasses.field(default=True, kw_only=True)
    overflow: Literal["cut", "drop"] = dataclasses.field(default="cut", kw_only=True)
    loss: Loss = dataclasses.field(default="answers", kw_only=True)
    template: str | None = dataclasses.field(default=None, kw_only=True)
    long_from: int | None = dataclasses.field(default=None, kw_only=True)
    kind: ClassVar[str] = "lm"
    num_labels: ClassVar[int] = 0
    label_names: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.overflow not in ("cut", "drop"):
            raise DataError(f"overflow must be 'cut' or 'drop' for chats, got {self.overflow!r}")
        if self.loss not in ("answers", "all"):
            raise DataError(f"loss must be 'answers' or 'all', got {self.loss!r}")
        if self.long_from is not None and self.long_from < 2:
            raise DataError(f"long_from must be >= 2 tokens, got {self.long_from}")

    def unpacked(self) -> Self:
        """The same task with one chat an example, for evaluation."""
        return dataclasses.replace(self, packed=False)

    def conversation(self, record: dict[str, Any], row: int) -> tuple[Any, str]:
        """The messages of a record, and where they come from, for errors."""
        raise NotImplementedError

    def _encoded(
        self, record: dict[str, Any], row: int, tokenizer: Tokenizer
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of one chat, and 1 on those of its answers."""
        messages, where = self.conversation(record, row)
        made = chat.encode_chat(tokenizer, messages, template=self.template, where=where)
        return np.asarray(made.ids, np.int32), np.asarray(made.answer_mask, np.uint8)

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """Encodes records.

        A chat none of whose answers fits in `max_length` is left out and counted in
        ``dropped``.

        Raises:
          DataError: no chat template, a missing or malformed column, a chat without an answer
            (the row is named), no chat left, or `max_length` is more than the model's positions.
        """
        tokenizer.check_length(max_length)
        chat.template_of(tokenizer, self.template)  # told before any row is named
        documents, masks, kept, cut = [], [], [], 0
        for row, record in enumerate(records):
            ids, answers = self._encoded(record, row, tokenizer)
            fits = len(ids) <= max_length
            counted = answers if self.loss == "answers" else np.ones_like(answers)
            if self.long_from is not None and len(ids) >= self.long_from:
                none = np.zeros((1, len(ids)))
                counted = long_sft_mask(np.ones(1), 1 - answers[None], answers[None], none)[0]
            if not counted[1:max_length].any() or (not fits and self.overflow == "drop"):
                continue
            cut += not fits
            documents.append(ids[:max_length])
            masks.append(counted[:max_length])
            kept.append(row)
        if not documents and len(records):
            raise DataError(
                f"of {len(records)} chats none has an answer within {max_length} tokens; "
                "raise max_length or shorten the prompts"
            )
        sizes = np.asarray([len(ids) for ids in documents])
        alone = None if self.long_from is None else sizes >= self.long_from
        return assemble_rows(
            records,
            tokenizer,
            documents,
            masks,
            max_length,
            packed=self.packed,
            kept=np.asarray(kept, np.int64),
            cut=cut,
            alone=alone,
        )


@dataclass(frozen=True)
class Chat(Conversations):
    """Chats to tokens, with the loss on the answers only; options as :class:`Conversations`.

    Attributes:
      messages: column: a list of ``{"role": ..., "content": ...}``.
    """

    messages: str = "messages"

    def conversation(self, record: dict[str, Any], row: int) -> tuple[Any, str]:
        """The messages of a record, and where they come from, for errors.

        Raises:
          DataError: no such column; names the row.
        """
        value = column(record, self.messages, row, option="messages")
        return value, f"{row_name(row, record)}: column {self.messages!r}"


@dataclass(frozen=True)
class Instruction(Conversations):
    """A prompt and its answer as a chat of two messages; options as :class:`Conversations`.

    Attributes:
      prompt, answer: columns.
      system: text of a system message before them, the same in every row; None: as the chat
        template has it.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    system: str | None = None

    def conversation(self, record: dict[str, Any], row: int) -> tuple[Any, str]:
        """The messages of a record, and where they come from, for errors.

        Raises:
          DataError: a missing column, or one that is not text or is blank; names the row.
        """
        where = row_name(row, record)
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        for role, name, option in (
            ("user", self.prompt, "prompt"),
            ("assistant", self.answer, "answer"),
        ):
            value = column(record, name, row, option=option)
            if not isinstance(value, str) or not value.strip():
                raise DataError(
                    f"{where}: column {name!r} must be text and not blank, got {shorten(value)}"
                )
            turns.append({"role": role, "content": value})
        return turns, where
