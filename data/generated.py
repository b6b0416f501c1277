"""Records that a generator makes: ``reasoning-gym:gsm_symbolic?size=1000&seed=0``.

The package ``reasoning-gym`` (Stojanovski et al. 2025) holds about a hundred generators of
problems with one right answer; ``gsm_symbolic`` makes GSM8K problems out of templates (Mirzadeh
et al. 2024), each with a worked solution. Its own code runs, so it must be installed; one
version of it makes the same problems for the same seed.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from steppe.data.errors import DataError, listing, shorten

Record = dict[str, Any]

MOST = 1_000_000
DEFAULTS = {"size": 1000, "seed": 0}


def options(name: str) -> tuple[str, dict[str, int]]:
    """The generator and the options ``size`` and ``seed`` of ``NAME[?size=N&seed=S]``.

    Raises:
      DataError: an unknown or repeated option, or one that is not an integer in its range.
    """
    generator, _, query = name.partition("?")
    chosen = dict(DEFAULTS)
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise DataError(f"reasoning-gym:{name}: cannot read {query!r} ({error})") from None
    for key, value in pairs:
        if key not in DEFAULTS or [k for k, _ in pairs].count(key) > 1:
            what = "given twice" if key in DEFAULTS else "unknown"
            raise DataError(
                f"reasoning-gym:{name}: option {key!r} is {what}; options: "
                f"size (default {DEFAULTS['size']}) and seed (default {DEFAULTS['seed']})"
            )
        low, high = (1, MOST) if key == "size" else (0, 2**31 - 1)
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            raise DataError(
                f"reasoning-gym:{name}: {key}={value!r} must be an integer from {low} to {high}"
            )
        chosen[key] = int(value)
    return generator, chosen


def reasoning_gym(name: str) -> list[Record]:
    """Problems of one generator.

    Args:
      name: ``NAME[?size=N&seed=S]``.

    Returns:
      Records with ``question``, ``answer`` and ``solution`` (worked steps; empty where the
      generator gives none). Problem i is the same for every size.

    Raises:
      DataError: the package is not installed, there is no such generator, or it failed.
    """
    generator, chosen = options(name)
    try:
        package = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise DataError(
            f"reasoning-gym:{name} needs the package reasoning-gym ({error}): "
            "run `pip install reasoning-gym`"
        ) from None
    known = sorted(getattr(getattr(package, "factory", None), "DATASETS", ()))
    if known and generator not in known:
        near = difflib.get_close_matches(generator, known, 5, 0.5) or known
        raise DataError(f"reasoning-gym has no generator {generator!r}; known: {listing(near)}")
    try:
        problems = package.create_dataset(generator, **chosen)
        return [_record(problems[i], generator, chosen["seed"], i) for i in range(chosen["size"])]
    except DataError:
        raise
    except Exception as error:  # whatever a generator of that package raises
        raise DataError(f"reasoning-gym:{name} failed: {shorten(error, 200)}") from error


def _record(problem: Mapping[str, Any], generator: str, seed: int, number: int) -> Record:
    where = f"reasoning-gym:{generator}, problem {number}"
    question, answer = problem.get("question"), problem.get("answer")
    if not isinstance(question, str) or not question.strip() or answer is None:
        raise DataError(f"{where}: expected a question and an answer, got {shorten(problem)}")
    worked = (problem.get("metadata") or {}).get("answer_cot")
    return {
        "id": f"reasoning-gym/{generator}/{seed}/{number}",
        "question": question,
        "answer": str(answer),
        "solution": worked if isinstance(worked, str) else "",
    }
