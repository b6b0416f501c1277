"""From settings to the values that a run is made of; nothing is written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from steppe.data import batches as batches_
from steppe.launch import balance, kinds, optimiser, overlays, probe, samples, setup
from steppe.launch import config as config_
from steppe.launch.config import FinetuneConfig
from steppe.models import pretrained, tree
from steppe.models.overlays import Overlay, lora
from steppe.models.overlays.overlay import BASE
from steppe.optim import basic
from steppe.train import mesh, step
from steppe.train.objectives import basic as objectives
from steppe.train.types import Objective, Params, TrainState

# Settings of the networks that --drop replaces.
_RATES = ("drop", "attn_drop", "ffn_drop")


@dataclass(frozen=True)
class Pieces:
    """Everything that the loop needs, built from the settings.

    Attributes:
      loaded: the pretrained model; ``model`` is it, with an overlay bound where asked for.
      overlay: the overlay, or None.
      trainable: regexes of what trains.
      data, plan, tx, schedule, train: see their modules.
      batches: endless training batches.
      steps, epoch: updates in the run and in one pass.
      branch: name below which the model's own parameters stand in those of the state, where
        there are others beside them (a teacher's); empty = they are all.
      beside: these others, by name.
      extra: what the state holds beside all parameters, see ``TrainState``.
      heard: is told the metrics of every validation.
      teacher: a network that runs forward beside, or None.
      base_hash: of the base's parameters, where an overlay is bound.
    """

    config: FinetuneConfig
    origin: setup.Origin
    loaded: pretrained.Loaded
    model: Any
    overlay: Any
    trainable: tuple[str, ...]
    data: setup.Data
    plan: mesh.MeshPlan
    tx: Any
    schedule: Callable[[Any], Any]
    train: step.TrainStep
    batches: Any
    steps: int
    epoch: int
    branch: str = ""
    beside: Params = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    heard: Callable[[Mapping[str, float]], None] | None = None
    teacher: Any = None
    base_hash: str = ""

    def own(self, params: Params) -> Params:
        """The model's own parameters among those of the state."""
        return params[self.branch] if self.branch else params

    def evaluation(self, split: str) -> Any:
        """One pass over a split."""
        data = self.config.data
        most = rows_of(self.loaded.model.config, self.data.task.kind, data.max_length)
        size = self.plan.data_size * max(1, most // self.plan.data_size)
        return batches_.evaluate(self.data.splits[split], size, buckets=setup.buckets(data))


def rows_of(model: Any, kind: str, length: int, most: int = 64) -> int:
    """Rows of a batch of an evaluation, so that vocabulary logits take at most 256 MiB."""
    if kind not in kinds.WRITTEN:
        return most
    return max(1, min(most, 2**26 // (length * model.vocab_size)))


def build(
    config: FinetuneConfig,
    *,
    data: setup.Data | None = None,
    loaded: pretrained.Loaded | None = None,
    origin: setup.Origin | None = None,
) -> Pieces:
    """Reads model and data and builds the step. Writes nothing.

    Args:
      data, loaded, origin: in place of those that the settings name, for several runs on the
        same ones; ``loaded`` as :func:`load` gives it.

    Raises:
      ValueError, OSError: whatever is wrong with the settings, the model or the data.
    """
    origin = setup.origin(config.model) if origin is None else origin
    # The tree's names and sizes come first: a wrong setting must not cost the loading time.
    bare = pretrained.load_config(origin.weights)
    data = setup.prepare(config.data, origin, bare) if data is None else data
    kind = data.task.kind
    plan = plan_of(config, bare)
    _check_batch(config, plan)
    samples.check_room(kind, config.samples, config.sample_tokens, bare.max_length)
    loaded = load(config, origin, data, plan) if loaded is None else loaded
    if config.probe:
        probe.check(loaded.model, kind)
    overlay = None
    model = loaded.model
    if config.overlay:
        overlay = overlays.parse(config.overlay)
    if config.lora.rank:
        overlay = lora.overlay(
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            sites=config.lora.sites,
            drop=config.lora.drop,
        )
    hashed = ""
    if overlay is not None:
        # Before the parameters are given up to the training.
        hashed = overlays.base_hash(loaded.params)
        # Bad ranks end here.
        delta = jax.eval_shape(overlay.init, jax.random.key(0), model.abstract())
        if config.balance.beta:
            balance.check_experts(delta)
        model = bound(overlay, loaded)
        plan = dataclasses.replace(plan, rules=tuple(model.axes))
    objective = None
    if config.balance.beta:
        usual = objectives.for_task(model, kind)
        objective = balance.balanced(config.balance, usual, data.splits["train"])
    batches = batches_.train(
        data.splits["train"],
        config.batch_size,
        seed=config.seed,
        buckets=setup.buckets(config.data, training=True),
        rows=rows_here(plan, config.batch_size),
    )
    if overlay is not None:
        overlays.check_forward(model, batches.plan)
    epoch = batches.steps_per_epoch
    steps = config.steps or max(1, math.ceil(config.epochs * epoch))
    o = config.optim
    schedule = basic.schedule(o.schedule, o.learning_rate, steps, warmup=o.warmup)
    tx = optimiser.transform(config, schedule, steps)
    return Pieces(
        config,
        origin,
        loaded,
        model,
        overlay,
        probe.trainable(overlay is not None) if config.probe else trainable(model, config.freeze),
        data,
        plan,
        tx,
        schedule,
        make_step(config, model, kind, tx, plan, objective),
        batches,
        steps,
        epoch,
        base_hash=hashed,
    )


def rows_here(plan: mesh.MeshPlan, batch_size: int) -> np.ndarray:
    """Numbers of the rows of a global batch that the devices of this process hold, ascending.

    A mesh may lay the data axes over the processes in any order, or give several processes
    the same rows (parameters split over hosts).
    """
    held = plan.rows().addressable_devices_indices_map((batch_size,)).values()
    numbers = np.arange(batch_size)
    return np.unique(np.concatenate([numbers[index] for index in held if index is not None]))


def plan_of(config: FinetuneConfig, bare: Any) -> mesh.MeshPlan:
    """The mesh of the settings with the rules of a model, given by its configuration."""
    return mesh.plan(config_.parse_mesh(config.mesh, len(jax.devices())), bare.build().axes)


def load(
    config: FinetuneConfig, origin: setup.Origin, data: setup.Data, plan: mesh.MeshPlan
) -> pretrained.Loaded:
    """The pretrained model with the task's head, its dropout rates those of the settings."""
    kind = data.task.kind
    labels = data.task.num_labels if kind in ("classification", "token") else None
    loaded = pretrained.load(
        origin.weights,
        head=kinds.head_of(kind),
        num_labels=labels,
        plan=plan,
        key=jax.random.key(config.seed),
    )
    if config.drop < 0:
        return loaded
    return dataclasses.replace(loaded, model=with_drop(loaded.model, config.drop))


def with_drop(model: Any, rate: float) -> Any:
    """``model`` with one rate of dropout everywhere, its classifier included."""
    config = model.config
    names = [f.name for f in dataclasses.fields(config) if f.name in _RATES]
    config = dataclasses.replace(config, **dict.fromkeys(names, rate))
    if config.head is not None and config.head.kind not in kinds.WRITTEN:
        config = config.with_head(dataclasses.replace(config.head, drop=rate))
    return config.build()


def make_step(
    config: FinetuneConfig,
    model: Any,
    kind: str,
    tx: Any,
    plan: mesh.MeshPlan,
    objective: Objective | None = None,
) -> step.TrainStep:
    """The compiled step of the settings; ``objective`` in place of the usual one of the task.

    Raises:
      ValueError: a first gradient that the model or the objective does not allow.
    """

    def usual(model: Any) -> Objective:
        return objectives.for_task(model, kind)

    ascent = optimiser.climb(config, model, usual if objective is None else None)
    return step.make(
        usual(model) if objective is None else objective,
        tx,
        plan,
        microbatches=config.microbatches,
        compute_dtype=None if config.compute_dtype == "float32" else config.compute_dtype,
        clip_norm=config.optim.clip_norm or None,
        ema=config.ema or None,
        ascent=ascent,
    )


def start(pieces: Pieces, *, donate: bool = False) -> TrainState:
    """The state before the first step.

    Args:
      donate: take over the arrays of ``pieces.loaded``, which are gone after the first step.
    """
    config, params = pieces.config, pieces.loaded.params
    if pieces.overlay is not None:
        made = pieces.own(jax.jit(pieces.model.init)(jax.random.key(config.seed)))
        params = tree.merge(made, {BASE: params})
    if pieces.branch:
        params = {pieces.branch: params, **pieces.beside}
    state = step.init(
        jax.random.key(config.seed),
        pieces.model,
        pieces.tx,
        pieces.plan,
        params=params,
        trainable=pieces.trainable,
        ema=config.ema or None,
        donate=donate,
    )
    return state.replace(extra={**state.extra, **pieces.extra}) if pieces.extra else state


def _check_batch(config: FinetuneConfig, plan: mesh.MeshPlan) -> None:
    multiple = plan.data_size * config.microbatches
    if config.batch_size % multiple:
        raise ValueError(
            f"batch_size={config.batch_size} is not divisible by {multiple} "
            f"({plan.data_size} parts of the data axes x microbatches={config.microbatches}); "
            f"use a multiple of {multiple}"
        )


def bound(overlay: Overlay, loaded: pretrained.Loaded) -> Any:
    """The loaded model with an overlay; a pooler that the files lack is random, and learns as the
    head above it does."""
    fresh = tuple(re.escape(path) for path in loaded.fresh if path.startswith("pooler/"))
    return overlay.bind(loaded.model, frozen=loaded.params, also=fresh)


def trainable(model: Any, freeze: tuple[str, ...]) -> tuple[str, ...]:
    """The model's patterns, less the paths that ``freeze`` matches.

    Raises:
      ValueError: a pattern that is none or matches nothing; nothing is left to train.
    """
    if not freeze:
        return tuple(model.trainable)
    paths = tree.paths(model.abstract())
    for pattern in freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"freeze={pattern!r} is no regular expression ({error}); embed/.* is one"
            ) from error
        if not any(tree.matches(path, (pattern,)) for path in paths):
            some = ", ".join(paths[:3])
            raise ValueError(f"freeze={pattern!r} matches no parameter; paths look like {some}")
    live = [p for p in paths if tree.matches(p, model.trainable) and not tree.matches(p, freeze)]
    if not live:
        raise ValueError(f"freeze={', '.join(freeze)} leaves nothing to train")
    return tuple(re.escape(path) for path in live)
