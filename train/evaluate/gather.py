"""One pass over batches: the rows of every output, in dataset order, without the padding rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from steppe.train.evaluate.predict import Outputs, Predict
from steppe.train.types import Batch, Params


@dataclass(frozen=True)
class Rows:
    """What was gathered, on the host.

    Attributes:
      index: [N] int64, the examples' positions in the dataset, increasing.
      outputs: name -> N arrays, one an example.
      columns: ``labels`` and ``label_mask`` where the batches hold them, else the
        ``attention_mask``; N arrays each.
    """

    index: np.ndarray
    outputs: dict[str, list[np.ndarray]]
    columns: dict[str, list[np.ndarray]]


def gather(predict: Predict, params: Params, batches: Iterable[Batch]) -> Rows:
    """Calls ``predict`` on every batch and brings the rows to the host.

    A batch's ``example_index`` [B] names its examples, -1 on padding rows. Without it the
    examples are numbered as they come, and rows whose ``label_mask`` is 0 throughout count
    as padding. The next batch is already under way while one is being fetched.

    Raises:
      ValueError: no examples; an example that comes twice; an output without the batch's rows.
    """
    index: list[int] = []
    outputs: dict[str, list[np.ndarray]] = {}
    columns: dict[str, list[np.ndarray]] = {}
    pending: deque[tuple[Outputs, Batch]] = deque()
    seen = 0

    def take(out: Outputs, batch: Batch) -> None:
        nonlocal seen
        host = jax.device_get(out)
        names = [name for name in ("labels", "label_mask") if name in batch]
        # Without either, what can be seen is what is predicted.
        names = names or [name for name in ("attention_mask",) if name in batch]
        given = {name: np.asarray(batch[name]) for name in names}
        rows = _row_numbers(batch, given, seen)
        seen += len(rows)
        keep = np.flatnonzero(rows >= 0)
        index.extend(rows[keep].tolist())
        for store, arrays in ((outputs, host), (columns, given)):
            for name, value in arrays.items():
                if np.ndim(value) == 0 or len(value) != len(rows):
                    raise ValueError(
                        f"{name!r} has shape {np.shape(value)}, but the batch has {len(rows)} rows"
                    )
                store.setdefault(name, []).extend(np.asarray(value)[keep])

    for batch in batches:
        pending.append((predict(params, batch), batch))
        if len(pending) > 1:
            take(*pending.popleft())
    while pending:
        take(*pending.popleft())

    if not index:
        raise ValueError("batches hold no examples; evaluation needs at least one")
    order = np.argsort(index, kind="stable")
    ordered = np.asarray(index, np.int64)[order]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise ValueError(
            f"example {ordered[twice[0]]} came twice; batches must be one pass over the dataset"
        )

    def sort(store: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
        for name, values in store.items():
            if len(values) != len(order):
                raise ValueError(f"{name!r} is missing from some of the batches")
        return {name: [values[i] for i in order] for name, values in store.items()}

    return Rows(ordered, sort(outputs), sort(columns))


def _row_numbers(batch: Batch, given: dict[str, np.ndarray], seen: int) -> np.ndarray:
    if "example_index" in batch:
        return np.asarray(batch["example_index"]).astype(np.int64)
    mask: Any = given.get("label_mask")
    rows = len(np.asarray(next(iter(given.values() if given else batch.values()))))
    numbers = np.arange(seen, seen + rows, dtype=np.int64)
    return numbers if mask is None else np.where(mask.reshape(rows, -1).any(1), numbers, -1)
