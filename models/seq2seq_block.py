"""The layers of an encoder-decoder: attention over own or other positions, and the block.

A block reads whole sequences (training, prompts) or one token after what it has kept of
earlier ones (decoding). Its parts:

  encoder                 attn, ffn
  decoder                 attn or ssru, cross, ffn

each in a residual branch with its norm before it (T5) or after the addition (BART, Marian).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from steppe.models.attention import Implementation, attend
from steppe.models.dropout import dropout
from steppe.models.layers import Dense, FeedForward, LayerNorm, RMSNorm
from steppe.models.sites import Hooks
from steppe.models.ssru import SSRU


@dataclass(frozen=True)
class LayerConfig:
    """One layer.

    Attributes:
      width, heads, head_dim, ffn_width: D, H, Dh, F.
      act, gated: of the feed-forward network.
      use_bias: biases of the linear maps.
      pre_norm: norms before the sublayers instead of after the additions.
      rms: RMS norms instead of LayerNorm.
      epsilon: of the norms.
      scale: of the attention scores; None = 1 / sqrt(Dh).
      drop, attn_drop, ffn_drop: dropout of branches, attention probabilities, activations.
      cross: whether the layer attends to an encoder's output.
      ssru: whether a recurrent cell takes the place of self-attention.
      attention: implementation, see ``attend``.
    """

    width: int
    heads: int
    head_dim: int
    ffn_width: int
    act: str
    gated: bool
    use_bias: bool
    pre_norm: bool
    rms: bool
    epsilon: float
    scale: float | None
    drop: float
    attn_drop: float
    ffn_drop: float
    cross: bool = False
    ssru: bool = False
    attention: Implementation | None = None

    def norm(self, name: str | None = None) -> LayerNorm | RMSNorm:
        """A norm of the layer's kind."""
        return (RMSNorm if self.rms else LayerNorm)(self.epsilon, name=name)


class Part(NamedTuple):
    """Keys and values, [B, H, S, Dh], with their mask and bias, which broadcast to [B, H, T, S]."""

    keys: jax.Array
    values: jax.Array
    mask: jax.Array | None = None
    bias: jax.Array | None = None


def attend_parts(q: jax.Array, parts: Sequence[Part], scale: float | None) -> jax.Array:
    """Attention of q [B, H, T, Dh] over keys that lie in several arrays, [B, H, T, Dh].

    One softmax over all of them, in float32, without a copy of the keys into one array: a
    cache is read where it lies.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = []
    for keys, _, mask, bias in parts:
        s = (q @ keys.swapaxes(-1, -2)).astype(jnp.float32) * scale
        s = s if bias is None else s + bias.astype(jnp.float32)
        scores.append(s if mask is None else jnp.where(mask, s, jnp.finfo(jnp.float32).min))
    probs = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out: Any = 0
    start = 0
    for part in parts:
        stop = start + part.keys.shape[2]
        out = out + probs[..., start:stop].astype(part.values.dtype) @ part.values
        start = stop
    return out


class MultiHead(nn.Module):
    """Attention whose keys and values may be projected in another call, under ``site.*``."""

    config: LayerConfig
    site: str

    def setup(self) -> None:
        c = self.config
        inner = c.heads * c.head_dim
        self.q, self.k, self.v = (Dense(inner, c.use_bias) for _ in range(3))
        self.o = Dense(c.width, c.use_bias)

    def _project(self, name: str, x: jax.Array, hooks: Hooks, context: Any) -> jax.Array:
        y = hooks(f"{self.site}.{name}", x, getattr(self, name), **context)
        return y.reshape(x.shape[0], -1, self.config.heads, self.config.head_dim)

    def _out(
        self, vectors: jax.Array, head_mask: jax.Array | None, hooks: Hooks, context: Any
    ) -> jax.Array:
        heads = self.config.heads
        if head_mask is not None:
            if head_mask.shape != (heads,):
                raise ValueError(
                    f"masks.head must have {heads} heads a layer, got {head_mask.shape[-1]}"
                )
            vectors = vectors * head_mask[:, None].astype(vectors.dtype)
        flat = vectors.reshape(*vectors.shape[:2], -1)
        return hooks(f"{self.site}.o", flat, self.o, **context)

    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        *,
        hooks: Hooks,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
        **context: Any,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """x [B, T, D] attends to source [B, S, D].

        Returns:
          Output [B, T, D], and keys and values [B, H, P + S, Dh] with the P columns of the
          prefix in front.
        """
        c = self.config
        q = self._project("q", x, hooks, context)
        k, v = (self._project(n, source, hooks, context) for n in "kv")
        name = f"{self.site}.kv_prefix"
        if name in hooks:
            none = jnp.zeros((k.shape[0], 0, c.heads, c.head_dim), k.dtype)
            extra = hooks(name, source, lambda _: (none, none), **context)
            front = ((0, 0),) * 3 + ((extra[0].shape[1], 0),)
            k, v = (
                jnp.concatenate(
                    [jnp.broadcast_to(e, (len(a), *e.shape[1:])).astype(a.dtype), a], axis=1
                )
                for e, a in zip(extra, (k, v), strict=True)
            )
            mask = None if mask is None else jnp.pad(mask, front, constant_values=True)
            bias = None if bias is None else jnp.pad(bias, front)
        vectors = attend(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=c.scale,
            drop=c.attn_drop if rng is not None else 0.0,
            rng=rng,
            implementation=c.attention,
        )
        kept = (k.swapaxes(1, 2), v.swapaxes(1, 2))
        return self._out(vectors, head_mask, hooks, context), kept

    def step(
        self,
        x: jax.Array,
        past: Part,
        *,
        hooks: Hooks,
        own: bool,
        bias: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        **context: Any,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """One token x [B, 1, D] attends to ``past`` and, when ``own``, to itself.

        Args:
          bias: of the token's score with itself, [1, H, 1, 1].

        Returns:
          Output [B, 1, D], and the token's keys and values [B, H, 1, Dh] when ``own``.
        """
        q = self._project("q", x, hooks, context).swapaxes(1, 2)
        parts, kept = [past], None
        if own:
            k, v = (self._project(n, x, hooks, context).swapaxes(1, 2) for n in "kv")
            parts.append(Part(k, v, None, bias))
            kept = (k, v)
        vectors = attend_parts(q, parts, self.config.scale).swapaxes(1, 2)
        return self._out(vectors, head_mask, hooks, context), kept


class Block(nn.Module):
    """A layer of the encoder or of the decoder; see the module."""

    config: LayerConfig

    def setup(self) -> None:
        c = self.config
        if c.ssru:
            self.ssru, self.ssru_norm = SSRU(c.width), c.norm()
        else:
            self.attn, self.attn_norm = MultiHead(c, "attn"), c.norm()
        if c.cross:
            self.cross, self.cross_norm = MultiHead(c, "cross"), c.norm()
        self.ffn = FeedForward(c.ffn_width, c.width, c.act, c.gated, c.use_bias, c.ffn_drop)
        self.ffn_norm = c.norm()

    def __call__(
        self,
        x: jax.Array,
        *,
        hooks: Hooks,
        mask: jax.Array | None = None,
        tokens: jax.Array | None = None,
        bias: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        ffn_mask: jax.Array | None = None,
        layer_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Any]:
        """A whole sequence, [B, T, D].

        Args:
          mask: of self-attention, [B, 1, T or 1, T].
          tokens: [B, T], non-zero = a token; of the recurrent cell.
          bias: of self-attention, [1, H, T, T].
          memory, memory_mask: the encoder's output [B, S, D] and mask [B, 1, 1, S].
          head_mask: [H], or [2 H] where a layer has two attentions (own, then cross).

        Returns:
          Output [B, T, D]; what the layer keeps of itself (keys and values [B, H, P + T, Dh],
          or the cell's state [B, D]); keys and values of the memory, or None.
        """
        keys = (None,) * 6 if rng is None else tuple(jax.random.split(rng, 6))
        own_heads, cross_heads = self._heads(head_mask)
        kept: Any
        if self.config.ssru:
            y, kept = self.ssru(self._in(x, self.ssru_norm), hooks=hooks, mask=tokens, residual=x)
            x = self._add(x, y, self.ssru_norm, layer_mask, keys[1])
        else:
            inside = self._in(x, self.attn_norm)
            y, kept = self.attn(
                inside,
                inside,
                hooks=hooks,
                mask=mask,
                bias=bias,
                head_mask=own_heads,
                rng=keys[0],
                residual=x,
                norm=self.attn_norm,
            )
            x = self._add(x, y, self.attn_norm, layer_mask, keys[1])
        read = None
        if self.config.cross:
            if memory is None:
                raise ValueError("a decoder layer needs the encoder's output")
            y, read = self.cross(
                self._in(x, self.cross_norm),
                memory,
                hooks=hooks,
                mask=memory_mask,
                head_mask=cross_heads,
                rng=keys[2],
                residual=x,
                norm=self.cross_norm,
            )
            x = self._add(x, y, self.cross_norm, layer_mask, keys[3])
        return self._feed(x, hooks, ffn_mask, layer_mask, keys[4], keys[5]), kept, read

    def step(
        self,
        x: jax.Array,
        past: Any,
        memory: Part,
        *,
        hooks: Hooks,
        bias: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        ffn_mask: jax.Array | None = None,
        layer_mask: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """One token [B, 1, D] of a decoder, after what earlier ones left.

        Args:
          past: the :class:`Part` of earlier tokens, or the cell's state [B, D].
          memory: keys and values of the encoder's output.
          bias: of the token's score with itself, [1, H, 1, 1].

        Returns:
          Output [B, 1, D], and the token's keys and values [B, H, 1, Dh] or the new state.
        """
        own_heads, cross_heads = self._heads(head_mask)
        kept: Any
        if self.config.ssru:
            inside = self._in(x, self.ssru_norm)
            y, kept = self.ssru(inside, hooks=hooks, cell=past, residual=x)
            x = self._add(x, y, self.ssru_norm, layer_mask, None)
        else:
            y, kept = self.attn.step(
                self._in(x, self.attn_norm),
                past,
                hooks=hooks,
                own=True,
                bias=bias,
                head_mask=own_heads,
                residual=x,
                norm=self.attn_norm,
            )
            x = self._add(x, y, self.attn_norm, layer_mask, None)
        y, _ = self.cross.step(
            self._in(x, self.cross_norm),
            memory,
            hooks=hooks,
            own=False,
            head_mask=cross_heads,
            residual=x,
            norm=self.cross_norm,
        )
        x = self._add(x, y, self.cross_norm, layer_mask, None)
        return self._feed(x, hooks, ffn_mask, layer_mask, None, None), kept

    def _heads(self, mask: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
        if mask is None or not self.config.cross:
            return mask, None
        return mask[: self.config.heads], mask[self.config.heads :]

    def _in(self, x: jax.Array, norm: nn.Module) -> jax.Array:
        return norm(x) if self.config.pre_norm else x

    def _add(
        self,
        x: jax.Array,
        branch: jax.Array,
        norm: nn.Module,
        layer_mask: jax.Array | None,
        rng: jax.Array | None,
    ) -> jax.Array:
        branch = dropout(branch, self.config.drop, rng)
        x = x + (branch if layer_mask is None else branch * layer_mask.astype(x.dtype))
        return x if self.config.pre_norm else norm(x)

    def _feed(
        self,
        x: jax.Array,
        hooks: Hooks,
        ffn_mask: jax.Array | None,
        layer_mask: jax.Array | None,
        inner: jax.Array | None,
        outer: jax.Array | None,
    ) -> jax.Array:
        y = self.ffn(
            self._in(x, self.ffn_norm),
            hooks=hooks,
            ffn_mask=ffn_mask,
            rng=inner,
            residual=x,
            norm=self.ffn_norm,
        )
        return self._add(x, y, self.ffn_norm, layer_mask, outer)
