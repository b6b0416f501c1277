"""Checks of what the transforms of this room are given; every error says what to pass instead."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

GradFn: TypeAlias = Callable[[Any], Any]
# A number, a schedule (step -> number), or an array that ``inject_hyperparams`` fills in.
Radius: TypeAlias = Any
RADIUS = "a finite number >= 0 or a schedule"


def number(
    value: Any,
    name: str,
    wanted: str,
    fits: Callable[[float], bool],
    *,
    array: bool = False,
    shown: str = "",
) -> None:
    """Refuses what is not a number that fits; a traced one is only known later.

    Args:
      wanted: what it must be, for the message.
      fits: whether a number will do; NaN and infinity are asked too.
      array: whether ``optax.inject_hyperparams`` may fill it in; if not, programs depend on it.
      shown: added to the message, such as where the number is from.

    Raises:
      ValueError: it is none, does not fit, or is an array that it must not be.
    """
    if isinstance(value, jax.Array) and not array:
        raise ValueError(
            f"{name} must be a Python number, which the program depends on, got an array: with "
            f"optax.inject_hyperparams pass static_args=({name!r},)"
        )
    scalar = np.ndim(value) == 0 if isinstance(value, (jax.Array, np.ndarray)) else True
    if not scalar:
        raise ValueError(f"{name} must be {wanted}, got an array of shape {value.shape}")
    if isinstance(value, jax.core.Tracer):
        return
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if isinstance(value, (jax.Array, np.ndarray)):
        real = value.dtype.kind in "iuf" or jnp.issubdtype(value.dtype, jnp.floating)
    if not real or not fits(float(value)):
        raise ValueError(f"{name} must be {wanted}, got {value!r}{shown}")


def within(low: float, high: float = float("inf")) -> Callable[[float], bool]:
    """Whether a finite number lies in [low, high]."""
    return lambda value: low <= value <= high and abs(value) < float("inf")


def share(value: float) -> bool:
    """Whether a number lies in (0, 1]."""
    return 0 < value <= 1


def whole(value: float) -> bool:
    """Whether it is a whole number >= 1."""
    return value >= 1 and value % 1 == 0


def flag(value: Any, name: str) -> None:
    """Refuses what is not True or False.

    Raises:
      ValueError: it is something else, or an array.
    """
    if isinstance(value, jax.Array):
        number(value, name, "", whole)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def radius(rho: Radius) -> None:
    """Checks rho, of a schedule its value at step 0; what is traced is only known later.

    Raises:
      ValueError: it is negative, NaN, infinite or no number; a schedule that gives no scalar.
    """
    if not callable(rho):
        number(rho, "rho", RADIUS, within(0), array=True)
        return
    first = rho(jnp.zeros((), jnp.int32))
    if np.shape(first):
        raise ValueError(f"rho's schedule must give a scalar, got shape {np.shape(first)}")
    number(first, "rho", RADIUS, within(0), array=True, shown=" at step 0")


def base(transform: Any) -> optax.GradientTransformationExtraArgs:
    """The base of a transform as one that takes extra arguments.

    Raises:
      TypeError: it has no ``init`` and ``update``.
    """
    if not all(callable(getattr(transform, name, None)) for name in ("init", "update")):
        raise TypeError(
            "base must be an optax transform such as optax.adamw(1e-4), got "
            f"{type(transform).__name__}"
        )
    return optax.with_extra_args_support(transform)


def function(value: Any, name: str, form: str) -> None:
    """Refuses what is not a function, or None.

    Raises:
      TypeError: it cannot be called.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function {form}, got {type(value).__name__}")


def groups(ascent: Any) -> None:
    """Checks what ``sam`` takes as ``ascent``.

    Raises:
      ValueError: it is neither "global" nor "device" nor a whole number >= 1.
    """
    if isinstance(ascent, jax.Array):
        number(ascent, "ascent", "", whole)
    count = isinstance(ascent, int) and not isinstance(ascent, bool) and ascent >= 1
    if not count and not (isinstance(ascent, str) and ascent in ("global", "device")):
        raise ValueError(
            f"ascent must be 'global', 'device' or a number of rows >= 1, got {ascent!r}"
        )


def group_fn(given: Any, groups: str | int, ascent: Any) -> None:
    """Checks what ``update`` of a transform with groups was given.

    Raises:
      ValueError: no ``group_fn``, or a direction of the whole batch beside groups.
    """
    if given is None:
        raise ValueError(
            f"ascent={groups!r} needs group_fn, a function (params, displaced, ascent) -> gradient "
            "over groups of rows: pass tx.update(..., group_fn=...); train.step.make does so"
        )
    if ascent is not None:
        raise ValueError(
            f"ascent={groups!r} takes its directions from groups of rows: leave out ascent= of "
            "train.step.make, or use ascent='global' in the transform"
        )


def no_ascent(ascent: Any, name: str) -> None:
    """Refuses a cheaper first gradient.

    Raises:
      ValueError: there is one.
    """
    if ascent is not None:
        raise ValueError(
            f"{name} compares the gradients at both points, which must be of the same rows and "
            "leaves: leave out ascent= of train.step.make, or use sam, asam, fsam or esam"
        )


def grad_fn(given: Any, params: Any) -> GradFn:
    """``grad_fn``, which every update of a two-gradient transform needs.

    Returns:
      It, with its result checked.

    Raises:
      ValueError: it, or params, was not passed to ``update``.
      TypeError: it is no function; when it is called, its result is no tree like params.
    """
    if params is None:
        raise ValueError("update needs params: pass tx.update(grads, state, params, grad_fn=...)")
    if given is None:
        raise ValueError(
            "update needs grad_fn, a function params -> gradient on the same batch: pass "
            "tx.update(grads, state, params, grad_fn=...); train.step.make does so. "
            "optax.MultiSteps around this transform loses it: use train.step.make(microbatches=k), "
            "or put MultiSteps inside, sam(optax.MultiSteps(base, k))"
        )
    function(given, "grad_fn", "params -> gradient")
    form: Any = jax.tree.structure(params)

    def checked(there: Any) -> Any:
        found = given(there)
        if jax.tree.structure(found) != form:
            raise TypeError(
                "grad_fn must return the gradient alone, a tree like params, got "
                f"{jax.tree.structure(found)}; of jax.value_and_grad take the second part"
            )
        return found

    return checked


def state(given: Any, kind: type, name: str) -> None:
    """Refuses the state of another transform.

    Raises:
      TypeError: it is not of ``kind``.
    """
    if type(given).__name__ != kind.__name__ or not hasattr(given, "_fields"):
        raise TypeError(
            f"the state is of another transform: {name} needs {kind.__name__}, got "
            f"{type(given).__name__}; start from tx.init(params)"
        )
