"""Multiple choice by likelihood: the option that the model finds most probable is its answer.

  accuracy       argmax_o  log p(o | question)
  accuracy_norm  argmax_o  log p(o | question) / length(o)

Without a length the shortest option has an advantage; a length in bytes does not depend on the
tokenizer. Brown et al. 2020 (arXiv 2005.14165), section 2.4, normalise by tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from steppe.train.evaluate import checks


class OptionScores(NamedTuple):
    """What :func:`option_accuracy` found. N questions.

    Attributes:
      accuracy: share of the questions whose most probable option is right.
      accuracy_norm: the same with log probabilities divided by the options' lengths; equal to
        ``accuracy`` where no lengths were given.
      chosen, chosen_norm: the options taken, int64 [N].
    """

    accuracy: float
    accuracy_norm: float
    chosen: np.ndarray
    chosen_norm: np.ndarray


def option_accuracy(
    scores: Sequence[Any], answers: Any, lengths: Sequence[Any] | None = None
) -> OptionScores:
    """Accuracy of the most probable option.

    Args:
      scores: for each question the log probabilities of its options, in nats; questions may
        have different numbers of options.
      answers: index of the right option of each question, [N].
      lengths: of each option, in bytes or tokens, shaped as ``scores``.

    Raises:
      ValueError: no questions, different lengths, fewer than two options, a score that is
        NaN, an answer that is no option, a length that is not above 0.
    """
    if not len(scores):
        raise ValueError("scores must not be empty: a metric of no questions is undefined")
    right = checks.classes(answers, "answers")
    checks.same_length(scores=scores, answers=right)
    if lengths is not None:
        checks.same_length(scores=scores, lengths=lengths)
    plain = np.zeros(len(right), np.int64)
    norm = np.zeros(len(right), np.int64)
    for i, row in enumerate(scores):
        values = np.asarray(row, np.float64)
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"scores[{i}] must have at least two options, got {values.shape}")
        if np.isnan(values).any():
            raise ValueError(f"scores[{i}] is not a number; look for NaN logits")
        if right[i] >= len(values):
            raise ValueError(f"answers[{i}] is {right[i]}, but there are {len(values)} options")
        plain[i] = norm[i] = values.argmax()
        if lengths is not None:
            size = np.asarray(lengths[i], np.float64)
            if size.shape != values.shape or not (size > 0).all():
                raise ValueError(f"lengths[{i}] must be one number > 0 an option, got {size}")
            norm[i] = (values / size).argmax()
    return OptionScores(float((plain == right).mean()), float((norm == right).mean()), plain, norm)
