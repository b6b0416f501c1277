"""What a readable part of an asset is, and what its readers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from steppe.data.errors import AssetError, DataError, shorten

Record = dict[str, Any]
Records = Sequence[Record]
Kind = Literal[
    "classification",
    "regression",
    "token",
    "span",
    "mlm",
    "lm",
    "seq2seq",
    "preference",
    "image",
]
T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """One readable part of a data asset.

    Attributes:
      read: folder of the fetched asset -> records.
      kind: the task that its records are made for: ``lm`` has the columns ``prompt`` and
        ``answer``, ``seq2seq`` ``source`` and ``target``, ``preference`` ``prompt``, ``chosen``
        and ``rejected``, ``span`` ``question``, ``context`` and ``answers``, ``image`` ``image``
        (uint8) and ``label``.
      labels: class names in order; empty where they are gathered from the records.
      columns: the columns besides ``id``.
    """

    read: Callable[[Path], Records]
    kind: Kind
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("text", "label")


class View(Sequence[Record], Generic[T]):
    """Records that are made when asked for, out of compact rows that may share their strings.

    Args:
      rows: one item a record.
      make: row -> record.
    """

    def __init__(self, rows: Sequence[T], make: Callable[[T], Record]) -> None:
        self._rows = rows
        self._make = make

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> View[T]: ...
    def __getitem__(self, index: int | slice) -> Record | View[T]:
        if isinstance(index, slice):
            return View(self._rows[index], self._make)
        return self._make(self._rows[index])


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) of a UTF-8 file; only newline characters end a line."""
    with open(path, encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            yield number, line.rstrip("\r\n")


def fields(path: Path, count: int) -> Iterator[list[str]]:
    """The tab-separated fields of each line that is not blank.

    Raises:
      DataError: a line has another number of fields; names the file and the line.
    """
    for number, line in lines(path):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != count:
            raise DataError(f"{path}: line {number} has {len(cells)} fields, expected {count}")
        yield cells


def json_file(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      AssetError: there is no such file.
      DataError: it is not JSON; names the file and the place.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AssetError(f"{path} is missing; fetch the asset again") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); fetch the asset again") from None


def field(record: Any, name: str, kind: type[T], where: str) -> T:
    """A field of a JSON object.

    Args:
      where: how the message names the object: file and row.

    Raises:
      DataError: not an object, no such field, or another type than `kind`.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        found = shorten(value) if isinstance(record, dict) and name in record else "nothing"
        raise DataError(f"{where}: {name!r} must be {_NAMES[kind]}, got {found}")
    return value


_NAMES = {str: "text", list: "a list", dict: "an object", int: "an integer"}
