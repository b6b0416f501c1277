"""One training step: exact gradients over micro-batches and meshes, then an optax update.

The loss of a step is ``sum_k total_k / W_k`` with ``W_k`` the weight of component k summed
over the global batch. It does not depend on how the batch is split: the weights of all
micro-batches come first (the compiler drops the forward pass when weights only need the
labels), then every micro-batch contributes the gradient of ``sum_k total_k / W_k``.

A transform may ask for the gradient elsewhere: ``update`` receives ``grad_fn(params)`` over
the same batch, random numbers, micro-batches, precision and mesh, and ``value``, the loss; and
``fisher_fn(params)``, the mean squared gradient of the batch's examples (see ``fisher``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.models import tree
from steppe.train import fisher, types
from steppe.train.mesh import MeshPlan, put
from steppe.train.microbatch import split_rows
from steppe.train.types import Batch, Metrics, ModelLike, Objective, Params, TrainState

EVERYTHING = (".*",)


def abstract(
    model: ModelLike,
    tx: optax.GradientTransformation,
    plan: MeshPlan | None = None,
    *,
    params: Params | None = None,
    trainable: Sequence[str] | None = None,
    ema: float | None = None,
) -> TrainState:
    """The shapes, dtypes and shardings of the state that :func:`init` would build.

    Allocates nothing; it is what ``Checkpoints.restore`` needs as ``like``. ``params`` may
    be arrays or shapes, when they differ from those of ``model.init``.
    """
    patterns = _patterns(model, trainable)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    full = _with_given(jax.eval_shape(model.init, key), model) if params is None else params
    train, frozen = tree.split(full, patterns)
    state = jax.eval_shape(lambda k, t, f: _assemble(k, t, f, tx, ema), key, train, frozen)
    if plan is None:
        return state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        plan.state(state),
    )


def init(
    key: jax.Array,
    model: ModelLike,
    tx: optax.GradientTransformation,
    plan: MeshPlan | None = None,
    *,
    params: Params | None = None,
    trainable: Sequence[str] | None = None,
    ema: float | None = None,
    donate: bool = False,
) -> TrainState:
    """A fresh training state, each leaf created in its shards.

    Args:
      key: typed PRNG key of the run; initialises and later drives dropout.
      model: anything with ``init(key) -> params`` and ``trainable``.
      tx: the optimiser; its state covers the trainable parameters only.
      plan: mesh and rules; None keeps everything on the default device.
      params: the full tree to start from (pretrained) instead of ``model.init``. Trainable
        leaves are copied one by one, because the step donates them; frozen ones are shared.
      trainable: regular expressions over paths; default ``model.trainable``.
      ema: decay of the moving average of the parameters, kept in ``state.extra["ema"]``.
      donate: take the trainable leaves of ``params`` over instead of copying them; the
        caller's arrays are then gone after the first step.

    Raises:
      ValueError: a pattern of ``trainable`` matches nothing, a leaf is covered by no sharding
        rule, or ``ema`` is outside [0, 1).
    """
    _check_decay(ema)
    patterns = _patterns(model, trainable)
    init_key, run_key = jax.random.split(key)
    if params is None and getattr(model, "given", None) is not None:
        # An overlay: its own leaves are made, the base's exist and are placed as they are.
        made = jax.eval_shape(model.init, init_key)
        to = None if plan is None else plan.shardings(made)
        params = _with_given(jax.jit(model.init, out_shardings=to)(init_key), model)
    if params is None:

        def build(first: jax.Array, second: jax.Array) -> TrainState:
            train, frozen = tree.split(model.init(first), patterns)
            return _assemble(second, train, frozen, tx, ema)

        shapes = jax.eval_shape(build, init_key, run_key)
        shardings = None if plan is None else plan.state(shapes)
        made = jax.jit(build, out_shardings=shardings)(init_key, run_key)
        return made if plan is None else plan.settle(made)

    train, frozen = tree.split(params, patterns)
    train = tree.map_with_path(lambda path, leaf: _own(leaf, path, plan, donate), train)
    frozen = jax.tree.map(jnp.asarray, frozen) if plan is None else plan.place(frozen)

    def beside(second: jax.Array, train: Params) -> TrainState:
        return _assemble(second, train, {}, tx, ema).replace(params={})

    shardings = None
    if plan is not None:
        shapes = jax.eval_shape(lambda k, t: _assemble(k, t, {}, tx, ema), run_key, train)
        shardings = plan.state(shapes).replace(params={})
    state = jax.jit(beside, out_shardings=shardings)(run_key, train)
    state = state.replace(params=train, frozen=frozen)
    return state if plan is None else plan.settle(state)


def make(
    objective: Objective,
    tx: optax.GradientTransformation,
    plan: MeshPlan | None = None,
    *,
    microbatches: int = 1,
    compute_dtype: Any = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    donate: bool = True,
) -> TrainStep:
    """Builds the compiled step ``(state, batch) -> (state, metrics)``.

    Args:
      objective: ``(params, batch, key) -> LossOut``; sees all parameters and the rows of one
        micro-batch.
      tx: optax transform; may use ``grad_fn=`` and ``value=`` in its update.
      plan: the mesh that the state was placed on, or None for one device.
      microbatches: number M of parts whose gradients are added up. Part i holds the rows i,
        i + M, i + 2M, ..., so that every device keeps its own rows whatever the mesh is.
      compute_dtype: such as "bfloat16": parameters are cast for the forward and backward
        pass; master copy, accumulated gradients and optimiser stay float32.
      clip_norm: largest global norm of the gradient. ``grad_fn`` clips in the same way.
      ema: decay of the moving average; give it to :func:`init` too.
      donate: reuse the memory of the old state, which is gone after the call. Frozen
        parameters and the key are never donated.

    The metrics are float32 scalars (sum, weight): ``loss``, ``loss/<component>`` for each
    named component, ``grad_norm`` (before clipping) and the objective's ``aux``.

    Raises:
      ValueError: an argument is out of range.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be >= 1, got {microbatches}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be > 0, or None, got {clip_norm}")
    _check_decay(ema)
    update = optax.with_extra_args_support(tx).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        parts = batch if microbatches == 1 else split_rows(batch, microbatches, plan)
        frozen = state.frozen if compute_dtype is None else tree.cast(state.frozen, compute_dtype)

        def gradient(params: Params) -> tuple[jax.Array, Metrics, jax.Array, Params]:
            loss, metrics, grads = _accumulate(
                objective, params, frozen, parts, key, microbatches, compute_dtype
            )
            norm = optax.global_norm(grads)
            if clip_norm is not None:
                # The 1.0 branch keeps an unclipped gradient bitwise what it was.
                factor = jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
                grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)
            return loss, metrics, norm, grads

        loss, metrics, norm, grads = gradient(state.params)
        updates, opt_state = update(
            grads,
            state.opt_state,
            state.params,
            grad_fn=_partial(lambda params: gradient(params)[3], state.params),
            fisher_fn=_partial(
                lambda params: fisher.diagonal(
                    objective, params, frozen, batch, plan, compute_dtype=compute_dtype
                ),
                state.params,
            ),
            value=loss,
        )
        params = optax.apply_updates(state.params, updates)
        extra = state.extra
        if ema is not None:
            if "ema" not in extra:
                raise ValueError("step.make has ema=, the state does not: give step.init ema= too")
            average = optax.incremental_update(params, extra["ema"], 1.0 - ema)
            extra = {**extra, "ema": average}
        metrics["grad_norm"] = (norm.astype(jnp.float32), jnp.float32(1))
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return _strong(new), metrics

    return TrainStep(step, plan, microbatches, donate)


class TrainStep:
    """A compiled step: call it as ``state, metrics = train_step(state, batch)``.

    One program is compiled for every shape of batch; the shardings of state and metrics are
    pinned, so nothing else ever recompiles.

    Attributes:
      fn: the pure function underneath, for use inside another jit, scan or shard_map.
      plan: the mesh that batches are split over, or None.
      compiles: number of programs compiled so far.
    """

    def __init__(
        self,
        fn: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
        plan: MeshPlan | None,
        microbatches: int,
        donate: bool,
    ) -> None:
        self.fn = fn
        self.plan = plan
        self.compiles = 0
        self._microbatches = microbatches
        self._donate = donate
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs one step; the arrays of ``state`` other than frozen and rng are given up."""
        placed = self.put(batch)
        signature = tuple((name, placed[name].shape, placed[name].dtype) for name in placed)
        program = self._programs.get(signature)
        if program is None:
            program = self.compile(state, placed)
            self._programs[signature] = program
            self.compiles += 1
        live, metrics = program(_without(state), state.frozen, state.rng, placed)
        if self.plan is not None:
            self.plan.settle((live, metrics))
        return live.replace(frozen=state.frozen, rng=state.rng), metrics

    def put(self, batch: Batch) -> dict[str, Any]:
        """Places a batch on the devices, without waiting for it; placed ones pass through."""
        if self.plan is not None:
            return self.plan.batch(batch)
        return {
            name: value if isinstance(value, jax.Array) else np.asarray(value)
            for name, value in batch.items()
        }

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The lowered program, for its text, FLOPs and memory; accepts abstract states."""
        abstract_batch = all(isinstance(v, jax.ShapeDtypeStruct) for v in batch.values())
        return self._lower(state, dict(batch) if abstract_batch else self.put(batch))

    def compile(self, state: TrainState, batch: Batch) -> jax.stages.Compiled:
        """The program that a call with these shapes runs, for its memory use; runs nothing."""
        return _compile(self.lower(state, batch))

    def _lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        self._check_rows(batch)
        live_shardings = metric_shardings = None
        if self.plan is not None:
            mesh = self.plan.mesh
            for key, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
                if getattr(leaf.sharding, "mesh", None) != mesh:
                    raise ValueError(
                        f"state leaf {jax.tree_util.keystr(key)} is not placed on the mesh of the "
                        "plan: build the state with step.init(..., plan)"
                    )
            live_shardings = jax.tree.map(lambda leaf: leaf.sharding, _without(state))
            metric_shardings = self.plan.replicated

        def program(
            live: TrainState, frozen: Params, rng: jax.Array, batch: Batch
        ) -> tuple[TrainState, Metrics]:
            # Models keep the rows of their activations on the data axes of this mesh.
            with _known(self.plan):
                new, metrics = self.fn(live.replace(frozen=frozen, rng=rng), batch)
            return _without(new), metrics

        jitted = jax.jit(
            program,
            donate_argnums=(0,) if self._donate else (),
            out_shardings=(live_shardings, metric_shardings),
        )
        return jitted.lower(_without(state), state.frozen, state.rng, batch)

    def _check_rows(self, batch: Batch) -> None:
        parts = 1 if self.plan is None else self.plan.data_size
        for name, value in batch.items():
            if not value.shape:
                continue
            rows = value.shape[0]
            if rows % self._microbatches:
                raise ValueError(
                    f"batch[{name!r}] has {rows} rows, not divisible by "
                    f"microbatches={self._microbatches}"
                )
            if rows // self._microbatches % parts:
                raise ValueError(
                    f"batch[{name!r}] has {rows} rows, {rows // self._microbatches} in each of "
                    f"{self._microbatches} micro-batches: not divisible by the {parts} parts of "
                    f"the data axes; use a multiple of {self._microbatches * parts} rows"
                )


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles so that donated memory is updated in place on the CPU too.

    XLA's usual analysis for the CPU cannot order "new parameters read the old moments" before
    "new moments overwrite them", and copies all of them in every step: AdamW on 22.7 million
    parameters took 152 ms, 65 ms without donation, and takes 40 ms with this analysis.
    """
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile({"xla_cpu_copy_insertion_use_region_analysis": True})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()  # another jaxlib; correct, only slower


def _known(plan: MeshPlan | None) -> contextlib.AbstractContextManager[Any]:
    """Makes the mesh known to the models that are traced inside; see ``models.layout``."""
    if plan is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh)


def _partial(fn: Callable[[Params], Params], whole: Params) -> Callable[[Params], Params]:
    """``fn`` for callers that see a part of the tree only.

    ``optax.partition`` and ``optax.masked`` show an inner transform ``MaskedNode`` in place of
    the leaves that are not its own. Those are taken from ``whole``, and left out of the result.
    """

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def call(params: Params) -> Params:
        filled = jax.tree.map(
            lambda own, new: own if masked(new) else new, whole, params, is_leaf=masked
        )
        found = fn(filled)
        return jax.tree.map(
            lambda new, got: new if masked(new) else got, params, found, is_leaf=masked
        )

    return call


def _accumulate(
    objective: Objective,
    params: Params,
    frozen: Params,
    parts: Batch,
    key: jax.Array,
    microbatches: int,
    compute_dtype: Any,
) -> tuple[jax.Array, Metrics, Params]:
    """Loss, metrics and gradient (dtype of ``params``) of the whole batch."""
    # Cast once, outside the scan; the gradient with respect to the cast copy is what the
    # transpose of a cast inside would receive.
    compute = params if compute_dtype is None else tree.cast(params, compute_dtype)

    def evaluate(p: Params, batch: Batch, index: Any) -> types.LossOut:
        return objective(tree.merge(p, frozen), batch, jax.random.fold_in(key, index))

    def scaled(p: Params, batch: Batch, index: Any, weights: Any) -> tuple[jax.Array, Any]:
        out = evaluate(p, batch, index)
        totals, own = types.components(out)
        weights = own if weights is None else weights
        weights = jax.lax.stop_gradient(weights)
        loss = jnp.float32(0)
        for name, total in totals.items():
            loss += total / jnp.where(weights[name] == 0, 1.0, weights[name])
        aux = {
            name: (types.scalar(s, f"aux {name!r}"), types.scalar(w, f"aux {name!r}"))
            for name, (s, w) in out.aux.items()
        }
        return loss, (loss, totals, weights, aux)

    grad = jax.grad(scaled, has_aux=True)
    if microbatches == 1:
        grads, (loss, totals, weights, aux) = grad(compute, parts, 0, None)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        return loss, _metrics(loss, totals, weights, aux), grads

    indices = jnp.arange(microbatches)

    def weigh(carry: None, part: tuple[Batch, jax.Array]) -> tuple[None, dict[str, jax.Array]]:
        return None, types.components(evaluate(compute, *part))[1]

    _, each = jax.lax.scan(weigh, None, (parts, indices))
    weights = jax.tree.map(lambda w: w.sum(0), each)

    def add(carry: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, Any]:
        grads, (loss, totals, _, aux) = grad(compute, *part, weights)
        return jax.tree.map(lambda c, g: c + g.astype(c.dtype), carry, grads), (loss, totals, aux)

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    grads, sums = jax.lax.scan(add, zeros, (parts, indices))
    loss, totals, aux = jax.tree.map(lambda x: x.sum(0), sums)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return loss, _metrics(loss, totals, weights, aux), grads


def _metrics(
    loss: jax.Array, totals: dict[str, Any], weights: dict[str, Any], aux: Metrics
) -> Metrics:
    one = jnp.float32(1)
    if set(totals) == {""}:
        out: Metrics = {"loss": (totals[""], weights[""])}
    else:
        out = {"loss": (loss, one)}
        out |= {f"loss/{name}": (totals[name], weights[name]) for name in totals}
    for name, pair in aux.items():
        if name in out or name == "grad_norm":
            raise ValueError(f"aux metric {name!r} has the name of a metric of the step: rename it")
        out[name] = pair
    return out


def _assemble(
    rng: jax.Array,
    train: Params,
    frozen: Params,
    tx: optax.GradientTransformation,
    ema: float | None,
) -> TrainState:
    # Copies, so that no two leaves share a buffer: a donated buffer may be given up once.
    extra = {} if ema is None else {"ema": jax.tree.map(jnp.copy, train)}
    opt_state = jax.tree.map(jnp.copy, tx.init(train))
    state = TrainState(jnp.zeros((), jnp.int32), train, frozen, opt_state, extra, rng)
    return _strong(state)


def _strong(state: TrainState) -> TrainState:
    """Strips weak types, which would make the second call a new program."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state)


def _without(state: TrainState) -> TrainState:
    return state.replace(frozen={}, rng=())


def _own(leaf: Any, path: str, plan: MeshPlan | None, donate: bool) -> jax.Array:
    """The leaf on its devices, in memory that nobody else holds unless ``donate``."""
    if isinstance(leaf, jax.Array):
        moved = leaf if plan is None else put(leaf, plan.sharding(path, leaf.shape))
        # device_put may share buffers with its argument, even when asked not to.
        return moved if donate else jnp.copy(moved)
    if plan is None:
        return jnp.array(leaf, copy=True)
    return put(leaf, plan.sharding(path, leaf.shape))


def _with_given(made: Params, model: ModelLike) -> Params:
    given = getattr(model, "given", None)
    return made if given is None else tree.merge(made, given)


def _patterns(model: ModelLike, trainable: Sequence[str] | None) -> tuple[str, ...]:
    chosen = getattr(model, "trainable", None) if trainable is None else trainable
    return EVERYTHING if chosen is None else tuple(chosen)


def _check_decay(ema: float | None) -> None:
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"ema must be in [0, 1), or None, got {ema}")
