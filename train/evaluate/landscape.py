"""The loss of a fixed set of examples as a function of the parameters, with its derivatives.

  L(w) = sum_k (sum_b total_kb) / (sum_b W_kb)      b over the batches, k over the components
  g(w) = sum_b grad L_b(w)                          L_b = sum_k total_kb / W_k
  H(w) v = sum_b d/dt grad L_b(w + t v)             forward over reverse (Pearlmutter 1994)

One batch is in memory at a time, in the gradient and in the Hessian-vector product too, so
the set may be as large as time allows. There is no dropout: the objective gets the key None.

Everything that measures the landscape (``ball``, ``curvature``, ``surface``) takes such a loss,
or any pure function ``loss(params) -> scalar``. It is an argument of the compiled programs and
not a constant in them: another set of the same shapes, or other frozen weights, compile nothing.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from steppe.models import tree
from steppe.optim.perturbation import dot as dot
from steppe.train import types
from steppe.train.gradient import known
from steppe.train.mesh import MeshPlan
from steppe.train.types import Batch, Objective, Params

# params -> float32 scalar.
Loss: TypeAlias = Callable[[Params], jax.Array]
# (done, of how many), after each of the costly steps of a measurement.
Tell: TypeAlias = Callable[[int, int], None]
# Shardings of the leaves of a tree; None for a leaf that is on no mesh.
Placement: TypeAlias = tuple[NamedSharding | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BatchedLoss:
    """``loss(params)`` over a fixed set; made by :func:`batched_loss`.

    Attributes:
      frozen: the parameters that do not vary.
      groups: the batches, those of one shape stacked: each leaf is [N, B, ...].
      objective, compute_dtype, plan: see :func:`batched_loss`.
    """

    frozen: Params
    groups: tuple[dict[str, Any], ...]
    objective: Objective = dataclasses.field(metadata={"static": True})
    compute_dtype: Any = dataclasses.field(metadata={"static": True})
    plan: MeshPlan | None = dataclasses.field(metadata={"static": True})

    def __call__(self, params: Params) -> jax.Array:
        """The loss, float32 scalar. Its derivatives recompute one batch at a time."""
        weights = self._weights(params)
        one = jax.checkpoint(lambda batch: self._share(params, batch, weights))
        return self._sum(one, jnp.float32(0))

    def value_and_grad(self, params: Params) -> tuple[jax.Array, Params]:
        """Loss and gradient; the gradient in float32."""
        weights = self._weights(params)
        one = jax.value_and_grad(self._share)
        return self._sum(
            lambda batch: one(params, batch, weights), (jnp.float32(0), zeros_like(params))
        )

    def hvp(self, params: Params, vector: Params) -> Params:
        """Hessian times ``vector``, in float32."""
        weights = self._weights(params)

        def one(batch: Batch) -> Params:
            return _along(lambda p: self._share(p, batch, weights), params, vector)

        return self._sum(one, zeros_like(params))

    def _out(self, params: Params, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        full = tree.merge(params, self.frozen)
        if self.compute_dtype is not None:
            full = tree.cast(full, self.compute_dtype)
        with known(self.plan):
            out = self.objective(full, batch, None)  # type: ignore[arg-type]
        return types.components(out)

    def _weights(self, params: Params) -> dict[str, jax.Array]:
        """Weights of the components over all batches; the forward pass is compiled away."""
        first = {name: value[0] for name, value in self.groups[0].items()}
        names = jax.eval_shape(lambda: self._out(params, first)[1])
        none = {name: jnp.float32(0) for name in names}
        return jax.lax.stop_gradient(self._sum(lambda batch: self._out(params, batch)[1], none))

    def _share(self, params: Params, batch: Batch, weights: dict[str, Any]) -> jax.Array:
        """What one batch contributes to the loss."""
        totals, _ = self._out(params, batch)
        loss = jnp.float32(0)
        for name, total in totals.items():
            loss += total / jnp.where(weights[name] == 0, 1.0, weights[name])
        return loss

    def _sum(self, fn: Callable[[Batch], Any], start: Any) -> Any:
        def add(total: Any, batch: Batch) -> tuple[Any, None]:
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, fn(batch)), None

        for group in self.groups:
            start, _ = jax.lax.scan(add, start, group)
        return start


def batched_loss(
    objective: Objective,
    frozen: Params,
    batches: Iterable[Mapping[str, Any]],
    *,
    compute_dtype: Any = None,
    plan: MeshPlan | None = None,
) -> BatchedLoss:
    """The mean loss over fixed batches, as a function of the trainable parameters.

    Totals and weights are added up over all batches before they are divided, so that the loss
    does not depend on how the examples are batched; rows of weight 0 count nothing.

    Args:
      objective: ``(params, batch, key) -> LossOut``; called with the key None, as evaluations do.
      frozen: the parameters that do not vary; ``{}`` for none.
      batches: each shape of batch is one loop of the compiled program. Columns that are not
        numbers, and ``example_index``, are left out.
      compute_dtype: of the forward and backward passes; sums are float32.
      plan: splits the rows over its mesh; None leaves the placement to the parameters.

    Raises:
      ValueError: there is no batch, or its rows cannot be divided over the mesh.
    """
    shapes: dict[Any, list[dict[str, np.ndarray]]] = {}
    for batch in batches:
        columns = {name: np.asarray(value) for name, value in batch.items()}
        columns = {
            name: value
            for name, value in columns.items()
            if name != "example_index"
            and (value.dtype.kind in "biuf" or jnp.issubdtype(value.dtype, jnp.floating))
        }
        key = tuple((name, columns[name].shape, columns[name].dtype.str) for name in columns)
        shapes.setdefault(key, []).append(columns)
    if not shapes:
        raise ValueError("batches is empty: a loss needs at least one batch")
    groups = tuple(
        {name: _place(name, [batch[name] for batch in same], plan) for name in same[0]}
        for same in shapes.values()
    )
    dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
    return BatchedLoss(frozen, groups, objective, dtype, plan)


def _place(name: str, values: list[np.ndarray], plan: MeshPlan | None) -> jax.Array:
    stacked = np.stack(values)
    if plan is None:
        return jnp.asarray(stacked)
    if stacked.ndim > 1 and stacked.shape[1] % plan.data_size:
        raise ValueError(
            f"batch[{name!r}] has {stacked.shape[1]} rows, not divisible by the {plan.data_size} "
            f"parts of mesh axes {plan.data_axes}; use a multiple of {plan.data_size}"
        )
    return jax.device_put(stacked, plan.rows(leading=1) if stacked.ndim > 1 else plan.replicated)


def as_argument(loss: Loss) -> Any:
    """``loss`` as a value that a compiled program takes; a plain function is known by identity."""
    leaves = jax.tree.leaves(loss)
    return jax.tree_util.Partial(loss) if len(leaves) == 1 and leaves[0] is loss else loss


def value_and_grad(loss: Any, params: Params) -> tuple[jax.Array, Params]:
    """Loss and gradient, one batch at a time where the loss can."""
    if isinstance(loss, BatchedLoss):
        return loss.value_and_grad(params)
    return jax.value_and_grad(lambda p: scalar(loss, p))(params)


def hvp(loss: Any, params: Params, vector: Params) -> Params:
    """Hessian times vector, one batch at a time where the loss can."""
    if isinstance(loss, BatchedLoss):
        return loss.hvp(params, vector)
    return _along(lambda p: scalar(loss, p), params, vector)


def _along(fn: Loss, params: Params, vector: Params) -> Params:
    tangent = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, params)
    return jax.jvp(jax.grad(fn), (params,), (tangent,))[1]


def scalar(loss: Any, params: Params) -> jax.Array:
    """``loss(params)``, which must have no shape.

    Raises:
      ValueError: it has one.
    """
    value = jnp.asarray(loss(params))
    if value.shape:
        raise ValueError(f"loss(params) must be a scalar, got shape {value.shape}; take its mean")
    return value


def zeros_like(params: Params) -> Params:
    """Zeros in float32, or wider where the parameters are."""
    return jax.tree.map(
        lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params
    )


def draw(key: jax.Array, params: Params, kind: str, where: Placement) -> Params:
    """Independent float32 entries shaped like ``params``: "normal", or "sign" (+1 or -1).

    All leaves are cut from one vector, whose entries do not depend on the mesh: a generator a
    leaf took most of the time that a start of Lanczos takes to compile.
    """
    leaves, structure = jax.tree.flatten(params)
    sample: Any = jax.random.normal if kind == "normal" else jax.random.rademacher
    ends = np.cumsum([leaf.size for leaf in leaves])
    meshes = [sharding.mesh for sharding in where if sharding is not None]
    many = meshes[0].size if meshes else 1
    # Every device makes its part of the vector, before the leaves take theirs.
    vector = sample(key, (-(-int(ends[-1]) // many) * many,), dtype=jnp.float32)
    if many > 1:
        split = NamedSharding(meshes[0], PartitionSpec(meshes[0].axis_names))
        vector = jax.lax.with_sharding_constraint(vector, split)
    parts = jnp.split(vector, ends)
    drawn = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves)]
    return jax.tree.unflatten(structure, drawn)


def placement(params: Params) -> Placement:
    """The shardings of the leaves, as a hashable value for :func:`pin`."""
    found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return tuple(s if isinstance(s, NamedSharding) else None for s in found)


def pin(vector: Params, where: Placement, *, leading: int = 0) -> Params:
    """Keeps a tree shaped like the parameters (``leading`` axes in front) in their shards."""
    leaves, structure = jax.tree.flatten(vector)
    pinned = [
        leaf
        if sharding is None
        else jax.lax.with_sharding_constraint(leaf, _behind(sharding, leading))
        for leaf, sharding in zip(leaves, where, strict=True)
    ]
    return jax.tree.unflatten(structure, pinned)


def stack_zeros(params: Params, rows: int, where: Placement) -> Params:
    """Room for ``rows`` vectors shaped like ``params``, each split as they are."""
    leaves, structure = jax.tree.flatten(params)
    made = [
        jnp.zeros(
            (rows, *leaf.shape),
            jnp.float32,
            device=None if sharding is None else _behind(sharding, 1),
        )
        for leaf, sharding in zip(leaves, where, strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def _behind(sharding: NamedSharding, leading: int) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*(None,) * leading, *sharding.spec))


def check_key(key: Any) -> None:
    """Refuses what is no key of random numbers.

    Raises:
      TypeError: naming what to pass instead.
    """
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0:
            return
        if key.dtype == jnp.uint32 and key.ndim == 1:  # of jax.random.PRNGKey
            return
    raise TypeError(f"key must be a key such as jax.random.key(0), got {key!r}")


def whole(name: str, value: Any, least: int) -> int:
    """``value`` as an integer.

    Raises:
      ValueError: it is not a whole number, or below ``least``.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not least <= value < math.inf or int(value) != value:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)
