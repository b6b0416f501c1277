"""Heads: hidden states -> logits, for the kinds of task that a model serves.

=================  ====================================  ==========================
kind               logits                                labels
=================  ====================================  ==========================
``classification``  [B, C]                                class
``regression``      [B]                                   float
``token``           [B, T, C]                             class of each token
``span``            [B, T, 2]                             first and last token
``mlm``             [B, T, V], tied to the embedding      token
``lm``              [B, T, V], tied or not                next token; of decoders only
=================  ====================================  ==========================
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import flax.linen as nn
import jax

from steppe.models.dropout import dropout
from steppe.models.layers import Dense, LayerNorm, activation

KINDS = ("classification", "regression", "token", "span", "mlm", "lm")
POOLED = ("classification", "regression")


@dataclass(frozen=True)
class HeadConfig:
    """A head.

    Attributes:
      kind: one of ``KINDS``.
      num_labels: C; 1 for regression, 2 for span, ignored for mlm and lm.
      transform: activation of a dense layer between the first token and the output
        ("tanh", "relu"); None where the model's pooler does that work, or none is wanted.
      drop: dropout rate before each dense layer.
    """

    kind: str
    num_labels: int = 2
    transform: str | None = None
    drop: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"head must be one of {', '.join(KINDS)}, got {self.kind!r}")
        count = self.num_labels
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"num_labels must be a whole number >= 1, got {self.num_labels!r}")
        if self.transform is not None:
            activation(self.transform)
        if not isinstance(self.drop, numbers.Real) or not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop!r}")
        fixed = {"regression": 1, "span": 2}.get(self.kind)
        if fixed is not None and self.num_labels != fixed:
            raise ValueError(f"a {self.kind} head has num_labels={fixed}, got {self.num_labels}")


class Head(nn.Module):
    """The network of a :class:`HeadConfig`, on an encoder."""

    config: HeadConfig
    features: int
    act: str
    epsilon: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        table: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """x: [B, D] for pooled kinds, else [B, T, D]; table: [V, D] for mlm."""
        c = self.config
        keys = (None, None) if rng is None else tuple(jax.random.split(rng))
        if c.kind == "lm":
            raise ValueError("an encoder sees the next token; a head 'lm' needs a decoder")
        if c.kind == "mlm":
            if table is None:
                raise ValueError("an mlm head needs the embedding table")
            x = activation(self.act)(Dense(self.features, name="dense")(x))
            x = LayerNorm(self.epsilon, name="norm")(x)
            bias = self.param("bias", nn.initializers.zeros, (table.shape[0],))
            flat = x.reshape(-1, x.shape[-1])
            logits = jax.lax.dot_general(flat, table, (((1,), (1,)), ((), ()))) + bias
            return logits.reshape(*x.shape[:-1], -1)
        if c.transform is not None:
            x = dropout(x, c.drop, keys[0]) if c.transform == "tanh" else x
            x = activation(c.transform)(Dense(self.features, name="dense")(x))
        x = dropout(x, c.drop, keys[1])
        logits = Dense(c.num_labels, name="out")(x)
        return logits[..., 0] if c.kind == "regression" else logits
