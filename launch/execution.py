"""Execution accuracy of the SQL that a run has written, where its data has databases.

The databases are made from the data's schemas and queries, once, beside the assets; see
``train.evaluate.sql_database`` for what their rows are worth.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steppe.data import assets
from steppe.launch import setup
from steppe.launch.config import DataConfig
from steppe.train import evaluate
from steppe.train.evaluate import sql, sql_database

SOURCE = "asset:spider"
FOLDER = "databases"


def metrics(written: evaluate.Generated | None, dataset: Any, data: DataConfig) -> dict[str, float]:
    """``execution`` and ``valid_sql``, shares of the queries that were written; empty where the
    data has no databases or nothing was written.

    Args:
      written: with the rows of ``dataset`` that it is about.
      data: settings of the data.
    """
    if data.source != SOURCE or written is None or not len(written.rows):
        return {}
    files = databases()
    records = [dataset.record(number) for number in written.rows]
    found = sql.execution_accuracy(
        # What a model writes after its query is no part of it.
        [text.strip().split("\n\n")[0] for text in written.predictions],
        [record["query"] for record in records],
        [files[record["db_id"]] for record in records],
    )
    return {"execution": found.execution, "valid_sql": found.valid}


@functools.cache
def databases() -> Mapping[str, Path]:
    """Database name -> its SQLite file, made if need be."""
    entries = json.loads((assets.path("spider") / "tables.json").read_text("utf-8"))
    records = setup.records(DataConfig(source=SOURCE, task="chat"))
    try:
        return sql_database.build_all(assets.root() / FOLDER / "spider", entries, records)
    # A cache that others share and this user may only read, or one of another version.
    except OSError:
        own = Path(tempfile.mkdtemp(prefix="steppe-spider-"))
        return sql_database.build_all(own, entries, records)
