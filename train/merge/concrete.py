"""Concrete subspace learning: one random mask, shared by all tasks, in which merging works.

  m ~ sigma((logit(u) + x) / T), u ~ U(0, 1), one number a parameter;  s = m / mean(m), a tensor
  Concrete Task Arithmetic   theta = theta_0 + lambda s * sum_i tau_i;   x <- Adam(x, grad_x H)
  Concrete AdaMerging        theta = theta_0 + s * sum_i lambda_i tau_i, bi-level:
      lambda' = lambda_0 + Adam_base(grad_lambda H(theta(lambda_0, sg(s))))    one step, rate 1
      x <- Adam_meta(x, grad_x H(theta(sg(lambda'), s)))    on new batches, first order
    then x is frozen, ONE mask m* is drawn, and lambda adapts from lambda_0 with a small rate.

H is the entropy of unlabelled answers (``adaptive``). The mask multiplies the sum over tasks, so
no masked copy of a task vector exists; the mean is that of the sampled entries, and the gradient
flows through it; layers that are stacked have a mean each. The mask m* belongs to the merged
model: with another draw it is another model.

The rate of 1 makes Adam's first step +-1 in every coefficient: clipped, the inner problem picks
tasks (a tensor) rather than tunes numbers. Its moments live on, so later steps are smaller;
with ``keep_moments=False`` each is +-1 again.

Tang, Shen, Luo, Ding, Hu, Du, Tao, 2023 (arXiv 2312.06173); code: subspace_fusion and, by the
same author, fusion_bench.

Deviations: the inner gradient is taken at lambda_0, as the bi-level problem says; both codes
take it at the coefficients of the step before (``stale_inner=True``). One mask a step serves the
inner and the outer problem, as in fusion_bench; subspace_fusion draws two (``redraw=True``).
Coefficients count as clipped, as in subspace_fusion (``clip=False`` for fusion_bench).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.models import masks, tree
from steppe.models.masks import rescaled_mask as rescaled_mask
from steppe.train.merge.adaptive import (
    AdaMergingConfig,
    AdaptState,
    EntropyFn,
    Level,
    adamerging,
    checked,
    coefficients,
    merged,
    place,
    settled,
    spread,
)
from steppe.train.merge.guard import Data, Entropy, Guard, Run, Watch, draw, entropy_of, run
from steppe.train.merge.leafwise import check_finite
from steppe.train.mesh import MeshPlan
from steppe.train.types import Params


@dataclass(frozen=True)
class ConcreteConfig:
    """How a mask is learnt; the values of the paper's CLIP runs.

    Attributes:
      steps: updates of the mask.
      temperature: T > 0.
      init: logits at the start; 0 keeps half of the entries.
      lam: merge coefficient, and where coefficients start.
      mask_lr: of Adam on the logits (1e-4 for Flan-T5).
      base_lr: of Adam on the coefficients inside (0.1 for Flan-T5).
      tta_steps, tta_lr: test-time adaptation of the coefficients with the mask frozen.
      clip: coefficients count as clipped to [0, 1].
      stale_inner: the inner gradient is that at the coefficients of the step before.
      redraw: the outer problem has a mask of its own.
      keep_moments: Adam's moments of the inner problem live on; False resets them.
      final: what m* is: "sample", one draw as in the paper; "hard", one draw of zeros and ones
        (fusion_bench's discrete mask); "mean", sigma(x), without noise.
      guard: see ``steppe.train.merge.guard``.
    """

    steps: int = 2000
    temperature: float = 0.5
    init: float = 0.0
    lam: float = 0.3
    mask_lr: float = 1e-3
    base_lr: float = 1.0
    tta_steps: int = 1000
    tta_lr: float = 1e-3
    clip: bool = True
    stale_inner: bool = False
    redraw: bool = False
    keep_moments: bool = True
    final: Literal["sample", "hard", "mean"] = "sample"
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.final not in ("sample", "hard", "mean"):
            raise ValueError(f"final must be 'sample', 'hard' or 'mean', got {self.final!r}")
        for name in ("steps", "tta_steps", "mask_lr", "base_lr", "tta_lr"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("init", "lam"):
            check_finite(name, getattr(self, name))

    def adaptation(self) -> AdaMergingConfig:
        """The test-time adaptation as a run of AdaMerging."""
        return AdaMergingConfig(
            steps=self.tta_steps, lr=self.tta_lr, lam=self.lam, clip=self.clip, guard=self.guard
        )


class MaskState(NamedTuple):
    """Everything that the learning of a mask goes on from.

    Attributes:
      step: int32 scalar; the noise of a step is a function of the key and this number.
      logits: x, float32, shaped and sharded like the leaves of theta_0 that merge.
      opt: Adam's state on the logits, sharded like them.
      lambdas: coefficients of the last step (see ``adaptive.merged``); None without an inner
        problem.
      base: Adam's state on the coefficients; None without.
    """

    step: Any
    logits: Params
    opt: Any
    lambdas: Any = None
    base: Any = None


class ConcreteResult(NamedTuple):
    """A merge inside a learnt subspace.

    Attributes:
      params: the merged trunk.
      mask: m*, the one draw that made it, not divided by its mean; save it with the model.
      lambdas: coefficients as they count: a number, [N], or a tree.
      state: of the mask, to go on from.
      tta: of the test-time adaptation, to go on from; None for Concrete Task Arithmetic.
      runs: how it went, the mask first; the ``notes`` belong into every report.
    """

    params: Params
    mask: Params
    lambdas: Any
    state: MaskState
    tta: AdaptState | None
    runs: tuple[Run, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report has to say."""
        return tuple(note for one in self.runs for note in one.notes)


def mask_init(
    taus: Params,
    cfg: ConcreteConfig,
    level: Level | None = None,
    *,
    plan: MeshPlan | None = None,
) -> MaskState:
    """The state before the first step.

    Args:
      taus: stacked on axis 0; the mask is over the leaves that they have.
      level: kind of coefficients; None for Concrete Task Arithmetic, which learns none.
    """
    logits = jax.tree.map(lambda t: jnp.full(t.shape[1:], cfg.init, jnp.float32), taus)
    lambdas = None if level is None else coefficients(taus, level, cfg.lam)
    base = None if level is None else optax.adam(cfg.base_lr).init(lambdas)
    opt = optax.adam(cfg.mask_lr).init(logits)
    state = MaskState(jnp.zeros((), jnp.int32), logits, opt, lambdas, base)
    return state if plan is None else jax.device_put(state, _shardings(state, plan))


def _shardings(state: MaskState, plan: MeshPlan) -> MaskState:
    def whole(tree_: Any) -> Any:
        return jax.tree.map(lambda _: plan.replicated, tree_)

    return MaskState(
        plan.replicated,
        plan.shardings(state.logits),
        plan.mirror(state.opt, state.logits),
        whole(state.lambdas),
        whole(state.base),
    )


def _pinned(state: MaskState, found: Entropy, plan: MeshPlan | None) -> tuple[MaskState, Entropy]:
    if plan is None:
        return state, found
    where = (_shardings(state, plan), jax.tree.map(lambda _: plan.replicated, found))
    pinned: tuple[MaskState, Entropy] = jax.tree.map(
        jax.lax.with_sharding_constraint, (state, found), where
    )
    return pinned


@functools.partial(jax.jit, static_argnames=("entropy_fn", "cfg", "plan"), donate_argnums=0)
def arithmetic_step(
    state: MaskState,
    batches: Any,
    key: jax.Array,
    *,
    theta0: Params,
    total: Params,
    entropy_fn: EntropyFn,
    cfg: ConcreteConfig,
    plan: MeshPlan | None = None,
) -> tuple[MaskState, Entropy]:
    """One update of the mask of Concrete Task Arithmetic.

    Args:
      batches: one a task.
      key: of the run; the step's number is folded in.
      total: sum_i tau_i with a leading axis of 1: task arithmetic never needs more of them.

    Returns:
      The next state, and the entropies before the update.
    """
    noise = jax.random.fold_in(key, state.step)
    lam = jnp.full(1, cfg.lam, jnp.float32)

    def objective(logits: Params) -> tuple[jax.Array, Entropy]:
        scale = rescaled_mask(noise, logits, cfg.temperature)
        theta = merged(theta0, total, lam, scale=scale, clip=False)
        found = entropy_of(entropy_fn(theta, batches))
        return found.total, found

    (_, found), grads = jax.value_and_grad(objective, has_aux=True)(state.logits)
    updates, opt = optax.adam(cfg.mask_lr).update(grads, state.opt)
    logits = optax.apply_updates(state.logits, updates)
    return _pinned(MaskState(state.step + 1, logits, opt), found, plan)


@functools.partial(jax.jit, static_argnames=("entropy_fn", "cfg", "plan"), donate_argnums=0)
def meta_step(
    state: MaskState,
    batches: tuple[Any, Any],
    key: jax.Array,
    *,
    theta0: Params,
    taus: Params,
    entropy_fn: EntropyFn,
    cfg: ConcreteConfig,
    plan: MeshPlan | None = None,
) -> tuple[MaskState, Entropy]:
    """One update of the mask of Concrete AdaMerging, with its inner step.

    Args:
      batches: (those of the inner problem, new ones for the mask), each one a task.
      key: of the run; the step's number is folded in.

    Returns:
      The next state, and the entropies of the outer problem before the update.
    """
    inner_key, outer_key = jax.random.split(jax.random.fold_in(key, state.step))
    fixed = rescaled_mask(inner_key, jax.lax.stop_gradient(state.logits), cfg.temperature)
    start = jax.tree.map(lambda x: jnp.full(x.shape, cfg.lam, x.dtype), state.lambdas)

    def inner(lambdas: Any) -> jax.Array:
        theta = merged(theta0, taus, lambdas, scale=fixed, clip=cfg.clip)
        return entropy_of(entropy_fn(theta, batches[0])).total

    base_tx = optax.adam(cfg.base_lr)
    grads = jax.grad(inner)(state.lambdas if cfg.stale_inner else start)
    base = state.base if cfg.keep_moments else base_tx.init(start)
    updates, base = base_tx.update(grads, base)
    lambdas = jax.lax.stop_gradient(optax.apply_updates(start, updates))

    def outer(logits: Params) -> tuple[jax.Array, Entropy]:
        scale = rescaled_mask(outer_key if cfg.redraw else inner_key, logits, cfg.temperature)
        theta = merged(theta0, taus, lambdas, scale=scale, clip=cfg.clip)
        found = entropy_of(entropy_fn(theta, batches[1]))
        return found.total, found

    (_, found), grads = jax.value_and_grad(outer, has_aux=True)(state.logits)
    updates, opt = optax.adam(cfg.mask_lr).update(grads, state.opt)
    logits = optax.apply_updates(state.logits, updates)
    return _pinned(MaskState(state.step + 1, logits, opt, lambdas, base), found, plan)


def concrete_task_arithmetic(
    theta0: Params,
    taus: Params,
    entropy_fn: EntropyFn,
    data: Data,
    cfg: ConcreteConfig | None = None,
    key: jax.Array | None = None,
    *,
    state: MaskState | None = None,
    plan: MeshPlan | None = None,
    watch: Watch | None = None,
    names: Sequence[str] | None = None,
) -> ConcreteResult:
    """Task arithmetic inside a learnt subspace.

    Args:
      theta0, taus, entropy_fn, data, plan, watch, names: see ``adaptive.adamerging``; one draw
        a step.
      cfg: default: the paper's.
      key: of all noise; default ``jax.random.key(0)``.
      state: to go on from, with the key of the run and data that continue; its arrays are used
        up.

    Raises:
      ValueError: trees that do not fit, or a value that is not finite in them.
      NonFiniteLoss: the entropy is not finite from the start.
    """
    cfg = ConcreteConfig() if cfg is None else cfg
    learn_key, draw_key = jax.random.split(jax.random.key(0) if key is None else key)
    taus = checked(theta0, taus)
    if plan is not None:
        theta0, taus = place(plan, theta0), place(plan, taus, leading=1)
    total = jax.jit(
        lambda t: jax.tree.map(lambda x: x.astype(jnp.float32).sum(0, keepdims=True), t)
    )(taus)
    step = functools.partial(
        arithmetic_step, theta0=theta0, total=total, entropy_fn=entropy_fn, cfg=cfg, plan=plan
    )
    done = run(
        lambda s, b: settled(step(s, b, learn_key), plan),
        mask_init(taus, cfg, plan=plan) if state is None else state,
        lambda n: spread(draw(data, n), plan),
        begin=0 if state is None else int(state.step),
        steps=cfg.steps,
        guard=cfg.guard,
        phase="concrete task arithmetic",
        watch=watch,
        names=names,
    )
    mask = draw_mask(draw_key, done.state.logits, cfg)
    params = masked_merge(theta0, total, jnp.full(1, cfg.lam, jnp.float32), mask)
    return ConcreteResult(params, mask, cfg.lam, done.state, None, (done,))


def concrete_adamerging(
    theta0: Params,
    taus: Params,
    entropy_fn: EntropyFn,
    data: Data,
    cfg: ConcreteConfig | None = None,
    key: jax.Array | None = None,
    *,
    level: Level = "layer",
    state: MaskState | None = None,
    tta: AdaptState | None = None,
    plan: MeshPlan | None = None,
    watch: Watch | None = None,
    names: Sequence[str] | None = None,
) -> ConcreteResult:
    """AdaMerging inside a learnt subspace: the mask first, then the coefficients.

    Args:
      theta0, taus, entropy_fn, plan, watch, names: see ``adaptive.adamerging``.
      data: draws 2 n and 2 n + 1 for step n of the mask, 2 ``cfg.steps`` + n for step n of the
        test-time adaptation.
      cfg, key: see :func:`concrete_task_arithmetic`.
      level: "layer" (a coefficient a task and tensor) or "task".
      state, tta: to go on from; ``tta`` with a ``state`` whose steps are done.

    Raises:
      ValueError: trees that do not fit, a value that is not finite in them, or a level that is
        neither.
      NonFiniteLoss: the entropy is not finite from the start.
    """
    cfg = ConcreteConfig() if cfg is None else cfg
    learn_key, draw_key = jax.random.split(jax.random.key(0) if key is None else key)
    taus = checked(theta0, taus)
    if plan is not None:
        theta0, taus = place(plan, theta0), place(plan, taus, leading=1)
    if state is None:
        state = mask_init(taus, cfg, level, plan=plan)
    step = functools.partial(
        meta_step, theta0=theta0, taus=taus, entropy_fn=entropy_fn, cfg=cfg, plan=plan
    )
    learnt = run(
        lambda s, b: settled(step(s, b, learn_key), plan),
        state,
        lambda n: tuple(spread(draw(data, 2 * n + part), plan) for part in (0, 1)),
        begin=int(state.step),
        steps=cfg.steps,
        guard=cfg.guard,
        phase="concrete mask",
        watch=watch,
        names=names,
    )
    mask = draw_mask(draw_key, learnt.state.logits, cfg)
    adapted = adamerging(
        theta0,
        taus,
        entropy_fn,
        data,
        level,
        cfg.adaptation(),
        scale=jax.jit(masks.rescale)(mask),
        state=tta,
        plan=plan,
        watch=watch,
        phase="concrete adaptation",
        begin=2 * cfg.steps,
        names=names,
    )
    runs = (learnt, adapted.run)
    return ConcreteResult(adapted.params, mask, adapted.lambdas, learnt.state, adapted.state, runs)


@functools.partial(jax.jit, static_argnames="cfg")
def draw_mask(key: jax.Array, logits: Params, cfg: ConcreteConfig) -> Params:
    """m*: one draw (see ``cfg.final``), the same for the same key on every mesh."""
    if cfg.final == "mean":
        return jax.tree.map(jax.nn.sigmoid, logits)
    return masks.concrete_mask(key, logits, cfg.temperature, hard=cfg.final == "hard")


@jax.jit
def masked_merge(theta0: Params, taus: Params, lambdas: Any, mask: Params) -> Params:
    """theta_0 + (m / mean(m)) * sum_i lambda_i tau_i: the merged trunk, from what is saved.

    Args:
      taus: stacked on axis 0.
      lambdas: [N], or a tree of [N] and [N, L].
      mask: m*, not divided by its mean.
    """
    return merged(theta0, taus, lambdas, scale=masks.rescale(mask), clip=False)


def mask_rates(logits: Params) -> dict[str, float]:
    """Mean of sigma(x) of every tensor (layer l of a stack is ``layers.l/...``), for reports.

    Below 1/2 a tensor has learnt to drop entries; what is left of it is scaled up.
    """
    rates = jax.jit(lambda t: tree.map_tensors(lambda x: jax.nn.sigmoid(x).mean(), t))(logits)
    found: dict[str, float] = {}
    for name, leaf in tree.tensors(jax.device_get(rates)):
        found[name] = float(leaf)
    return found
