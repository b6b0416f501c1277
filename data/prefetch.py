"""The grain implementation of :class:`steppe.data.batches.Batches`: batches made ahead on threads.

Grain reads the same :class:`steppe.data.batches.Plan`, so its batches and its state are those
of the numpy implementation; a run may change the backend when it resumes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steppe.data.batches import Batch, Plan, State, TrainBatches, checked

_ENDLESS = 1 << 62


class GrainBatches(TrainBatches):
    """Endless batches, prefetched by ``grain``. Made by ``train(..., backend="grain")``.

    Args:
      threads: that make batches.
      buffer: batches kept ready.
    """

    def __init__(
        self, plan: Plan, rows: slice | np.ndarray, *, threads: int = 2, buffer: int = 8
    ) -> None:
        import grain

        super().__init__(plan, rows)

        def make(number: Any) -> Batch:
            return plan.batch(int(number), rows)

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        numbers = grain.MapDataset.range(0, _ENDLESS)
        self._iterator = iter(numbers.map(make).to_iter_dataset(options))

    def __next__(self) -> Batch:
        batch: Batch = next(self._iterator)
        self._next += 1
        return batch

    def set_state(self, state: State) -> None:
        """As the numpy implementation's; batches made ahead are dropped."""
        number = checked(state, self.plan)
        self._iterator.set_state({"next_index": number})
        self._next = number
