"""Scaled dot-product attention over [B, T, H, Dh], shared by all families."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steppe.models.dropout import dropout

Implementation = Literal["xla", "cudnn"]


def attention_mask(mask: jax.Array | None) -> Bool[Array, "B 1 T_or_1 S"] | None:
    """Turns [B, S] or [B, T, S] (non-zero = visible) into a boolean mask over heads and queries.

    Raises:
      ValueError: the mask has another rank, or is of floats.
    """
    if mask is None:
        return None
    if jnp.issubdtype(mask.dtype, jnp.floating):
        raise ValueError(
            f"attention_mask must be boolean or integer (non-zero = visible), got {mask.dtype}; "
            "an additive mask would be read the wrong way round"
        )
    if mask.ndim == 2:
        return (mask != 0)[:, None, None, :]
    if mask.ndim == 3:
        return (mask != 0)[:, None, :, :]
    raise ValueError(
        f"attention_mask must be [batch, keys] or [batch, queries, keys], got shape {mask.shape}"
    )


def columns_of(mask: jax.Array | None) -> jax.Array | None:
    """Columns [B, T] of a source that are to be seen: of a mask [B, T, T], those that any token
    sees."""
    if mask is None:
        return None
    shown = jnp.asarray(mask) != 0
    return shown if shown.ndim == 2 else shown.any(1)


def last_column(mask: jax.Array) -> Int[Array, " B"]:
    """Of every row the last column that a mask [B, T] shows; T - 1 where it shows none."""
    shown = jnp.asarray(mask) != 0
    return shown.shape[1] - 1 - jnp.argmax(shown[:, ::-1], axis=1)


def causal_mask(queries: int, front: int = 0, window: int | None = None) -> Bool[Array, "1 1 T S"]:
    """Query t sees key t and those before it, [1, 1, T, front + T].

    Args:
      front: keys in front that every query sees.
      window: how many keys a query sees at most, itself included, those in front apart.
    """
    t = jnp.arange(queries)
    distance = t[:, None] - t[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return jnp.pad(seen, ((0, 0), (front, 0)), constant_values=True)[None, None]


def attend(
    q: Float[Array, "B T H Dh"],
    k: Float[Array, "B S Hkv Dh"],
    v: Float[Array, "B S Hkv Dh"],
    *,
    mask: Bool[Array, "B 1 T_or_1 S"] | None = None,
    bias: Float[Array, "1 H T S"] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    drop: float = 0.0,
    rng: jax.Array | None = None,
    implementation: Implementation | None = None,
    whole_queries: int | None = None,
) -> Float[Array, "B T H Dh"]:
    """``softmax(q k^T * scale + bias) v`` with the softmax in float32.

    Args:
      mask: True where a key is visible. A query that sees no key returns the mean of v.
      bias: added to the scaled scores.
      causal: with mask None: query t sees keys up to S - T + t, at most the last ``window`` of
        them but for the first S - T keys, which every query sees.
      scale: defaults to 1 / sqrt(Dh).
      drop: dropout rate on the probabilities; needs ``rng``.
      implementation: "xla", "cudnn" (GPU, bf16 or float16) or None = the fastest known for
        the backend.
      whole_queries: number of queries of the call whose dropout this one is to share, when q
        holds only the first of them.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fused = drop == 0.0 and (implementation is not None or jax.default_backend() != "cpu")
    if fused and causal and mask is None and q.shape[1] == k.shape[1]:
        # No mask in memory: the fused kernels skip what lies in the future.
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias=bias,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            scale=scale,
            implementation=implementation,
        )
    if causal and mask is None:
        mask = causal_mask(q.shape[1], k.shape[1] - q.shape[1], window)
    if fused:
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask, scale=scale, implementation=implementation
        )
    # On the CPU, and for dropout on the probabilities (which the fused call lacks). Batched
    # matmuls with heads in front run 2.3 x faster there than the einsum over [B, T, H, Dh].
    if k.shape[2] != q.shape[2]:
        k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], axis=2) for a in (k, v))
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    scores = (q @ k.swapaxes(-1, -2)).astype(jnp.float32) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    # Queries may be the first of a sequence as long as the keys; see ``Attention``.
    whole = None if whole_queries is None else (*probs.shape[:2], whole_queries, probs.shape[3])
    probs = dropout(probs, drop, rng, whole=whole)
    return (probs @ v).swapaxes(1, 2)
