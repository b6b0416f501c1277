"""A student of fewer layers that learns from the merged model and serves all of its tasks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steppe.data import batches as batches_
from steppe.launch import setup
from steppe.launch.tour.graph import Done, Result
from steppe.launch.tour.world import MODEL, World
from steppe.models import pretrained, shrink, tree
from steppe.models.tree import Params
from steppe.optim import basic
from steppe.train import distill, loop, metrics, step
from steppe.train.continual import classes, replay
from steppe.train.merge import heads, joined

CLIP = 1.0


def learn(world: World, teacher: Done, seed: int, folder: Path) -> Result:
    """Cuts, distils and exports the student; its head holds the classes of all tasks.

    Every row is about its own task's classes alone, on both sides, so that the divergence is
    that of the task's answers.
    """
    config = world.config
    taught, params = joined.join(heads.load(teacher.folder / MODEL))
    made = shrink.student(taught.config.build(), params, layers=config.layers)
    student = classes.grouped(made.model, taught.groups)
    model = classes.grouped(taught.config.build(), taught.groups)
    joint = distill.with_teacher(student, distill.Teacher(model, params))
    fed = mixed(world, taught, seed)
    steps = math.ceil(config.student_epochs * fed.steps_per_epoch)
    schedule = basic.schedule("linear", config.student_lr, steps, warmup=config.optim.warmup)
    tx = basic.adamw(schedule, weight_decay=config.optim.weight_decay)
    both = {"student": made.params, "teacher": params}
    state = step.init(jax.random.key(seed), joint, tx, params=both, donate=True)
    objective = distill.kd(
        student, distill.Teacher(model), kind=config.divergence, beta=config.beta
    )
    said = _Said(world, steps)
    state = loop.run(
        step.make(objective, tx, clip_norm=CLIP),
        state,
        classes.Tagged(fed, taught.groups),
        steps=steps,
        log_every=max(1, min(10, steps // 10)),
        writers=[metrics.JsonLines(folder / "metrics.jsonl"), said],
    )
    own: Params = state.full()["student"]
    write(world, folder / MODEL, joined.Joined(made.model.config, taught.classes), own)
    return {"steps": steps, "loss": said.loss, "parameters": tree.count(own)}


def mixed(world: World, what: joined.Joined, seed: int) -> Any:
    """Batches of all tasks' training texts, shuffled together; labels number the columns."""
    parts = []
    for name, task in world.tasks.items():
        data, start = task.splits["train"], what.columns(name).start
        labels = np.asarray(data.labels) + np.int32(start)
        parts.append(dataclasses.replace(data, labels=labels.astype(np.int32)))
    return batches_.train(
        replay.joined(parts),
        world.config.batch_size,
        seed=seed,
        buckets=setup.buckets(world.config.data, training=True),
    )


def write(world: World, folder: Path, what: joined.Joined, params: Params) -> None:
    """The folder that ``transformers`` opens, with TASK/CLASS as names of the classes."""
    own = world.origin.tokenizer
    pretrained.save(
        folder,
        what.config.build(),
        params,
        labels=what.labels,
        tokenizer_dir=own if own.is_dir() else None,
    )


def read(folder: Path) -> tuple[joined.Joined, Params]:
    """What :func:`write` wrote."""
    loaded = pretrained.load(folder)
    return joined.read(loaded.model, loaded.labels), loaded.params


class _Said:
    """A writer of rows that tells how far the student is, and keeps the last loss."""

    def __init__(self, world: World, steps: int) -> None:
        self._world, self._steps = world, steps
        self.loss: float | None = None

    def write(self, step: int, kind: str, values: Any) -> None:
        """Shows a row."""
        loss = values.get("loss")
        if kind == "train" and loss is not None:
            self.loss = float(loss)
        shown = "" if self.loss is None else f", divergence {self.loss:.4f}"
        self._world.tell(f"student{shown}", step, self._steps)

    def truncate(self, step: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""
