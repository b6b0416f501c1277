"""FSAM: sharpness-aware minimisation that perturbs only the parameters with the largest Fisher
information.

  every ``refresh_every`` steps  F = diagonal Fisher;  m = global top-k mask of F
  every step                     e = m * rho * g / (|g| + delta);  base gets dL(w + e) at w

The norm is that of the whole gradient, before masking, and e is not scaled up again, so that
|e| <= rho with equality for a mask of ones.

Zhong, Ding, Shen, Mi, Liu, Du, Tao, Findings of EMNLP 2022, arXiv 2210.05497.

Deviations: the published code leaves biases and embeddings out of the mask and gives them the
whole perturbation (``exclude=..., excluded_mode="full"``), and perturbs with zeros in the steps
that refresh the mask (``plain_refresh=True``); the paper, which is followed by default, does
neither. Entries that tie at the threshold are all perturbed, and so are those whose square
underflows to 0 where the share reaches down to them. With a first gradient that is cut
(``steppe.train.ascent``) the share is that of the part above the cut, and so is the norm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from steppe.models.tree import path_of
from steppe.optim import check
from steppe.optim import fisher as fisher_
from steppe.optim import structure as structure_
from steppe.optim.check import Radius
from steppe.optim.perturbation import Perturbation, displace, l2
from steppe.optim.sam import First, Groups, at_radius, static_zero, two_gradients, typed_as

# "element", "tensor" (whole tensors, one a layer), "layer", ("head", heads) or ("head", heads,
# kv_heads), or (N, M): N of every M neighbours.
Structure: TypeAlias = str | tuple[str, int] | tuple[str, int, int] | tuple[int, int]
WHOLE = ("element", "tensor", "layer")


class FsamState(NamedTuple):
    """State of :func:`fsam`.

    Attributes:
      steps: int32 scalar, updates done.
      base: the base optimiser's state.
      mask: bool tree, True where the perturbation acts; sharded and saved like the parameters.
      age: int32 scalar, updates since the mask was made; -1 before the first one.
    """

    steps: jax.Array
    base: optax.OptState
    mask: Any
    age: jax.Array


def fsam(
    base: optax.GradientTransformation,
    rho: Radius = 0.05,
    *,
    keep_ratio: float = 0.1,
    refresh_every: int = 100,
    fisher: Literal["batch", "per_sample"] = "batch",
    structure: Structure = "element",
    exclude: Sequence[str] = (),
    excluded_mode: Literal["zero", "full"] = "zero",
    perturbation: Perturbation | None = None,
    plain_refresh: bool = False,
    ascent: Groups = "global",
) -> optax.GradientTransformationExtraArgs:
    """FSAM around any optax optimiser.

    Args:
      base: what turns the second gradient into an update.
      rho: radius of the ball, >= 0: a number, a schedule, or an injected array. With
        ``optax.inject_hyperparams`` keep_ratio and plain_refresh are ``static_args``.
      keep_ratio: share of the candidate entries that is perturbed; 0 is the base optimiser,
        1 is SAM. Tune rho with it: the perturbation shrinks with the share.
      refresh_every: updates that a mask serves.
      fisher: "batch" = square of the gradient at hand, at no cost; "per_sample" = mean of the
        squared gradients of the batch's examples, from ``fisher_fn(params)``, which
        ``train.step.make`` passes to ``update``.
      structure: "element"; "tensor" = whole tensors, by the mean of their scores; "layer" =
        whole layers; ("head", heads) or ("head", heads, kv_heads) = whole attention heads and
        other tensors, see ``optim.structure``; (N, M) = the N largest of every M neighbours,
        where keep_ratio is N / M whatever it is set to.
      exclude: regular expressions on paths of leaves that are no candidates.
      excluded_mode: "zero" = those are not perturbed, "full" = they are, wholly.
      perturbation: of all entries before masking; default SAM's, see ``perturbation``.
      plain_refresh: steps that refresh the mask are steps of the base optimiser.
      ascent: whose gradient is climbed by, see :func:`steppe.optim.sam`; the mask is one for all
        groups, by the gradient of the whole batch, which is then a third one where it is made.

    Raises:
      ValueError: an argument outside its range; from ``init``, an exclude pattern that matches
        nothing; from ``update``, no ``grad_fn``, or params of another structure than the mask's.
      TypeError: base is not an optax transform.

    Example:
      >>> loss = lambda params: jnp.sum(params["w"] ** 2)
      >>> params = {"w": jnp.array([3.0, 4.0])}
      >>> tx = fsam(optax.sgd(0.1), rho=0.05, keep_ratio=0.5)
      >>> gradient = jax.grad(loss)
      >>> updates, _ = tx.update(gradient(params), tx.init(params), params, grad_fn=gradient)
      >>> [round(float(u), 3) for u in updates["w"]]  # the entry of the smaller score stays
      [-0.6, -0.808]
    """
    _check(keep_ratio, refresh_every, fisher, structure, excluded_mode)
    check.flag(plain_refresh, "plain_refresh")
    check.function(perturbation, "perturbation", "(g, w, rho) -> e")
    check.radius(rho)
    check.groups(ascent)
    groups = ascent
    base = check.base(base)
    perturb = perturbation or l2()
    whole = structure in WHOLE or structure[0] == "head"
    exclude = _patterns(exclude)
    if excluded_mode == "full" and not exclude:
        raise ValueError(
            "excluded_mode='full' perturbs what exclude names, and exclude is empty: give "
            "exclude, or leave excluded_mode='zero'"
        )
    if whole and keep_ratio == 1 and not exclude and not plain_refresh:
        return two_gradients(base, rho, perturb, lambda g, sharp: sharp, groups)
    off = (whole and keep_ratio == 0 and (not exclude or excluded_mode == "zero")) or static_zero(
        rho
    )

    def make_mask(scores: Any, live: Any) -> Any:
        chosen = fisher_.candidates(scores, exclude)
        excluded = excluded_mode == "full"
        ratio = keep_ratio
        if live is not None:
            ratio = _share(keep_ratio, scores, chosen, live, entries=structure == "element")
            scores = jax.tree.map(lambda s, on: jnp.where(on, s, 0.0), scores, live)
        if structure == "element":
            return fisher_.elementwise(scores, ratio, chosen, excluded)
        if structure == "tensor":
            return structure_.tensorwise(scores, ratio, chosen, excluded)
        if structure == "layer":
            return structure_.layerwise(scores, ratio, chosen, excluded)
        if structure[0] == "head":
            heads, *kv = (int(n) for n in structure[1:])
            return structure_.headwise(
                scores, ratio, heads, chosen, excluded, kv_heads=kv[0] if kv else None
            )
        return fisher_.n_of_m(scores, int(structure[0]), int(structure[1]), chosen, excluded)

    def init(params: Any) -> FsamState:
        chosen = fisher_.candidates(params, exclude)
        if not whole:
            fisher_.check_neighbours(params, int(structure[1]), chosen)
        mask = jax.tree.map(lambda w: jnp.zeros(w.shape, bool), params)
        return FsamState(jnp.zeros((), jnp.int32), base.init(params), mask, jnp.int32(-1))

    def update(
        grads: Any,
        state: FsamState,
        params: Any = None,
        *,
        grad_fn: Any = None,
        fisher_fn: Any = None,
        group_fn: Any = None,
        ascent: Any = None,
        **extra: Any,
    ) -> tuple[Any, FsamState]:
        check.state(state, FsamState, "fsam")
        first = First.of(grads, check.grad_fn(grad_fn, params), params, ascent)
        extra |= {"grad_fn": grad_fn, "group_fn": group_fn}
        if off:
            updates, inner = base.update(grads, state.base, params, **extra)
            return updates, state._replace(steps=optax.safe_increment(state.steps), base=inner)
        _check_mask(state.mask, params)
        if fisher == "per_sample" and fisher_fn is None:
            raise ValueError(
                "fisher='per_sample' needs fisher_fn, a function params -> mean squared gradient "
                "of the examples: pass tx.update(..., fisher_fn=...); train.step.make does so"
            )
        if groups != "global":
            check.group_fn(group_fn, groups, ascent)
        due = (state.age < 0) | (state.age >= refresh_every)

        def refresh(_: None) -> tuple[Any, jax.Array]:
            if fisher == "batch":
                # With groups nobody else needs the gradient of the batch: it is taken here alone.
                g = first.direction if groups == "global" else first.grad_fn(params)
                scores = fisher_.square(g)
            else:
                scores = fisher_fn(params)
            # A gradient that is not a number says nothing: keep the mask, try again next time.
            good = jnp.array([jnp.isfinite(s).all() for s in jax.tree.leaves(scores)]).all()
            made = make_mask(scores, first.live)
            mask = jax.tree.map(lambda new, old: jnp.where(good, new, old), made, state.mask)
            return mask, jnp.where(good, 0, state.age)

        mask, age = jax.lax.cond(due, refresh, lambda _: (state.mask, state.age), None)

        def climb(radius: Any) -> Any:
            def displaced(w: Any, g: Any) -> Any:
                step = jax.tree.map(lambda e, m: jnp.where(m, e, 0.0), perturb(g, w, radius), mask)
                return displace(w, step)

            if groups != "global":
                return group_fn(params, displaced, groups)
            return first.grad_fn(displaced(params, first.direction))

        if plain_refresh:
            kinds = jax.eval_shape(first.plain)

            def sharp(_: None) -> Any:
                return typed_as(at_radius(climb, first.plain, rho, state.steps), kinds)

            final = jax.lax.cond(due, lambda _: first.plain(), sharp, None)
        else:
            final = at_radius(climb, first.plain, rho, state.steps)
        updates, inner = base.update(final, state.base, params, **extra)
        age = jnp.where(age < 0, age, age + 1)
        return updates, FsamState(optax.safe_increment(state.steps), inner, mask, age)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(
    keep_ratio: float, refresh_every: int, fisher: str, structure: Structure, excluded_mode: str
) -> None:
    check.number(keep_ratio, "keep_ratio", "in [0, 1]", check.within(0, 1))
    wanted = "a whole number of updates >= 1"
    check.number(refresh_every, "refresh_every", wanted, check.whole, array=True)
    if fisher not in ("batch", "per_sample"):
        raise ValueError(f"fisher must be 'batch' or 'per_sample', got {fisher!r}")
    if excluded_mode not in ("zero", "full"):
        raise ValueError(f"excluded_mode must be 'zero' or 'full', got {excluded_mode!r}")
    if structure in WHOLE:
        return
    parts: tuple[Any, ...] = structure if isinstance(structure, tuple) else ()
    heads = len(parts) in (2, 3) and parts[0] == "head"
    numbers = parts[1:] if heads else parts
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    if whole and (heads or (len(numbers) == 2 and numbers[0] <= numbers[1])):
        return
    raise ValueError(
        "structure must be 'element', 'tensor', 'layer', ('head', heads), ('head', heads, "
        f"kv_heads) or (N, M) with 0 < N <= M, got {structure!r}"
    )


def _patterns(exclude: Any) -> tuple[str, ...]:
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    try:
        patterns = tuple(exclude)
        for pattern in patterns:
            re.compile(pattern)
    except (TypeError, re.error) as error:
        raise ValueError(
            f"exclude must be regular expressions on paths, such as ('embed/.*',), got {exclude!r}"
        ) from error
    return patterns


def _share(keep_ratio: float, scores: Any, chosen: Any, live: Any, *, entries: bool) -> float:
    """The share of all candidates that is ``keep_ratio`` of those that may be perturbed."""
    total = there = 0
    for leaf, flag, on in zip(*map(jax.tree.leaves, (scores, chosen, live)), strict=True):
        if flag:
            total += leaf.size
            there += int(on.sum()) * (leaf.size // on.size)
    if not entries:
        return keep_ratio * there / total
    # The half keeps int(share * total) from losing one to rounding.
    return min(1.0, (fisher_.keep_count(keep_ratio, there) + 0.5) / total)


def _check_mask(mask: Any, params: Any) -> None:
    """A mask that was made for other parameters would be applied to the wrong entries."""
    ours = jax.tree_util.tree_flatten_with_path(mask)[0]
    theirs = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    for keys, leaf in ours:
        other = theirs.pop(keys, None)
        if other is None or other.shape != leaf.shape:
            got = "is not among the parameters" if other is None else f"is {other.shape} there"
            raise ValueError(
                f"the mask in the state is of other parameters: {path_of(keys)!r} "
                f"{leaf.shape} {got}; start from tx.init(params)"
            )
    if theirs:
        first = path_of(next(iter(theirs)))
        raise ValueError(
            f"the mask in the state is of other parameters: it lacks {first!r}; start from "
            "tx.init(params)"
        )
