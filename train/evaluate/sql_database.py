"""Small SQLite databases made from a schema and the queries that will be asked of it.

**The rows are made, not collected.** Published schemas come without their data more often than
not; execution accuracy needs some. For every gold query there are rows that satisfy its
conditions and join along its keys, rows just beside its constants, and seeded filler in which
values repeat, keys are skewed and some entries are NULL, so that a query with a wrong column,
constant, join or DISTINCT mostly gives another result. Numbers on such a database compare
methods with each other; they are not those of the published databases.

A schema is an entry of Spider's ``tables.json``: ``table_names_original``,
``column_names_original`` [(table, name)], ``column_types``, ``primary_keys``, ``foreign_keys``
[(column, column)]. The tables are created without constraints; keys of one column are unique
and foreign keys point at rows that exist.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steppe.train.evaluate.sql_rows import Rows, Value

FORMAT = 1  # raised when the same arguments give other rows


class Schema(NamedTuple):
    """A checked schema. C columns, T tables.

    Attributes:
      tables: names.
      columns: (table's number, name, whether it is a text) of every column.
      primary: columns that are a key by themselves.
      foreign: pairs (column, the column that it points at).
    """

    tables: tuple[str, ...]
    columns: tuple[tuple[int, str, bool], ...]
    primary: frozenset[int]
    foreign: tuple[tuple[int, int], ...]


def read_schema(entry: Mapping[str, Any]) -> Schema:
    """An entry of ``tables.json``; the star of ``count(*)`` is left out.

    Raises:
      ValueError: a field is missing, a number is out of range, or a table has no column.
    """
    name = entry.get("db_id", "schema")
    try:
        tables = tuple(map(str, entry["table_names_original"]))
        given = [(int(t), str(c)) for t, c in entry["column_names_original"]]
        types = [str(t) for t in entry["column_types"]]
        primary = [k for k in entry["primary_keys"] if isinstance(k, int)]
        foreign = [(int(a), int(b)) for a, b in entry["foreign_keys"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no entry of tables.json ({error!r})") from None
    if len(types) != len(given):
        raise ValueError(f"{name} has {len(given)} columns but {len(types)} column_types")
    number: dict[int, int] = {}
    columns: list[tuple[int, str, bool]] = []
    for i, ((table, column), kind) in enumerate(zip(given, types, strict=True)):
        if table < 0:
            continue
        if table >= len(tables):
            raise ValueError(f"{name}: column {column!r} is of table {table} of {len(tables)}")
        number[i] = len(columns)
        columns.append((table, column, kind == "text"))
    for i, table_name in enumerate(tables):
        if not any(table == i for table, _, _ in columns):
            raise ValueError(f"{name}: table {table_name!r} has no column")
    for key in (*primary, *(c for pair in foreign for c in pair)):
        if key not in number:
            raise ValueError(f"{name}: a key names column {key}, which does not exist")
    return Schema(
        tables,
        tuple(columns),
        frozenset(number[k] for k in primary),
        tuple((number[a], number[b]) for a, b in foreign),
    )


def build(
    target: str | os.PathLike[str],
    entry: Mapping[str, Any],
    queries: Sequence[str],
    *,
    seed: int = 0,
    rows: int = 24,
) -> Path:
    """Makes a database; the same arguments give the same rows.

    Args:
      target: the new file. One that an earlier call with the same arguments made is kept.
      entry: the schema, see the module.
      queries: gold queries; what in them is no SQL of this schema is ignored.
      seed: of the filler.
      rows: rows of filler a table, at least 1.

    Raises:
      ValueError: a schema that is none, or rows < 1.
      FileExistsError: ``target`` is another database or another file.
    """
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")
    file = Path(target)
    schema = read_schema(entry)
    made_of = json.dumps(
        [FORMAT, schema[:2], sorted(schema[2]), schema[3], list(queries), seed, rows]
    )
    stamp = zlib.crc32(made_of.encode()) & 0x7FFFFFFF
    if file.exists():
        if _stamp(file) == stamp:
            return file
        raise FileExistsError(
            f"{file} is another database (other queries, seed or rows); choose a new name"
        )
    content = Rows(schema.columns, schema.primary, schema.foreign, seed=seed)
    content.read(schema.tables, queries)
    content.fill(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        _write(scratch, schema, content.tables(), stamp)
        os.chmod(scratch, 0o644)
        os.replace(scratch, file)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return file


def build_all(
    folder: str | os.PathLike[str],
    entries: Sequence[Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    rows: int = 24,
) -> dict[str, Path]:
    """One database for every ``db_id`` that the records name: ``FOLDER/<db_id>.sqlite``.

    Args:
      entries: schemas, as in ``tables.json``.
      records: each with ``db_id`` and the gold ``query``.

    Raises:
      ValueError: a record of a database without a schema, or as :func:`build`.
      FileExistsError: as :func:`build`.
    """
    known = {str(entry.get("db_id")): entry for entry in entries}
    queries: dict[str, list[str]] = {}
    for row, record in enumerate(records):
        name = str(record["db_id"])
        if name not in known:
            raise ValueError(f"records[{row}] is about {name!r}, of which there is no schema")
        queries.setdefault(name, []).append(str(record["query"]))
    where = Path(folder)
    return {
        name: build(where / f"{name}.sqlite", known[name], asked, seed=seed, rows=rows)
        for name, asked in queries.items()
    }


def _write(
    file: str, schema: Schema, tables: Sequence[Sequence[Sequence[Value]]], stamp: int
) -> None:
    link = sqlite3.connect(file)
    try:
        for number, name in enumerate(schema.tables):
            if name.lower().startswith("sqlite_"):
                continue  # SQLite's own: published schemas list them, and nobody may make them
            own = [(column, text) for table, column, text in schema.columns if table == number]
            # NUMERIC keeps a date as the text that it is and makes a number of "2014".
            cells = ", ".join(f"{_quote(c)} {'TEXT' if t else 'NUMERIC'}" for c, t in own)
            link.execute(f"CREATE TABLE {_quote(name)} ({cells})")
            marks = ", ".join("?" * len(own))
            link.executemany(f"INSERT INTO {_quote(name)} VALUES ({marks})", tables[number])
        link.execute(f"PRAGMA user_version = {stamp}")
        link.commit()
    finally:
        link.close()


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _stamp(file: Path) -> int | None:
    try:
        link = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        try:
            return int(link.execute("PRAGMA user_version").fetchone()[0])
        finally:
            link.close()
    except sqlite3.Error:
        return None
