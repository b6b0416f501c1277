"""The localised balancing constraint of LoRAMoE, around any objective.

  Z_{n, i} = I_{n, i} Q_{n, i},   I = 1 + delta where expert i is of the group of sample n's type,
                                  1 - delta elsewhere; experts [0, E / 2) are of type 1
  L_lbc    = var(Z) / mean(Z)^2      var with the denominator N E - 1; ``mode="paper"``: / mean(Z)
  L        = L_task + beta sum over layers and sites of L_lbc

Q is the mass that the routers give, see ``models.overlays.loramoe``; no gradient flows through I.
The constraint is met where Z is constant, so Q is proportional to 1 / I: the group with 1 + delta
gets the share (1 - delta) / 2 of a sample, the other (1 + delta) / 2. A sample is therefore routed
*away* from the group of its own type; the groups are alike at first, so they specialise all the
same. Name them by the mass that they receive.

Dou et al., ACL 2024, arXiv 2312.09979.

Deviations: the constraint is not a sum over samples: it is that of the rows of one micro-batch
(over all devices), and micro-batches are averaged. Rows that fill a batch up do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steppe.models.overlays.loramoe import ROUTER_MASS
from steppe.models.sites import listening
from steppe.train.types import Batch, LossOut, Objective, Params

MODES = ("cv2", "paper")


def localized_balance_loss(
    router_mass: Float[Array, "N E"],
    sample_type: Int[Array, " N"],
    delta: float = 0.1,
    *,
    mode: Literal["cv2", "paper"] = "cv2",
    eps: float = 1e-10,
    rows: Float[Array, " N"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """L_lbc of one layer and site, float32.

    Args:
      router_mass: Q.
      sample_type: 1 = world-knowledge questions, 0 = anything else.
      delta: of the importance, in [0, 1).
      mode: "cv2" does not depend on the length of the samples; "paper" grows with it.
      eps: added to the squared mean of "cv2".
      rows: 1 = the row counts; None = all do.
      axis_name: of ``shard_map`` or ``pmap``, where N is a device's share of the rows.

    Raises:
      ValueError: an unknown mode, delta out of range, an odd number of experts.
    """
    _check(mode, delta)
    experts = router_mass.shape[1]
    if experts % 2:
        raise ValueError(
            f"the balancing constraint halves the experts: their number must be even, got {experts}"
        )
    first = jnp.arange(experts) < experts // 2
    own = first[None, :] == (jnp.asarray(sample_type) == 1)[:, None]
    importance = jnp.where(own, 1.0 + delta, 1.0 - delta)
    z = importance * router_mass.astype(jnp.float32)
    weight = jnp.ones(z.shape[:1], jnp.float32) if rows is None else rows.astype(jnp.float32)

    def total(values: jax.Array) -> jax.Array:
        found = (values * weight[:, None]).sum()
        return found if axis_name is None else jax.lax.psum(found, axis_name)

    count = total(jnp.ones_like(z))
    mean = total(z) / jnp.maximum(count, 1.0)
    variance = total(jnp.square(z - mean)) / jnp.maximum(count - 1.0, 1.0)
    scale = jnp.square(mean) + eps if mode == "cv2" else jnp.where(count > 0, mean, 1.0)
    return jnp.where(count > 1, variance / scale, 0.0)


def loramoe_loss(
    objective: Objective,
    *,
    beta: float = 0.1,
    delta: float = 0.1,
    mode: Literal["cv2", "paper"] = "cv2",
    types: str = "sample_type",
) -> Objective:
    """``objective`` and beta times the constraint, of a model that has ``loramoe.overlay``.

    The batch holds the type of every row, 0 or 1. Components: those of ``objective`` as ``task``
    (``task/NAME`` where it has several), and ``balance``. aux: ``balance/loss`` before beta,
    and those of ``objective``.

    Args:
      objective: runs the bound model once.
      beta, delta, mode: see the module.
      types: the batch's column of types.

    Raises:
      ValueError: a setting out of range; from the objective, a batch without types, or a model
        that has no router.
    """
    if beta < 0:
        raise ValueError(f"beta must be >= 0, got {beta}")
    _check(mode, delta)

    def balanced(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        if types not in batch:
            raise ValueError(
                f"the batch lacks {types!r} [B], the type 0 or 1 of every row; it holds "
                f"{', '.join(batch)}"
            )
        with listening() as told:
            out = objective(params, batch, key)  # type: ignore[arg-type]
        masses = [value for name, value in told.items() if name.startswith(f"{ROUTER_MASS}/")]
        if not masses:
            raise ValueError("no router was heard: bind loramoe.overlay to the objective's model")
        rows = _counted(batch)
        found = jnp.float32(0)
        for layers in masses:  # [L, N, E] each
            each = jax.vmap(
                lambda q: localized_balance_loss(q, batch[types], delta, mode=mode, rows=rows)
            )
            found += each(layers).sum()
        several = isinstance(out.total, Mapping)
        totals = {f"task/{n}": v for n, v in out.total.items()} if several else {"task": out.total}
        weights = (
            {f"task/{n}": v for n, v in out.weight.items()} if several else {"task": out.weight}
        )
        aux = {**out.aux, "balance/loss": (jax.lax.stop_gradient(found), 1.0)}
        return LossOut(
            {**totals, "balance": beta * found}, {**weights, "balance": jnp.float32(1)}, aux
        )

    return balanced


def _counted(batch: Batch) -> Any:
    """Float [B], 0 for rows without any label; None where the batch has no ``label_mask``."""
    mask = batch.get("label_mask")
    if mask is None:
        return None
    mask = jnp.asarray(mask) > 0
    return mask.reshape(mask.shape[0], -1).any(1).astype(jnp.float32)


def _check(mode: str, delta: float) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0.0 <= delta < 1.0:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
