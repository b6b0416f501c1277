"""The layer of vision transformers and of CLIP: norms before the sublayers.

  x = x + g_1 * attention(norm_1(x));  x = x + g_2 * ffn(norm_2(x))

g are learnt gains by channel (LayerScale, Touvron et al. 2021, arXiv 2103.17239), or 1. In
training a whole branch of an example is dropped with probability ``drop_path`` (stochastic
depth, Huang et al. 2016, arXiv 1603.09382).
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from steppe.models.dropout import dropout
from steppe.models.layers import Attention, FeedForward, LayerNorm
from steppe.models.sites import Hooks


class LayerScale(nn.Module):
    """``x * scale`` with one gain a channel.

    Attributes:
      value: initial gain.
    """

    value: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        scale = self.param("scale", nn.initializers.constant(self.value), (x.shape[-1],))
        return x * scale.astype(x.dtype)


class LayerNormBlock(nn.Module):
    """A pre-norm layer.

    Attributes:
      attention, feed_forward: constructors of the sublayers, as in ``PostNormBlock``.
      epsilon: of the norms.
      layer_scale: initial gain of both branches; None = none.
      drop: dropout rate of both branches.
      drop_path: probability of leaving a branch of an example out.
    """

    attention: Callable[..., Attention]
    feed_forward: Callable[..., FeedForward]
    epsilon: float
    layer_scale: float | None = None
    drop: float = 0.0
    drop_path: float = 0.0

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
        keys = (None,) * 5 if rng is None else tuple(jax.random.split(rng, 5))
        whole, n = x.shape, queries

        def add(
            x: jax.Array,
            branch: jax.Array,
            name: str,
            key: jax.Array | None,
            path: jax.Array | None,
        ) -> jax.Array:
            if self.layer_scale is not None:
                branch = LayerScale(self.layer_scale, name=name)(branch)
            branch = dropout(branch, self.drop, key, whole=whole)
            if path is not None and self.drop_path:
                keep = dropout(jnp.ones((len(branch), 1, 1), branch.dtype), self.drop_path, path)
                branch = branch * keep
            return x + (branch if layer_mask is None else branch * layer_mask.astype(x.dtype))

        norm = LayerNorm(self.epsilon, name="attn_norm")
        branch = self.attention(name="attn")(
            norm(x),
            hooks=hooks,
            mask=mask,
            bias=bias,
            head_mask=head_mask,
            rng=keys[0],
            queries=n,
            residual=x[:, :n],
            norm=norm,
        )
        x = add(x[:, :n], branch, "attn_scale", keys[1], keys[2])
        norm = LayerNorm(self.epsilon, name="ffn_norm")
        branch = self.feed_forward(name="ffn")(
            norm(x), hooks=hooks, ffn_mask=ffn_mask, residual=x, norm=norm
        )
        return add(x, branch, "ffn_scale", keys[3], keys[4])
