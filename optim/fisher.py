"""Which parameters matter most: the diagonal of the empirical Fisher information, and masks.

  batch        F = (dL_B(w))^2, the square of the current mini-batch's gradient: free
  per sample   F = 1/N sum_i (d log p_w(y_i | x_i))^2 over N examples with their true labels

A mask keeps the k = int(keep_ratio * n) entries with the largest F, over all candidate leaves
together, so that a layer of small gradients may keep nothing. ``structure`` coarsens that to
whole tensors a layer, or to N of every M neighbours.

Zhong et al., Findings of EMNLP 2022 (FSAM, arXiv 2210.05497); Mi et al., NeurIPS 2022 (SSAM,
2210.05177).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.tree import SEPARATOR
from steppe.optim.perturbation import dimensions
from steppe.optim.topk import top_k

# (params, example) -> log-likelihood or loss of one example, a scalar.
ExampleLoss = Callable[[Any, Any], jax.Array]


def path_of(keys: Any) -> str:
    """The path of a leaf as sharding rules and masks write it, such as ``layers/attn/q/kernel``."""
    return SEPARATOR.join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)


def square(grads: Any) -> Any:
    """The Fisher diagonal of one mini-batch, float32."""
    return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), grads)


def per_sample(loss: ExampleLoss, params: Any, examples: Any, *, chunk: int = 8) -> Any:
    """The mean over examples of the squared gradient of each, float32.

    Args:
      loss: the loss of one example, nats.
      examples: tree of arrays [N, ...].
      chunk: examples whose gradients are in memory at once; N need not be a multiple.

    Raises:
      ValueError: chunk < 1, or no examples.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    count = jax.tree.leaves(examples)[0].shape[0]
    if count == 0:
        raise ValueError("examples must not be empty: the Fisher information of nothing is unknown")
    chunk = min(chunk, count)
    chunks = -(-count // chunk)

    def cut(leaf: jax.Array) -> jax.Array:
        padded = jnp.concatenate([leaf, jnp.repeat(leaf[:1], chunks * chunk - count, axis=0)])
        return padded.reshape(chunks, chunk, *leaf.shape[1:])

    weights = (jnp.arange(chunks * chunk) < count).astype(jnp.float32).reshape(chunks, chunk)
    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))

    def add(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        examples, weight = part
        grads = square(each(params, examples))
        return jax.tree.map(lambda t, g: t + jnp.tensordot(weight, g, 1), total, grads), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), params)
    total, _ = jax.lax.scan(add, zeros, (jax.tree.map(cut, examples), weights))
    return jax.tree.map(lambda t: t / count, total)


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


def n_of_m(fisher: Any, n: int, m: int, chosen: Any, excluded: bool) -> Any:
    """Bool tree: the n largest of every m neighbours along the last axis of each matrix.

    Leaves of one dimension a layer, and matrices whose last axis m does not divide, are kept
    whole where any of their entries may be: they have no groups to choose from.
    """

    def one(keys: Any, leaf: jax.Array, flag: bool) -> jax.Array:
        if not flag:
            return jnp.full(leaf.shape, excluded)
        if dimensions(keys, leaf) < 2 or leaf.shape[-1] % m:
            return jnp.ones(leaf.shape, bool)
        groups = leaf.reshape(*leaf.shape[:-1], -1, m)
        # Rank of each entry in its group; of equal ones the first goes first.
        order = jnp.argsort(jnp.argsort(-groups, axis=-1, stable=True), axis=-1)
        return (order < n).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, fisher, chosen)


def tensorwise(fisher: Any, keep_ratio: float, chosen: Any, excluded: bool) -> Any:
    """Bool tree: whole tensors, those with the largest mean score, until the share is reached.

    A stacked leaf counts as one tensor a layer. Tensors are taken in order of their mean
    score while the entries taken so far are fewer than ``keep_ratio`` of all.
    """
    keyed, structure = jax.tree_util.tree_flatten_with_path(fisher)
    flags = jax.tree.leaves(chosen)
    means, sizes = [], []
    for (keys, leaf), flag in zip(keyed, flags, strict=True):
        if flag:
            rows = _tensors(keys, leaf)
            means.append(rows.mean(axis=1))
            sizes += [rows.shape[1]] * rows.shape[0]
    scores = jnp.concatenate(means)
    order = jnp.argsort(-scores, stable=True)
    taken = jnp.cumsum(jnp.asarray(sizes, jnp.float32)[order])
    before = taken - jnp.asarray(sizes, jnp.float32)[order]
    kept = jnp.zeros(len(sizes), bool).at[order].set(before < keep_ratio * sum(sizes))
    masks, start = [], 0
    for (keys, leaf), flag in zip(keyed, flags, strict=True):
        if not flag:
            masks.append(jnp.full(leaf.shape, excluded))
            continue
        number = _tensors(keys, leaf).shape[0]
        mine = kept[start : start + number]
        start += number
        shape = (number, *(1,) * (leaf.ndim - 1)) if leaf.ndim else ()
        masks.append(jnp.broadcast_to(mine.reshape(shape), leaf.shape))
    return jax.tree.unflatten(structure, masks)


def _tensors(keys: Any, leaf: jax.Array) -> jax.Array:
    """A leaf as [tensors, entries]."""
    stacked = dimensions(keys, leaf) < leaf.ndim
    return leaf.astype(jnp.float32).reshape(leaf.shape[0] if stacked else 1, -1)
