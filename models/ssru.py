"""The simpler simple recurrent unit (SSRU): a gated running mean in place of self-attention.

  f_t = sigmoid(x_t W_f + b_f),   c_t = f_t * c_{t-1} + (1 - f_t) * x_t W,   y_t = relu(c_t)

The recurrence is element-wise, so that a whole sequence is one associative scan and a step of
decoding costs two small matrices and a vector of state.

Kim et al., From Research to Production and Back: Ludicrously Fast Neural Machine Translation,
WNGT 2019, section 3; used by the Marian students of Bogoychev et al. 2020 (WNGT 2020).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from steppe.models.layers import Dense
from steppe.models.sites import Hooks


class SSRU(nn.Module):
    """The unit, with the sites ``ssru.in`` and ``ssru.forget``."""

    features: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        hooks: Hooks,
        cell: jax.Array | None = None,
        mask: jax.Array | None = None,
        **context: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """x [B, T, D] -> (y [B, T, D], the last c [B, D] in float32).

        Args:
          cell: c before the first token; zero by default.
          mask: [B, T], non-zero = a token; the others leave c as it is.
        """
        value = hooks("ssru.in", x, Dense(self.features, use_bias=False, name="in"), **context)
        gate = hooks("ssru.forget", x, Dense(self.features, name="forget"), **context)
        forget = jax.nn.sigmoid(gate.astype(jnp.float32))
        added = (1 - forget) * value.astype(jnp.float32)
        if mask is not None:
            real = (mask != 0)[..., None]
            forget, added = jnp.where(real, forget, 1.0), jnp.where(real, added, 0.0)
        if cell is not None:
            added = added.at[:, 0].add(forget[:, 0] * cell)
        if x.shape[1] > 1:

            def then(
                left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
            ) -> tuple[jax.Array, jax.Array]:
                return left[0] * right[0], left[1] * right[0] + right[1]

            added = jax.lax.associative_scan(then, (forget, added), axis=1)[1]
        return jax.nn.relu(added).astype(value.dtype), added[:, -1]
