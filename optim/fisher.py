"""Which parameters matter most: the diagonal of the empirical Fisher information, and masks.

  batch        F = (dL_B(w))^2, the square of the current mini-batch's gradient: free
  per sample   F = 1/N sum_i (d log p_w(y_i | x_i))^2 over N examples with their true labels,
               which ``steppe.train.fisher`` computes

A mask keeps the k = int(keep_ratio * n) entries with the largest F, over all candidate leaves
together, so that a layer of small gradients may keep nothing. ``structure`` coarsens that to
whole tensors a layer, or to N of every M neighbours.

Zhong et al., Findings of EMNLP 2022 (FSAM, arXiv 2210.05497); Mi et al., NeurIPS 2022 (SSAM,
2210.05177).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.tree import path_of
from steppe.optim.perturbation import dimensions
from steppe.optim.topk import top_k


def square(grads: Any) -> Any:
    """The Fisher diagonal of one mini-batch, float32."""
    return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), grads)


def candidates(params: Any, exclude: Sequence[str] = ()) -> Any:
    """Tree of Python bools: whether a leaf may be masked at all.

    Args:
      exclude: regular expressions on whole paths of the leaves left out.

    Raises:
      ValueError: a pattern matches no leaf, or all leaves are left out.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern in exclude:
        if not any(re.fullmatch(pattern, path) for path in paths):
            some = ", ".join(paths[:4])
            raise ValueError(f"exclude={pattern!r} matches no parameter; paths look like {some}")
    chosen = [not any(re.fullmatch(p, path) for p in exclude) for path in paths]
    if not any(chosen):
        raise ValueError(f"exclude={tuple(exclude)} leaves no parameter to choose from")
    return jax.tree.unflatten(jax.tree.structure(params), chosen)


def elementwise(fisher: Any, keep_ratio: float, chosen: Any, excluded: bool) -> Any:
    """Bool tree: True on the ``int(keep_ratio * n)`` largest entries of the candidate leaves.

    Args:
      fisher: non-negative scores.
      keep_ratio: share of the candidates' entries, in [0, 1].
      chosen: tree of Python bools, see :func:`candidates`.
      excluded: value of the mask on the other leaves.
    """
    leaves, structure = jax.tree.flatten(fisher)
    flags = jax.tree.leaves(chosen)
    scores = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
    entries = sum(leaf.size for leaf in scores)
    found = iter(top_k(scores, keep_count(keep_ratio, entries)).mask)
    masks = [
        next(found) if flag else jnp.full(leaf.shape, excluded)
        for leaf, flag in zip(leaves, flags, strict=True)
    ]
    return jax.tree.unflatten(structure, masks)


def keep_count(keep_ratio: float, entries: int) -> int:
    """``int(keep_ratio * entries)``, all of them at 1 whatever floats make of it."""
    return entries if keep_ratio == 1 else int(keep_ratio * entries)


def check_neighbours(params: Any, m: int, chosen: Any) -> None:
    """Refuses groups of m neighbours that no candidate leaf has.

    Raises:
      ValueError: m divides the last axis of none: all would be kept whole.
    """
    keyed = jax.tree_util.tree_flatten_with_path(params)[0]
    axes = [
        leaf.shape[-1]
        for (keys, leaf), flag in zip(keyed, jax.tree.leaves(chosen), strict=True)
        if flag and dimensions(keys, leaf) >= 2
    ]
    if not any(axis % m == 0 for axis in axes):
        raise ValueError(
            f"structure=(N, {m}) needs a matrix whose last axis {m} divides, got last axes "
            f"{sorted(set(axes))}: every entry would be perturbed, which is SAM"
        )


def n_of_m(fisher: Any, n: int, m: int, chosen: Any, excluded: bool) -> Any:
    """Bool tree: the n largest of every m neighbours along the last axis of each matrix.

    Leaves of one dimension a layer, and matrices whose last axis m does not divide, are kept
    whole where any of their entries may be: they have no groups to choose from.
    """

    def one(keys: Any, leaf: jax.Array, flag: bool) -> jax.Array:
        if not flag:
            return jnp.full(leaf.shape, excluded)
        if not leaf.size or dimensions(keys, leaf) < 2 or leaf.shape[-1] % m:
            return jnp.ones(leaf.shape, bool)
        groups = leaf.reshape(*leaf.shape[:-1], -1, m)
        # Rank of each entry in its group; of equal ones the first goes first.
        order = jnp.argsort(jnp.argsort(-groups, axis=-1, stable=True), axis=-1)
        return (order < n).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, fisher, chosen)
