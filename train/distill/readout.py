"""The matrix that turns hidden states into logits, and pieces of it.

A piece has the same columns in each of ``shards`` equal parts of the vocabulary, so that a
matrix that is split over a mesh gives every device a share of every piece, without moving.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import quantized, tree
from steppe.models.decoder import DecoderConfig
from steppe.models.model import Model
from steppe.train.types import Params


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "bias"],
    meta_fields=["transposed", "softcap"],
)
@dataclass(frozen=True)
class Readout:
    """An output layer: z = h W^T + b, or soft-capped, c tanh(z / c).

    Attributes:
      kernel: W [V, D], a table of embeddings; [D, V] if ``transposed``, a dense layer.
      bias: b [V], or None.
      transposed: see above.
      softcap: c, or None.
    """

    kernel: Any
    bias: Any = None
    transposed: bool = False
    softcap: float | None = None

    @property
    def size(self) -> int:
        """V."""
        return int(self.kernel.shape[1 if self.transposed else 0])

    def check(self, h: jax.Array, name: str) -> None:
        """Raises ValueError unless it reads hidden states like ``h``."""
        shape = tuple(self.kernel.shape)
        width = shape[0 if self.transposed else 1] if len(shape) == 2 else None
        if width != h.shape[-1]:
            wanted = "[D, V]" if self.transposed else "[V, D]"
            raise ValueError(
                f"the {name}'s output matrix must be {wanted} with D = {h.shape[-1]}, the width of "
                f"its hidden states, got shape {shape}; see transposed="
            )
        if self.bias is not None and tuple(self.bias.shape) != (self.size,):
            raise ValueError(
                f"the {name}'s bias must have shape {(self.size,)}, got {tuple(self.bias.shape)}"
            )

    def cut(self, vocab: int | None) -> Readout:
        """The first ``vocab`` columns; a copy where there are more."""
        if vocab is None or vocab == self.size:
            return self
        kernel = self.kernel[:, :vocab] if self.transposed else self.kernel[:vocab]
        return dataclasses.replace(
            self, kernel=kernel, bias=None if self.bias is None else self.bias[:vocab]
        )

    def logits(self, h: jax.Array) -> jax.Array:
        """Logits [N, V] of hidden states [N, D], float32."""
        sides = ((1,), (0,)) if self.transposed else ((1,), (1,))
        z = jax.lax.dot_general(h, self.kernel, (sides, ((), ())), **_exact(h, self.kernel))
        return self._finish(z if self.bias is None else z + self.bias)

    def of(self, h: jax.Array, ids: jax.Array) -> jax.Array:
        """Logits [..., K] of the tokens ``ids`` [..., K], float32."""
        kernel = self.kernel[:, ids] if self.transposed else self.kernel[ids]
        kernel = jnp.moveaxis(kernel, 0, -1) if self.transposed else kernel
        z = (h[..., None, :].astype(jnp.float32) * kernel.astype(jnp.float32)).sum(-1)
        return self._finish(z if self.bias is None else z + self.bias[ids])

    def _finish(self, z: jax.Array) -> jax.Array:
        z = z.astype(jnp.float32)
        return z if self.softcap is None else jnp.tanh(z / self.softcap) * self.softcap

    def uncapped(self, z: jax.Array, d: jax.Array) -> jax.Array:
        """The derivative by the product h W^T + b from that by the logits ``z``."""
        if self.softcap is None:
            return d
        slope = 1.0 - (z / self.softcap) ** 2
        return jnp.where(z > -jnp.inf, d * slope, 0.0)

    # Pieces ----------------------------------------------------------------------------------

    def split(self, shards: int) -> Wide:
        """The matrix with the vocabulary as [shards, V / shards]."""
        shape = self.kernel.shape
        parts = (shards, self.size // shards)
        kernel = self.kernel.reshape((shape[0], *parts) if self.transposed else (*parts, shape[1]))
        bias = None if self.bias is None else self.bias.reshape(parts)
        return Wide(kernel, bias, self.transposed, self.softcap)

    def like(self, kernel: jax.Array, bias: jax.Array | None) -> Readout:
        """A gradient of this layer from that of its split form."""
        return dataclasses.replace(
            self,
            kernel=kernel.reshape(self.kernel.shape).astype(self.kernel.dtype),
            bias=None if bias is None else bias.reshape(self.bias.shape).astype(self.bias.dtype),
        )


@dataclass(frozen=True)
class Wide:
    """A :class:`Readout` whose vocabulary has the axes [shards, columns]."""

    kernel: jax.Array
    bias: jax.Array | None
    transposed: bool
    softcap: float | None

    @property
    def axis(self) -> int:
        """The axis of the columns."""
        return 2 if self.transposed else 1

    def take(self, start: jax.Array, width: int) -> Piece:
        """The columns ``start : start + width`` of every shard."""
        kernel = jax.lax.dynamic_slice_in_dim(self.kernel, start, width, self.axis)
        bias = None
        if self.bias is not None:
            bias = jax.lax.dynamic_slice_in_dim(self.bias, start, width, 1).reshape(-1)
        flat = (kernel.shape[0], -1) if self.transposed else (-1, kernel.shape[2])
        return Piece(Readout(kernel.reshape(flat), bias, self.transposed, self.softcap))

    def put(self, whole: jax.Array, start: jax.Array, width: int, piece: jax.Array) -> jax.Array:
        """``whole`` with a piece's gradient added at its place."""
        shape = list(whole.shape)
        shape[self.axis] = width
        old = jax.lax.dynamic_slice_in_dim(whole, start, width, self.axis)
        new = old + piece.reshape(shape)
        return jax.lax.dynamic_update_slice_in_dim(whole, new, start, self.axis)


@dataclass(frozen=True)
class Piece:
    """Some columns of a readout, as a matrix of its own."""

    readout: Readout

    def logits(self, h: jax.Array) -> jax.Array:
        return self.readout.logits(h)

    def back(self, d: jax.Array) -> jax.Array:
        """``d`` [N, C] times the matrix: [N, D], float32."""
        kernel = self.readout.kernel
        sides = ((1,), (1,)) if self.readout.transposed else ((1,), (0,))
        return jax.lax.dot_general(d, kernel, (sides, ((), ())), **_exact(d, kernel))

    def outer(self, d: jax.Array, h: jax.Array) -> jax.Array:
        """The gradient of the matrix from ``d`` [N, C] and hidden states [N, D], float32."""
        pair = (h, d) if self.readout.transposed else (d, h)
        return jax.lax.dot_general(*pair, (((0,), (0,)), ((), ())), **_exact(d, h))


def _exact(left: jax.Array, right: jax.Array) -> dict[str, Any]:
    # Sums in float32 also where the factors are bfloat16.
    return {"preferred_element_type": jnp.promote_types(jnp.float32, left.dtype)}


def readout_of(model: Model, params: Params) -> Readout:
    """The output layer of a language model, as its hidden states meet it.

    Works for decoders with an ``lm`` head, also under an overlay, and quantised ones: a rounded
    head is rounded here too, straight through for the gradient. Under an overlay that changes the
    logits themselves (site "logits") the result would not be the model's.

    Raises:
      ValueError: the model is of another kind; the message says what to do.
    """
    config = model.config
    if not isinstance(config, DecoderConfig) or config.head is None or config.head.kind != "lm":
        kind = getattr(getattr(config, "head", None), "kind", None)
        raise ValueError(
            "vocab_chunk= reads the last hidden states with the output matrix, which is known of "
            f"decoders with head 'lm' only; this is a {type(config).__name__} with head {kind!r}: "
            "use vocab_chunk=None, or chunked_divergence with a Readout of your own"
        )
    base = params["base"] if "base" in params and "overlay" in params else params
    path = "embed/word/table" if config.tied else "head/out/kernel"
    return Readout(_multiplied(model, base, path), None, not config.tied, config.softcap)


def _multiplied(model: Model, params: Params, path: str) -> Any:
    """The matrix at ``path`` as the model's own forward pass multiplies with it."""
    own, extra = quantized.unquant(params)
    if isinstance(model, quantized.Quantized) and model.stored == "float":
        chosen = {p: c for p, c in model.chosen.items() if p == path}
        own = quantized.rounded_kernels(own, chosen, extra)
    held = tree.get(own, path)
    return fq.dequantize(held["q"], held["scale"]) if quantized.is_grid(held) else held
