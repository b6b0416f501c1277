"""The values that the training room passes around: losses as sums, and one state pytree.

A loss is a pair of sums (total, weight) and never a mean: sums may be added over
micro-batches, devices and steps without an error, means may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import jax
from flax import struct

from steppe.models import tree

Params: TypeAlias = dict[str, Any]
Batch: TypeAlias = Mapping[str, Any]
# name -> (sum, weight); the value of the metric is sum / weight, after adding up both.
Metrics: TypeAlias = dict[str, tuple[jax.Array, jax.Array]]


class LossOut(NamedTuple):
    """What an objective returns for the rows that it was given.

    The loss is ``sum_k total_k / weight_k`` with both sums taken over the *global* batch,
    however it is split into micro-batches and over devices.

    Attributes:
      total: scalar sum of the per-item losses (nats, squared units, ...), or a dict of named
        sums, one a component, with the component's coefficient already multiplied in.
      weight: scalar number of items (tokens, examples) that ``total`` sums over, or a dict
        with the same keys. No gradient flows through it. A component whose global weight is
        0 (no labelled token in the batch) contributes its total undivided, that is 0.
      aux: named metrics for the log, each a pair (sum, weight).
      rows: what ``total`` and ``weight`` are the sums of, a pair of arrays [B] or of dicts of
        them, one entry a row of the batch; None where the rows are not told apart. Transforms
        that choose rows read it; without it every row has to be run by itself.
    """

    total: Any
    weight: Any
    aux: Mapping[str, tuple[Any, Any]] = {}
    rows: tuple[Any, Any] | None = None


# (params, batch, key) -> LossOut; params is the full tree, trainable and frozen merged.
Objective: TypeAlias = Callable[[Params, Batch, jax.Array], LossOut]
# (trainable params) -> their gradient, on the batch of the current step.
GradFn: TypeAlias = Callable[[Params], Params]


class Climb(NamedTuple):
    """A cheaper first gradient, handed to ``update`` as ``ascent=``; see ``train.ascent``.

    A transform that takes a gradient to climb by and a second one elsewhere uses these in place
    of ``grads`` and ``grad_fn``; ``grads`` is then not computed at all.

    Attributes:
      direction: estimate of the gradient at the parameters, whole tree, zero where it must
        not be perturbed.
      grad_fn: the exact gradient at parameters that differ from the current ones only where
        ``live`` is True.
      live: tree of constant bools that broadcast to the leaves: what may be perturbed. None =
        everything.
    """

    direction: Params
    grad_fn: GradFn
    live: Any = None


@struct.dataclass
class TrainState:
    """Everything that a run is made of: one pytree, one checkpoint, one sharding tree.

    Attributes:
      step: int32 scalar, number of updates done.
      params: trainable parameters, float32 master copy.
      frozen: the other parameters; no gradient, no optimiser state, never donated.
      opt_state: state of the optax transform.
      extra: named trees that live beside the parameters; ``"ema"`` holds the moving average.
      rng: typed PRNG key of the run. It never changes: the key of a micro-batch is derived
        from it, the step and the micro-batch's number, so a resumed run draws the same.
    """

    step: Any
    params: Any
    frozen: Any
    opt_state: Any
    extra: Any
    rng: Any

    def full(self, *, average: bool = True) -> Params:
        """All parameters, trainable and frozen, as models and objectives take them.

        Args:
          average: the moving average in place of the trainable ones, where the state has one.
        """
        live = self.extra.get("ema", self.params) if average else self.params
        return tree.merge(live, self.frozen)

    if TYPE_CHECKING:  # flax adds it; type checkers do not know

        def replace(self, **changes: Any) -> TrainState:
            """A copy with some fields changed."""


class ModelLike(Protocol):
    """The part of ``steppe.models.Model`` that training needs."""

    @property
    def init(self) -> Callable[[jax.Array], Params]:
        """``init(key) -> params``, a nested dict."""

    @property
    def trainable(self) -> Any:
        """Regular expressions over paths: the parameters that train by default."""


def components(out: LossOut) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Totals and weights as float32 dicts; a plain scalar loss is the component ``""``.

    Raises:
      TypeError: the objective did not return a LossOut.
      ValueError: total and weight do not name the same components, or are not scalars.
    """
    if not isinstance(out, LossOut):
        raise TypeError(f"an objective must return LossOut, got {type(out).__name__}")
    total, weight = out.total, out.weight
    if not isinstance(total, Mapping) and not isinstance(weight, Mapping):
        total, weight = {"": total}, {"": weight}
    if (
        not isinstance(total, Mapping)
        or not isinstance(weight, Mapping)
        or set(total) != set(weight)
    ):
        have = [sorted(x) if isinstance(x, Mapping) else "a scalar" for x in (total, weight)]
        raise ValueError(
            f"LossOut.total and .weight must have the same keys, got {have[0]} and {have[1]}"
        )
    return {k: scalar(v, f"total {k!r}") for k, v in total.items()}, {
        k: scalar(weight[k], f"weight {k!r}") for k in total
    }


def rows(out: LossOut) -> tuple[dict[str, jax.Array], dict[str, jax.Array]] | None:
    """``out.rows`` as float32 dicts with the keys of :func:`components`; None where it is.

    Raises:
      ValueError: they do not name the components of the loss, or are not [B].
    """
    if out.rows is None:
        return None
    found = []
    for name, of, given in zip(("total", "weight"), (out.total, out.weight), out.rows, strict=True):
        keys = sorted(of) if isinstance(of, Mapping) else [""]
        parts = given if isinstance(given, Mapping) else {"": given}
        if sorted(parts) != keys:
            raise ValueError(
                f"LossOut.rows must have the components of the loss, {keys}, got {sorted(parts)} "
                f"for {name}"
            )
        arrays = {k: jax.numpy.asarray(v, dtype=jax.numpy.float32) for k, v in parts.items()}
        for key, array in arrays.items():
            if array.ndim != 1:
                raise ValueError(
                    f"LossOut.rows {name} {key!r} must have one entry a row, [B], got shape "
                    f"{array.shape}"
                )
        found.append(arrays)
    return found[0], found[1]


def scalar(value: Any, name: str) -> jax.Array:
    """``value`` as a float32 scalar.

    Raises:
      ValueError: it has a shape; the loss must be summed by the objective.
    """
    array = jax.numpy.asarray(value, dtype=jax.numpy.float32)
    if array.shape:
        raise ValueError(f"LossOut {name} must be a scalar sum, got shape {array.shape}")
    return array
