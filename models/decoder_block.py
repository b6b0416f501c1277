"""The layer of decoder-only models: norms before the sublayers, causal attention, cached keys.

  x = x + [post](attention(norm(x)));  x = x + [post](ffn(norm(x)))

The norms in brackets are Gemma 3's. One module serves the full forward pass, in which the layer
also gives its keys and values, and the reading of one token beside those of the past.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from steppe.models.attention import attend
from steppe.models.dropout import dropout
from steppe.models.layers import Dense, FeedForward, LayerNorm, RMSNorm
from steppe.models.rotary import Turn, rotate
from steppe.models.sites import Hooks

if TYPE_CHECKING:
    from steppe.models.decoder import DecoderConfig

KeysValues = tuple[jax.Array, jax.Array]


class View(NamedTuple):
    """What a layer sees: its rotary angles and which keys are visible.

    Attributes:
      turn: see ``Rotary.turn``; None without rotary embeddings.
      mask: [B or 1, 1, T, S] True where a query sees a key, or None = all before it.
      window: of the fused attention call, for mask None; None = no limit.
    """

    turn: Turn | None
    mask: jax.Array | None
    window: int | None = None


class Past(NamedTuple):
    """Keys and values of one layer that were read before, [B, Hkv, S, Dh], and the mask [B, S]."""

    keys: jax.Array
    values: jax.Array
    mask: jax.Array


def norm(config: DecoderConfig, name: str | None = None) -> LayerNorm | RMSNorm:
    """A norm of the configuration's kind."""
    if config.norm == "layer":
        return LayerNorm(config.epsilon, name=name)
    return RMSNorm(config.epsilon, offset=1.0 if config.norm == "rms1" else 0.0, name=name)


class CausalAttention(nn.Module):
    """Grouped-query attention to what came before, with the ``attn.*`` sites."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        hooks: Hooks,
        view: View,
        past: Past | None = None,
        head_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
        **context: Any,
    ) -> tuple[jax.Array, KeysValues]:
        """x [B, T, D], head_mask [H] -> ([B, T, D], keys and values [B, Hkv, P + T, Dh]).

        With ``past`` T is 1, and the keys and values are those of that token alone.
        """
        c = self.config
        b, t, _ = x.shape

        def project(name: str, heads: int) -> jax.Array:
            layer = Dense(heads * c.dim, c.qkv_bias, name=name)
            return hooks(f"attn.{name}", x, layer, **context).reshape(b, t, heads, c.dim)

        q, k, v = project("q", c.heads), project("k", c.groups), project("v", c.groups)
        if c.qk_norm:
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        if view.turn is not None and c.rotary is not None:
            q = rotate(q, view.turn.queries, c.rotary.layout)
            k = rotate(k, view.turn.keys, c.rotary.layout)
        if past is not None:
            heard = _attend_past(q, k, v, past, c.scale)
        else:
            mask = view.mask
            if "attn.kv_prefix" in hooks:
                none = jnp.zeros((b, 0, c.groups, c.dim), k.dtype)
                extra = hooks("attn.kv_prefix", x, lambda _: (none, none), **context)
                prefix = extra[0].shape[1]
                k, v = (
                    jnp.concatenate([jnp.broadcast_to(e, (b, *e.shape[1:])).astype(a.dtype), a], 1)
                    for e, a in zip(extra, (k, v), strict=True)
                )
                if mask is not None:
                    mask = jnp.pad(mask, ((0, 0),) * 3 + ((prefix, 0),), constant_values=True)
            heard = attend(
                q,
                k,
                v,
                mask=mask,
                causal=mask is None,
                window=view.window,
                scale=c.scale,
                drop=c.attn_drop,
                rng=rng,
                implementation=c.attention,
            )
        if head_mask is not None:
            if head_mask.shape != (c.heads,):
                raise ValueError(
                    f"masks.head must have {c.heads} heads a layer, got {head_mask.shape[-1]}"
                )
            heard = heard * head_mask[:, None].astype(heard.dtype)
        out = Dense(c.width, c.out_bias, name="o")
        y = hooks("attn.o", heard.reshape(b, t, -1), out, **context)
        return y, (k.swapaxes(1, 2), v.swapaxes(1, 2))


def _attend_past(q: jax.Array, k: jax.Array, v: jax.Array, past: Past, scale: float) -> jax.Array:
    """Attention of one token [B, 1, H, Dh] to the past and to itself.

    The token's own key is not written into the cache first: all layers' keys are written at
    once after the last layer, so that the compiler updates the cache where it lies.
    """
    b, _, heads, dim = q.shape
    groups = k.shape[2]
    q = q.reshape(b, groups, heads // groups, dim)
    k, v = k.reshape(b, groups, 1, dim), v.reshape(b, groups, 1, dim)
    before = (q @ past.keys.swapaxes(-1, -2).astype(q.dtype)).astype(jnp.float32) * scale
    own = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(-1, keepdims=True) * scale
    before = jnp.where(past.mask[:, None, None, :], before, jnp.finfo(jnp.float32).min)
    most = jnp.maximum(before.max(-1, keepdims=True), own)
    before, own = jnp.exp(before - most), jnp.exp(own - most)
    total = before.sum(-1, keepdims=True) + own
    out = (before / total).astype(v.dtype) @ past.values.astype(v.dtype)
    out = out + (own / total).astype(v.dtype) * v
    return out.reshape(b, 1, heads, dim)


class DecoderBlock(nn.Module):
    """A layer."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        hooks: Hooks,
        view: View,
        past: Past | None = None,
        head_mask: jax.Array | None = None,
        ffn_mask: jax.Array | None = None,
        layer_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """[B, T, D] -> ([B, T, D], keys and values); masks are this layer's slices."""
        c = self.config
        keys = (None, None, None) if rng is None else tuple(jax.random.split(rng, 3))

        def add(x: jax.Array, branch: jax.Array, name: str, key: jax.Array | None) -> jax.Array:
            if c.post_norms:
                branch = norm(c, name)(branch)
            branch = dropout(branch, c.drop, key)
            return x + (branch if layer_mask is None else branch * layer_mask.astype(x.dtype))

        before = norm(c, "attn_norm")
        branch, kept = CausalAttention(c, name="attn")(
            before(x),
            hooks=hooks,
            view=view,
            past=past,
            head_mask=head_mask,
            rng=keys[0],
            residual=x,
            norm=before,
        )
        x = add(x, branch, "attn_post_norm", keys[1])
        before = norm(c, "ffn_norm")
        feed_forward = FeedForward(
            c.ffn_width, c.width, c.act, gated=c.gated, use_bias=c.ffn_bias, name="ffn"
        )
        branch = feed_forward(before(x), hooks=hooks, ffn_mask=ffn_mask, residual=x, norm=before)
        return add(x, branch, "ffn_post_norm", keys[2]), kept
