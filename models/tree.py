"""Parameter trees: nested dicts of arrays addressed by paths such as ``layers/attn/q/kernel``.

Everything that selects, counts, casts or merges parameters goes through here, so that a
path means the same to a sharding rule, a mask, a merge and a checkpoint.

Layers are stacked: a leaf below a ``layers`` component holds all layers of that stack along
its axis 0. Algorithms that are defined per tensor (trimming, per-tensor norms, layer-wise
coefficients) must see such a leaf as L tensors; :func:`tensors` and :func:`map_tensors`
own that view.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]

SEPARATOR = "/"
STACK = "layers"


def path_of(keys: Any) -> str:
    """The path of a leaf from its jax key path: ``layers/attn/q/kernel``."""
    return jax.tree_util.keystr(keys, simple=True, separator=SEPARATOR)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Maps every path to its leaf, in insertion order. Empty sub-trees vanish.

    Raises:
      ValueError: a key is not a string, or contains the separator.

    Example:
      >>> flatten({"layers": {"attn.q": {"kernel": 1, "bias": 2}}, "head": 3})
      {'layers/attn.q/kernel': 1, 'layers/attn.q/bias': 2, 'head': 3}
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping):
            flat[SEPARATOR.join(prefix)] = node
            return
        for key, value in node.items():
            if not isinstance(key, str) or SEPARATOR in key:
                where = SEPARATOR.join(prefix) or "the root"
                raise ValueError(
                    f"parameter keys must be strings without {SEPARATOR!r}, "
                    f"got {key!r} below {where}"
                )
            walk(value, (*prefix, key))

    walk(tree, ())
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of :func:`flatten`.

    Raises:
      ValueError: one path is a prefix of another, so that it would be leaf and branch at once.
    """
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split(SEPARATOR)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"path {path!r} runs through the leaf {key!r}")
        if last in node:
            raise ValueError(f"path {path!r} is given twice, or is a branch of another path")
        node[last] = leaf
    return tree


def paths(tree: Mapping[str, Any]) -> list[str]:
    """The paths of all leaves, in insertion order."""
    return list(flatten(tree))


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or sub-tree at ``path``.

    Raises:
      KeyError: there is none; the message lists what stands at the last level reached.
    """
    node: Any = tree
    for key in path.split(SEPARATOR):
        if not isinstance(node, Mapping) or key not in node:
            there = sorted(node) if isinstance(node, Mapping) else "a leaf"
            raise KeyError(f"no parameter at {path!r}: at {key!r} there is {there}")
        node = node[key]
    return node


def replace(tree: Mapping[str, Any], values: Mapping[str, Any]) -> Params:
    """A copy of ``tree`` with the leaves at the given paths replaced.

    Raises:
      KeyError: a path is not a leaf of ``tree``.
    """
    flat = flatten(tree)
    for path, leaf in values.items():
        if path not in flat:
            raise KeyError(f"no parameter at {path!r} to replace")
        flat[path] = leaf
    return unflatten(flat)


def merge(*trees: Mapping[str, Any]) -> Params:
    """Deep union of trees that share no leaf, such as trainable and frozen parameters.

    Raises:
      ValueError: two trees hold the same path.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in flat:
                raise ValueError(f"both trees hold a parameter at {path!r}")
            flat[path] = leaf
    return unflatten(flat)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether any of the regular expressions matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def split(tree: Mapping[str, Any], patterns: Sequence[str]) -> tuple[Params, Params]:
    """Splits ``tree`` into (leaves whose whole path matches a pattern, the others).

    Raises:
      ValueError: a pattern matches no path at all (a misspelt pattern would freeze or train
        the wrong parameters in silence).
    """
    flat = flatten(tree)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in flat):
            some = ", ".join(list(flat)[:4])
            raise ValueError(f"pattern {pattern!r} matches no parameter; paths look like {some}")
    selected = {path: leaf for path, leaf in flat.items() if matches(path, patterns)}
    rest = {path: leaf for path, leaf in flat.items() if path not in selected}
    return unflatten(selected), unflatten(rest)


def count(tree: Any) -> int:
    """Number of scalars in all leaves (arrays or abstract shapes)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or abstract shapes)."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def cast(tree: Any, dtype: Any) -> Any:
    """Casts the floating-point leaves to ``dtype`` and leaves the others alone."""

    def one(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def is_stacked(path: str) -> bool:
    """Whether the leaf at ``path`` holds one tensor a layer along its axis 0."""
    return STACK in path.split(SEPARATOR)[:-1]


def map_with_path(fn: Callable[..., Any], tree: Mapping[str, Any], *rest: Any) -> Params:
    """``fn(path, leaf, *leaves_of_rest)`` on every leaf; all trees have the same structure."""
    others = [flatten(other) for other in rest]
    return unflatten(
        {path: fn(path, leaf, *(o[path] for o in others)) for path, leaf in flatten(tree).items()}
    )


def map_tensors(fn: Callable[..., Any], tree: Mapping[str, Any], *rest: Any) -> Params:
    """``fn(tensor, *tensors_of_rest)`` on every tensor, a stacked leaf counting as L of them.

    ``fn`` must be traceable: it is mapped over the layer axis of stacked leaves by ``jax.vmap``.
    """

    def one(path: str, *leaves: Any) -> Any:
        return jax.vmap(fn)(*leaves) if is_stacked(path) else fn(*leaves)

    return map_with_path(one, tree, *rest)


def tensors(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every tensor with its name; layer l of a stacked leaf is named ``layers.l/...``."""
    for path, leaf in flatten(tree).items():
        if not is_stacked(path):
            yield path, leaf
            continue
        for layer in range(leaf.shape[0]):
            parts = [f"{p}.{layer}" if p == STACK else p for p in path.split(SEPARATOR)]
            yield SEPARATOR.join(parts), leaf[layer]


def rows(tree: Any, ids: jax.Array, *, axis: int = 0) -> Any:
    """Entries ``ids`` [B] of the leading axis of every leaf, with the axis B at ``axis``.

    An id outside the leaf, negative ones too, gives NaN and not an entry (integers: a zero).
    """

    def one(leaf: Any) -> jax.Array:
        inside = jnp.where(ids < 0, leaf.shape[0], ids)
        void = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        found = jnp.take(jnp.asarray(leaf), inside, axis=0, mode="fill", fill_value=void)
        return jnp.moveaxis(found, 0, axis)

    return jax.tree.map(one, tree)


def same_structure(
    left: Mapping[str, Any], right: Mapping[str, Any], names: tuple[str, str]
) -> None:
    """Checks that two trees hold the same paths with the same shapes.

    Raises:
      ValueError: names the first path that differs, with both shapes.
    """
    a, b = flatten(left), flatten(right)
    for path in (*a, *b):
        if path not in a or path not in b:
            holder, other = names if path in a else names[::-1]
            raise ValueError(f"{holder} has a parameter at {path!r} that {other} lacks")
    for path, leaf in a.items():
        if tuple(leaf.shape) != tuple(b[path].shape):
            raise ValueError(
                f"shape mismatch at {path!r}: {names[0]} has {tuple(leaf.shape)}, "
                f"{names[1]} has {tuple(b[path].shape)}"
            )
