"""Spider: questions about a database and the SQL that answers them (Yu et al., EMNLP 2018).

Only the development set is here: 1,034 questions over 20 databases. ``group`` is the database:
divide with ``splits.by_hash(..., key="group")`` so that a schema is in one split only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steppe.data.assets.readers.part import Part, Record, field, json_file
from steppe.data.errors import DataError, listing, shorten

PROMPT = (
    "Database:\n{schema}\n\nWrite one SQL query that answers the question.\nQuestion: {question}"
)


def schema_text(tables: dict[str, Any], where: str) -> str:
    """A database as text: one table a line with its columns, types and keys.

    ``concert(concert_ID number primary key, Stadium_ID text -> stadium.Stadium_ID)``: the arrow
    is a foreign key.

    Raises:
      DataError: a field is missing or an index is out of range; `where` names the database.
    """
    names = field(tables, "table_names_original", list, where)
    columns = field(tables, "column_names_original", list, where)
    types = field(tables, "column_types", list, where)
    if len(types) != len(columns):
        raise DataError(f"{where}: {len(types)} column types for {len(columns)} columns")
    primary: set[int] = set()
    for key in field(tables, "primary_keys", list, where):
        primary.update(key if isinstance(key, list) else [key])
    try:
        foreign = {
            int(column): f"{names[columns[target][0]]}.{columns[target][1]}"
            for column, target in field(tables, "foreign_keys", list, where)
        }
        held: list[list[str]] = [[] for _ in names]
        for number, ((table, column), kind) in enumerate(zip(columns, types, strict=True)):
            if table < 0:
                continue  # the star of count(*)
            text = f"{column} {kind}"
            text += " primary key" if number in primary else ""
            text += f" -> {foreign[number]}" if number in foreign else ""
            held[table].append(text)
    except (IndexError, TypeError, ValueError) as error:
        raise DataError(f"{where}: its keys and columns do not fit together ({error})") from None
    return "\n".join(f"{name}({', '.join(cells)})" for name, cells in zip(names, held, strict=True))


def schemas(folder: Path) -> dict[str, str]:
    """Database name -> :func:`schema_text`, of all 166 databases of Spider.

    Raises:
      DataError: malformed; names the file and the row.
    """
    path = folder / "tables.json"
    found = json_file(path)
    if not isinstance(found, list):
        raise DataError(f"{path}: must be a list of databases, got {shorten(found)}")
    texts = {}
    for number, tables in enumerate(found):
        name = field(tables, "db_id", str, f"{path}: row {number}")
        texts[name] = schema_text(tables, f"{path}: row {number} ({name})")
    return texts


def _read(folder: Path) -> list[Record]:
    """``prompt`` shows the schema and asks for SQL; ``answer`` is the query."""
    known = schemas(folder)
    path = folder / "dev.json"
    found = json_file(path)
    if not isinstance(found, list):
        raise DataError(f"{path}: must be a list of questions, got {shorten(found)}")
    records = []
    for number, row in enumerate(found):
        where = f"{path}: row {number}"
        name = field(row, "db_id", str, where)
        if name not in known:
            raise DataError(f"{where}: no schema of {name!r}; tables.json has {listing(known)}")
        question = " ".join(field(row, "question", str, where).split())
        query = " ".join(field(row, "query", str, where).split())
        record: Record = {
            "id": f"spider/{number}",
            "prompt": PROMPT.format(schema=known[name], question=question),
            "answer": query,
            "question": question,
            "query": query,
            "db_id": name,
            "schema": known[name],
            "group": f"spider/{name}",
        }
        records.append(record)
    return records


PARTS: dict[str, Part] = {
    "spider": Part(
        _read,
        "lm",
        columns=("prompt", "answer", "question", "query", "db_id", "schema", "group"),
    ),
}
