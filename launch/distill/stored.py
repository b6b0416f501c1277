"""``steppe distill --store FOLDER``: the teacher runs over the training split once, before the run.

What it says of every labelled token, the ``top_k`` most probable ones and the remainder, lies in
the folder; batches carry it along, and no step runs the teacher. Further runs on the same split
read the same folder. The teacher is opened all the same, for the report's comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from steppe.data import batches as batches_
from steppe.launch import setup
from steppe.launch.distill.settings import DistillConfig
from steppe.launch.pieces import rows_of
from steppe.launch.progress import Line
from steppe.train.distill import offline
from steppe.train.distill.store import MANIFEST, Store, StoreError

DTYPE = "float16"


def ready(config: DistillConfig, teacher: Any, data: setup.Data, vocab: int | None) -> Store:
    """The store of the settings, written, finished or mended, where it is not complete and whole.

    Args:
      teacher: ``pretrained.Loaded``.
      vocab: see ``opened.Both``.

    Raises:
      ValueError: vocabularies that are padded differently; several processes and no complete
        store; one of another teacher, tokenizer, split, top_k or temperature (named).
      OSError: the disk is full; what is written stands, and the next call goes on after it.
    """
    assert config.store is not None
    assert config.top_k is not None
    if vocab is not None:
        raise ValueError(
            f"store={config.store!r} names tokens of the teacher's vocabulary, and the two are of "
            "different sizes: leave store out"
        )
    folder, split = Path(config.store).expanduser(), data.splits["train"]
    words, texts = offline.tokenizer_hash(data.tokenizer), offline.dataset_hash(split)
    temperature = 1.0 if config.temperature is None else config.temperature
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"store={config.store!r} is a file: name the folder of a store, or a new one"
        )
    known = offline.teacher_hash(teacher.model, teacher.params)
    at = functools.partial(Store, folder, teacher=known, tokenizer=words, dataset=texts)
    held = _whole(at) if (folder / MANIFEST).is_file() else None
    if held is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"store={config.store!r} is not complete, and is written by a single process: run "
                "the command once as one"
            )
        rows = rows_of(teacher.model.config, data.task.kind, config.data.max_length)
        passes = batches_.evaluate(split, rows, buckets=setup.buckets(config.data, training=True))
        with Line(every=20.0) as shown:
            offline.write(
                folder,
                teacher,
                passes,
                k=config.top_k,
                dtype=DTYPE,
                temperature=temperature,
                progress=lambda done, _: shown.tell("the teacher's store", done, len(split)),
                tokenizer=words,
                dataset=texts,
            )
        held = at()
    for name, found, wanted in (
        ("top_k", held.k, config.top_k),
        ("temperature", held.temperature, temperature),
    ):
        if found != wanted:
            raise ValueError(
                f"{name}={wanted} is not that of store={config.store!r}, {found}: give {name} "
                f"{found}, or another folder"
            )
    return held


def _whole(at: Callable[..., Store]) -> Store | None:
    """The store, if it is complete and every shard is what was written; if not, the writer goes on
    with it, and replaces what is damaged."""
    store = at(partial=True)
    try:
        store.check()
    except StoreError:
        return None
    return store if store.manifest["complete"] else None


class Stored:
    """Batches that carry what the teacher said of their rows; resumed as those inside are."""

    def __init__(self, batches: Any, store: Store) -> None:
        self._batches, self._store = batches, store
        self.shapes = batches.shapes
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __iter__(self) -> Stored:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        return {**batch, **offline.columns(self._store, batch)}
