"""Second-order rounding: the error of each weight is taken up by those that come after it.

  H = G + lambda mean(diag G) I,  G = X^T X / n;   H^-1 = U^T U, U upper triangular
  for i = 1..in:   q_i = round(w_i / s);  e = (w_i - s q_i) / U_ii;   w_j -= U_ij e for j > i

for a kernel w [in, out], all outputs at once; it lowers the output error tr(E^T G E), where
rounding to nearest only sees E. s of a channel comes from the kernel as it was; with groups, s of
a group from what the kernel has become when its first row is reached.

Frantar et al., ICLR 2023 (arXiv 2210.17323): lambda = 0.01.

Deviations: row by row without blocks (one loop of ``in`` steps a kernel, layers one after the
other); symmetric grids; an input that is always 0 keeps its weights, rounded to nearest, where
the published code puts 0. With ``act_order`` groups keep the steps of the original kernel. Where
H cannot be inverted in float32 a layer falls back to rounding to nearest.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import quantized, tree
from steppe.models.quantized import QuantConfig, QuantRules
from steppe.models.tree import Params
from steppe.train.quantize.baselines import each_kernel
from steppe.train.quantize.calibrate import check_inputs

HIGHEST = jax.lax.Precision.HIGHEST


def gptq(
    params: Params,
    grams: Mapping[str, Any],
    rules: QuantRules,
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> Params:
    """Parameters with integers in place of kernels.

    Args:
      params: float parameters; ``smooth`` entries are multiplied in, and their inputs divided.
      grams: of ``calibrate.grams``: [L, in, in] (or [in, in]) at the kernels' paths. Kernels
        without one are rounded to nearest.
      damping: lambda, > 0.
      act_order: inputs of large magnitude first.

    Raises:
      ValueError: damping, a Gram that does not fit its kernel or is not finite, no Gram at all
        for the kernels that are rounded; as ``quantized.quantize``.
    """
    if not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}")
    flat = tree.flatten(grams)
    own, extra = quantized.unquant(params)
    chosen = quantized.resolve(own, rules)
    if not any(path in flat for path in chosen):
        raise ValueError("grams hold none of the kernels: collect them with calibrate.grams")

    def one(w: jax.Array, path: str, config: QuantConfig) -> fq.Grid:
        if path not in flat:
            return fq.quantize(w, config.w_bits, group=config.group, fit=config.fit)
        gram = jnp.asarray(flat[path], jnp.float32)
        if tuple(gram.shape) != (*w.shape[:-1], w.shape[-2]):
            raise ValueError(
                f"the Gram at {path!r} must be {(*w.shape[:-1], w.shape[-2])}, "
                f"got {tuple(gram.shape)}"
            )
        check_inputs(gram, quantized.site_of(path), layered=tree.is_stacked(path))
        if config.smooth:
            s = extra[quantized.site_of(path)]["smooth"]
            gram = gram / (s[..., :, None] * s[..., None, :])
        solve = functools.partial(
            solved,
            bits=config.w_bits,
            group=config.group,
            damping=damping,
            act_order=act_order,
            fit=config.fit,
        )
        if w.ndim == 2:
            return solve(w, gram)
        return fq.Grid(*_stack(solve, w, gram))

    return each_kernel(params, rules, one)


@functools.partial(jax.jit, static_argnames=("bits", "group", "act_order", "fit"))
def solved(
    w: jax.Array,
    gram: jax.Array,
    *,
    bits: int,
    group: int | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    fit: fq.Fit = "absmax",
) -> fq.Grid:
    """The grid of one kernel [in, out] with the Gram matrix [in, in] of its inputs."""
    inputs = w.shape[0]
    size = inputs if group is None else group
    top = 2 ** (bits - 1) - 1
    diagonal = jnp.diagonal(gram)
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(inputs)
    fixed = fq.steps(w, bits, group=group, fit=fit)
    live = w.astype(jnp.float32)[order]
    upper = _upper(gram[order][:, order], damping)
    moving = group is not None and not act_order

    def row(i: jax.Array, carry: Any) -> Any:
        live, q, scale = carry
        at = order[i] // size
        if moving:

            def renewed(scale: jax.Array) -> jax.Array:
                rows = jax.lax.dynamic_slice_in_dim(live, i, size)
                return scale.at[at].set(fq.steps(rows, bits, fit=fit)[0])

            scale = jax.lax.cond(i % size == 0, renewed, lambda scale: scale, scale)
        s = scale[at]
        code = jnp.clip(jnp.round(live[i] / s), -top, top)
        error = (live[i] - code * s) / upper[i, i]
        later = jnp.where(jnp.arange(inputs) > i, upper[i], 0.0)
        return live - later[:, None] * error[None], q.at[i].set(code), scale

    _, q, scale = jax.lax.fori_loop(0, inputs, row, (live, jnp.zeros_like(live), fixed))
    q = jnp.zeros_like(q).at[order].set(q)
    plain = fq.quantize(w, bits, group=group, fit=fit)
    fine = jnp.isfinite(upper).all() & jnp.isfinite(q).all() & jnp.isfinite(scale).all()
    return fq.Grid(
        jnp.where(fine, q, plain.q).astype(jnp.int8), jnp.where(fine, scale, plain.scale)
    )


def _upper(gram: jax.Array, damping: float) -> jax.Array:
    """U with H^-1 = U^T U."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    eye = jnp.eye(len(gram), dtype=jnp.float32)
    mean = diagonal.mean()
    ridge = jnp.where(mean > 0, damping * mean, 1.0)
    h = gram + eye * jnp.where(dead, 1.0, ridge)
    inverse = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(h), eye)
    # Symmetric to the last bit, or the second factorisation may fail.
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


def _stack(solve: Any, w: jax.Array, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layer by layer, so that the work space is that of one kernel."""
    lead = w.shape[:-2]
    flat = (w.reshape(-1, *w.shape[-2:]), gram.reshape(-1, *gram.shape[-2:]))
    found = jax.jit(lambda pair: jax.lax.map(lambda each: solve(*each), pair))(flat)
    return tuple(part.reshape(*lead, *part.shape[1:]) for part in found)
