"""One training step: exact gradients over micro-batches and meshes, then an optax update.

The gradient does not depend on how the batch is split (see ``gradient``). A transform may ask
for more than the gradient at the parameters: ``update`` receives, besides ``value`` (the loss),

  grad_fn(params)               the gradient elsewhere: same rows, dropout, precision and mesh
  fisher_fn(params)             mean squared gradient of the batch's examples (see ``fisher``)
  losses_fn(params)             the loss of every row by itself [B]
  row_losses                    those at the parameters, where the first pass has them, or None
  subset_grad_fn(params, rows)  the gradient of the mean loss of the rows with indices [k]
  group_fn(params, displaced, ascent)   groups of rows that climb by themselves (see ``groups``)
  ascent                        with ``make(ascent=)``, a cheaper first gradient (see ``ascent``)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.models import tree
from steppe.train.ascent import Ascent, Watched, cheaper
from steppe.train.gradient import Work, fill, known, partial
from steppe.train.groups import Groups
from steppe.train.mesh import MeshPlan, put
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
    ascent: Ascent | None = None,
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
      ascent: a cheaper first gradient for transforms that take two, see ``train.ascent``;
        ``value`` stays the loss of the whole batch.

    The metrics are float32 scalars (sum, weight): ``loss``, ``loss/<component>`` for each
    named component, ``grad_norm`` (before clipping) and the objective's ``aux``. They come
    from the first pass; with ``ascent`` that is the cheap one, on its rows, in its dtype.

    Raises:
      ValueError: an argument is out of range; from the first step, an ascent that the transform
        does not read.
      TypeError: ascent is not an ``Ascent``.
    """
    if ascent is not None and not isinstance(ascent, Ascent):
        raise TypeError(
            f"step.make takes ascent=Ascent(...) of train.ascent, got {ascent!r}; groups that "
            "climb by themselves are an argument of the transform: sam(base, rho, ascent=...)"
        )
    if microbatches < 1:
        raise ValueError(f"microbatches must be >= 1, got {microbatches}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be > 0, or None, got {clip_norm}")
    _check_decay(ema)
    update = optax.with_extra_args_support(tx).update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        work = Work(
            objective, state.frozen, batch, key, plan, microbatches, compute_dtype, clip_norm
        )
        # Where a cheaper one is made, the compiler drops what nobody reads of this one.
        whole = found = work.evaluate(state.params)
        climb, given = None, {}
        if ascent is not None:
            found, made = cheaper(work, state.params, ascent)
            climb = Watched(*made._replace(grad_fn=partial(made.grad_fn, state.params)))
            given["ascent"] = climb
        groups = Groups(work, state.params)
        updates, opt_state = update(
            whole.grads,
            state.opt_state,
            state.params,
            grad_fn=partial(work.gradient, state.params),
            fisher_fn=partial(work.fisher, state.params),
            losses_fn=lambda params: work.losses(fill(params, state.params)),
            row_losses=whole.rows,
            subset_grad_fn=partial(work.subset, state.params),
            group_fn=groups,
            value=whole.loss,
            **given,
        )
        if climb is not None and not climb.read:
            raise ValueError(
                "step.make has ascent=, and the transform does not read it, so that it would pay "
                "for both first passes: leave it out, or use sam, asam, fsam or esam"
            )
        clean = groups.clean or found
        metrics, norm = clean.metrics, clean.norm
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
            with known(self.plan):
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
