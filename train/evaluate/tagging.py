"""Entity-level scores of tagged sequences, as CoNLL's script and seqeval compute them.

An entity is a maximal run of tags; it counts as found when type, first and last position all
agree. Malformed sequences are read as the CoNLL-2000 script reads them: an entity starts at
B-X or S-X, and at any other tag X that does not continue the entity before it (after O, after
another type, after E or S); so ``O I-PER I-PER`` is one entity. IOB1, IOB2, IOE2 and IOBES all
follow from that rule. Tjong Kim Sang and Buchholz 2000; Nakayama 2018 (seqeval, default mode).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from steppe.train.evaluate import checks
from steppe.train.evaluate.classification import PRF


class Entity(NamedTuple):
    """Type, and positions of the first and the last token (inclusive)."""

    kind: str
    start: int
    end: int


class EntityScores(NamedTuple):
    """Scores in [0, 1]; 0 where a denominator is 0 (no entity labelled, or none predicted).

    Attributes:
      precision, recall, f1: micro averages, over all entities.
      macro: plain mean over the types that are labelled or predicted.
      per_type: type -> scores, sorted by name.
      support: type -> number of labelled entities.
    """

    precision: float
    recall: float
    f1: float
    macro: PRF
    per_type: dict[str, PRF]
    support: dict[str, int]


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one sequence, in order.

    Args:
      tags: ``O``, or a prefix B, I, E, S with a type: ``B-PER``. A prefix alone has type ``_``.

    Raises:
      ValueError: another tag; names it and its position.
    """
    found: list[Entity] = []
    before, kind, start = "O", "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, name = _parse(tag, i)
        continues = prefix in ("I", "E") and before in ("B", "I") and name == kind
        if not continues:
            if before != "O":
                found.append(Entity(kind, start, i - 1))
            start = i
        before, kind = prefix, name
    return found


def entity_f1(
    predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]
) -> EntityScores:
    """Precision, recall and F1 of the entities of a corpus.

    Args:
      predictions, labels: one sequence of tags a sentence, of equal lengths.

    Raises:
      ValueError: no sentences, different lengths, or a tag outside the scheme.
    """
    if not len(labels):
        raise ValueError("labels must not be empty: a metric of no examples is undefined")
    checks.same_length(predictions=predictions, labels=labels)
    right: Counter[str] = Counter()
    guessed: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for row, (guess, label) in enumerate(zip(predictions, labels)):
        if len(guess) != len(label):
            raise ValueError(f"sentence {row} has {len(label)} labels but {len(guess)} predictions")
        a, b = set(entities(guess)), set(entities(label))
        guessed.update(e.kind for e in a)
        true.update(e.kind for e in b)
        right.update(e.kind for e in a & b)
    kinds = sorted({*guessed, *true})
    per_type = {k: _scores(right[k], guessed[k], true[k]) for k in kinds}
    micro = _scores(right.total(), guessed.total(), true.total())
    columns = list(zip(*per_type.values())) if kinds else [(0.0,)] * 3
    macro = PRF(*(sum(column) / len(column) for column in columns))
    return EntityScores(*micro, macro, per_type, {k: true[k] for k in kinds})


def is_tagging_scheme(names: Sequence[str]) -> bool:
    """Whether label names are ``O`` and prefixed types, so that entities are meant."""
    return (
        "O" in names
        and any(n[:2] in ("B-", "I-", "E-", "S-") for n in names)
        and all(n == "O" or n[:2] in ("B-", "I-", "E-", "S-") for n in names)
    )


def _parse(tag: str, position: int) -> tuple[str, str]:
    if tag == "O":
        return "O", ""
    prefix, dash, name = tag.partition("-")
    if prefix not in ("B", "I", "E", "S") or (dash and not name):
        raise ValueError(
            f"tag {tag!r} at position {position} is not O, or B-, I-, E-, S- and a type"
        )
    return prefix, name or "_"


def _scores(right: int, guessed: int, true: int) -> PRF:
    return PRF(
        right / guessed if guessed else 0.0,
        right / true if true else 0.0,
        2 * right / (guessed + true) if guessed + true else 0.0,
    )
