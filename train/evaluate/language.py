"""Scores of language models: per token, per byte, and of the texts that they write.

  loss           = sum of nats / tokens
  perplexity     = exp(loss)
  bits_per_byte  = sum of nats / (ln 2 * bytes of the predicted tokens)

Sums over tokens, so that packing, padding and the split into batches change nothing. Bits a
byte can be compared between models with different tokenizers, perplexities cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from steppe.train.evaluate import checks, classification
from steppe.train.evaluate.generation import bleu, chrf, perplexity


class Generated(NamedTuple):
    """Texts that a model wrote, beside those that it should have written. N of each.

    Attributes:
      predictions, references: texts; the metrics compare them as they are.
      sources: what the model was given, for a reader; may be empty.
      rows: positions in the dataset; may be empty.
    """

    predictions: Sequence[str]
    references: Sequence[str]
    sources: Sequence[str] = ()
    rows: Sequence[int] = ()


def token_metrics(
    nll: np.ndarray,
    predictions: np.ndarray,
    labels: np.ndarray,
    token_bytes: np.ndarray | None = None,
) -> dict[str, float]:
    """accuracy, perplexity, tokens, and bits_per_byte where the bytes are known.

    Args:
      nll: nats of each labelled token, [M].
      predictions, labels: token ids, [M].
      token_bytes: bytes of the text of each token id, [V]; see :func:`token_bytes`.

    Raises:
      ValueError: no tokens, a label without an entry in ``token_bytes``.
    """
    total = float(nll.sum())
    found = {
        "accuracy": classification.accuracy(predictions, labels),
        "perplexity": perplexity(total, len(nll)),
        "tokens": float(len(nll)),
    }
    if token_bytes is not None:
        if labels.max() >= len(token_bytes):
            raise ValueError(
                f"token_bytes must have an entry for every token id, has {len(token_bytes)}, "
                f"but a label is {labels.max()}"
            )
        size = float(np.asarray(token_bytes)[labels].sum())
        if size > 0:
            found["bits_per_byte"] = total / math.log(2) / size
    return found


def text_metrics(generated: Generated) -> dict[str, float]:
    """chrf and bleu in [0, 100], exact in [0, 1] (white space around a text apart).

    Raises:
      ValueError: no texts, or not as many predictions as references.
      ImportError: sacrebleu is not installed.
    """
    said, wanted = list(generated.predictions), list(generated.references)
    if not said:
        raise ValueError("generated must hold at least one text: a metric of none is undefined")
    checks.same_length(predictions=said, references=wanted)
    same = [a.strip() == b.strip() for a, b in zip(said, wanted, strict=True)]
    return {
        "chrf": chrf(said, wanted),
        "bleu": bleu(said, wanted),
        "exact": sum(same) / len(same),
        "generated": float(len(said)),
    }


def token_bytes(tokenizer: Any) -> np.ndarray:
    """Bytes (UTF-8) of the text that each token stands for, int64 [V]; 0 for special tokens.

    Byte-level tokens are spelt with one character a byte, so that pieces of a character count
    too; SentencePiece's mark of a word stands for one space, ``<0x0A>`` for one byte;
    WordPiece's ``##`` for nothing, and its spaces are lost.

    Args:
      tokenizer: a ``steppe.data.text.Tokenizer``.
    """
    backend = tokenizer.backend
    added = backend.get_added_tokens_decoder()
    special = {number for number, token in added.items() if token.special}
    byte_level = "ByteLevel" in repr(backend.decoder)
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    for token, number in backend.get_vocab(with_added_tokens=True).items():
        if number in special or not 0 <= number < len(sizes):
            continue
        sizes[number] = _bytes_of(token, byte_level and number not in added)
    return sizes


def _bytes_of(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").removeprefix("##").encode())
