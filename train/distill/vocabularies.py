"""Whether two tokenizers agree, before a divergence compares what is not comparable.

A divergence by token compares entry v of one model with entry v of the other; where token v is
not the same text on both sides, the loss falls and the student learns nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_tokenizers(student: Any, teacher: Any) -> int:
    """The number of ids, from 0 on, that name the same token in both vocabularies.

    It is the ``vocab=`` of the objectives where one vocabulary goes on after the other ends.

    Args:
      student, teacher: a ``steppe.data.text.Tokenizer``, a tokenizer with ``get_vocab()``, or
        a mapping token -> id.

    Raises:
      ValueError: an id that both know names different tokens; the message names the first.
      TypeError: what was given has no vocabulary.
    """
    ours, theirs = _by_id(student, "student"), _by_id(teacher, "teacher")
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise ValueError(
                f"the tokenizers differ: id {number} is {ours[number]!r} to the student and "
                f"{theirs[number]!r} to the teacher. A divergence by token needs one tokenizer; "
                "across tokenizers the teacher's texts can be learnt from, read by the student's "
                "own tokenizer (sequence-level distillation: objectives.token_ce on them)"
            )
    common = 0
    while common in ours and common in theirs:
        common += 1
    if common < 2:
        raise ValueError(
            f"the vocabularies share {common} ids from 0 on, of the student's {len(ours)} and the "
            f"teacher's {len(theirs)}: they are not of one tokenizer"
        )
    return common


def first_unknown(student: Any, teacher: Any) -> tuple[int, str] | None:
    """The lowest id, and its token, that the student's vocabulary names and the teacher's does
    not; None where the teacher knows all that the student reads.

    Args:
      student, teacher: as in :func:`check_tokenizers`.

    Raises:
      TypeError: what was given has no vocabulary.
    """
    ours, theirs = _by_id(student, "student"), _by_id(teacher, "teacher")
    number = min(ours.keys() - theirs.keys(), default=None)
    return None if number is None else (number, ours[number])


def _by_id(given: Any, name: str) -> dict[int, str]:
    table = given
    readers: tuple[Any, ...] = (getattr(given, "backend", None), given)
    for reader in readers:
        if callable(getattr(reader, "get_vocab", None)):
            table = reader.get_vocab()
            break
    if not isinstance(table, Mapping) or not table:
        raise TypeError(
            f"{name} must be a tokenizer or a mapping token -> id, got {type(given).__name__}"
        )
    return {int(number): token for token, number in table.items()}
