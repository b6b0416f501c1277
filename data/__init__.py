"""Records to batches: sources, splits, tasks, tokenisation, collation, and resumable order.

    >>> from steppe.data import assets, batches, sources, splits, tasks, text
    >>> records = sources.load("asset:vader/movies")
    >>> parts = splits.by_hash(records)
    >>> task = tasks.Classification(("negative", "positive"))
    >>> tokenizer = text.Tokenizer.from_dir(assets.path("minilm-l6"))
    >>> train = batches.train(task.encode(parts["train"], tokenizer, 64), 32, seed=0)
    >>> next(train)["labels"].shape
    (32,)

Modules are imported when first used; importing this package imports none of the heavy
libraries (datasets, tensorflow_datasets, grain, tokenizers, pyarrow).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.data import (
        assets,
        batches,
        chat,
        collate,
        conversations,
        dataset,
        errors,
        files,
        images,
        lm,
        masking,
        packing,
        seq2seq,
        sources,
        spans,
        splits,
        tasks,
        text,
        tokens,
    )

__all__ = [
    "assets",
    "batches",
    "chat",
    "collate",
    "conversations",
    "dataset",
    "errors",
    "files",
    "images",
    "lm",
    "masking",
    "packing",
    "seq2seq",
    "sources",
    "spans",
    "splits",
    "tasks",
    "text",
    "tokens",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
