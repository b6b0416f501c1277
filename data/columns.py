"""Columns of records to arrays: shared by the tasks. Errors name the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steppe.data.dataset import Dataset, Ragged
from steppe.data.errors import DataError, column, listing, row_name, shorten
from steppe.data.text import Encoding, Tokenizer

Records = Sequence[dict[str, Any]]


def texts(records: Records, name: str, option: str) -> list[str]:
    """One text column of all records.

    Raises:
      DataError: a record lacks it, or holds something other than text.
    """
    found = []
    for row, record in enumerate(records):
        value = column(record, name, row, option=option)
        if not isinstance(value, str):
            raise DataError(
                f"{row_name(row, record)}: column {name!r} must be text, got {shorten(value)}"
            )
        found.append(value)
    return found


def class_index(value: Any, names: Sequence[str], row: int, record: dict[str, Any]) -> int:
    """The class of a label: a name, or an integer in range (also as text, as CSV files have it).

    Raises:
      DataError: out of range or not among the classes; names the row.
    """
    if isinstance(value, str):
        if value in names:
            return names.index(value)
        if not value.strip().lstrip("-").isdigit():
            raise DataError(
                f"{row_name(row, record)}: label {value!r} is not among the classes "
                f"{listing(names)}; fix the row or give labels= with all classes"
            )
        value = int(value)
    if isinstance(value, (bool, np.bool_)):
        value = int(value)
    if not isinstance(value, (int, np.integer)):
        raise DataError(
            f"{row_name(row, record)}: label {shorten(value)} is neither a class name "
            "nor an integer"
        )
    if not 0 <= value < len(names):
        raise DataError(
            f"{row_name(row, record)}: label {value} is out of range for {len(names)} classes "
            f"(0 to {len(names) - 1}: {listing(names)})"
        )
    return int(value)


def class_names(records: Records, name: str) -> tuple[str, ...]:
    """The classes that occur: names sorted, or "0" to the largest integer.

    Raises:
      DataError: a record lacks the label, or names and integers are mixed.
    """
    values: set[Any] = set()
    for row, record in enumerate(records):
        value = column(record, name, row, option="label")
        if not isinstance(value, (str, int, np.integer)):
            raise DataError(
                f"{row_name(row, record)}: label {shorten(value)} is neither a class name "
                "nor an integer"
            )
        values.add(value)
    if values and all(isinstance(value, (int, np.integer)) for value in values):
        return tuple(str(number) for number in range(max(0, int(max(values))) + 1))
    if not all(isinstance(value, str) for value in values):
        odd = next(value for value in values if not isinstance(value, str))
        raise DataError(
            f"column {name!r} mixes class names with {shorten(odd)}; use one or the other"
        )
    if len(values) > 1 and all(value.isdigit() for value in values):
        return tuple(str(number) for number in range(max(map(int, values)) + 1))
    return tuple(sorted(values))


def check_names(names: tuple[str, ...]) -> None:
    """Raises DataError unless there are at least two distinct classes."""
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"labels must be at least two distinct names, got {listing(names)}")


def assemble(
    kind: str,
    records: Records,
    encodings: Sequence[Encoding],
    tokenizer: Tokenizer,
    labels: Any,
    **more: Any,
) -> Dataset:
    """A Dataset with one example a record."""
    kinds = None
    if tokenizer.has_token_types:
        kinds = Ragged.pack((e["token_type_ids"] for e in encodings), np.int32)
    return Dataset(
        kind=kind,
        input_ids=Ragged.pack((e["input_ids"] for e in encodings), np.int32),
        token_type_ids=kinds,
        labels=labels,
        ids=[record["id"] for record in records],
        records=records,
        record_index=np.arange(len(records)),
        pad_id=tokenizer.pad_id,
        cut=sum(e["cut"] for e in encodings),
        **more,
    )


def classes(records: Records, name: str, names: tuple[str, ...]) -> np.ndarray:
    """Class indices of all records, int32 [N]; see :func:`class_index`."""
    found = np.zeros(len(records), np.int32)
    for row, record in enumerate(records):
        found[row] = class_index(column(record, name, row, option="label"), names, row, record)
    return found
