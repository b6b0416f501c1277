"""Metrics of language models: perplexity, and BLEU and chrF through sacrebleu.

  perplexity = exp(sum of nats / number of tokens)

BLEU: Papineni et al. 2002; chrF: Popović 2015; comparable numbers: Post 2018 (arXiv 1804.08771).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from steppe.train.evaluate import checks


def perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens), at least 1 for a proper model.

    Args:
      nll: sum of the negative log probabilities of all tokens, in nats.
      tokens: number of tokens that the sum is over.

    Returns:
      Infinity where the mean exceeds what a float holds (709 nats) or is infinite.

    Raises:
      ValueError: tokens is not above 0, or nll is NaN.
    """
    if not tokens > 0:
        raise ValueError(f"tokens must be > 0, got {tokens}: there is no perplexity of nothing")
    if math.isnan(nll):
        raise ValueError("nll must be a number, got nan; look for NaN logits")
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def bleu(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], **options: Any
) -> float:
    """Corpus BLEU in [0, 100].

    Args:
      predictions: detokenised texts.
      references: for each prediction one text or several.
      **options: of ``sacrebleu.corpus_bleu``, such as ``tokenize="zh"`` or ``lowercase=True``.

    Raises:
      ValueError: no texts, different lengths, or a prediction without a reference.
      ImportError: sacrebleu is not installed.
    """
    streams = _streams(predictions, references)
    return float(_sacrebleu().corpus_bleu(list(predictions), streams, **options).score)


def chrf(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]], **options: Any
) -> float:
    """Corpus chrF (character n-gram F2) in [0, 100]; ``word_order=2`` gives chrF++.

    Arguments and errors as :func:`bleu`, options of ``sacrebleu.corpus_chrf``.
    """
    streams = _streams(predictions, references)
    return float(_sacrebleu().corpus_chrf(list(predictions), streams, **options).score)


def _streams(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> list[list[str | None]]:
    """sacrebleu's layout: stream k holds the k-th reference of every prediction, or None."""
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references must be lists of texts, got one text")
    if not len(predictions):
        raise ValueError("predictions must not be empty: a metric of no examples is undefined")
    checks.same_length(predictions=predictions, references=references)
    rows = [[r] if isinstance(r, str) else list(r) for r in references]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"references[{i}] is empty; every prediction needs a reference")
    width = max(map(len, rows))
    return [[row[k] if k < len(row) else None for row in rows] for k in range(width)]


def _sacrebleu() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise ImportError("BLEU and chrF need sacrebleu: pip install sacrebleu") from None
    return sacrebleu
