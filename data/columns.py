"""Columns of records to arrays: shared by the tasks. Errors name the row."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steppe.data.dataset import Dataset, Ragged
from steppe.data.errors import DataError, column, listing, row_name, shorten
from steppe.data.text import Encoding, Tokenizer

Records = Sequence[dict[str, Any]]

# More than any classification task has; beyond it a column holds something else.
MOST_CLASSES = 10_000
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


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


def class_name(value: Any, name: str, row: int, record: Mapping[str, Any]) -> str:
    """The name of a label, the same for 4, 4.0, "4" and " 4.0 ", however a file writes it.

    Raises:
      DataError: blank, or neither text nor a number; names the row.
    """
    if isinstance(value, str):
        text = value.strip()
        if not text:
            raise DataError(
                f"{row_name(row, record)}: column {name!r} is empty; drop the row or fill it in"
            )
        return _number_name(float(text)) if _NUMBER.fullmatch(text) else text
    numeric = isinstance(value, (bool, np.bool_, int, np.integer, float, np.floating))
    if numeric and math.isfinite(value):
        return _number_name(float(value))
    raise DataError(
        f"{row_name(row, record)}: label {shorten(value)} is neither a class name nor an integer"
    )


def class_index(
    value: Any, names: Sequence[str], row: int, record: dict[str, Any], name: str = "label"
) -> int:
    """The class of a label: by its name, numbers by value (4 is "4.0").

    Where no class is called by a number, an integer is the position of the class, as data sets
    with named classes have it. Otherwise it never is: 1 among the classes 1, 2, 3 is the first.

    Raises:
      DataError: not among the classes, or out of range; names the row.
    """
    table = _class_table(tuple(names))
    label = class_name(value, name, row, record)
    if label in table:
        return table[label]
    if not _NUMBER.fullmatch(label):
        raise DataError(
            f"{row_name(row, record)}: label {value!r} is not among the classes "
            f"{listing(names)}; fix the row or name all classes"
        )
    number = float(label)
    if any(_NUMBER.fullmatch(known) for known in table):
        raise DataError(
            f"{row_name(row, record)}: label {value!r} is not among the classes {listing(names)}; "
            "fix the row or name all classes"
        )
    if number != int(number):
        raise DataError(
            f"{row_name(row, record)}: label {shorten(value)} is neither a class name "
            "nor an integer"
        )
    if not 0 <= number < len(names):
        raise DataError(
            f"{row_name(row, record)}: label {label} is out of range for {len(names)} classes "
            f"(0 to {len(names) - 1}: {listing(names)})"
        )
    return int(number)


def class_names(records: Records, name: str) -> tuple[str, ...]:
    """The classes that occur, numbers by value and names alphabetically.

    Raises:
      DataError: a record lacks the label, names and integers are mixed, or there are so many
        different labels that the column cannot be one of classes.
    """
    found: set[str] = set()
    typed: Any = None  # a label that the file gives as a number, not as text
    for row, record in enumerate(records):
        value = column(record, name, row, option="label")
        found.add(class_name(value, name, row, record))
        typed = value if not isinstance(value, str) else typed
    numbers = {label for label in found if _NUMBER.fullmatch(label)}
    if typed is not None and numbers != found:
        raise DataError(
            f"column {name!r} mixes class names with {shorten(typed)}; use one or the other"
        )
    if len(found) > MOST_CLASSES:
        raise DataError(
            f"column {name!r} holds {len(found)} different labels in {len(records)} rows, more "
            f"than {MOST_CLASSES}; is it an id, or a number to regress on?"
        )
    return tuple(sorted(found, key=float)) if numbers == found else tuple(sorted(found))


def _number_name(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)


@functools.lru_cache(maxsize=32)
def _class_table(names: tuple[str, ...]) -> dict[str, int]:
    """Canonical name -> class."""
    return {class_name(name, "classes", i, {}): i for i, name in enumerate(names)}


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
