"""Rows inside a text: put in at a column, added to, and taken out again before a head.

A column is one for all texts (an int) or one of each text's own [B].
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.model import Inputs

Column = int | jax.Array


def inserted(x: Inputs, rows: Any, at: Column) -> Inputs:
    """The input of the embedding block with ``rows`` [B, t, D] at column ``at``.

    Tokens from there on move t positions on; new ones are visible to all, of the type of the
    token that stood there.

    Raises:
      ValueError: an attention mask that says who sees whom.
    """
    if x.mask is not None and jnp.ndim(x.mask) != 2:
        raise ValueError("rows inside a text need an attention_mask [batch, tokens]")
    batch, length, _ = x.hidden.shape
    t = rows.shape[1]

    def there(values: jax.Array) -> jax.Array:
        """[B, T] -> [B, 1], what stands at the column (the last token, behind the text)."""
        if isinstance(at, int):
            return values[:, at : at + 1] if at < length else values[:, -1:]
        return jnp.take_along_axis(values, jnp.minimum(at, length - 1)[:, None], axis=1)

    positions = x.positions
    if positions is not None:
        positions = jnp.broadcast_to(jnp.asarray(positions), (batch, length))
        behind = jnp.arange(length) >= (at if isinstance(at, int) else at[:, None])
        new = there(positions) + jnp.arange(t, dtype=positions.dtype)
        positions = _put(positions + t * behind.astype(positions.dtype), new, at)
    types = x.types
    if types is not None:
        types = jnp.asarray(types)
        types = _put(types, jnp.broadcast_to(there(types), (batch, t)), at)
    mask = x.mask
    if mask is not None:
        mask = _put(jnp.asarray(mask), jnp.ones((batch, t), jnp.asarray(mask).dtype), at)
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
