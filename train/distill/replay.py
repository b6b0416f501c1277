"""DistiLLM's adaptive use of the student's own texts: a threshold, and a buffer of old ones.

  r ~ U(0, 1) each step;      phi starts at 0, t of T steps are done
  r < phi (1 - t / T), or r < phi and the buffer is not full:   generate, keep, train on it
  otherwise r < phi:                                            train on a text of the buffer
  otherwise:                                                    train on the data set
  after an epoch: if its validation loss >= the last one + eps: phi <- min(phi + 0.1, 1), and it
  becomes the last one

Ko et al., ICML 2024 (arXiv 2402.03898).

Deviations: of the published schedules the falling one; the rest is as written above. The last
validation loss moves only when the threshold does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.train.distill.divergences import fraction

DATA, GENERATE, REPLAY = "data", "generate", "replay"


class Buffer(NamedTuple):
    """The newest ``capacity`` rows, as arrays of fixed size.

    Attributes:
      rows: field -> [capacity, ...].
      size: int32 scalar, rows that are filled.
      next: int32 scalar, where the next row goes.
    """

    rows: Any
    size: Any
    next: Any


def buffer(batch: Mapping[str, Any], capacity: int = 1000) -> Buffer:
    """An empty buffer for rows like those of ``batch``, which should be as the policy returns it.

    Raises:
      ValueError: fewer places than the batch has rows.
    """
    fields = {name: value for name, value in batch.items() if np.ndim(value)}
    count = len(next(iter(fields.values())))
    if capacity < count:
        raise ValueError(f"capacity must be at least the {count} rows of a batch, got {capacity}")
    rows = {
        name: jnp.zeros((capacity, *np.shape(value)[1:]), jnp.result_type(value))
        for name, value in fields.items()
    }
    return Buffer(rows, jnp.int32(0), jnp.int32(0))


@jax.jit
def push(held: Buffer, batch: Mapping[str, Any]) -> Buffer:
    """The buffer with the rows of ``batch`` in it, in place of its oldest ones."""
    capacity = jax.tree.leaves(held.rows)[0].shape[0]
    count = next(iter(batch[name].shape[0] for name in held.rows))
    places = (held.next + jnp.arange(count)) % capacity
    rows = {
        name: value.at[places].set(jnp.asarray(batch[name], value.dtype))
        for name, value in held.rows.items()
    }
    size = jnp.minimum(held.size + count, capacity)
    return Buffer(rows, size, (held.next + count) % capacity)


def draw(held: Buffer, key: jax.Array, count: int) -> dict[str, Any]:
    """``count`` rows of the buffer, drawn with replacement; ``count`` is static.

    Rows of an empty buffer are zeros: the caller must have pushed before.
    """
    index = jax.random.randint(key, (count,), 0, jnp.maximum(held.size, 1))
    return {name: value[index] for name, value in held.rows.items()}


class Threshold(NamedTuple):
    """The adaptive threshold.

    Attributes:
      phi: in [0, 1].
      last: validation loss that the next one is compared with; None before the first.
    """

    phi: float = 0.0
    last: float | None = None


def adapt(state: Threshold, loss: float, *, epsilon: float = 0.1, step: float = 0.1) -> Threshold:
    """The threshold after an epoch with this validation loss.

    Raises:
      ValueError: a loss that is not a number.
    """
    if not np.isfinite(loss):
        raise ValueError(f"loss must be a finite number, got {loss!r}")
    if state.last is None:
        return Threshold(state.phi, float(loss))
    if loss >= state.last + epsilon:
        return Threshold(min(state.phi + step, 1.0), float(loss))
    return state


def decide(r: float, phi: float, step: int, total: int, *, full: bool, empty: bool = False) -> str:
    """What to train on: "data", "generate" or "replay".

    Args:
      r: the draw of this step, in [0, 1).
      phi: the threshold.
      step, total: updates done, and of the whole run.
      full, empty: the state of the buffer; an empty one cannot be replayed.

    Raises:
      ValueError: phi outside [0, 1], a step outside 0..total.
    """
    fraction(phi, "phi")
    if not 0 <= step <= total or total < 1:
        raise ValueError(f"step must lie in 0..total with total >= 1, got {step} and {total}")
    if r < phi * (1 - step / total) or (r < phi and (empty or not full)):
        return GENERATE
    return REPLAY if r < phi else DATA


def adaptive(
    generate: Callable[[Any, Any, Any], Any],
    held: Buffer,
    state: Threshold,
    params: Any,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    step: int,
    total: int,
) -> tuple[Any, Buffer, str]:
    """One step of the policy: (batch to train on, buffer, what was decided).

    Args:
      generate: ``(params, batch, key) -> batch``, such as ``policies.student(...)``.
      held, state: buffer and threshold.
      batch: of the data set; its prompts are continued where it is decided to generate.
    """
    coin, more = jax.random.split(key)
    r = float(jax.random.uniform(coin))
    capacity = jax.tree.leaves(held.rows)[0].shape[0]
    size = int(held.size)
    choice = decide(r, state.phi, step, total, full=size == capacity, empty=size == 0)
    if choice == GENERATE:
        new = generate(params, batch, more)
        return new, push(held, {name: jnp.asarray(new[name]) for name in held.rows}), choice
    if choice == REPLAY:
        count = len(next(iter(batch[name] for name in held.rows)))
        return draw(held, more, count), held, choice
    return batch, held, choice
