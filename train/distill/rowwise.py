"""The loss of a distillation from hidden states, some tokens at a time, with its gradient.

  L = sum_i w_i (a D_i + b * -log q_i(y_i)),     dL / dh_S = sum over blocks of dz W_S,  dW_S alike

A block of tokens has all of its logits, [rows, V], and no more than one block exists at a time.
As L is one number whose coefficients are known beforehand, its gradient is made in the same pass,
block by block, and kept; backward only multiplies it by the number that comes in. The matrix
products are those of the dense form, four of its six with a gradient to make (the other two are
the backward pass's): nothing is computed twice, which ``chunked`` cannot say. In exchange there is
one number, where ``chunked`` gives one at every position, and reverse mode is all there is.

Blocks take every (N / rows)-th token, so that tokens split over a mesh give each device its share
of every block; a vocabulary that is split over a mesh stays so.

Losses with the gradient in the forward pass: Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steppe.train.distill import divergences
from steppe.train.distill.chunked import Side, check_vocabularies
from steppe.train.distill.readout import Piece, Readout

# Columns of W's gradient that are added to at once.
COLUMNS = 8192


class Sums(NamedTuple):
    """What :func:`rowwise_loss` finds, float32 scalars.

    Attributes:
      loss: L, the only one that is differentiated.
      divergence: sum_i w_i D_i, nats.
      nll: sum_i w_i * -log q_i(y_i), nats.
    """

    loss: Any
    divergence: Any
    nll: Any


@dataclass(frozen=True)
class Plan:
    """The constants of one program."""

    kind: str
    temperature: float
    beta: float
    alpha: float
    mix: tuple[float, float]
    blocks: int


def rowwise_loss(
    kind: str,
    h_s: Float[Array, "*n D"],
    readout_s: Readout,
    h_t: Float[Array, "*n E"],
    readout_t: Readout,
    weight: Float[Array, "*n"],
    labels: Int[Array, "*n"],
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    mix: tuple[float, float] = (1.0, 0.0),
    rows: int = 64,
) -> Sums:
    """The weighted sum of divergence and cross entropy over all tokens.

    Args:
      kind, temperature, beta, alpha: see ``divergences``; the temperature is the divergence's.
      h_s, readout_s: hidden states of the student and its output matrix, both differentiated.
      h_t, readout_t: the teacher's, of any width; no gradient.
      weight: w, such as the label mask; where it is 0 nothing counts, not even NaN. No gradient.
      labels: y; any number in the vocabulary where the weight is 0.
      mix: (a, b) of L.
      rows: tokens of a block at most; their logits take rows * V * 4 bytes a model, and a few
        times that while they are worked on.

    Raises:
      ValueError: as ``token_divergence``; rows < 1; weights or labels of another shape.
    """
    divergences.check(kind, temperature, beta, alpha)
    check_vocabularies(h_s, readout_s, h_t, readout_t)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows must be a whole number >= 1, got {rows!r}")
    lead = h_s.shape[:-1]
    for name, value in (("weight", weight), ("labels", labels)):
        if tuple(value.shape) != tuple(lead):
            raise ValueError(f"{name} must be {tuple(lead)} like the tokens, got {value.shape}")
    n = int(weight.size)
    blocks = -(-n // min(rows, n)) if n else 1
    plan = Plan(kind, float(temperature), beta, alpha, mix, blocks)
    h_s, h_t = (divergences.shown(weight, h) for h in (h_s, h_t))
    student = (_padded(h_s.reshape(n, -1), blocks), readout_s)
    teacher = jax.lax.stop_gradient((_padded(h_t.reshape(n, -1), blocks), readout_t))
    w = _padded(jax.lax.stop_gradient(weight).reshape(n).astype(jnp.float32), blocks)
    y = _padded(labels.reshape(n), blocks)
    return _loss(plan, student, teacher, w, y)


def _padded(x: jax.Array, blocks: int) -> jax.Array:
    """[N, ...] with rows of zeros at the end, so that blocks divide it."""
    more = -len(x) % blocks
    return jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))) if more else x


def _split(x: jax.Array, blocks: int) -> jax.Array:
    """[rows * blocks, ...] -> [blocks, rows, ...], a block being every ``blocks``-th row."""
    return jnp.moveaxis(x.reshape(-1, blocks, *x.shape[1:]), 1, 0)


def _joined(x: jax.Array) -> jax.Array:
    """Inverse of :func:`_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(plan: Plan, student: Side, teacher: Side, w: jax.Array, y: jax.Array) -> Sums:
    def add(sums: Any, block: Any) -> tuple[Any, None]:
        h_s, h_t, w, y = block
        found = _sums(plan, student[1].logits(h_s), teacher[1].logits(h_t), w, y)
        return jax.tree.map(jnp.add, sums, found), None

    return jax.lax.scan(add, _nothing(), _blocks(plan, student, teacher, w, y))[0]


def _forward(
    plan: Plan, student: Side, teacher: Side, w: jax.Array, y: jax.Array
) -> tuple[Sums, Any]:
    readout = student[1]
    wide = readout.split(1)
    d_bias = None if wide.bias is None else jnp.zeros(readout.size, jnp.float32)

    def add(carry: Any, block: Any) -> tuple[Any, jax.Array]:
        sums, d_kernel, d_bias = carry
        h_s, h_t, w, y = block
        z_s, z_t = readout.logits(h_s), teacher[1].logits(h_t)

        def loss(z: jax.Array) -> tuple[jax.Array, Sums]:
            found = _sums(plan, z, z_t, w, y)
            return found.loss, found

        d, found = jax.grad(loss, has_aux=True)(z_s)
        d = readout.uncapped(z_s, d)
        if d_bias is not None:
            d_bias += d.sum(0)
        # In the dtype that the product of the dense form would have.
        d = d.astype(jnp.result_type(h_s.dtype, readout.kernel.dtype))
        d_h = Piece(readout).back(d).astype(h_s.dtype)
        d_kernel = _grown(d_kernel, wide, d, h_s)
        return (jax.tree.map(jnp.add, sums, found), d_kernel, d_bias), d_h

    start = _nothing(), jnp.zeros(wide.kernel.shape, jnp.float32), d_bias
    (sums, d_kernel, d_bias), d_h = jax.lax.scan(add, start, _blocks(plan, student, teacher, w, y))
    return sums, (_joined(d_h), readout.like(d_kernel, d_bias))


def _backward(plan: Plan, kept: Any, given: Sums) -> Any:
    def times(leaf: jax.Array) -> jax.Array:
        return (leaf * given.loss).astype(leaf.dtype)

    return jax.tree.map(times, kept), None, None, None


_loss.defvjp(_forward, _backward)


def _blocks(plan: Plan, student: Side, teacher: Side, w: jax.Array, y: jax.Array) -> Any:
    return jax.tree.map(lambda x: _split(x, plan.blocks), (student[0], teacher[0], w, y))


def _nothing() -> Sums:
    return Sums(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def _sums(plan: Plan, z_s: jax.Array, z_t: jax.Array, w: jax.Array, y: jax.Array) -> Sums:
    """The sums over one block from its logits [rows, V]."""
    value = divergences.token_divergence(
        plan.kind, z_s, z_t, temperature=plan.temperature, beta=plan.beta, alpha=plan.alpha
    )
    divergence = jnp.where(w > 0, w * value, 0.0).sum()
    a, b = plan.mix
    if b == 0:
        return Sums(a * divergence, divergence, jnp.zeros((), jnp.float32))
    # A label beyond the vocabulary must not be read as another token: NaN stops the loop.
    known = y < z_s.shape[-1]
    picked = jnp.take_along_axis(z_s, jnp.where(known, y, 0)[:, None], axis=1)[:, 0]
    nll = jax.nn.logsumexp(z_s, axis=1) - jnp.where(known, picked, jnp.nan)
    nll = jnp.where(w > 0, w * nll, 0.0).sum()
    return Sums(a * divergence + b * nll, divergence, nll)


def _grown(whole: jax.Array, wide: Any, d: jax.Array, h: jax.Array) -> jax.Array:
    """``whole``, the gradient of the matrix, with d^T h added some columns at a time: as one
    product it would be a second array of its size."""
    size = d.shape[1]
    width = min(COLUMNS, size)

    def add(number: Any, whole: jax.Array) -> jax.Array:
        begin = jnp.minimum(number * width, size - width)
        part = jax.lax.dynamic_slice_in_dim(d, begin, width, 1)
        # The last piece ends with the vocabulary, and leaves out what was there before.
        fresh = begin + jnp.arange(width) >= number * width
        piece = wide.take(begin, width).outer(jnp.where(fresh, part, 0), h)
        return wide.put(whole, begin, width, piece)

    grown: jax.Array = jax.lax.fori_loop(0, -(-size // width), add, whole)
    return grown
