"""The process that runs untrusted SQL: one line of JSON in, one line of JSON out.

The first line in holds the limits, and "ready" is the answer to it.

Run as a script by ``sql.Executor``, never imported by the package; it needs the standard library
alone. What a query may do:

  read           the file is opened with ``mode=ro``, and an authorizer allows SELECT, reading of
                 columns, functions (not those that load code) and recursive WITH; so there is no
                 ATTACH, PRAGMA, transaction, write or temporary table
  in one go      the first word is SELECT, WITH or VALUES, and nothing follows the statement
  for a while    a clock and a count of SQLite's instructions, both checked every 1,000 of them
  in some room   SQLite's heap, the length of every value, and rows and bytes of the result are
                 limited; so is the process (address space, no byte into any file, no core dump)

What slips through all of that (one long instruction) the parent ends by killing the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # not on Windows: SQLite's own limits remain
    resource = None  # type: ignore[assignment]

EVERY = 1_000  # instructions of SQLite's machine between two looks at the clock
MAX_QUERY = 100_000  # characters
SELECT, READ, FUNCTION, RECURSIVE = 21, 20, 31, 33  # action codes of the authorizer
# Functions that load code or open files, where a build of SQLite has them.
FORBIDDEN = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "sqlite_log"}
# Tables that show the file or the settings instead of the data.
INTERNAL = re.compile(r"pragma_|dbstat|bytecode|sqlite_(db|stmt|memstat|btreeinfo)", re.IGNORECASE)
COMMENT = re.compile(r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?(?:\*/|\Z))*", re.DOTALL)


class Refused(Exception):
    """A query that is not run, or whose result is not given."""


def main() -> None:
    """Serves requests until standard input ends."""
    settings = json.loads(sys.stdin.readline())
    confine(settings)
    print("ready", flush=True)
    opened: dict[str, sqlite3.Connection] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = serve(opened, request, settings)
        except (Refused, sqlite3.Error, sqlite3.Warning) as error:
            answer = {"error": explain(error)}
        except MemoryError:
            answer = {"error": "out of memory"}
        except (ValueError, OverflowError) as error:  # a NUL in the query, a lone surrogate
            answer = {"error": str(error) or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def confine(settings: dict[str, Any]) -> None:
    """Limits of the whole process."""
    if resource is None:
        return
    wanted = [("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0), ("RLIMIT_AS", settings["memory"])]
    for name, value in wanted:
        # Some systems lack a limit, or do not let it be lowered.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            kind = getattr(resource, name)
            _, hard = resource.getrlimit(kind)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


def spend(seconds: float) -> None:
    """Ends the process itself after so much more computing, should the parent be gone."""
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 5
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def identity(database: str) -> str:
    """What tells a file from one that has taken its place.

    Raises:
      Refused: there is no such file.
    """
    file = Path(database)
    if not file.is_file():
        raise Refused(f"no database at {database}")
    state = file.stat()
    return f"{state.st_ino} {state.st_mtime_ns} {state.st_size} {database}"


def connect(database: str, settings: dict[str, Any]) -> sqlite3.Connection:
    """Opens a database for reading and takes everything else away."""
    uri = Path(database).absolute().as_uri()
    link = sqlite3.connect(f"{uri}?mode=ro", uri=True, isolation_level=None)
    link.text_factory = lambda raw: raw.decode("utf-8", "replace")
    for name, value in (
        ("query_only", 1),
        ("trusted_schema", 0),
        ("temp_store", 2),  # sorting in memory, where the heap's limit counts, not in files
        ("mmap_size", 0),
        ("cache_size", -4096),
        ("hard_heap_limit", settings["memory"] // 2),
    ):
        link.execute(f"PRAGMA {name} = {value}").close()
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, settings["value_bytes"]),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, min(MAX_QUERY, settings["value_bytes"])),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 100),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):
        link.setlimit(limit, value)
    link.set_authorizer(authorize)
    return link


def authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """What a statement may do; SQLite asks while it compiles it."""
    if action in (SELECT, RECURSIVE):
        return sqlite3.SQLITE_OK
    if action == READ and not INTERNAL.match(first or ""):
        return sqlite3.SQLITE_OK
    if action == FUNCTION and (second or "").lower() not in FORBIDDEN:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def serve(
    opened: dict[str, sqlite3.Connection], request: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The rows of one query.

    Raises:
      Refused: no query, or one beyond the limits.
    """
    database, query = request["database"], request["query"]
    start = COMMENT.match(query)
    first = re.match(r"\w*", query[start.end() if start else 0 :])
    word = first.group().upper() if first else ""
    if word not in ("SELECT", "WITH", "VALUES"):
        raise Refused(f"only SELECT is run, got {word or 'no statement'}")
    key = identity(database)
    if key not in opened:
        while len(opened) >= 16:
            opened.pop(next(iter(opened))).close()
        opened[key] = connect(database, settings)
    link = opened[key]
    spend(settings["seconds"])
    deadline = time.monotonic() + settings["seconds"]
    left = settings["steps"] // EVERY
    why = ""

    def look() -> int:
        nonlocal left, why
        left -= 1
        if left < 0:
            why = f"more than {settings['steps']} instructions"
        elif time.monotonic() > deadline:
            why = f"longer than {settings['seconds']:g} seconds"
        return bool(why)

    link.set_progress_handler(look, EVERY)
    cursor = link.cursor()
    try:
        cursor.execute(query)
        columns = len(cursor.description or ())
        return {"columns": columns, "rows": read(cursor, settings)}
    except sqlite3.OperationalError as error:
        raise Refused(why or explain(error)) from None
    finally:
        cursor.close()
        link.set_progress_handler(None, 0)


def read(cursor: sqlite3.Cursor, settings: dict[str, Any]) -> list[list[Any]]:
    """The rows, as far as the limits go.

    Raises:
      Refused: more rows or bytes than are allowed.
    """
    rows: list[list[Any]] = []
    size = 0
    for row in cursor:
        if len(rows) == settings["rows"]:
            raise Refused(f"more than {settings['rows']} rows")
        # 16 bytes stand for a number.
        size += sum(len(v) if isinstance(v, str | bytes) else 16 for v in row)
        if size > settings["result_bytes"]:
            raise Refused(f"a result of more than {settings['result_bytes']} bytes")
        rows.append([{"blob": v.hex()} if isinstance(v, bytes) else v for v in row])
    return rows


def explain(error: Exception) -> str:
    """SQLite's message in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


if __name__ == "__main__":
    main()
