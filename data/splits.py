"""Deterministic splits by the hash of an example's id.

u(id) = SHA-256(salt, id) / 2^256 in [0, 1); the split is the interval of the cumulated
fractions that holds u. An example keeps its split when others are added or removed, when the
order changes, and on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from steppe.data.errors import DataError, column

DEFAULT = {"train": 0.8, "valid": 0.1, "test": 0.1}


def position(key: str, salt: str = "") -> float:
    """Where a key falls in [0, 1): the first 52 bits of its hash, exact in a float."""
    digest = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 12) / (1 << 52)


def by_hash(
    records: Sequence[dict[str, Any]],
    fractions: Mapping[str, float] | None = None,
    salt: str = "",
    *,
    key: str = "id",
) -> dict[str, list[dict[str, Any]]]:
    """Divides records by the hash of a column.

    Args:
      fractions: split name -> share, in order; they sum to 1. Default 80 / 10 / 10 as
        train / valid / test.
      salt: another salt gives another, independent division.
      key: the column to hash. Records with equal values stay together: ``"group"`` keeps the
        sentences of one document in one split, ``"text"`` keeps duplicates together.

    Returns:
      Split name -> records, in their original order.

    Raises:
      DataError: bad fractions, two records with one id, or a split that would be empty.

    Example:
      >>> parts = by_hash([{"id": f"review {i}"} for i in range(100)])
      >>> {name: len(records) for name, records in parts.items()}  # shares, not quotas
      {'train': 83, 'valid': 10, 'test': 7}
    """
    shares = dict(DEFAULT if fractions is None else fractions)
    wrong = {name: share for name, share in shares.items() if not 0 < share <= 1}
    if wrong or not shares or not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-9):
        raise DataError(f"fractions must be positive and sum to 1, got {shares}")
    bounds: list[tuple[float, str]] = []
    total = 0.0
    for name, share in shares.items():
        total += share
        bounds.append((total, name))
    bounds[-1] = (1.0, bounds[-1][1])
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in shares}
    seen: dict[str, int] = {}
    for row, record in enumerate(records):
        value = str(column(record, key, row, option="key"))
        if key == "id" and value in seen:
            raise DataError(f"rows {seen[value]} and {row} share the id {value!r}; ids must differ")
        seen.setdefault(value, row)
        place = position(value, salt)
        parts[next(name for bound, name in bounds if place < bound)].append(record)
    for name, chosen in parts.items():
        if not chosen:
            raise DataError(
                f"split {name!r} is empty: {len(records)} record(s) with fractions {shares}; "
                "add data, enlarge its fraction, or change the salt"
            )
    return parts
