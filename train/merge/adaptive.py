"""AdaMerging: merge coefficients that minimise the entropy of the merged model's answers.

  theta^l = theta_0^l + sum_i clip(lambda_i^l, 0, 1) tau_i^l          l a tensor, i a task
  H(theta) = sum_i mean_{x in batch_i} entropy(softmax(h_i(f_theta(x))))       nats, no labels
  lambda  <- Adam(lambda, grad_lambda H)

"layer" has one coefficient a task and tensor (each weight and each bias; a leaf of stacked
layers is one tensor a layer), "task" one a task. AdaMerging++ learns them for the task vectors
that TIES has trimmed and rid of disagreeing signs, which ``ties=0.2`` does. Heads h_i are no
part of the merge: they stay frozen with their task. Where the adaptation sees the test inputs,
the result is transductive: say so, and evaluate on others too.

Yang et al., ICLR 2024 (arXiv 2310.02575).

Deviations: entropies from log_softmax, as in the code of subspace_fusion; fusion_bench adds
1e-8 inside the logarithm and does not clip (``clip=False``). Answers that collapse to one
class are noticed, see ``guard``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from steppe.models import tree
from steppe.models.model import Batch, Model
from steppe.train.merge.guard import Data, Entropy, Guard, Run, Watch, draw, entropy_of, run
from steppe.train.merge.leafwise import check_finite, mergeable, tasks
from steppe.train.mesh import MeshPlan
from steppe.train.types import Params

Level = Literal["task", "layer"]
# (merged trunk, one batch a task) -> scalar in nats, or an Entropy
EntropyFn: TypeAlias = Callable[[Params, Any], Any]


# The objective -------------------------------------------------------------------------------


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of softmax(logits) along the last axis, nats, float32. Logits of -inf count 0."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -(jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), log_p, 0.0)).sum(-1)


def entropies(
    models: Model | Sequence[Model],
    heads: Sequence[Mapping[str, Any]],
    *,
    select: Callable[[jax.Array, Batch], jax.Array] | None = None,
    compute_dtype: Any = None,
) -> EntropyFn:
    """The objective of N classifiers that share a trunk.

    Args:
      models: the network with its head; one for all tasks, or one a task where the heads differ
        in shape.
      heads: each task's frozen parameters, everything that the trunk lacks.
      select: (logits, batch) -> the logits [B, C] whose entropy counts, such as
        ``lambda z, batch: z[:, 0]`` for the first generated token. By default logits [B, C]
        as they are, and of logits [B, T, C] those that ``attention_mask`` shows.
      compute_dtype: dtype of the forward pass; entropies are float32.

    Returns:
      ``(trunk, batches) -> Entropy``, where batches has one batch a task. Rows that
      ``example_index`` marks as filling (-1) do not count.

    Raises:
      ValueError: not as many models as heads, or batches; logits that are no class scores.
    """
    nets = [models] * len(heads) if isinstance(models, Model) else list(models)
    if not heads or len(nets) != len(heads):
        raise ValueError(
            f"there must be one head a task, got {len(nets)} models, {len(heads)} heads"
        )

    def objective(trunk: Params, batches: Sequence[Batch]) -> Entropy:
        if len(batches) != len(heads):
            raise ValueError(f"{len(heads)} tasks need one batch each, got {len(batches)}")
        rows = []
        for net, head, batch in zip(nets, heads, batches, strict=True):
            full = tree.merge(trunk, head)
            full = full if compute_dtype is None else tree.cast(full, compute_dtype)
            logits = net.apply(full, batch, train=False).logits
            if logits is not None and select is not None:
                logits = select(logits, batch)
            rows.append(_task(logits, batch))
        return summed(rows)

    return objective


def task_entropy(
    logits: jax.Array, weight: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mean entropy, mean probability [C], answers [C]) of logits [..., C]; weight 0 drops one."""
    flat = logits.reshape(-1, logits.shape[-1])
    w = jnp.ones(flat.shape[0]) if weight is None else weight.reshape(-1).astype(jnp.float32)
    count = jnp.maximum(w.sum(), 1.0)
    mean = (jnp.where(w > 0, entropy(flat), 0.0) * w).sum() / count
    still = jax.lax.stop_gradient(flat.astype(jnp.float32))
    classes = (w[:, None] * jax.nn.softmax(still, axis=-1)).sum(0) / count
    answers = jnp.zeros(flat.shape[-1]).at[still.argmax(-1)].add(w)
    return mean, classes, answers


def summed(rows: Sequence[tuple[jax.Array, jax.Array, jax.Array]]) -> Entropy:
    """The :class:`Entropy` of all tasks from the :func:`task_entropy` of each."""
    means = jnp.stack([row[0] for row in rows])
    return Entropy(means.sum(), means, tuple(r[1] for r in rows), tuple(r[2] for r in rows))


def _task(logits: jax.Array | None, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    if logits is None or logits.ndim not in (2, 3) or logits.shape[-1] < 2:
        have = None if logits is None else logits.shape
        raise ValueError(f"entropy needs class logits [B, C] or [B, T, C], got {have}")
    weight = None
    if "example_index" in batch:
        weight = (jnp.asarray(batch["example_index"]) >= 0).astype(jnp.float32)
    if logits.ndim == 3:
        shown = jnp.asarray(batch["attention_mask"]) != 0
        weight = shown if weight is None else shown * weight[:, None]
    return task_entropy(logits, weight)


# The merge -----------------------------------------------------------------------------------


@jax.custom_vjp
def weighted_sum(weights: jax.Array, taus: jax.Array) -> jax.Array:
    """sum_i w_i tau_i in float32: weights [N] or [N, L], taus [N, ...] or [N, L, ...].

    No gradient for the taus. Written out as additions the sum is one pass over the memory, in
    whatever dtype; its derivative is one reduction a task, which XLA does five times faster in
    this form than from the transposed additions.
    """
    shape = (*weights.shape[1:], *(1,) * (taus.ndim - weights.ndim))
    terms = [w.reshape(shape) * t.astype(jnp.float32) for w, t in zip(weights, taus)]
    return functools.reduce(jnp.add, terms)


def _sum_forward(weights: jax.Array, taus: jax.Array) -> Any:
    return weighted_sum(weights, taus), (weights, taus)


def _sum_backward(kept: Any, g: jax.Array) -> Any:
    weights, taus = kept
    product = taus.astype(jnp.float32) * g[None]
    return product.sum(tuple(range(weights.ndim, taus.ndim))), None


weighted_sum.defvjp(_sum_forward, _sum_backward)


def merged(
    theta0: Params,
    taus: Params,
    lambdas: Any,
    *,
    scale: Params | None = None,
    clip: bool = True,
) -> Params:
    """theta_0 + s * sum_i lambda_i tau_i; leaves that ``taus`` lack are those of theta_0.

    Args:
      taus: task vectors, stacked leaf by leaf on axis 0; float leaves only.
      lambdas: [N], or a tree of [N] ([N, L] for stacked layers).
      scale: s, shaped like theta_0: one rescaled mask for all tasks, applied to their sum.
      clip: coefficients count as clipped to [0, 1], without a gradient outside.

    Returns:
      A tree in the dtypes of theta_0; the sum is in float32.
    """
    vectors = tree.flatten(taus)
    each = tree.flatten(lambdas) if isinstance(lambdas, Mapping) else None
    scales = None if scale is None else tree.flatten(scale)

    def one(path: str, leaf: jax.Array) -> jax.Array:
        if path not in vectors:
            return leaf
        weights = lambdas if each is None else each[path]
        delta = weighted_sum(_clipped(weights) if clip else weights, vectors[path])
        if scales is not None:
            delta = delta * scales[path]
        return (leaf.astype(jnp.float32) + delta).astype(leaf.dtype)

    return tree.map_with_path(one, theta0)


merge_once = jax.jit(merged, static_argnames="clip")


def _clipped(x: jax.Array) -> jax.Array:
    """x in [0, 1]; the gradient is 1 inside and at the ends (jnp.clip has 1/2 there)."""
    held = jax.lax.stop_gradient(jnp.clip(x, 0.0, 1.0))
    return jnp.where((x >= 0) & (x <= 1), x, held)


def coefficients(taus: Params, level: Level, value: float) -> Any:
    """Coefficients that are all ``value``: [N], or a tree of [N] and [N, L].

    Raises:
      ValueError: an unknown level.
    """
    if level == "task":
        return jnp.full(tasks(taus), value, jnp.float32)
    if level != "layer":
        raise ValueError(f"level must be 'task' or 'layer', got {level!r}")

    def one(path: str, leaf: Any) -> jax.Array:
        return jnp.full(leaf.shape[: 2 if tree.is_stacked(path) else 1], value, jnp.float32)

    return tree.map_with_path(one, taus)


def checked(theta0: Params, taus: Params) -> Params:
    """``taus`` without leaves that are not floats, in the order of ``theta0``.

    Raises:
      ValueError: no task or leaf; a task vector that theta0 has no place for; a value that is
        not finite (names tensor and task).
    """
    found, base = tree.flatten(taus), tree.flatten(theta0)
    for path, leaf in found.items():
        if path not in base:
            raise ValueError(f"taus hold {path!r}, which theta0 lacks: they are of another model")
        if tuple(leaf.shape[1:]) != tuple(base[path].shape) or not leaf.ndim:
            raise ValueError(
                f"taus[{path!r}] must have shape (N, *{tuple(base[path].shape)}), "
                f"got {tuple(leaf.shape)}"
            )
    kept = {p: found[p] for p in base if p in found and mergeable(base[p])}
    tasks(tree.unflatten(kept))
    for path, leaf in kept.items():
        whole = jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim)))
        for task, fine in enumerate(jax.device_get(whole)):
            if not fine:
                raise ValueError(f"taus[{path!r}] of task {task} holds NaN or infinity")
    return tree.unflatten(kept)


def place(plan: MeshPlan, params: Params, *, leading: int = 0) -> Params:
    """Puts a tree into the shards of its paths; ``leading`` axes in front stay whole."""

    def one(path: str, leaf: jax.Array) -> jax.Array:
        spec = plan.sharding(path, leaf.shape[leading:]).spec
        whole = PartitionSpec(*(None,) * leading, *spec) if len(spec) else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(plan.mesh, whole))

    return tree.map_with_path(one, params)


# The adaptation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaMergingConfig:
    """How coefficients are learnt; the paper's values.

    Attributes:
      steps: updates.
      lr: of Adam.
      lam: where every coefficient starts.
      clip: see :func:`merged`.
      ties: share of entries that TIES keeps of each task vector first (AdaMerging++, 0.2 in
        the paper); None leaves the vectors as they are.
      guard: see ``steppe.train.merge.guard``.
    """

    steps: int = 1000
    lr: float = 1e-3
    lam: float = 0.3
    clip: bool = True
    ties: float | None = None
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        if not self.lr >= 0:
            raise ValueError(f"lr must be >= 0, got {self.lr}")
        check_finite("lam", self.lam)
        if self.ties is not None and not 0 < self.ties <= 1:
            raise ValueError(f"ties must lie in (0, 1], got {self.ties}")


class AdaptState(NamedTuple):
    """Everything that AdaMerging goes on from.

    Attributes:
      step: int32 scalar.
      lambdas: see :func:`merged`.
      opt: Adam's state.
    """

    step: jax.Array
    lambdas: Any
    opt: Any


class Adapted(NamedTuple):
    """A merge whose coefficients were learnt.

    Attributes:
      params: the merged trunk.
      lambdas: as they count, clipped.
      state: to go on from.
      run: how it went; ``run.notes`` belongs into every report.
    """

    params: Params
    lambdas: Any
    state: AdaptState
    run: Run


def adapt_init(taus: Params, level: Level, cfg: AdaMergingConfig) -> AdaptState:
    """The state before the first step."""
    lambdas = coefficients(taus, level, cfg.lam)
    return AdaptState(jnp.zeros((), jnp.int32), lambdas, optax.adam(cfg.lr).init(lambdas))


@functools.partial(jax.jit, static_argnames=("entropy_fn", "cfg", "plan"), donate_argnums=0)
def adapt_step(
    state: AdaptState,
    batches: Any,
    *,
    theta0: Params,
    taus: Params,
    scale: Params | None = None,
    entropy_fn: EntropyFn,
    cfg: AdaMergingConfig,
    plan: MeshPlan | None = None,
) -> tuple[AdaptState, Entropy]:
    """One update of the coefficients; the entropies are those before it."""

    def objective(lambdas: Any) -> tuple[jax.Array, Entropy]:
        found = entropy_of(
            entropy_fn(merged(theta0, taus, lambdas, scale=scale, clip=cfg.clip), batches)
        )
        return found.total, found

    (_, found), grads = jax.value_and_grad(objective, has_aux=True)(state.lambdas)
    updates, opt = optax.adam(cfg.lr).update(grads, state.opt)
    new = AdaptState(state.step + 1, optax.apply_updates(state.lambdas, updates), opt)
    return pinned((new, found), plan)


def pinned(values: Any, plan: MeshPlan | None) -> Any:
    """Keeps small values whole on every device, so that the next call compiles nothing."""
    if plan is None:
        return values
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, plan.replicated), values)


def adamerging(
    theta0: Params,
    taus: Params,
    entropy_fn: EntropyFn,
    data: Data,
    level: Level = "layer",
    cfg: AdaMergingConfig | None = None,
    *,
    scale: Params | None = None,
    state: AdaptState | None = None,
    plan: MeshPlan | None = None,
    watch: Watch | None = None,
    phase: str = "adamerging",
    begin: int = 0,
    names: Sequence[str] | None = None,
) -> Adapted:
    """Learns merge coefficients on unlabelled batches.

    Args:
      theta0: the pretrained trunk.
      taus: theta_i - theta_0, stacked leaf by leaf on axis 0.
      entropy_fn: see :func:`entropies`.
      data: one tuple of batches (one a task) a step: an endless iterator, or a function of the
        number of the draw.
      level: "layer" or "task".
      scale: a rescaled mask (see ``concrete``); None for plain AdaMerging.
      state: to go on from; its arrays are used up.
      plan: mesh; theta0 and taus lie or are put there, the batches are split over it.
      watch: called after every ``cfg.guard.window`` steps.
      phase, begin: name of the run, and number of its first draw.
      names: of the tasks, for what the guard says; default their numbers.

    Raises:
      ValueError: trees or names that do not fit, or a value that is not finite in the trees.
      NonFiniteLoss: the entropy is not finite from the start.
    """
    cfg = AdaMergingConfig() if cfg is None else cfg
    taus = checked(theta0, taus)
    if cfg.ties is not None:
        from steppe.train.merge.ties import ties_components

        taus = ties_components(taus, k=cfg.ties)
    if state is None:
        state = adapt_init(taus, level, cfg)
    if plan is not None:
        theta0, taus = place(plan, theta0), place(plan, taus, leading=1)
        scale = None if scale is None else place(plan, scale)
        state = jax.device_put(state, plan.replicated)
    step = functools.partial(
        adapt_step, theta0=theta0, taus=taus, scale=scale, entropy_fn=entropy_fn, cfg=cfg, plan=plan
    )
    done = run(
        lambda s, b: settled(step(s, b), plan),
        state,
        lambda n: spread(draw(data, begin + n), plan),
        begin=int(state.step),
        steps=cfg.steps,
        guard=cfg.guard,
        phase=phase,
        watch=watch,
        names=names,
    )
    lambdas = done.state.lambdas
    lambdas = jax.tree.map(lambda x: jnp.clip(x, 0.0, 1.0), lambdas) if cfg.clip else lambdas
    params = merge_once(theta0, taus, lambdas, scale=scale, clip=False)
    return Adapted(params, lambdas, done.state, done)


def spread(batches: Any, plan: MeshPlan | None) -> Any:
    """Every batch of a (nested) sequence of batches, its rows split over the mesh."""
    if plan is None:
        return batches
    if isinstance(batches, Mapping):
        return plan.batch(batches)
    return tuple(spread(batch, plan) for batch in batches)


def settled(values: Any, plan: MeshPlan | None) -> Any:
    """``values``, waited for where devices share their threads (see ``mesh.settle``)."""
    return values if plan is None else plan.settle(values)
