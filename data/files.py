"""Records from local files: JSON lines, CSV, TSV, Parquet and plain text.

Every error names the file and the line. A record without an ``id`` column is named after
its file and line, so ids stay the same from run to run as long as the file does.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from steppe.data.errors import DataError, listing, shorten

Record = dict[str, Any]


def read(path: Path | str, split: str | None = None) -> Sequence[Record]:
    """Reads a file, or with `split` the file ``PATH/SPLIT.*`` of a folder.

    Args:
      path: ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet`` or ``.txt`` (one record a line).
      split: base name of the file inside a folder.

    Raises:
      FileNotFoundError: there is no such file.
      DataError: unknown kind of file, not UTF-8, malformed (the line is named), or no records.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = _inside(path, split)
    elif split is not None:
        raise DataError(
            f"{path}: split={split!r} needs a folder with one file a split; "
            "a single file is divided with splits.by_hash"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix!r} files; known: {listing(_READERS)}")
    records = reader(path)
    if not records:
        raise DataError(f"{path}: holds no records")
    return records


def _inside(folder: Path, split: str | None) -> Path:
    known = sorted(p for p in folder.iterdir() if p.suffix.lower() in _READERS)
    if split is None:
        if len(known) == 1:
            return known[0]
        raise DataError(
            f"{folder}: is a folder; name a file, or a split= of: {listing(p.stem for p in known)}"
        )
    chosen = [p for p in known if p.stem == split]
    if len(chosen) != 1:
        count = "no file" if not chosen else "several files"
        raise DataError(
            f"{folder}: has {count} for split {split!r}; it has {listing(p.name for p in known)}"
        )
    return chosen[0]


def text(path: Path) -> str:
    """The file's text, decoded as UTF-8 (a byte-order mark is dropped).

    Raises:
      DataError: not UTF-8; the message names the byte, its offset and its line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"(line {line}); convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # str.splitlines would also split at separators that may stand inside a text.
    for number, line in enumerate(text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _named(path: Path, number: int, record: Record) -> Record:
    """Puts the id first: the record's own as text, or one made of the file and the line."""
    own = record.pop("id", None)
    return {"id": f"{path.name}:{number}" if own is None else str(own), **record}


def _jsonl(path: Path) -> list[Record]:
    records = []
    for number, line in _lines(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}: line {number} is not JSON: {error.msg} at column {error.colno}"
            ) from error
        if not isinstance(value, dict):
            raise DataError(f"{path}: line {number} is not a JSON object but {shorten(value)}")
        records.append(_named(path, number, value))
    return records


def _separated(delimiter: str) -> Callable[[Path], list[Record]]:
    def read_table(path: Path) -> list[Record]:
        # The limit is global to the process; long texts need more than its 128 KiB.
        before = csv.field_size_limit(1 << 30)
        try:
            return _table(path, delimiter)
        except csv.Error as error:
            raise DataError(f"{path}: malformed CSV: {error}") from error
        finally:
            csv.field_size_limit(before)

    return read_table


def _table(path: Path, delimiter: str) -> list[Record]:
    rows = csv.reader(io.StringIO(text(path), newline=""), delimiter=delimiter, strict=True)
    header = next(rows, None)
    if header is None:
        return []
    if len(set(header)) != len(header) or not all(header):
        raise DataError(f"{path}: the header needs distinct, non-empty names, got {header}")
    records = []
    start = rows.line_num + 1
    for row in rows:
        if row:
            if len(row) != len(header):
                raise DataError(
                    f"{path}: line {start} has {len(row)} fields, the header has {len(header)} "
                    f"({listing(header)}); quote fields that hold {delimiter!r}"
                )
            records.append(_named(path, start, dict(zip(header, row))))
        start = rows.line_num + 1
    return records


def _plain(path: Path) -> list[Record]:
    return [{"id": f"{path.name}:{number}", "text": line} for number, line in _lines(path)]


class Arrow(Sequence[Record]):
    """Rows of an Arrow table as records, converted one at a time."""

    def __init__(self, table: Any, name: str) -> None:
        self._table = table
        self._name = name

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        record: Record = self._table.slice(row, 1).to_pylist()[0]
        own = record.pop("id", None)
        return {"id": f"{self._name}:{row + 1}" if own is None else str(own), **record}


def _parquet(path: Path) -> Sequence[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        return Arrow(pyarrow.parquet.read_table(path), path.name)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_first(error)})") from error


def _first(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


_READERS: dict[str, Callable[[Path], Sequence[Record]]] = {
    ".jsonl": _jsonl,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
    ".txt": _plain,
}
