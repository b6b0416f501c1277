"""The step that a plan is about, as abstract values: model, state, batch, transform, objective.

Nothing here allocates what a model is made of: parameters, teacher, optimiser state and batch are
shapes, dtypes and shardings, over a mesh of devices that need not exist.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from steppe.launch import config as config_
from steppe.launch import estimate, kinds, optimiser, overlays, pieces
from steppe.launch.plan import shapes
from steppe.launch.plan.settings import PlanConfig
from steppe.models import tree
from steppe.models.families import family
from steppe.models.model import Model
from steppe.models.overlays import lora
from steppe.models.overlays.overlay import BASE
from steppe.models.tree import Params
from steppe.train import distill, step
from steppe.train.distill.pairs import STUDENT, TEACHER
from steppe.train.mesh import MeshPlan
from steppe.train.objectives import basic
from steppe.train.types import Objective, TrainState

# Tasks that a plan assumes where no recipe says another one, by kind of model.
TASKS = {
    "encoder": "classification",
    "decoder": "lm",
    "encoder-decoder": "seq2seq",
    "vision": "image",
}
LENGTHS = {"decoder": 4096}
_RATES = ("drop", "attn_drop", "ffn_drop")


@dataclass(frozen=True)
class Work:
    """A step without devices.

    Attributes:
      config: settings.
      bare: the network that trains, without overlay or teacher.
      model: with them: its ``axes`` are the sharding rules of all parameters.
      params: shapes and dtypes of all parameters.
      trainable: regexes of the paths that train.
      tx: the optimiser.
      objective: the loss.
      kind: of the task.
      length: tokens of a row (0 for images).
    """

    config: PlanConfig
    bare: Model
    model: Model
    params: Params
    trainable: tuple[str, ...]
    tx: Any
    objective: Objective
    kind: str
    length: int

    @property
    def gradients(self) -> float:
        """Gradients that a step takes."""
        return optimiser.gradients(self.config.training())

    @property
    def dear(self) -> float:
        """Share of the steps that do what a method does now and then: a new mask, a new ascent."""
        own = optimiser.options(self.config.training())
        return 1.0 / float(own.get("refresh_every") or own.get("look_every") or 1)

    def rows(self, plan: MeshPlan) -> int:
        """Rows of a step on a mesh.

        Raises:
          ValueError: the mesh and the micro-batches do not divide those of the settings.
        """
        least = plan.data_size * self.config.microbatches
        rows = self.config.batch_size or least
        if rows % least:
            raise ValueError(
                f"batch_size={rows} is not divisible by {least} ({plan.data_size} parts of the "
                f"data axes x microbatches={self.config.microbatches}); use a multiple of "
                f"{least}, or fewer devices on data and fsdp"
            )
        return rows

    def shape(self, rows: int) -> tuple[int, ...]:
        """Shape of a batch as ``estimate.batch_shapes`` takes it."""
        c = self.bare.config
        if self.kind == "image":
            return (rows, c.image_size, c.image_size, c.channels)
        return (rows, self.length, self.length) if self.kind == "seq2seq" else (rows, self.length)

    def state(self, plan: MeshPlan | None = None) -> TrainState:
        """The abstract training state, sharded over the plan's mesh."""
        return step.abstract(
            self.model,
            self.tx,
            plan,
            params=self.params,
            trainable=self.trainable,
            ema=self.config.ema or None,
        )

    def step(self, plan: MeshPlan) -> step.TrainStep:
        """The step on a mesh."""
        c = self.config
        return step.make(
            self.objective,
            self.tx,
            plan,
            microbatches=c.microbatches,
            compute_dtype=None if c.compute_dtype == "float32" else c.compute_dtype,
            clip_norm=c.optim.clip_norm or None,
            ema=c.ema or None,
        )

    def batch(self, plan: MeshPlan) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract batch, its rows split over the mesh."""
        kind = "classification" if self.kind == "image" else self.kind
        types = bool(getattr(self.bare.config, "types", 0))
        made = estimate.batch_shapes(kind, self.shape(self.rows(plan)), types=types, packed=False)
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=plan.rows())
            for name, leaf in made.items()
        }

    def model_flops(self, rows: int) -> float:
        """Model FLOPs of a step, by counting (see ``estimate.model_flops``); no recomputation.

        Frozen bases need no gradient of their own: 2/3 of a gradient. A teacher runs forward.
        """
        shape = self.shape(rows)
        one = estimate.model_flops(self.bare, shape)
        if self.config.overlay or self.config.lora.rank:
            one *= 2 / 3
        total = self.gradients * one
        if self.config.teacher:
            teacher = _network(self.config, self.config.teacher, self.kind)
            total += self.gradients * estimate.model_flops(teacher, shape) / 3
        return total


def build(config: PlanConfig) -> Work:
    """The step of the settings.

    Raises:
      ValueError: an unknown model, a task that it does not have, sizes beyond its positions,
        overlay or distillation settings that do not fit.
    """
    if not config.model:
        raise ValueError("no model is named: steppe plan MODEL --on v5p-128, such as llama-70b")
    found = shapes.config_of(config.model)
    which = kinds.kind_of(found)
    task: str = config.data.task
    if task not in kinds.TASKS[which] or config.data == config_.DataConfig():
        task = TASKS[which]  # nobody said another one
    kinds.check_task(task, found, config.model)
    kind = {"pair": "classification", "chat": "lm"}.get(task, task)
    bare = _network(config, config.model, kind, config.layers)
    most = getattr(bare.config, "max_length", None) or 0
    length = config.length or min(LENGTHS.get(which, 128), most or 128)
    if most and length > most:
        raise ValueError(
            f"length={length} is longer than the {most} positions of {config.model}; lower it"
        )
    params = bare.abstract()
    model, trainable = bare, tuple(bare.trainable)
    if config.overlay or config.lora.rank:
        chosen = (
            overlays.parse(config.overlay)
            if config.overlay
            else lora.overlay(
                rank=config.lora.rank, alpha=config.lora.alpha, sites=config.lora.sites
            )
        )
        params = _as(params, config.frozen_dtype)
        model = chosen.bind(bare, frozen=params)
        made = jax.eval_shape(model.init, jax.random.key(0))
        params = tree.merge(made, {BASE: params})
        trainable = tuple(model.trainable)
    if config.probe:
        raise ValueError("probe fits a head on features: there is no step to plan; leave it out")
    if config.freeze:
        trainable = pieces.trainable(model, config.freeze)
    objective = basic.for_task(model, "classification" if kind == "image" else kind)
    if config.teacher:
        model, params, trainable, objective = _distilled(config, kind, model, params, trainable)
    tx = optimiser.transform(config.training(), lambda count: 1e-4, 1000)
    return Work(
        config,
        bare,
        model,
        params,
        trainable,
        tx,
        objective,
        kind,
        0 if kind == "image" else length,
    )


def _distilled(
    config: PlanConfig, kind: str, model: Model, params: Params, trainable: tuple[str, ...]
) -> tuple[Model, Params, tuple[str, ...], Objective]:
    if kind not in ("lm", "classification"):
        raise ValueError(f"a teacher goes with lm and classification, not with {kind!r}")
    network = _network(config, config.teacher, kind)
    weights = _as(network.abstract(), config.teacher_dtype)
    joint = distill.with_teacher(model, distill.Teacher(network, weights))
    objective = distill.kd(
        model,
        distill.Teacher(network),
        kind=config.divergence,
        ratio=config.weight,
        temperature=config.temperature,
        top_k=config.top_k,
        vocab_chunk=config.vocab_chunk,
        token_chunk=config.token_chunk,
    )
    both = {STUDENT: params, TEACHER: weights}
    return joint, both, tuple(rf"{STUDENT}/(?:{p})" for p in trainable), objective


def _network(config: PlanConfig, name: str, kind: str, layers: int = 0) -> Model:
    """The network of a shape under the head of the task, with the settings' dropout and remat."""
    found = shapes.config_of(name)
    if layers:
        found = _cut(found, layers, name)
    head = kinds.head_of("classification" if kind == "image" else kind)
    made = family(found.family).head(head, 1 if head in ("lm", "mlm", "regression") else 2, 0.0)
    fields = {f.name for f in dataclasses.fields(found)}
    change: dict[str, Any] = dict.fromkeys(fields & set(_RATES), max(config.drop, 0.0))
    if config.remat and "remat" in fields:
        change["remat"] = config.remat
    model: Model = dataclasses.replace(found, **change).with_head(made).build()
    return model


def _cut(found: Any, layers: int, name: str) -> Any:
    most = getattr(found, "layers", 0)
    if layers > most:
        raise ValueError(f"layers={layers} is more than the {most} layers of {name}")
    windowed = getattr(found, "windowed", None)
    change = {} if windowed is None else {"windowed": windowed[:layers]}
    return dataclasses.replace(found, layers=layers, **change)


def _as(params: Params, dtype: str) -> Params:
    return jax.eval_shape(lambda p: tree.cast(p, dtype), params)


def mesh_of(config: PlanConfig) -> dict[str, int] | None:
    """The mesh of the settings; None where one is to be proposed.

    Raises:
      ValueError: its product is not the number of devices.
    """
    if not config.mesh:
        return None
    sizes: Mapping[str, int] = config_.parse_mesh(config.mesh, config.place.devices)
    product = math.prod(sizes.values())
    if product != config.place.devices:
        raise ValueError(
            f"mesh {config.mesh!r} has {product} devices, but {config.on} has "
            f"{config.place.devices}: choose sizes whose product is {config.place.devices}"
        )
    return dict(sizes)
