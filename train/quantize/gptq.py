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

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import quantized, tree
from steppe.models.quantized import QuantConfig, QuantRules
from steppe.models.tree import Params
from steppe.train.quantize.baselines import each_kernel
from steppe.train.quantize.calibrate import check_inputs, with_entries

# (kernel, its path and scheme, entries of ``quant``) -> what ``compensated`` gives.
Solve: TypeAlias = Callable[
    [jax.Array, str, QuantConfig, Mapping[str, Any]], tuple[jax.Array, fq.Grid]
]


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
    solve, flat = _solver(params, grams, rules, damping, act_order)
    _, extra = quantized.unquant(params)

    def one(w: jax.Array, path: str, config: QuantConfig) -> fq.Grid:
        if path not in flat:
            return fq.quantize(w, config.w_bits, group=config.group, fit=config.own_fit)
        return solve(w, path, config, extra)[1]

    return each_kernel(params, rules, one)


def start(
    params: Params,
    grams: Mapping[str, Any],
    rules: QuantRules,
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> tuple[Params, QuantRules]:
    """Float parameters that round to what :func:`gptq` gives, for a student to learn from there.

    A kernel is W' = W with the errors of earlier rows taken up, as each row was when it was
    rounded: round(W' / s) are GPTQ's integers, and W' is as far from the next integer as it came
    to be, which a kernel that stands on its grid is not. The steps s do not follow the kernel any
    more: they stand in ``params["quant"]``, and the rules read them there (``fit="fixed"``).

    Args:
      params, grams, damping, act_order: see :func:`gptq`.
      rules: of kernels that are not smoothed.

    Returns:
      The parameters, and ``rules`` path by path, for ``quantized.wrap`` and
      ``quantized.quantize``. Kernels without a Gram matrix are as they were in both.

    Raises:
      ValueError: a rule with ``smooth``; as :func:`gptq`.
    """
    solve, flat = _solver(params, grams, rules, damping, act_order)
    own, extra = quantized.unquant(params)
    pairs, made = [], {}
    entries: dict[str, dict[str, jax.Array]] = {}
    for path, config in quantized.resolve(own, rules).items():
        if config.smooth:
            raise ValueError(
                f"rules smooth {path!r}: start takes kernels as they are, smooth=False"
            )
        if config.w_bits != fq.BYPASS and path in flat:
            w = tree.get(own, path)
            quantized.check_finite(w, path)
            live, grid = solve(w, path, config, extra)
            made[path] = live.astype(w.dtype)
            entries[quantized.site_of(path)] = {"step": grid.scale}
            config = dataclasses.replace(config, fit="fixed")
        pairs.append((re.escape(path), config))
    return with_entries(tree.replace(params, made), entries), tuple(pairs)


def _solver(
    params: Params, grams: Mapping[str, Any], rules: QuantRules, damping: float, act_order: bool
) -> tuple[Solve, dict[str, Any]]:
    """``compensated`` for kernels of any stack, and the Gram matrices by path."""
    if not damping > 0:
        raise ValueError(f"damping must be > 0, got {damping}")
    flat = tree.flatten(grams)
    chosen = quantized.resolve(quantized.unquant(params)[0], rules)
    if not any(path in flat for path in chosen):
        raise ValueError("grams hold none of the kernels: collect them with calibrate.grams")

    def solve(w: jax.Array, path: str, config: QuantConfig, extra: Mapping[str, Any]) -> Any:
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
        one = functools.partial(
            compensated,
            bits=config.w_bits,
            group=config.group,
            damping=damping,
            act_order=act_order,
            fit=config.own_fit,
        )
        return one(w, gram) if w.ndim == 2 else _stack(one, w, gram)

    return solve, flat


@functools.partial(jax.jit, static_argnames=("bits", "group", "act_order", "fit"))
def compensated(
    w: jax.Array,
    gram: jax.Array,
    *,
    bits: int,
    group: int | None = None,
    damping: float = 0.01,
    act_order: bool = False,
    fit: fq.Fit = "absmax",
) -> tuple[jax.Array, fq.Grid]:
    """One kernel [in, out] with the Gram matrix [in, in] of its inputs.

    Returns:
      Its rows as they were when they were rounded, float32 [in, out], and the grid.
    """
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

    live, q, scale = jax.lax.fori_loop(0, inputs, row, (live, jnp.zeros_like(live), fixed))
    live, q = (jnp.zeros_like(rows).at[order].set(rows) for rows in (live, q))
    plain = fq.quantize(w, bits, group=group, fit=fit)
    fine = jnp.isfinite(upper).all() & jnp.isfinite(q).all() & jnp.isfinite(scale).all()
    grid = fq.Grid(
        jnp.where(fine, q, plain.q).astype(jnp.int8), jnp.where(fine, scale, plain.scale)
    )
    return jnp.where(fine, live, w.astype(jnp.float32)), grid


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


def _stack(one: Any, w: jax.Array, gram: jax.Array) -> tuple[jax.Array, fq.Grid]:
    """Layer by layer, so that the work space is that of one kernel."""
    lead = w.shape[:-2]
    flat = (w.reshape(-1, *w.shape[-2:]), gram.reshape(-1, *gram.shape[-2:]))
    found = jax.jit(lambda pair: jax.lax.map(lambda each: one(*each), pair))(flat)
    split: tuple[jax.Array, fq.Grid] = jax.tree.map(
        lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), found
    )
    return split
