"""Prompt tuning: learned word embeddings in front of the text.

  embeddings = [P ; E(x)],   P in R^{n x D}

Tokens of the text move n positions on, the prompt is visible to all of them, and heads skip its
rows. In generation it is read once, with the text.

Lester, Al-Rfou, Constant, EMNLP 2021, arXiv 2104.08691.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.model import Inputs
from steppe.models.overlays.overlay import Overlay
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

FREQUENT = 5000  # vocabularies begin, but for special tokens, with what is most frequent


def overlay(
    *,
    length: int = 20,
    site: str = "embed",
    start: str = "words",
    ids: Sequence[int] = (),
) -> Overlay:
    """The prompt overlay.

    Args:
      length: n, rows in front.
      site: ``embed``; of an encoder-decoder ``encoder.embed``.
      start: initial rows: ``words`` = embeddings of tokens drawn from the 5,000 first of the
        vocabulary, ``uniform`` in (-0.5, 0.5), or ``normal`` with the table's spread.
      ids: tokens whose embeddings the first rows begin as, such as those of the classes' names;
        they are repeated as often as it takes.

    Returns:
      An overlay whose delta is ``{"prompt": [n, D]}``; it has no merged form.

    Raises:
      ValueError: length < 1, an unknown ``start``; from ``init`` an id outside the vocabulary, or
        a prompt that leaves the text no position.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1, got {length}")
    if start not in ("words", "uniform", "normal"):
        raise ValueError(f"start must be words, uniform or normal, got {start!r}")
    if site.split(".")[-1] != "embed":
        raise ValueError(f"site must be an embed site, got {site!r}")
    known = tuple(int(i) for i in ids)

    def init(key: jax.Array, params: Params) -> Params:
        table = table_of(params, "word")
        if table is None:
            raise ValueError("this model embeds no words: a prompt has no place in it")
        size, width = table.shape
        if known and not all(0 <= i < size for i in known):
            bad = next(i for i in known if not 0 <= i < size)
            raise ValueError(f"ids must be of the vocabulary of {size} tokens, got {bad}")
        positions = table_of(params, "position")
        if positions is not None and length >= positions.shape[0]:
            raise ValueError(
                f"length={length} leaves the text none of the model's {positions.shape[0]} "
                "positions; take a shorter prompt"
            )
        if start == "uniform" and not known:
            return {"prompt": jax.random.uniform(key, (length, width), minval=-0.5, maxval=0.5)}
        if isinstance(table, jax.ShapeDtypeStruct):  # only shapes are asked for
            return {"prompt": jnp.zeros((length, width))}
        table = jnp.asarray(table, jnp.float32)
        if known:
            return {"prompt": table[jnp.asarray([known[i % len(known)] for i in range(length)])]}
        if start == "normal":
            return {"prompt": table.std() * jax.random.normal(key, (length, width))}
        return {"prompt": table[jax.random.choice(key, min(size, FREQUENT), (length,), False)]}

    def attach(delta: Params) -> dict[str, Site]:
        return {site: Site(prepend, delta["prompt"])}

    settings = (("length", length), ("site", site), ("start", start), ("ids", known))
    return Overlay("prompt", init, attach, None, settings=settings)


def prepend(rows: Any, x: Inputs, base: Callable[[Any], Any], context: SiteContext) -> Inputs:
    """The site function: ``rows`` [n, D] or [B, n, D] in front of word embeddings."""
    if context.step:
        found: Inputs = base(x)
        return found
    batch = len(x.hidden)
    rows = jnp.asarray(rows).astype(x.hidden.dtype)
    if rows.ndim == 2:
        rows = rows[None]
    n = rows.shape[1]
    rows = jnp.broadcast_to(rows, (batch, *rows.shape[1:]))
    positions = x.positions
    if positions is not None:
        positions = jnp.asarray(positions)
        # Some families count from 2 on.
        first = positions[..., :1] + jnp.arange(n, dtype=positions.dtype)
        positions = jnp.concatenate([first, positions + n], axis=-1)
    moved = Inputs(
        jnp.concatenate([rows, x.hidden], axis=1),
        positions,
        None if x.types is None else _front(x.types, n, 0),
        _seen(x.mask, n),
        x.prompt + n,
    )
    done: Inputs = base(moved)
    return done


def _front(values: Any, n: int, fill: int) -> jax.Array:
    values = jnp.asarray(values)
    return jnp.pad(values, ((0, 0), (n, 0)), constant_values=fill)


def _seen(mask: Any, n: int) -> jax.Array | None:
    """The mask with the prompt in front: all see it, and it sees itself alone where the mask
    says who sees whom."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.ndim == 2:
        return _front(mask, n, 1)
    wide = jnp.pad(mask, ((0, 0), (0, 0), (n, 0)), constant_values=1)
    own = jnp.pad(
        jnp.ones((mask.shape[0], n, n), mask.dtype), ((0, 0), (0, 0), (0, mask.shape[-1]))
    )
    return jnp.concatenate([own, wide], axis=1)


def table_of(params: Params, name: str) -> Any:
    """An embedding table by the name of its place, or None."""
    for path in tree.paths(params):
        parts = path.split(tree.SEPARATOR)
        if parts[-2:] == [name, "table"] and "embed" in parts:
            return tree.get(params, path)
    return None
