"""m-sharpness: every group of rows climbs by its own gradient.

  g_i = dL_i(w);   e_i = perturbation(g_i), of length rho;   result = sum_i W_i / W * dL_i(w + e_i)

L_i is the loss of the rows of group i alone and W_i its weight (tokens, examples); the sum is
exact whatever the weights are. Groups are consecutive rows of the *global* batch: group i of
size s holds the rows i s to (i + 1) s - 1, on any mesh and for any number of micro-batches.
``"device"`` is s = B / P with P data shards (the product of the mesh's data and fsdp axes;
devices that differ only along a model axis share a group), the rows that one shard holds.

Where s divides a shard's rows, every shard works through its own groups and no gradient is
exchanged before the final sum. The shards are an axis of ``jax.vmap`` that is split over the data
axes of the mesh; under ``jax.shard_map`` an objective could not use what it closes over, such as
a teacher's parameters on the mesh. Parameters that are split over ``fsdp`` are gathered. Other
sizes run one group after the other, each on all devices. With micro-batches a group is itself cut
so that no more rows are in memory at once than a micro-batch has; its gradient is that of the
whole group.

Dropout: micro-batch j of group i has the key ``fold_in(fold_in(key, i), j)``, in both passes.

Foret et al., ICLR 2021, arXiv 2010.01412, section 4.2, where a group is a device's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import NamedSharding, PartitionSpec

from steppe.optim.perturbation import global_norm
from steppe.train.gradient import (
    Found,
    Sums,
    Work,
    accumulate,
    cast,
    clipped,
    fill,
    hide,
    weigh,
)
from steppe.train.microbatch import split_rows
from steppe.train.types import Batch, Params

SHARDS = "shards"
# (w, gradient of a group) -> w + e of that group
Displaced = Callable[[Params, Params], Params]


class Groups:
    """The ``group_fn`` of one step.

    Attributes:
      clean: loss, metrics and gradient at the parameters, once they have come out of the
        groups' first passes; None before. The step then drops its own pass over the batch.
    """

    def __init__(self, work: Work, whole: Params) -> None:
        self.clean: Found | None = None
        self._work = work
        self._whole = whole  # the leaves that a transform inside optax.partition does not see
        self._trace = core.get_opaque_trace_state()

    def __call__(self, params: Params, displaced: Displaced, ascent: str | int) -> Params:
        """The gradient for the optimiser.

        Args:
          params: w.
          displaced: ``(w, gradient of a group) -> w + e`` of that group. It may run where every
            device works by itself, and must use the w that it is given.
          ascent: "device", or the number of rows of a group.

        Raises:
          ValueError: the groups do not divide the rows.
        """

        def there(whole: Params, grads: Params) -> Params:
            return fill(displaced(hide(whole, params), hide(grads, params)), whole)

        whole = fill(params, self._whole)
        sharp, clean = gradient(self._work, whole, there, ascent)
        # What was made inside a branch (rho is a schedule) cannot leave it.
        if clean is not None and core.get_opaque_trace_state() == self._trace:
            self.clean = clean
        return hide(sharp, params)


def gradient(
    work: Work, params: Params, displaced: Displaced, ascent: str | int
) -> tuple[Params, Found | None]:
    """See the top of the file; with what the first passes add up to, for one-component losses.

    Raises:
      ValueError: groups that do not divide the rows.
    """
    rows = work.rows
    shards = 1 if work.plan is None else work.plan.data_size
    size = rows // shards if ascent == "device" else int(ascent)
    if rows % size:
        raise ValueError(
            f"ascent={ascent} does not divide the {rows} rows of the batch: use a group size that "
            "does, 'device' or 'global'"
        )
    if size == rows:
        clean = work.evaluate(params)
        return work.gradient(displaced(params, clean.grads)), clean
    local = shards > 1 and (rows // shards) % size == 0
    most = max(rows // work.microbatches // (shards if local else 1), 1)
    cuts = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= most)
    plan = work.plan if local else None
    within = work.plan if not local and size // cuts % shards == 0 else None
    frozen, key = work.still, work.key
    compute = cast(params, work.compute_dtype)

    def spread(one: Any) -> Any:
        """Of what every shard has a copy of its own, that copy on the shard."""
        if plan is None:
            return one
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(
                x,
                NamedSharding(plan.mesh, PartitionSpec(*(PartitionSpec.UNCONSTRAINED,) * x.ndim)),
            ),
            one,
        )

    def run(params: Params, batch: Batch) -> tuple[Any, Any]:
        own = next(v.shape[0] for v in batch.values() if v.ndim) // size
        first = 0 if plan is None else jax.lax.axis_index(SHARDS) * own
        numbers = first + jnp.arange(own)
        groups = {
            name: value.reshape(own, size, *value.shape[1:])
            if value.ndim
            else jnp.broadcast_to(value, (own,))
            for name, value in batch.items()
        }

        def start(group: Batch, number: jax.Array) -> tuple[Batch, jax.Array]:
            parts = group if cuts == 1 else split_rows(group, cuts, within)
            return parts, jax.random.fold_in(key, number)

        def weights_of(group: Batch, number: jax.Array) -> dict[str, jax.Array]:
            parts, own_key = start(group, number)
            return weigh(work.objective, compute, frozen, parts, own_key, cuts)

        def sums(at: Params, parts: Batch, own_key: jax.Array, weights: Any) -> Sums:
            return accumulate(
                work.objective, at, frozen, parts, own_key, cuts, work.compute_dtype, weights
            )

        _, each = jax.lax.scan(lambda _, x: (None, weights_of(*x)), None, (groups, numbers))
        weights = jax.tree.map(lambda w: w.sum(0), each)
        if plan is not None:
            weights = jax.lax.psum(weights, SHARDS)

        def one(carry: Any, item: tuple[Batch, jax.Array]) -> tuple[Any, Any]:
            parts, own_key = start(*item)
            clean = sums(params, parts, own_key, None)
            there = spread(displaced(params, spread(clean.grads)))
            sharp = sums(there, parts, own_key, weights)
            total = jax.tree.map(lambda c, g: c + g.astype(c.dtype), carry[0], sharp.grads)
            known = carry[1]
            if len(weights) == 1:
                (name,) = weights
                share = clean.weights[name] / jnp.where(weights[name] == 0, 1.0, weights[name])
                known = jax.tree.map(lambda c, g: c + share * g.astype(c.dtype), known, clean.grads)
            return spread((total, known)), (clean.totals, clean.aux)

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        known = zeros if len(weights) == 1 else ()
        (total, known), stats = jax.lax.scan(one, (zeros, known), (groups, numbers))
        stats = jax.tree.map(lambda x: x.sum(0), stats)
        if plan is not None:
            total, known, stats = jax.lax.psum((total, known, stats), SHARDS)
        return (total, known), (*stats, weights)

    batch = {name: jnp.asarray(value) for name, value in work.batch.items()}
    if plan is None:
        found = run(params, batch)
    else:
        blocks = {
            name: value.reshape(shards, -1, *value.shape[1:]) if value.ndim else value
            for name, value in batch.items()
        }
        rowwise = {name: 0 if value.ndim else None for name, value in batch.items()}
        each = jax.vmap(
            run,
            in_axes=(None, rowwise),
            out_axes=None,
            axis_name=SHARDS,
            spmd_axis_name=plan.data_axes,
        )
        # The mesh is unknown inside: models would split the rows of a group over it.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            found = each(params, blocks)
    (total, known), (totals, aux, weights) = found
    total = jax.tree.map(lambda g, p: g.astype(p.dtype), total, params)
    sharp = clipped(total, global_norm(total), work.clip_norm)
    if len(weights) != 1:
        return sharp, None
    (name,) = weights
    loss = totals[name] / jnp.where(weights[name] == 0, 1.0, weights[name])
    return sharp, Sums(loss, totals, weights, aux, known).found(work.clip_norm)
