"""Errors of the data room: one line that names the row, column, file or value, and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

# Arguments whose option on the command line has another name.
FLAGS = {"key": "group", "answers": "label"}


class DataError(ValueError):
    """Data that cannot be used as asked. The message is one line and says what to change."""


class AssetError(OSError):
    """An asset could not be fetched or does not match its record in the catalogue."""


class AssetMissing(AssetError, FileNotFoundError):
    """An asset is not in the cache. The message holds the command that fetches it."""


class HashMismatch(AssetError):
    """A file is not the one recorded in the catalogue. The message names both hashes."""


def row_name(row: int, record: Mapping[str, Any]) -> str:
    """How errors name a record: its 0-based row and its id."""
    return f"row {row} (id {record['id']!r})" if "id" in record else f"row {row}"


def listing(items: Iterable[Any], limit: int = 12) -> str:
    """Joins a few items for a message; says how many were left out."""
    names = [str(item) for item in items]
    if not names:
        return "none"
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def near(name: str, known: Iterable[str]) -> str:
    """How a message about an unknown name goes on: ``; did you mean 'x'?``, or not at all."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message about an unknown name: the nearest one, and all that are known."""
    names = list(known)
    return f"unknown {what} {name!r}{near(name, names)} (known: {', '.join(names)})"


def shorten(value: Any, limit: int = 60) -> str:
    """The representation of a value, cut so that the message stays one line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def column(record: Mapping[str, Any], name: str, row: int, *, option: str) -> Any:
    """Reads one column of a record.

    Args:
      option: the task's argument that chooses the column; the message offers it as the cure.

    Raises:
      DataError: the record lacks the column, or it holds None.
    """
    value = record.get(name)
    if value is None:
        where = row_name(row, record)
        if name in record:
            raise DataError(f"{where}: column {name!r} is empty; drop the row or fill it in")
        flag = FLAGS.get(option, option)
        raise DataError(
            f"{where} has no column {name!r}, only {listing(record)}; "
            f"name the right one with {option}=..., on the command line --data.{flag}"
        )
    return value
