"""Masks of whole groups of entries: a tensor, a transformer layer, or an attention head.

  score of a group = mean Fisher information of its entries
  groups are taken in order of their score while the entries taken so far are fewer than
  keep_ratio of all candidates

  tensor  one leaf, of a stacked leaf one layer
  layer   everything below ``layers`` with one layer number; what lies outside of a stack is
          grouped by the first part of its path (``embed``, ``head``)
  head    of every attention block the columns of q, k, v and the rows of o that serve one head,
          with the biases of q, k, v; all other tensors are groups of their own, one a layer.
          With fewer heads for k and v the query heads that share one belong together.

A mask of whole layers is what lets a step leave the unperturbed ones out of its second pass.
Zhong et al., Findings of EMNLP 2022 (FSAM, arXiv 2210.05497) study structured masks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models.tree import SEPARATOR, STACK, path_of

# (path, shape) -> the name of a group, or an array of names that broadcasts to the shape.
Naming = Callable[[str, tuple[int, ...]], Any]
# The projections of an attention block and the axis, from the last, along which heads lie.
HEAD_SITES = ((r"(.*/)?[qkv]/kernel", 1), (r"(.*/)?[qkv]/bias", 1), (r"(.*/)?o/kernel", 2))


def layerwise(fisher: Any, keep_ratio: float, chosen: Any, excluded: bool) -> Any:
    """Bool tree: whole transformer layers, those with the largest mean score.

    Args:
      fisher: non-negative scores.
      keep_ratio: share of the candidates' entries, in [0, 1]; whole groups are taken until it
        is reached.
      chosen: tree of Python bools, see ``fisher.candidates``.
      excluded: value of the mask on the other leaves.
    """
    return groupwise(fisher, keep_ratio, chosen, excluded, _layer_names)


def tensorwise(fisher: Any, keep_ratio: float, chosen: Any, excluded: bool) -> Any:
    """Bool tree: whole tensors, those with the largest mean score; a stacked leaf is one a layer.

    Args:
      fisher, keep_ratio, chosen, excluded: see :func:`layerwise`.
    """
    return groupwise(fisher, keep_ratio, chosen, excluded, _tensor_names)


def headwise(
    fisher: Any,
    keep_ratio: float,
    heads: int,
    chosen: Any,
    excluded: bool,
    *,
    kv_heads: int | None = None,
    sites: str = r"(.*/)?(attn|self_attn|cross_attn|cross)/[qkvo]/.*",
) -> Any:
    """Bool tree: whole attention heads and other whole tensors, by their mean score.

    Args:
      fisher, keep_ratio, chosen, excluded: see :func:`layerwise`.
      heads: query heads of a block.
      kv_heads: heads of k and v where they are fewer; a group is then what shares one of them.
      sites: regular expression on the paths of attention blocks' parameters.

    Raises:
      ValueError: heads < 1, kv_heads that do not divide heads, no parameter at the sites, or a
        width that the groups do not divide.
    """
    if heads < 1 or int(heads) != heads:
        raise ValueError(f"heads must be a whole number >= 1, got {heads}")
    groups = heads if kv_heads is None else kv_heads
    if groups < 1 or heads % groups:
        raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(fisher)[0]]
    if not any(re.fullmatch(sites, path) for path in paths):
        raise ValueError(
            f"no parameter of an attention block matches {sites!r}; paths look like "
            + ", ".join(paths[:4])
        )

    def names(path: str, shape: tuple[int, ...]) -> Any:
        tensor = _tensor_names(path, shape)
        axis = next((a for pattern, a in HEAD_SITES if re.fullmatch(pattern, path)), 0)
        if not axis or not re.fullmatch(sites, path):
            return tensor
        if len(shape) < axis or shape[-axis] % groups:
            raise ValueError(
                f"{path!r} of shape {shape} cannot be cut into {groups} heads along axis {-axis}"
            )
        block = _tensor_names(SEPARATOR.join(path.split(SEPARATOR)[:-2]), shape, path)
        of_head = np.array([f"#{h}" for h in range(groups)], object)
        along = np.repeat(of_head, shape[-axis] // groups)
        return block + along.reshape(along.shape + (1,) * (axis - 1))

    return groupwise(fisher, keep_ratio, chosen, excluded, names)


def groupwise(fisher: Any, keep_ratio: float, chosen: Any, excluded: bool, naming: Naming) -> Any:
    """Bool tree: whole groups, those with the largest mean score, until the share is reached.

    Sums are taken along the axes that a group spans, leaf by leaf; what is compared is one
    number a group.

    Args:
      naming: gives every candidate entry the name of its group, see :data:`Naming`.
    """
    keyed, structure = jax.tree_util.tree_flatten_with_path(fisher)
    flags = jax.tree.leaves(chosen)
    numbers: dict[str, int] = {}
    labels: list[np.ndarray | None] = []
    sizes: list[int] = []
    totals: list[tuple[np.ndarray, jax.Array]] = []
    for (keys, leaf), flag in zip(keyed, flags, strict=True):
        if not flag or not leaf.size:
            labels.append(None)
            continue
        names = np.asarray(naming(path_of(keys), tuple(leaf.shape)), object)
        names = names.reshape((1,) * (leaf.ndim - names.ndim) + names.shape)
        label = np.empty(names.shape, np.int32)
        for index, name in np.ndenumerate(names):
            label[index] = numbers.setdefault(name, len(numbers))
        sizes += [0] * (len(numbers) - len(sizes))
        each = leaf.size // label.size
        for number in label.ravel():
            sizes[number] += each
        spanned = tuple(axis for axis in range(leaf.ndim) if label.shape[axis] == 1)
        sums = jnp.sum(leaf.astype(jnp.float32), axis=spanned, keepdims=True)
        totals.append((label, sums))
        labels.append(label)
    scores = jnp.zeros(len(sizes), jnp.float32)
    for label, sums in totals:
        scores = scores.at[label.ravel()].add(sums.ravel())
    entries = jnp.asarray(sizes, jnp.float32)
    order = jnp.argsort(-scores / entries, stable=True)
    before = jnp.cumsum(entries[order]) - entries[order]
    kept = jnp.zeros(len(sizes), bool).at[order].set(before < keep_ratio * math.fsum(sizes))
    masks = [
        jnp.full(leaf.shape, excluded)
        if label is None
        else jnp.broadcast_to(kept[label], leaf.shape)
        for (_, leaf), label in zip(keyed, labels, strict=True)
    ]
    return jax.tree.unflatten(structure, masks)


def _layer_names(path: str, shape: tuple[int, ...]) -> Any:
    parts = path.split(SEPARATOR)
    if STACK not in parts[:-1]:
        return parts[0]
    stack = SEPARATOR.join(parts[: parts.index(STACK) + 1])
    return _numbered(stack, shape)


def _tensor_names(path: str, shape: tuple[int, ...], leaf: str | None = None) -> Any:
    """``path``, with the layer's number where ``leaf`` (default the path) is stacked."""
    stacked = STACK in (leaf or path).split(SEPARATOR)[:-1]
    return _numbered(path, shape) if stacked else np.array(path, object)


def _numbered(name: str, shape: tuple[int, ...]) -> np.ndarray:
    names = np.array([f"{name}.{layer}" for layer in range(shape[0])], object)
    return names.reshape(-1, *(1,) * (len(shape) - 1))
