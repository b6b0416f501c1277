"""A vector a text without running a network: the mean of the vectors of its words.

Words are lower-cased and without punctuation at their ends; those that the table lacks are left
out. A text without any known word has a random vector of its own, normal with a spread of 0.6, so
that texts without information are not all alike. Wu et al., NAACL 2022, arXiv 2204.04497, with
GloVe's 300 dimensions.
"""

from __future__ import annotations

import os
import string
from collections.abc import Mapping, Sequence

import numpy as np

SPREAD = 0.6


def average_words(
    texts: Sequence[str], table: Mapping[str, np.ndarray], *, seed: int = 0
) -> np.ndarray:
    """Mean vectors, float32 [texts, d].

    Args:
      table: vector [d] of every known word.
      seed: of the vectors of texts without one.

    Raises:
      ValueError: an empty table.
    """
    if not table:
        raise ValueError("table must hold at least one word, got none")
    width = len(next(iter(table.values())))
    out = np.empty((len(texts), width), np.float32)
    for row, text in enumerate(texts):
        words = (word.strip(string.punctuation) for word in text.lower().split())
        known = [table[word] for word in words if word in table]
        if known:
            out[row] = np.mean(known, axis=0)
        else:
            out[row] = np.random.default_rng([seed, row]).normal(0.0, SPREAD, width)
    return out


def read_table(
    path: str | os.PathLike[str], words: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Vectors of a text file with a word and its numbers a line, as GloVe's are.

    A word may hold spaces, as a few of GloVe's largest table do: what stands before as many
    numbers as the first line has is the word.

    Args:
      words: those to keep; None = all.

    Raises:
      ValueError: a line with other than numbers, or fewer or more of them than the first has.
    """
    wanted = None if words is None else set(words)
    table: dict[str, np.ndarray] = {}
    width = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.rstrip("\n").split(" ")
            width = width or len(parts) - 1
            begin = max(1, len(parts) - width)
            word, values = " ".join(parts[:begin]), parts[begin:]
            if any(map(_is_number, parts[1:begin])):
                values = []
            try:
                vector = np.array(values, np.float32)
            except ValueError:
                vector = np.empty(0, np.float32)
            if not values or len(vector) != width:
                raise ValueError(f"{path}, line {number}: not a word and {width} numbers")
            if wanted is None or word in wanted:
                table[word] = vector
    return table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
