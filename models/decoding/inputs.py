"""Arguments of generation in the form that compiled programs take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models.decoding.sampling import NOWHERE
from steppe.models.decoding.settings import Rows
from steppe.models.sites import Site


def hold_eos(logits: jax.Array, eos: jax.Array, held: jax.Array) -> jax.Array:
    """Logits [B, V] without the ids ``eos`` [E] in the rows ``held`` [B]."""
    if not eos.shape[0]:
        return logits
    ids = jnp.where(held[:, None], eos, NOWHERE)
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def eos_ids(eos_id: int | Sequence[int] | None) -> np.ndarray:
    """End-of-sequence ids, int32 [E].

    Raises:
      ValueError: a negative id.
    """
    ids = np.atleast_1d(np.asarray([] if eos_id is None else eos_id)).astype(np.int32)
    if (ids < 0).any():
        raise ValueError(f"eos_id must be token ids >= 0, got {eos_id}; None = there is none")
    return ids


def pad_rows(rows: Rows, count: int) -> Rows:
    """Settings of ``count`` rows; those that are added generate nothing."""
    more = count - len(rows.max_new)
    if not more:
        return rows
    padded = Rows(*(np.concatenate([x, np.repeat(x[:1], more)]) for x in rows))
    quiet = np.arange(count) >= count - more
    return padded._replace(
        max_new=np.where(quiet, 0, padded.max_new).astype(np.int32),
        temperature=np.where(quiet, 0, padded.temperature).astype(np.float32),
    )


def threefry(key: jax.Array | None) -> jax.Array:
    """A threefry key; other generators give rows under ``vmap`` that depend on each other."""
    if key is None:
        return jax.random.key(0, impl="threefry2x32")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def split_sites(sites: Mapping[str, Site] | None) -> tuple[Any, Any]:
    """Sites as (static functions, arrays); undone by :func:`join_sites`."""
    if not sites:
        return None, None
    names = sorted(sites)
    hooks = tuple((n, sites[n].fn, sites[n].tokenwise) for n in names)
    return hooks, {n: sites[n].delta for n in names}


def join_sites(hooks: Any, deltas: Any) -> dict[str, Site] | None:
    """Sites from hooks, for which a program is compiled, and arrays, which it is given."""
    if hooks is None:
        return None
    return {name: Site(fn, deltas[name], tokenwise) for name, fn, tokenwise in hooks}
