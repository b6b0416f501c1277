"""Rows inside a text: put in at a column, added to, and taken out again before a head.

A column is one for all texts (an int) or one of each text's own [B].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.model import Inputs

Column = int | jax.Array


def first_column(first: int, stack: str) -> int:
    """Where words stand in a text: 1 behind its first token, 0 in front; -1 = what the model needs.

    Raises:
      ValueError: another column.
    """
    if first not in (-1, 0, 1):
        raise ValueError(f"first must be 0 or 1, got {first}; -1 takes what the model needs")
    if first >= 0:
        return first
    return 0 if stack else 1  # sources need not begin with a token of their own


def inserted(x: Inputs, rows: Any, at: Column) -> Inputs:
    """The input of the embedding block with ``rows`` [B, t, D] at column ``at``.

    Tokens from there on move t positions on. New ones follow the token in front of them, are
    visible to all, and of the type of the token that stood there or, behind a text, of its last
    one: padding makes no difference.

    Raises:
      ValueError: an attention mask that says who sees whom.
    """
    if x.mask is not None and jnp.ndim(x.mask) != 2:
        raise ValueError("rows inside a text need an attention_mask [batch, tokens]")
    batch, length, _ = x.hidden.shape
    t = rows.shape[1]

    mask = None if x.mask is None else jnp.asarray(x.mask)
    column = jnp.broadcast_to(jnp.asarray(at), (batch,))[:, None]
    before, there = jnp.maximum(column - 1, 0), jnp.minimum(column, length - 1)
    positions = x.positions
    if positions is not None:
        positions = jnp.broadcast_to(jnp.asarray(positions), (batch, length))
        # Padding has no position that could be counted on from: the token in front has.
        first = jnp.take_along_axis(positions, before, axis=1) + (column > 0)
        new = (first + jnp.arange(t)).astype(positions.dtype)
        behind = jnp.arange(length) >= column
        positions = _put(positions + t * behind, new, at)
    types = x.types
    if types is not None:
        types = jnp.asarray(types)
        inside = there == column
        if mask is not None:
            inside &= jnp.take_along_axis(mask, there, axis=1) != 0
        own = jnp.take_along_axis(types, jnp.where(inside, there, before), axis=1)
        types = _put(types, jnp.broadcast_to(own, (batch, t)), at)
    if mask is not None:
        mask = _put(mask, jnp.ones((batch, t), mask.dtype), at)
    return x._replace(
        hidden=_put(x.hidden, rows.astype(x.hidden.dtype), at),
        positions=positions,
        types=types,
        mask=mask,
    )


def added(hidden: jax.Array, rows: jax.Array, at: Column) -> jax.Array:
    """``rows`` [B, t, D] added to hidden [B, T, D] from column ``at`` on."""
    rows = rows.astype(hidden.dtype)
    t = rows.shape[1]
    if isinstance(at, int):
        return hidden.at[:, at : at + t].add(rows)
    column = at[:, None] + jnp.arange(t)
    return hidden.at[jnp.arange(len(hidden))[:, None], column].add(rows)


def removed(values: jax.Array, t: int, at: Column) -> jax.Array:
    """``values`` [B, T + t, ...] without the t rows from column ``at`` on."""
    if isinstance(at, int):
        return jnp.concatenate([values[:, :at], values[:, at + t :]], axis=1)
    column = jnp.arange(values.shape[1] - t)
    source = jnp.where(column < at[:, None], column, column + t)
    return jnp.take_along_axis(values, source.reshape(*source.shape, *(1,) * (values.ndim - 2)), 1)


def _put(values: jax.Array, new: jax.Array, at: Column) -> jax.Array:
    if isinstance(at, int):
        return jnp.concatenate([values[:, :at], new, values[:, at:]], axis=1)
    length, t = values.shape[1], new.shape[1]
    column = jnp.arange(length + t)
    begin = at[:, None]
    # New rows are those behind the old ones.
    source = jnp.where(column < begin, column, column - t)
    source = jnp.where((column >= begin) & (column < begin + t), length + column - begin, source)
    both = jnp.concatenate([values, new.astype(values.dtype)], axis=1)
    return jnp.take_along_axis(both, source.reshape(*source.shape, *(1,) * (both.ndim - 2)), 1)
