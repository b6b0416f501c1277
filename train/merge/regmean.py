"""RegMean: the linear layer that fits best what every model's layer does on its own inputs.

  W = (sum_i G~_i)^-1 sum_i G~_i W_i,    G_i = X_i^T X_i / n_i,    G~ = a G + (1 - a) diag(G)

for every kernel W [in, out] whose inputs X_i [n_i, in] were seen (model i on the data of task
i); everything else is averaged. With a = 1 and equal n it minimises sum_i |X_i W - X_i W_i|^2.

Jin et al., ICLR 2023 (arXiv 2212.09849): a = 0.9.

Deviations: the published code counts padding among the n_i tokens and in X; here a token that
the attention mask hides counts only with ``padding=True``. A singular sum gets a ridge, which
is added to every G~_i and therefore draws towards the average, not to 0. Solved for is what W
differs from the average by: equal models give themselves, however badly the sum is conditioned.
The sum is solved, and found singular, at unit diagonal: the scale of an input is a unit of
measure, and says nothing about whether its row is known. Rows of inputs that are always 0 are
averaged.

Gram matrices are collected through the sites of the model (``steppe.models.sites``): a site
gives what goes into a dense layer. Its value has to leave the scan over the layers, and the one
thing that does is the gradient of the site's own parameters; so a site holds a matrix of zeros
whose "gradient" is defined to be X^T X. That costs one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.models.model import Model
from steppe.models.overlays.overlay import BASE, kernel_paths
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params
from steppe.train.merge import leafwise

Precision: TypeAlias = Literal["auto", "float32", "float64"]
LARGE = 2000  # inputs of a layer above which the solver works in float64 on the host
# At unit diagonal. Grams in float32 have noise of about the first, whatever the solver's
# precision; the second is far above it.
SINGULAR, RIDGE = 1e-5, 1e-3
# A ridge is the same for all inputs as far as it lies within so many times RIDGE of each one's
# own variance. One ridge leaves, in directions without inputs, exactly the average; but beside
# an input of a million times the variance it would drown the others.
SPREAD = 10.0
TINY = float(np.finfo(np.float32).tiny)
HIGHEST = jax.lax.Precision.HIGHEST


@jax.custom_vjp
def _tap(gram: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """y; the gradient of ``gram`` is x^T x, whatever that of y is."""
    return y


def _tap_forward(gram: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    return y, x


def _tap_backward(x: jax.Array, grad: jax.Array) -> tuple[Any, Any, Any]:
    return jnp.einsum("ni,nj->ij", x, x, precision=HIGHEST), jnp.zeros_like(x), grad


_tap.defvjp(_tap_forward, _tap_backward)


def collect_grams(
    model: Model,
    params: Params,
    batches: Iterable[Mapping[str, Any]],
    *,
    sites: Sequence[str] | None = None,
    padding: bool = False,
) -> Params:
    """Gram matrices of the inputs of the dense layers inside the stack(s).

    Args:
      model: the network, without dropout; of an overlay's bound model the base's layers.
      params: its parameters.
      batches: inputs of the model; 256 examples are usual.
      sites: dense layers such as ``attn.q``; default all that the model has a site for.
      padding: count tokens that the attention mask hides too, as the published code does.

    Returns:
      A tree with the kernels' paths, ``layers/attn/q/kernel`` -> float32 [L, in, in], divided
      by the number of tokens. Kernels outside the layers (poolers, patches, heads) have no site
      and are not in it.

    Raises:
      ValueError: a site that is no dense layer of the model, or no batch.
    """
    base = params.get(BASE, params)
    dense = kernel_paths(base)
    chosen = [name for name in dense if name in model.sites] if sites is None else list(sites)
    for name in chosen:
        if name not in dense or name not in model.sites:
            raise ValueError(
                f"no dense layer at site {name!r}; there are "
                f"{', '.join(sorted(n for n in dense if n in model.sites))}"
            )

    def site(delta: Any, x: Any, layer: Callable[[Any], Any], context: SiteContext) -> jax.Array:
        y = layer(x)
        flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        live = _live(context.mask, x.shape, padding).reshape(-1, 1)
        counted = jnp.concatenate([flat * live, live], axis=1)
        # The last row and column of the product count the tokens.
        return _tap(delta, counted, y)

    def outputs(taps: Mapping[str, Any], params: Params, batch: Mapping[str, Any]) -> jax.Array:
        attached = {name: Site(site, taps[name]) for name in chosen}
        out = model.apply(params, batch, sites=attached)
        whole = out.hidden.astype(jnp.float32).sum()
        return whole if out.logits is None else whole + out.logits.astype(jnp.float32).sum()

    zeros = {}
    for name in chosen:
        layers, width, _ = tree.get(base, dense[name]).shape
        zeros[name] = jnp.zeros((layers, width + 1, width + 1), jnp.float32)
    run = jax.jit(jax.grad(outputs))
    total = None
    for batch in batches:
        part = run(zeros, params, dict(batch))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    if total is None:
        raise ValueError("batches must not be empty: there is no input to take Gram matrices of")
    grams = {}
    for name in chosen:
        count = jnp.maximum(total[name][:, -1:, -1:], 1.0)
        grams[dense[name]] = total[name][:, :-1, :-1] / count
    return tree.unflatten(grams)


def _live(mask: jax.Array | None, shape: tuple[int, ...], padding: bool) -> jax.Array:
    """1 for the tokens that count, [B, T]."""
    if mask is None or padding or mask.ndim != 2 or mask.shape[0] != shape[0]:
        return jnp.ones(shape[:-1], jnp.float32)
    if mask.shape[1] < shape[1]:
        return jnp.ones(shape[:-1], jnp.float32)
    return (mask[:, : shape[1]] != 0).astype(jnp.float32)


def regmean(
    thetas: Sequence[Mapping[str, Any]],
    grams: Sequence[Mapping[str, Any]],
    a: float = 0.9,
    *,
    precision: Precision = "auto",
) -> Params:
    """The RegMean merge.

    Args:
      thetas: N models of one structure.
      grams: N trees of Gram matrices at the paths of kernels: [in, in], or [L, in, in] of a
        stacked kernel [L, in, out]; see :func:`collect_grams`. Kernels may have more than one
        output axis. All N hold the same paths.
      a: what off-diagonal entries are multiplied by, in [0, 1].
      precision: of the solver: "float32" (works under jit), "float64" (on the host), or "auto"
        = float64 for kernels of more than 2000 inputs where the values are at hand.

    Raises:
      ValueError: ``a`` is out of range, N differs, or a Gram does not fit its kernel.
    """
    leafwise.check_models(thetas)
    if not 0 <= a <= 1:
        raise ValueError(f"a must be in [0, 1], got {a}")
    if precision not in ("auto", "float32", "float64"):
        raise ValueError(f"precision must be auto, float32 or float64, got {precision!r}")
    if len(grams) != len(thetas):
        raise ValueError(
            f"there must be one tree of Grams a model: {len(thetas)}, got {len(grams)}"
        )
    flats = [tree.flatten(gram) for gram in grams]
    known = tree.flatten(thetas[0])
    for number, flat in enumerate(flats):
        if set(flat) != set(flats[0]):
            path = sorted(set(flat) ^ set(flats[0]))[0]
            raise ValueError(f"Grams 0 and {number} do not hold the same kernels: {path!r}")
        for path, gram in flat.items():
            if path not in known:
                raise ValueError(f"there is a Gram at {path!r}, where the models have no kernel")
            lead = 1 if tree.is_stacked(path) else 0
            wanted = (*known[path].shape[: lead + 1], known[path].shape[lead])
            if tuple(gram.shape) != wanted:
                raise ValueError(f"the Gram at {path!r} must be {wanted}, got {tuple(gram.shape)}")

    def one(path: str, *leaves: Any) -> Any:
        first = leaves[0]
        if not leafwise.mergeable(first):
            return first
        if path not in flats[0]:
            return (leafwise.total(leaves) / len(leaves)).astype(first.dtype)
        lead = 1 if tree.is_stacked(path) else 0
        layers = first.shape[0] if lead else 1
        width = first.shape[lead]
        kernels = [leaf.reshape(layers, width, -1) for leaf in leaves]
        stack = [flat[path].reshape(layers, width, width) for flat in flats]
        traced = any(isinstance(x, jax.core.Tracer) for x in (*kernels, *stack))
        on_host = precision == "float64" or (precision == "auto" and width > LARGE and not traced)
        solved = (_host if on_host else _device)(stack, kernels, a)
        return jnp.asarray(solved, jnp.float32).reshape(first.shape).astype(first.dtype)

    return tree.map_with_path(one, *thetas)


@jax.jit
def _device(stack: list[jax.Array], kernels: list[jax.Array], a: Any) -> jax.Array:
    eye = jnp.eye(stack[0].shape[-1], dtype=jnp.float32)

    def layer(parts: tuple[list[jax.Array], list[jax.Array]]) -> jax.Array:
        found = [g.astype(jnp.float32) for g in parts[0]]
        shrunk = [g * (a + (1 - a) * eye) for g in found]
        weights = [w.astype(jnp.float32) for w in parts[1]]

        left = leafwise.total(shrunk)
        mean = leafwise.total(weights) / len(weights)
        right = leafwise.total(
            [jnp.matmul(g, w - mean, precision=HIGHEST) for g, w in zip(shrunk, weights)]
        )
        variances = jnp.diagonal(left)
        live = variances >= TINY
        safe = jnp.where(live, variances, 1.0)
        unit = jnp.where(live, jax.lax.rsqrt(safe), 0.0)[:, None]
        whole = left * unit * unit.T + jnp.diag(jnp.where(live, 0.0, 1.0))
        scaled = right * unit

        def solve(factor: jax.Array) -> jax.Array:
            return mean + unit * jax.scipy.linalg.cho_solve((factor, True), scaled)

        # The ridge is no part of the right side: sum_i r (W_i - mean) = 0.
        typical = jnp.exp(jnp.log(safe).sum() / jnp.maximum(live.sum(), 1))
        ridge = RIDGE * jnp.clip(typical / safe, 1 / SPREAD, SPREAD)
        plain = jnp.linalg.cholesky(whole)
        pivots = jnp.square(jnp.diagonal(plain))
        return jax.lax.cond(
            (pivots > SINGULAR).all(),
            lambda: solve(plain),
            lambda: solve(jnp.linalg.cholesky(whole + ridge * eye)),
        )

    return jax.lax.map(layer, (stack, kernels))


def _host(stack: Sequence[Any], kernels: Sequence[Any], a: float) -> np.ndarray:
    from scipy import linalg

    out = np.empty(kernels[0].shape, np.float32)
    width = stack[0].shape[-1]
    diagonal = np.arange(width)
    for number in range(out.shape[0]):
        left = np.zeros((width, width))
        right = np.zeros((width, out.shape[2]))
        weights = [np.asarray(kernel[number], np.float64) for kernel in kernels]
        mean = sum(weights) / len(weights)
        for gram, weight in zip(stack, weights, strict=True):
            shrunk = np.asarray(gram[number], np.float64) * a
            shrunk[diagonal, diagonal] = np.diagonal(np.asarray(gram[number], np.float64))
            left += shrunk
            right += shrunk @ (weight - mean)
        live = left[diagonal, diagonal] >= TINY
        safe = np.where(live, left[diagonal, diagonal], 1.0)
        unit = np.where(live, 1 / np.sqrt(safe), 0.0)[:, None]
        left *= unit
        left *= unit.T
        left[diagonal, diagonal] = 1.0
        try:
            factor = np.linalg.cholesky(left)
            fine = bool((np.square(np.diagonal(factor)) > SINGULAR).all())
        except np.linalg.LinAlgError:
            fine = False
        if not fine:
            typical = np.exp(np.log(safe).sum() / max(live.sum(), 1))
            left[diagonal, diagonal] += RIDGE * np.clip(typical / safe, 1 / SPREAD, SPREAD)
            factor = np.linalg.cholesky(left)
        out[number] = mean + unit * linalg.cho_solve((factor, True), unit * right)
    return out
