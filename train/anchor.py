"""The state that a run goes back to when its loss spikes: on disk, or a copy in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from steppe.train.checkpoint import Checkpoints
from steppe.train.spikes import Spike, Spikes
from steppe.train.types import TrainState


class Anchor:
    """Keeps the anchor of ``spikes``.

    Args:
      spikes: the batches; they decide.
      checkpoints: where the anchor is one of them, and is not deleted; None = in memory, which
        takes as much of it again as what trains and its optimiser.
    """

    def __init__(self, spikes: Spikes, checkpoints: Checkpoints | None) -> None:
        self.spikes = spikes
        self._checkpoints = checkpoints
        self._kept: tuple[TrainState, Mapping[str, Any]] | None = None

    def begin(self, state: TrainState, step: int) -> None:
        """A run begins, or goes on with a state that may lie behind its anchor."""
        if self._checkpoints is not None and self.spikes.anchor in self._checkpoints.steps:
            self._checkpoints.hold = self.spikes.anchor
            return
        self.drop(state, step)
        if self._checkpoints is not None:
            self._checkpoints.save(state, self.spikes.get_state())

    def drop(self, state: TrainState, step: int) -> None:
        """From now on this state is gone back to; with checkpoints it is to be saved next."""
        self.spikes.anchored(step)
        if self._checkpoints is not None:
            self._checkpoints.hold = step
        else:
            self._kept = _copied(state), self.spikes.get_state()

    def back(self, spike: Spike, state: TrainState) -> tuple[TrainState, int]:
        """The state of the anchor and its step; the batches are put behind what led to the spike.

        Args:
          state: the newest one; its memory is given up.

        Raises:
          Diverged: no rollback is left.
          CheckpointError: the anchor is gone or damaged.
        """
        skip = self.spikes.back(spike)
        anchor = self.spikes.anchor
        assert anchor is not None
        data: Mapping[str, Any]
        if self._checkpoints is not None:
            like = _shapes(state)
            found, data = self._checkpoints.restore(like, anchor)
            # One that SIGTERM made on the way here is of the steps that are taken back.
            self._checkpoints.drop_after(anchor)
        else:
            assert self._kept is not None
            kept, data = self._kept
            found = _copied(kept).replace(frozen=state.frozen, rng=state.rng)
        self.spikes.rewind(data, skip)
        return found, anchor


def _shapes(state: TrainState) -> TrainState:
    """The state without its arrays, the frozen ones apart."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    bare = state.replace(frozen={})
    like: TrainState = jax.tree.map(one, bare)
    for leaf in jax.tree.leaves(bare.replace(rng=())):
        leaf.delete()
    return like.replace(frozen=state.frozen)


def _copied(state: TrainState) -> TrainState:
    """What a step gives up, in memory of its own."""
    live = state.replace(frozen={}, rng=())
    copied: TrainState = _copy(live)
    return copied


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)
