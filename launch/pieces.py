"""From settings to the values that a run is made of; nothing is written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from steppe.data import batches as batches_
from steppe.launch import config as config_
from steppe.launch import kinds, probe, setup
from steppe.launch.config import FinetuneConfig
from steppe.models import pretrained, tree
from steppe.models.overlays import lora
from steppe.optim import basic
from steppe.train import mesh, step
from steppe.train.objectives import basic as objectives

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


def build(config: FinetuneConfig) -> Pieces:
    """Reads model and data and builds the step. Writes nothing.

    Raises:
      ValueError, OSError: whatever is wrong with the settings, the model or the data.
    """
    origin = setup.origin(config.model)
    # The tree's names and sizes come first: a wrong setting must not cost the loading time.
    bare = pretrained.load_config(origin.weights)
    data = setup.prepare(config.data, origin, bare)
    kind = data.task.kind
    devices = jax.devices()
    shape = config_.parse_mesh(config.mesh, len(devices))
    plan = mesh.plan(shape, bare.build().axes)
    _check_batch(config, plan)
    labels = data.task.num_labels if kind in ("classification", "token") else None
    rates = [f.name for f in dataclasses.fields(bare) if f.name in _RATES]
    drop = {} if config.drop < 0 else dict.fromkeys(rates, config.drop)
    loaded = pretrained.load(
        origin.weights,
        head=kinds.head_of(kind),
        num_labels=labels,
        plan=plan,
        key=jax.random.key(config.seed),
        **drop,
    )
    if drop and loaded.model.config.head is not None and kind not in kinds.WRITTEN:
        head = dataclasses.replace(loaded.model.config.head, drop=config.drop)
        loaded = dataclasses.replace(loaded, model=loaded.model.config.with_head(head).build())
    if config.probe:
        probe.check(loaded.model, kind)
    overlay = None
    model = loaded.model
    if config.lora.rank:
        overlay = lora.overlay(
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            sites=config.lora.sites,
            drop=config.lora.drop,
        )
        jax.eval_shape(overlay.init, jax.random.key(0), model.abstract())  # bad ranks end here
        model = overlay.bind(model, frozen=loaded.params)
        plan = dataclasses.replace(plan, rules=tuple(model.axes))
    batches = batches_.train(
        data.splits["train"],
        config.batch_size,
        seed=config.seed,
        buckets=setup.buckets(config.data, training=True),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    epoch = batches.steps_per_epoch
    steps = config.steps or max(1, math.ceil(config.epochs * epoch))
    o = config.optim
    schedule = basic.schedule(o.schedule, o.learning_rate, steps, warmup=o.warmup)
    tx = basic.adamw(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    train = step.make(
        objectives.for_task(model, kind),
        tx,
        plan,
        microbatches=config.microbatches,
        compute_dtype=None if config.compute_dtype == "float32" else config.compute_dtype,
        clip_norm=o.clip_norm or None,
        ema=config.ema or None,
    )
    return Pieces(
        config,
        origin,
        loaded,
        model,
        overlay,
        probe.TRAINABLE if config.probe else _trainable(model, config.freeze, loaded),
        data,
        plan,
        tx,
        schedule,
        train,
        batches,
        steps,
        epoch,
    )


def _check_batch(config: FinetuneConfig, plan: mesh.MeshPlan) -> None:
    multiple = plan.data_size * config.microbatches
    if config.batch_size % multiple:
        raise ValueError(
            f"batch_size={config.batch_size} is not divisible by {multiple} "
            f"({plan.data_size} parts of the data axes x microbatches={config.microbatches}); "
            f"use a multiple of {multiple}"
        )


def _trainable(model: Any, freeze: tuple[str, ...], loaded: pretrained.Loaded) -> tuple[str, ...]:
    """The model's patterns, less the paths that ``freeze`` matches."""
    if not freeze:
        return tuple(model.trainable)
    paths = tree.paths(model.abstract())
    for pattern in freeze:
        if not any(tree.matches(path, (pattern,)) for path in paths):
            some = ", ".join(tree.paths(loaded.params)[:3])
            raise ValueError(f"freeze={pattern!r} matches no parameter; paths look like {some}")
    live = [p for p in paths if tree.matches(p, model.trainable) and not tree.matches(p, freeze)]
    if not live:
        raise ValueError(f"freeze={', '.join(freeze)} leaves nothing to train")
    return tuple(re.escape(path) for path in live)
