"""The blocks of which every family is built: dense, norms, embeddings, attention, feed-forward.

All modules take the compute dtype from their parameters: the float32 master copy gives a
float32 forward pass, a bf16 cast of it a bf16 one. Norms and softmax are in float32 always.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from steppe.models.attention import Implementation, attend
from steppe.models.dropout import dropout
from steppe.models.sites import Hooks

Initializer = Callable[..., jax.Array]


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x/2 (1 + erf(x / sqrt 2)).

    ``jax.nn.gelu`` uses erfc, which takes XLA's CPU backend 2.8 x as long; erf is also what
    PyTorch computes.
    """
    half = jnp.asarray(0.5, x.dtype)
    return half * x * (1 + jax.lax.erf(x * jnp.asarray(math.sqrt(0.5), x.dtype)))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation called ``name``.

    Raises:
      ValueError: it is not known; lists those that are.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def run(net: nn.Module, params: Any, *args: Any, **kwargs: Any) -> jax.Array:
    """The output of a module under ``params``: linen's ``apply`` without its wrapping."""
    return cast(jax.Array, net.apply({"params": params}, *args, **kwargs))


class Dense(nn.Module):
    """``x @ kernel + bias`` over the last axis, computed as one flat matmul.

    (B, T, D) is flattened to (B * T, D) first: XLA's CPU matmul is 1.6 x faster on it, and
    accelerators do not mind.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x.astype(kernel.dtype).reshape(-1, x.shape[-1]) @ kernel
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,))
        return y.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, in float32, returned in the dtype of the scale."""

    epsilon: float = 1e-12

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(scale.dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * (offset + scale)`` over the last axis, in float32, in the dtype of the scale.

    Zhang and Sennrich 2019 (arXiv 1910.07467). Gemma's files hold the scale less 1 (offset 1).
    """

    epsilon: float = 1e-6
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", start, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        gain = scale.astype(jnp.float32) + self.offset if self.offset else scale
        return (y * gain).astype(scale.dtype)


class Embedding(nn.Module):
    """A table [N, D] and its look-up."""

    size: int
    features: int
    init_std: float = 0.02

    def setup(self) -> None:
        self.table = self.param(
            "table", nn.initializers.normal(self.init_std), (self.size, self.features)
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Rows of the table; an id outside it, negative ones too, gives NaN and not a row."""
        ids = jnp.asarray(ids)
        return jnp.take(self.table, jnp.where(ids < 0, self.size, ids), axis=0)


class Attention(nn.Module):
    """Multi-head (grouped-query) attention with the ``attn.*`` sites.

    Attributes:
      heads, kv_heads, head_dim: H, Hkv (H when None), Dh.
      features: D of the output.
      use_bias: biases on q, k, v, o.
      out_bias: bias on o, where that differs from the others.
      drop: dropout rate on the probabilities.
      implementation: see ``attend``.
    """

    heads: int
    head_dim: int
    features: int
    kv_heads: int | None = None
    use_bias: bool = True
    out_bias: bool | None = None
    drop: float = 0.0
    implementation: Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        hooks: Hooks,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
        queries: int | None = None,
        **context: Any,
    ) -> jax.Array:
        """x [B, T, D], mask [B, 1, T or 1, S], bias [1, H, T, S], head_mask [H] -> [B, T, D].

        With ``queries`` = n only the outputs of the first n positions are computed, [B, n, D].
        """
        b, t, _ = x.shape
        n = t if queries is None else queries
        kv_heads = self.kv_heads or self.heads

        def project(name: str, x: jax.Array, heads: int) -> jax.Array:
            layer = Dense(heads * self.head_dim, self.use_bias, name=name)
            y = hooks(f"attn.{name}", x, layer, **context)
            return y.reshape(b, -1, heads, self.head_dim)

        q = project("q", x[:, :n], self.heads)
        k, v = project("k", x, kv_heads), project("v", x, kv_heads)
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, :n]
        if bias is not None:
            bias = bias[:, :, :n]
        if "attn.kv_prefix" in hooks:
            none = jnp.zeros((b, 0, kv_heads, self.head_dim), k.dtype)
            extra = hooks("attn.kv_prefix", x, lambda _: (none, none), **context)
            prefix = extra[0].shape[1]
            k, v = (
                jnp.concatenate([jnp.broadcast_to(e, (b, *e.shape[1:])).astype(a.dtype), a], axis=1)
                for e, a in zip(extra, (k, v), strict=True)
            )
            if mask is not None:
                mask = jnp.pad(mask, ((0, 0),) * 3 + ((prefix, 0),), constant_values=True)
            if bias is not None:
                bias = jnp.pad(bias, ((0, 0),) * 3 + ((prefix, 0),))
        context_vectors = attend(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            drop=self.drop,
            rng=rng,
            implementation=self.implementation,
            whole_queries=t,
        )
        if head_mask is not None:
            if head_mask.shape != (self.heads,):
                raise ValueError(
                    f"masks.head must have {self.heads} heads a layer, got {head_mask.shape[-1]}"
                )
            context_vectors = context_vectors * head_mask[:, None].astype(context_vectors.dtype)
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        out = Dense(self.features, out_bias, name="o")
        return hooks("attn.o", context_vectors.reshape(b, n, -1), out, **context)


class FeedForward(nn.Module):
    """``out(act(in(x)))``, or gated ``out(act(gate(x)) * in(x))``, with the ``ffn.*`` sites.

    Attributes:
      drop: dropout rate of the activations.
    """

    width: int
    features: int
    act: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    drop: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        hooks: Hooks,
        ffn_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
        **context: Any,
    ) -> jax.Array:
        """x [B, T, D], ffn_mask [F] -> [B, T, D]."""
        act = activation(self.act)
        y = hooks("ffn.in", x, Dense(self.width, self.use_bias, name="in"), **context)
        if self.gated:
            gate = hooks("ffn.gate", x, Dense(self.width, self.use_bias, name="gate"), **context)
            y = act(gate) * y
        else:
            y = act(y)
        if ffn_mask is not None:
            if ffn_mask.shape != (self.width,):
                raise ValueError(
                    f"masks.ffn must have {self.width} units a layer, got {ffn_mask.shape[-1]}"
                )
            y = y * ffn_mask.astype(y.dtype)
        y = dropout(y, self.drop, rng)
        out = Dense(self.features, self.use_bias, name="out")
        return hooks("ffn.out", y, out, inputs=x, **context)


class PostNormBlock(nn.Module):
    """A BERT layer: ``x = LN(x + attention(x)); x = LN(x + ffn(x))``."""

    attention: Callable[..., Attention]
    feed_forward: Callable[..., FeedForward]
    epsilon: float
    drop: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        hooks: Hooks,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        head_mask: jax.Array | None = None,
        ffn_mask: jax.Array | None = None,
        layer_mask: jax.Array | None = None,
        rng: jax.Array | None = None,
        queries: int | None = None,
    ) -> jax.Array:
        """One layer, [B, T, D] -> [B, T, D]; masks are this layer's slices.

        With ``queries`` = n only the first n positions are computed, [B, n, D].
        """
        keys = (None, None, None) if rng is None else tuple(jax.random.split(rng, 3))
        whole, n = x.shape, queries

        def add(x: jax.Array, branch: jax.Array, key: jax.Array | None) -> jax.Array:
            branch = dropout(branch, self.drop, key, whole=whole)
            return x + (branch if layer_mask is None else branch * layer_mask.astype(x.dtype))

        norm = LayerNorm(self.epsilon, name="attn_norm")
        branch = self.attention(name="attn")(
            x,
            hooks=hooks,
            mask=mask,
            bias=bias,
            head_mask=head_mask,
            rng=keys[0],
            queries=n,
            residual=x[:, :n],
            norm=norm,
        )
        x = norm(add(x[:, :n], branch, keys[1]))
        norm = LayerNorm(self.epsilon, name="ffn_norm")
        branch = self.feed_forward(name="ffn")(
            x, hooks=hooks, ffn_mask=ffn_mask, residual=x, norm=norm
        )
        return norm(add(x, branch, keys[2]))
