"""Span question answering: the answer is a stretch of the context (Rajpurkar et al., EMNLP 2016).

A context that does not fit is read in windows that overlap by ``stride`` tokens; each window
is one example. A window without the whole answer, and a question without an answer, points
at its first token (as in SQuAD 2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from steppe.data.columns import texts
from steppe.data.dataset import Dataset, Ragged
from steppe.data.errors import DataError, column, row_name, shorten
from steppe.data.text import Encoding, Tokenizer

Records = Sequence[dict[str, Any]]


def answers_of(record: Mapping[str, Any], name: str, row: int) -> list[tuple[str, int]]:
    """The (text, first character) pairs of a record's answers column.

    Accepts ``{"text": [...], "answer_start": [...]}`` and a list of
    ``{"text": ..., "answer_start": ...}``; an empty one means: not answerable.

    Raises:
      DataError: another form; names the row.
    """
    value = column(record, name, row, option="answers")
    try:
        if isinstance(value, Mapping):
            pairs = list(zip(value["text"], value["answer_start"], strict=True))
        else:
            pairs = [(item["text"], item["answer_start"]) for item in value]
        return [(str(text), int(start)) for text, start in pairs]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{row_name(row, record)}: column {name!r} must hold 'text' and 'answer_start' "
            f"of equal length, got {shorten(value)}"
        ) from None


@dataclass(frozen=True)
class SpanQA:
    """A question and a context to the place of the answer.

    Attributes:
      question, context, answers: columns; see :func:`answers_of`. The first answer is the
        target, all count in evaluation.
      stride: tokens that neighbouring windows share.
    """

    question: str = "question"
    context: str = "context"
    answers: str = "answers"
    stride: int = 64
    kind: ClassVar[str] = "span"
    num_labels: ClassVar[int] = 2
    label_names: ClassVar[tuple[str, ...]] = ("start", "end")

    def encode(self, records: Records, tokenizer: Tokenizer, max_length: int) -> Dataset:
        """Encodes records, one or more examples each.

        Raises:
          DataError: a missing column, or an answer that is not in the context at the place
            that it names (the row is named).
        """
        questions = texts(records, self.question, "question")
        contexts = texts(records, self.context, "context")
        gold: list[tuple[int, int] | None] = []
        for row, record in enumerate(records):
            gold.append(self._gold(record, contexts[row], row))
        windows = tokenizer.encode_windows(questions, contexts, max_length, self.stride)
        flat: list[Encoding] = [window for row in windows for window in row]
        owner = np.repeat(np.arange(len(records)), [len(row) for row in windows])
        labels = np.zeros((len(flat), 2), np.int32)
        places = []
        for number, window in enumerate(flat):
            offsets = np.asarray(window["offsets"], np.int32)
            outside = np.asarray([s != 1 for s in window["sequence_ids"]])
            offsets[outside] = 0
            places.append(offsets)
            span = gold[owner[number]]
            if span is not None:
                labels[number] = token_span(offsets, *span)
        kinds = None
        if tokenizer.has_token_types:
            kinds = Ragged.pack((e["token_type_ids"] for e in flat), np.int32)
        return Dataset(
            kind=self.kind,
            input_ids=Ragged.pack((e["input_ids"] for e in flat), np.int32),
            token_type_ids=kinds,
            labels=labels,
            ids=[records[int(row)]["id"] for row in owner],
            records=records,
            record_index=owner,
            pad_id=tokenizer.pad_id,
            offsets=Ragged.pack(places, np.int32),
        )

    def _gold(self, record: dict[str, Any], context: str, row: int) -> tuple[int, int] | None:
        found = answers_of(record, self.answers, row)
        for text, start in found:
            if start < 0 or not text or context[start : start + len(text)] != text:
                raise DataError(
                    f"{row_name(row, record)}: answer {shorten(text)} is not at character {start} "
                    f"of its context, there is {shorten(context[max(start, 0) :][: len(text)])}"
                )
        return (found[0][1], found[0][1] + len(found[0][0])) if found else None


def token_span(offsets: Int[np.ndarray, "t 2"], start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters [start, end); (0, 0) where the window lacks them."""
    inside = offsets[:, 1] > offsets[:, 0]
    overlap = np.flatnonzero(inside & (offsets[:, 0] < end) & (offsets[:, 1] > start))
    if not len(overlap):
        return 0, 0
    first, last = int(overlap[0]), int(overlap[-1])
    # Both ends must be in this window, or the label would be a piece of the answer.
    if offsets[first, 0] > start and first == np.flatnonzero(inside)[0]:
        return 0, 0
    if offsets[last, 1] < end and last == np.flatnonzero(inside)[-1]:
        return 0, 0
    return first, last


def answer_text(dataset: Dataset, example: int, start: int, end: int, context: str) -> str:
    """The context's text from token `start` to token `end` of a window; "" for no answer.

    Raises:
      DataError: a data set of another kind.
    """
    if dataset.offsets is None:
        raise DataError(f"a {dataset.kind!r} data set has no answers; encode with SpanQA")
    offsets = dataset.offsets[example]
    if not 0 <= start <= end < len(offsets) or not offsets[start, 1] or not offsets[end, 1]:
        return ""
    return context[offsets[start, 0] : offsets[end, 1]]


def best_answers(
    dataset: Dataset,
    spans: Int[np.ndarray, "n 2"],
    scores: Float[np.ndarray, " n"],
    *,
    context: str = "context",
) -> dict[str, str]:
    """Record id -> predicted answer: the text of the window with the highest score.

    Args:
      spans: (first, last) token a window, in the order of the data set.
      scores: comparable over the windows of a record, for example start plus end logit.
    """
    best: dict[str, tuple[float, str]] = {}
    for example in range(len(dataset)):
        record = dataset.record(example)
        start, end = (int(token) for token in spans[example])
        text = answer_text(dataset, example, start, end, record[context])
        held = best.get(record["id"])
        if held is None or scores[example] > held[0]:
            best[record["id"]] = (float(scores[example]), text)
    return {key: text for key, (_, text) in best.items()}
