"""Merging low-rank adapters by their products, without the full matrices where that is possible.

  W_i = W_0 + s_i A_i B_i
  sum_i c_i s_i A_i B_i = [A_1 ... A_N] [c_1 s_1 B_1; ...; c_N s_N B_N]

Averages and task arithmetic are linear in the products: their merge is one adapter of rank
sum_i r_i, made by concatenation. Averaging A and B separately would not be: (mean A)(mean B)
holds products of different tasks. What is not linear (TIES, DARE, Fisher, RegMean, the adaptive
methods) merges full matrices: ``products`` gives the task vectors of the adapted kernels alone,
``folded`` whole models.

Hu et al., ICLR 2022 (LoRA, arXiv 2106.09685); Ilharco et al., ICLR 2023 (2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.overlays import lora
from steppe.models.overlays.overlay import Overlay, site_path
from steppe.models.tree import Params
from steppe.train.merge import leafwise


def concatenated(
    deltas: Sequence[Mapping[str, Any]],
    scales: Sequence[float],
    coefficients: Sequence[Any] | None = None,
) -> tuple[Overlay, Params]:
    """The adapter that adds ``sum_i c_i s_i A_i B_i``.

    Args:
      deltas: N LoRA deltas ``{"layers": {site: {"a": [L, d_in, r_i], "b": [L, r_i, d_out]}}}``;
        their ranks and sites may differ.
      scales: s_i of each, alpha / r (see :func:`scale`).
      coefficients: c_i; default 1/N, the average. ``[lam] * N`` is task arithmetic.

    Returns:
      The overlay and its delta, of rank sum_i r_i with scale 1.

    Raises:
      ValueError: no delta, one without factors, other numbers of scales or coefficients, one
        of them that is not finite, or factors of different shapes at one site (named).
    """
    count = len(deltas)
    if count == 0:
        raise ValueError("there must be at least one adapter to merge, got none")
    c = [1.0 / count] * count if coefficients is None else list(coefficients)
    if len(scales) != count or len(c) != count:
        raise ValueError(
            f"there must be one scale and one coefficient an adapter: {count}, "
            f"got {len(scales)} and {len(c)}"
        )
    leafwise.check_finite("scales", list(scales))
    leafwise.check_finite("coefficients", c)
    stacks = _stacks(deltas)
    names = list(dict.fromkeys(name for stack in stacks for name in stack))
    whole = max(sum(_rank(s[n]) for s in stacks if n in s) for n in names)
    merged = {}
    for name in names:
        held = [(s[name], w * k) for s, w, k in zip(stacks, scales, c) if name in s]
        shape = held[0][0]["a"].shape[:2], held[0][0]["b"].shape[2]
        for factors, _ in held:
            if (factors["a"].shape[:2], factors["b"].shape[2]) != shape:
                raise ValueError(
                    f"the adapters' factors at {name!r} are of different models: "
                    f"{held[0][0]['a'].shape} and {factors['a'].shape}"
                )
        a = jnp.concatenate([factors["a"] for factors, _ in held], axis=2)
        b = jnp.concatenate(
            [
                (factors["b"].astype(jnp.float32) * by).astype(factors["b"].dtype)
                for factors, by in held
            ],
            axis=1,
        )
        # A site that some adapters lack is filled up: an overlay has one rank.
        room = whole - a.shape[2]
        a = jnp.pad(a, ((0, 0), (0, 0), (0, room)))
        b = jnp.pad(b, ((0, 0), (0, room), (0, 0)))
        merged[name] = {"a": a, "b": b}
    overlay = lora.overlay(rank=whole, alpha=float(whole), sites=names)
    return overlay, {tree.STACK: merged}


def _stacks(deltas: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The factors of every adapter by site.

    Raises:
      ValueError: an adapter has none.
    """
    for number, delta in enumerate(deltas):
        if not delta.get(tree.STACK):
            raise ValueError(
                f"adapter {number} must hold LoRA factors under {tree.STACK!r}, "
                f"got {', '.join(map(repr, delta)) or 'nothing'}"
                f"{' without a site' if tree.STACK in delta else ''}"
            )
    return [delta[tree.STACK] for delta in deltas]


def _rank(factors: Mapping[str, Any]) -> int:
    return int(factors["a"].shape[2])


def scale(rank: int, alpha: float = 16.0, rank_stabilised: bool = False) -> float:
    """s of a LoRA overlay: alpha / r, or alpha / sqrt(r)."""
    return 0.0 if rank == 0 else alpha / (rank**0.5 if rank_stabilised else rank)


def compressed(delta: Mapping[str, Any], rank: int) -> Params:
    """The closest delta of a smaller rank, through QR of the factors; no full matrix is made.

    Args:
      delta: as made by :func:`concatenated` (scale 1).
      rank: wanted; the products keep their largest singular values.

    Raises:
      ValueError: rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")

    def one(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
        left, upper = jnp.linalg.qr(a.astype(jnp.float32))
        right, lower = jnp.linalg.qr(b.astype(jnp.float32).T)
        u, s, v = jnp.linalg.svd(upper @ lower.T, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return {
            "a": ((left @ u[:, :rank]) * root).astype(a.dtype),
            "b": (root[:, None] * (v[:rank] @ right.T)).astype(b.dtype),
        }

    stack = delta[tree.STACK]
    return {tree.STACK: {n: jax.vmap(one)(f["a"], f["b"]) for n, f in stack.items()}}


def products(
    base: Mapping[str, Any], deltas: Sequence[Mapping[str, Any]], scales: Sequence[float]
) -> Params:
    """Task vectors ``s_i A_i B_i`` of the adapted kernels only, stacked [N, L, d_in, d_out].

    They are float32 whatever the dtype of the base, as those of ``leafwise.task_vectors``. The
    tree holds some of the base's paths; every merge of ``leafwise``, ``ties`` and ``dare`` copies
    the others. The global threshold of TIES is then one over the adapted kernels.

    Raises:
      ValueError: no delta, one without factors, a scale that is not finite, or a site that the
        base lacks.
    """
    if not deltas or len(scales) != len(deltas):
        raise ValueError(f"there must be one scale an adapter: {len(deltas)}, got {len(scales)}")
    leafwise.check_finite("scales", list(scales))
    stacks = _stacks(deltas)
    names = list(dict.fromkeys(name for stack in stacks for name in stack))
    out = {}
    for name in names:
        path = site_path(dict(base), name)
        kernel = tree.get(base, path)
        parts = []
        for stack, s in zip(stacks, scales):
            if name not in stack:
                parts.append(jnp.zeros(kernel.shape, jnp.float32))
                continue
            a, b = (stack[name][n].astype(jnp.float32) for n in "ab")
            parts.append(s * jnp.einsum("lir,lro->lio", a, b))
        out[path] = jnp.stack(parts)
    return tree.unflatten(out)


def folded(base: Params, overlays: Sequence[Overlay], deltas: Sequence[Params]) -> Iterator[Params]:
    """The models with their adapters folded in, one after another.

    Raises:
      ValueError: an overlay has no merged form.
    """
    for overlay, delta in zip(overlays, deltas, strict=True):
        if overlay.merge is None:
            raise ValueError(
                f"the overlay {overlay.name!r} has no merged form and cannot be folded"
            )
        yield overlay.merge(base, delta)
