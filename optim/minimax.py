"""Two players on one objective: min over x, max over y of f(x, y), one pure step at a time.

  SAM-SGA         g = grad_x f(x, y; z);  e = rho g / |g|
                  x <- x - eta_x grad_x f(x + e, y; z)         K times, z new each time
                  y <- y + eta_y grad_y f(x, y; z')            at the new x
  SGD-SGA         the same with rho = 0
  descent-ascent  both players move from the same point, on the same z
  extragradient   x' = x - eta_x grad_x f(x, y),  y' = y + eta_y grad_y f(x, y);
                  then both step from (x, y) by the gradients at (x', y')

x and y are trees, f(x, y, key) gives a scalar (or a scalar and a dict of scalars to log), and the
optimisers are any optax transforms: that of y is handed the gradient of -f. K steps of x are one
``lax.scan``, so that a jitted step is one program whatever K is. With f of the form ``Game``,
what does not depend on x (a generated batch, a teacher's answers) is computed once for both
gradients of SAM, and no gradient of x can reach it.

For f that is L-smooth in both and whose -f(x, .) satisfies the PL condition, steps of order
1/sqrt(T) with eta_x well below eta_y bring grad Phi, Phi(x) = max_y f(x, y), to 0 (two time
scales). Plain descent-ascent turns away from the saddle of a bilinear game; extragradient
reaches it.

Zhu et al., EMNLP 2023 (arXiv 2310.13315) for SAM-SGA; Korpelevich 1976 for the extragradient;
Yang, Kiyavash, He, NeurIPS 2020 (2002.09621) for alternating steps under PL.

Deviations: the paper's code is not public. The order (x, then y at the new x) and that both
gradients of SAM share z are as its text has been summarised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from steppe.optim import check
from steppe.optim.check import Radius
from steppe.optim.perturbation import Perturbation, global_norm
from steppe.optim.sam import sam

Metrics: TypeAlias = dict[str, jax.Array]
# A scalar, or (scalar, {name: scalar}).
Value: TypeAlias = Any
Project: TypeAlias = Callable[[Any], Any]


class Game(NamedTuple):
    """f(x, y, key) = value(x, prepare(y, key)).

    Attributes:
      prepare: ``(y, key) -> made``, everything that does not depend on x.
      value: ``(x, made) -> f``, or ``(f, {name: scalar})``.
    """

    prepare: Callable[[Any, jax.Array], Any]
    value: Callable[[Any, Any], Value]


# (x, y, key) -> f, or a Game.
Objective: TypeAlias = Callable[[Any, Any, jax.Array], Value] | Game


class MinimaxState(NamedTuple):
    """State of both players.

    Attributes:
      step: int32 scalar, iterations done.
      min, max: the optimisers' states.
    """

    step: jax.Array
    min: optax.OptState
    max: optax.OptState


class Minimax(NamedTuple):
    """An algorithm for two players.

    Attributes:
      init: ``(x, y) -> MinimaxState``.
      step: ``(state, x, y, f, key) -> (x, y, state, metrics)``, one iteration, pure. Metrics are
        float32 scalars: ``f`` (mean over the steps of x, before each), ``f_max`` (before the
        last step of y), the norms ``min_norm`` and ``max_norm`` of the gradients, and what f
        logs of itself (mean over the steps of x).
    """

    init: Callable[[Any, Any], MinimaxState]
    step: Callable[[MinimaxState, Any, Any, Objective, jax.Array], tuple[Any, Any, Any, Metrics]]


def sam_sga(
    min_tx: optax.GradientTransformation,
    max_tx: optax.GradientTransformation,
    rho: Radius = 0.05,
    k_min: int = 1,
    *,
    k_max: int = 1,
    perturbation: Perturbation | None = None,
    project_min: Project | None = None,
    project_max: Project | None = None,
) -> Minimax:
    """Sharpness-aware descent of x, stochastic gradient ascent of y.

    Args:
      min_tx: optimiser of x; it gets the gradient at x + e.
      max_tx: optimiser of y; it gets the gradient of -f.
      rho: radius of the ball around x, a number >= 0 or a schedule over the steps of x; 0 is
        SGD-SGA without a second gradient. y is not perturbed.
      k_min, k_max: steps of x, then of y, an iteration; k_max = 0 freezes y.
      perturbation: see :func:`steppe.optim.sam`.
      project_min, project_max: what is applied to x or y after each of its steps, such as the
        projection on a ball or a simplex.

    Raises:
      ValueError: rho, k_min or k_max out of range. TypeError: an optimiser or a projection that
        is none.
    """
    return alternating(
        sam(_transform(min_tx, "min_tx"), rho, perturbation=perturbation),
        max_tx,
        k_min,
        k_max=k_max,
        project_min=project_min,
        project_max=project_max,
    )


def alternating(
    min_tx: optax.GradientTransformation,
    max_tx: optax.GradientTransformation,
    k_min: int = 1,
    *,
    k_max: int = 1,
    project_min: Project | None = None,
    project_max: Project | None = None,
) -> Minimax:
    """k_min steps of x, then k_max steps of y at the new x; each step draws a key of its own.

    Either optimiser may ask for the gradient elsewhere (``grad_fn=``), as those of this room do.

    Args:
      min_tx, max_tx, k_min, k_max, project_min, project_max: see :func:`sam_sga`.

    Raises:
      ValueError, TypeError: as :func:`sam_sga`.
    """
    min_tx, max_tx = _transform(min_tx, "min_tx"), _transform(max_tx, "max_tx")
    _steps(k_min, "k_min", 1)
    _steps(k_max, "k_max", 0)
    keep_x, keep_y = _project(project_min, "project_min"), _project(project_max, "project_max")

    def step(
        state: MinimaxState, x: Any, y: Any, f: Objective, key: jax.Array
    ) -> tuple[Any, Any, MinimaxState, Metrics]:
        game = _game(f)

        def descend(carry: Any, key: jax.Array) -> tuple[Any, Metrics]:
            x, opt = carry
            # Constants: neither gradient of x may flow into y.
            made = jax.lax.stop_gradient(game.prepare(y, key))
            loss = functools.partial(_value, game.value, made)
            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(x)
            x, opt = _moved(min_tx, keep_x, x, opt, grads, loss, value)
            return (x, opt), {"f": value, "min_norm": global_norm(grads), **aux}

        def ascend(carry: Any, key: jax.Array) -> tuple[Any, Metrics]:
            y, opt = carry

            def loss(y: Any) -> tuple[jax.Array, Metrics]:
                value, aux = _value(game.value, game.prepare(y, key), x)
                return -value, aux

            (value, _), grads = jax.value_and_grad(loss, has_aux=True)(y)
            y, opt = _moved(max_tx, keep_y, y, opt, grads, loss, value)
            return (y, opt), {"f_max": -value, "max_norm": global_norm(grads)}

        keys = jax.random.split(key, k_min + k_max)
        (x, low), rows = jax.lax.scan(descend, (x, state.min), keys[:k_min])
        metrics = {name: value.mean() for name, value in rows.items()}
        high = state.max
        if k_max:
            (y, high), last = jax.lax.scan(ascend, (y, state.max), keys[k_min:])
            metrics.update({name: value[-1] for name, value in last.items()})
        return x, y, MinimaxState(optax.safe_increment(state.step), low, high), metrics

    return Minimax(_init(min_tx, max_tx), step)


def descent_ascent(
    min_tx: optax.GradientTransformation,
    max_tx: optax.GradientTransformation,
    *,
    project_min: Project | None = None,
    project_max: Project | None = None,
) -> Minimax:
    """Both players step from the same point, on the same key (simultaneous descent-ascent).

    Raises:
      TypeError: an optimiser or a projection that is none.
    """
    return _together(min_tx, max_tx, project_min, project_max, extra=False)


def extragradient(
    min_tx: optax.GradientTransformation,
    max_tx: optax.GradientTransformation,
    *,
    project_min: Project | None = None,
    project_max: Project | None = None,
) -> Minimax:
    """Both players step by the gradients that they would meet after one step; twice the cost.

    The step ahead is the optimisers' own, at their present state, which only the second one
    advances; both see the same key.

    Raises:
      TypeError: an optimiser or a projection that is none.
    """
    return _together(min_tx, max_tx, project_min, project_max, extra=True)


def run(
    algorithm: Minimax, f: Objective, x: Any, y: Any, key: jax.Array, steps: int
) -> tuple[Any, Any, MinimaxState, Metrics]:
    """``steps`` iterations as one scan: (x, y, state, metrics [steps]). Jit it."""

    def body(carry: Any, key: jax.Array) -> tuple[Any, Metrics]:
        x, y, state = carry
        x, y, state, metrics = algorithm.step(state, x, y, f, key)
        return (x, y, state), metrics

    start = (x, y, algorithm.init(x, y))
    (x, y, state), metrics = jax.lax.scan(body, start, jax.random.split(key, steps))
    return x, y, state, metrics


def _together(
    min_tx: Any, max_tx: Any, project_min: Any, project_max: Any, *, extra: bool
) -> Minimax:
    min_tx, max_tx = _transform(min_tx, "min_tx"), _transform(max_tx, "max_tx")
    keep_x, keep_y = _project(project_min, "project_min"), _project(project_max, "project_max")

    def step(
        state: MinimaxState, x: Any, y: Any, f: Objective, key: jax.Array
    ) -> tuple[Any, Any, MinimaxState, Metrics]:
        game = _game(f)

        def loss(both: Any) -> tuple[jax.Array, Metrics]:
            return _value(game.value, game.prepare(both[1], key), both[0])

        def slopes(x: Any, y: Any) -> Any:
            (value, aux), (low, high) = jax.value_and_grad(loss, has_aux=True)((x, y))
            return value, aux, low, jax.tree.map(jnp.negative, high)

        def moved(low: Any, high: Any, value: jax.Array) -> Any:
            down, a = min_tx.update(low, state.min, x, value=value)
            up, b = max_tx.update(high, state.max, y, value=-value)
            new = keep_x(optax.apply_updates(x, down)), keep_y(optax.apply_updates(y, up))
            return new, MinimaxState(optax.safe_increment(state.step), a, b)

        value, aux, low, high = slopes(x, y)
        norms = {"min_norm": global_norm(low), "max_norm": global_norm(high)}
        if extra:
            ahead, _ = moved(low, high, value)
            at, _, low, high = slopes(*ahead)
            (x, y), state = moved(low, high, at)
        else:
            (x, y), state = moved(low, high, value)
        return x, y, state, {"f": value, "f_max": value, **norms, **aux}

    return Minimax(_init(min_tx, max_tx), step)


def _init(min_tx: Any, max_tx: Any) -> Callable[[Any, Any], MinimaxState]:
    def init(x: Any, y: Any) -> MinimaxState:
        return MinimaxState(jnp.zeros((), jnp.int32), min_tx.init(x), max_tx.init(y))

    return init


def _moved(
    tx: Any, keep: Project, w: Any, opt: Any, grads: Any, loss: Callable[[Any], Any], value: Any
) -> tuple[Any, Any]:
    def grad_fn(there: Any) -> Any:
        return jax.grad(loss, has_aux=True)(there)[0]

    updates, opt = tx.update(grads, opt, w, grad_fn=grad_fn, value=value)
    return keep(optax.apply_updates(w, updates)), opt


def _value(fn: Callable[[Any, Any], Value], made: Any, x: Any) -> tuple[jax.Array, Metrics]:
    """(f, what it logs), float32."""
    found = fn(x, made)
    value, aux = found if isinstance(found, tuple) else (found, {})
    if jnp.shape(value):
        raise ValueError(f"f must give a scalar, got shape {jnp.shape(value)}")
    logged = {name: jax.lax.stop_gradient(jnp.float32(v)) for name, v in aux.items()}
    return jnp.asarray(value, jnp.float32), logged


def _game(f: Objective) -> Game:
    if isinstance(f, Game):
        return f
    if not callable(f):
        raise TypeError(
            f"f must be a function (x, y, key) -> scalar, or a Game, got {type(f).__name__}"
        )
    return Game(lambda y, key: (y, key), lambda x, made: f(x, *made))


def _transform(tx: Any, name: str) -> optax.GradientTransformationExtraArgs:
    try:
        return check.base(tx)
    except TypeError as error:
        raise TypeError(str(error).replace("base", name, 1)) from None


def _steps(value: Any, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")


def _project(fn: Project | None, name: str) -> Project:
    check.function(fn, name, "tree -> tree")
    return (lambda w: w) if fn is None else fn
