"""Exact match and F1 of answers to questions, as the SQuAD scripts define them.

An answer is normalised: lower case, no punctuation (ASCII), no articles (a, an, the), single
spaces. Exact match compares the normalised texts; F1 is over their bags of words. With several
gold answers the best counts; gold answers without a word left are dropped, and a question that
has none is unanswerable: then the right answer is one without a word, for 1, and others get 0.
Rajpurkar et al. 2016 (arXiv 1606.05250), 2018 (1806.03822) for the unanswerable ones.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from steppe.train.evaluate import checks

if TYPE_CHECKING:
    from steppe.data.dataset import Dataset
    from steppe.data.spans import SpanQA

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SquadScores(NamedTuple):
    """Means over the questions, in [0, 1] (the official scripts print them times 100)."""

    exact: float
    f1: float


def normalise(text: str) -> str:
    """The text that is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the gold answers after normalisation, else 0.0."""
    return float(normalise(prediction) in _golds(gold))


def f1_score(prediction: str, gold: Sequence[str]) -> float:
    """The best bag-of-words F1 with one of the gold answers, in [0, 1]."""
    words = normalise(prediction).split()
    return max(_f1(words, g.split()) for g in _golds(gold))


def squad(predictions: Sequence[str], gold: Sequence[Sequence[str]]) -> SquadScores:
    """Mean exact match and F1.

    Args:
      predictions: one answer a question.
      gold: the acceptable answers of each question.

    Raises:
      ValueError: no question, different lengths, or a gold entry that is a plain string.
    """
    if not len(predictions):
        raise ValueError("predictions must not be empty: a metric of no examples is undefined")
    checks.same_length(predictions=predictions, gold=gold)
    for row, answers in enumerate(gold):
        if isinstance(answers, str):
            raise ValueError(f"gold[{row}] must be a list of answers, got the text {answers!r}")
    pairs = list(zip(predictions, gold))
    return SquadScores(
        sum(exact_match(p, g) for p, g in pairs) / len(pairs),
        sum(f1_score(p, g) for p, g in pairs) / len(pairs),
    )


def token_spans(predictions: Any, labels: Any) -> SquadScores:
    """Exact match and F1 of spans given as token positions [N, 2] (first, last, inclusive).

    This is what can be known without the text. The F1 is over token positions, so a right word
    in the wrong place does not count and articles do; it is close to, not equal to, the F1 of
    :func:`squad`.

    Raises:
      ValueError: no spans, different shapes.
    """
    z, y = np.asarray(predictions, np.int64), np.asarray(labels, np.int64)
    if z.shape != y.shape or z.ndim != 2 or z.shape[1] != 2 or not len(z):
        raise ValueError(
            f"spans must be two arrays [N, 2] with N >= 1, got {z.shape} and {y.shape}"
        )
    first, last = np.maximum(z[:, 0], y[:, 0]), np.minimum(z[:, 1], y[:, 1])
    common = np.maximum(last - first + 1, 0)
    lengths = sum(np.maximum(s[:, 1] - s[:, 0] + 1, 0) for s in (z, y))
    f1 = 2 * common / np.maximum(lengths, 1)
    exact = (z == y).all(1)
    return SquadScores(float(exact.mean()), float(np.where(exact, 1.0, f1).mean()))


def answer_scores(
    dataset: Dataset, spans: Any, scores: Any, task: SpanQA | None = None
) -> SquadScores:
    """Exact match and F1 of the answers' texts, one a question, whatever its windows.

    Args:
      dataset: what the task encoded.
      spans: ``EvalResult.predictions`` of the whole data set [N, 2].
      scores: ``EvalResult.scores`` [N]; of a question's windows the highest counts.
      task: names the columns; default ``SpanQA()``.

    Raises:
      ValueError: not one span and one score for every example of the data set.
    """
    from steppe.data.spans import SpanQA, answers_of, best_answers

    task = task or SpanQA()
    checks.same_length(dataset=dataset, spans=spans, scores=scores)
    given = best_answers(
        dataset, np.asarray(spans), np.asarray(scores, np.float64), context=task.context
    )
    gold = {
        record["id"]: [text for text, _ in answers_of(record, task.answers, row)]
        for row, record in enumerate(dataset.records)
        if record["id"] in given
    }
    return squad([given[key] for key in gold], list(gold.values()))


def _golds(gold: Sequence[str]) -> list[str]:
    return [text for text in map(normalise, gold) if text] or [""]


def _f1(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))
