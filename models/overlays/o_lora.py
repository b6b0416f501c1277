"""O-LoRA: each task learns in a low-rank subspace that is orthogonal to those of earlier tasks.

  y = x W + s * drop(x) (sum_{i < t} A_i B_i + A_t B_t),     s = alpha / r
  L = CE + lambda_1 sum_{sites, layers} sum_{i < t} |A_i^T A_t|_1
         + lambda_2 sum_{sites, layers} (|A_t|_F + |B_t|_F)

A_i and B_i of the earlier tasks are frozen and stand in a bank of fixed size, [d_in, T r] and
[T r, d_out], so that a new task compiles nothing; ``active`` says which slots count. After a task
``commit_task`` moves A_t, B_t into the next slot and draws a new A_t; B_t = 0, so that every task
starts at the function that the one before has left. All branches are summed, at inference without
any task's name, and merge: W' = W + s sum_i A_i B_i.

Wang et al., Orthogonal Subspace Learning for Language Model Continual Learning, Findings of EMNLP
2023, arXiv 2310.14152.

Deviations: our kernels are (in, out), so A and B here are the transposes of the paper's and the
columns of A span a task's subspace. The paper squares the entries of A_i^T A_t (``p=2``), its code
takes their absolute values (``p=1``, the default here). The sums run over all layers and sites, as
in the code: lambda_1 means another thing in a deeper model. ``drop`` is 0 unless it is given, where
the published runs have 0.1, as ``steppe continual`` has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models import tree
from steppe.models.model import Rules
from steppe.models.overlays import lora
from steppe.models.overlays.overlay import Overlay, site_kernel
from steppe.models.sites import Site
from steppe.models.tree import Params

BANK, ACTIVE = "bank", "active"
RULES: Rules = (
    *lora.RULES,
    *((rf"{BANK}/{pattern}", axes) for pattern, axes in lora.RULES),
    (rf"{BANK}/{ACTIVE}", (None,)),
)


def overlay(
    *,
    tasks: int = 4,
    rank: int = 8,
    alpha: float = 32.0,
    sites: Sequence[str] = ("attn.q", "attn.v"),
    drop: float = 0.0,
) -> Overlay:
    """The O-LoRA overlay; its bank does not train.

    Args:
      tasks: T, slots of the bank: tasks that can be committed.
      rank: r of one task.
      alpha: numerator of the scale alpha / r, the same for all tasks.
      sites, drop: see ``overlays.lora``; the branches of all tasks see one dropout mask.

    Returns:
      An overlay whose delta is ``{"layers": {site: {"a": [L, d_in, r], "b": [L, r, d_out]}},
      "bank": {"layers": {site: {"a": [L, d_in, T r], "b": [L, T r, d_out]}}, "active": [T]}}``.

    Raises:
      ValueError: tasks or rank below 1, alpha not finite, and what LoRA refuses; from ``init``,
        subspaces that do not fit beside each other into the inputs of a matrix.
    """
    if tasks < 1:
        raise ValueError(f"tasks must be >= 1, got {tasks}")
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    plain = lora.overlay(rank=rank, alpha=alpha, sites=sites, drop=drop)
    names = tuple(sites)

    def init(key: jax.Array, params: Params) -> Params:
        made = plain.init(key, params)
        kept = {}
        for name in names:
            layers, d_in, d_out = site_kernel(params, name).shape
            if tasks * rank > d_in:
                raise ValueError(
                    f"tasks * rank must be <= {d_in} at site {name!r}, where no more directions "
                    f"are orthogonal to each other, got {tasks} * {rank} = {tasks * rank}"
                )
            kept[name] = {
                "a": jnp.zeros((layers, d_in, tasks * rank)),
                "b": jnp.zeros((layers, tasks * rank, d_out)),
            }
        return {**made, BANK: {tree.STACK: kept, ACTIVE: jnp.zeros(tasks)}}

    def attach(delta: Params) -> dict[str, Site]:
        return plain.sites(joined(delta))

    def merge(params: Params, delta: Params) -> Params:
        assert plain.merge is not None
        return plain.merge(params, joined(delta))

    settings = {"tasks": tasks, "rank": rank, "alpha": alpha, "sites": names, "drop": drop}
    return Overlay(
        "o-lora",
        init,
        attach,
        merge,
        RULES,
        settings=tuple(settings.items()),
        fixed=(rf"{BANK}/.*",),
    )


def joined(delta: Params) -> Params:
    """The delta of the plain LoRA that computes the same: all slots, and the current task last."""
    out = {}
    for name, own in delta[tree.STACK].items():
        kept, columns = delta[BANK][tree.STACK][name], _columns(delta, own["a"])
        out[name] = {
            "a": jnp.concatenate([kept["a"], own["a"]], -1),
            "b": jnp.concatenate([kept["b"] * columns[:, None], own["b"]], -2),
        }
    return {tree.STACK: out}


def commit_task(delta: Params, key: jax.Array) -> Params:
    """The delta with which the next task begins: the trained pair in the bank, a new A, B = 0.

    The function that the delta computes stays the same. The optimiser's state of the task that
    is over must be thrown away.

    Args:
      key: of the new A, uniform in +-1 / sqrt(d_in).

    Raises:
      ValueError: all slots of the bank are taken. Inside jit, where the number of tasks is not
        known, the new slot is NaN instead.
    """
    active = delta[BANK][ACTIVE]
    count = active.astype(jnp.float32).sum().astype(jnp.int32)
    size = active.shape[0]
    if not isinstance(count, jax.core.Tracer) and int(count) >= size:
        raise ValueError(
            f"the bank holds {size} tasks and all of its slots are taken; make the overlay with "
            f"tasks={size + 1} or more"
        )
    live, bank = {}, {}
    layers = delta[tree.STACK]
    for (name, own), one in zip(layers.items(), jax.random.split(key, len(layers)), strict=True):
        a, b = own["a"], own["b"]
        kept = delta[BANK][tree.STACK][name]
        room = jnp.where(count < size, 1.0, jnp.nan).astype(a.dtype)
        start = count * a.shape[-1]
        bank[name] = {
            "a": jax.lax.dynamic_update_slice_in_dim(kept["a"], room * a, start, a.ndim - 1),
            "b": jax.lax.dynamic_update_slice_in_dim(kept["b"], room * b, start, b.ndim - 2),
        }
        bound = 1.0 / math.sqrt(a.shape[-2])
        fresh = jax.random.uniform(one, a.shape, a.dtype, minval=-bound, maxval=bound)
        live[name] = {"a": fresh, "b": jnp.zeros_like(b)}
    taken = (jnp.arange(size) <= count).astype(active.dtype)
    return {tree.STACK: live, BANK: {tree.STACK: bank, ACTIVE: taken}}


def orthogonality_penalty(
    bank: Float[Array, "*L D N"],
    active: Float[Array, " N"],
    a: Float[Array, "*L D r"],
    p: int = 1,
) -> Float[Array, ""]:
    """``sum |A_i^T A_t|^p`` over the active columns of the bank, in float32.

    Args:
      bank: A of all slots; a leading axis of layers is summed over.
      active: 1 = the column is of a task that has been learnt.
      a: A of the current task.
      p: 1 as in the published code, 2 as in the paper.

    Raises:
      ValueError: p is neither.
    """
    _check_power(p)
    kept = bank.astype(jnp.float32) * active.astype(jnp.float32)
    overlap = jnp.einsum("...dn,...dr->...nr", kept, a.astype(jnp.float32))
    return jnp.abs(overlap).sum() if p == 1 else jnp.square(overlap).sum()


def penalty(delta: Params, p: int = 1) -> jax.Array:
    """:func:`orthogonality_penalty` of all sites of a delta; 0 for the first task."""
    total = jnp.float32(0)
    for name, own in delta[tree.STACK].items():
        kept = delta[BANK][tree.STACK][name]["a"]
        total += orthogonality_penalty(kept, _columns(delta, own["a"]), own["a"], p)
    return total


def l2_penalty(delta: Params) -> jax.Array:
    """The sum of the Frobenius norms, not squared, of the current task's A and B of every layer.

    Its gradient at a matrix of zeros, which every B is at first, is taken to be 0.
    """

    def norms(leaf: Any) -> jax.Array:
        square = jnp.square(leaf.astype(jnp.float32)).sum((-2, -1))
        some = square > 0
        return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1.0)), 0.0).sum()

    return sum(map(norms, jax.tree.leaves(delta[tree.STACK])), jnp.float32(0))


def project_gradient(
    gradient: Float[Array, "*L D r"], bank: Float[Array, "*L D N"], active: Float[Array, " N"]
) -> Float[Array, "*L D r"]:
    """The part of a gradient of A that is orthogonal to the active columns of the bank.

    With it in place of the penalty the new subspace keeps whatever overlap it began with.
    """
    kept = bank.astype(jnp.float32) * active.astype(jnp.float32)
    inside = kept @ (jnp.linalg.pinv(kept) @ gradient.astype(jnp.float32))
    return (gradient - inside).astype(gradient.dtype)


def largest_cosine(delta: Params) -> jax.Array:
    """Largest |cos| between a column of an earlier task's A and one of the current task's."""
    worst = jnp.float32(0)
    for name, own in delta[tree.STACK].items():
        kept = delta[BANK][tree.STACK][name]["a"] * _columns(delta, own["a"])
        left, right = (_unit(x.astype(jnp.float32)) for x in (kept, own["a"]))
        worst = jnp.maximum(worst, jnp.abs(jnp.einsum("...dn,...dr->...nr", left, right)).max())
    return worst


def _unit(columns: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(columns, axis=-2, keepdims=True)
    return columns / jnp.where(norm > 0, norm, 1.0)


def _columns(delta: Params, a: Any) -> jax.Array:
    """``active`` of every column of the bank, [T r]."""
    return jnp.repeat(delta[BANK][ACTIVE], a.shape[-1])


def _check_power(p: int) -> None:
    if p not in (1, 2):
        raise ValueError(f"p must be 1 (absolute values) or 2 (squares), got {p}")
