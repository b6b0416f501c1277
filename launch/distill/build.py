"""From the settings of ``steppe distill`` to the pieces that ``steppe finetune`` trains with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from steppe.data import batches as batches_
from steppe.launch import pieces as pieces_
from steppe.launch import setup
from steppe.launch.distill import objectives, opened, stored, texts
from steppe.launch.distill.settings import DistillConfig
from steppe.launch.pieces import Pieces
from steppe.models.model import Model
from steppe.train import distill
from steppe.train.distill.ctcd import by_branch
from steppe.train.distill.pairs import EXTRA, STUDENT, TEACHER


@dataclass(frozen=True)
class Distilled:
    """A student beside its teacher, ready for training.

    Attributes:
      config: resolved settings.
      both: where the two come from.
      pieces: as of ``steppe finetune``; its model is both, and answers as the student.
      student: the model that trains, under its overlay where there is one.
      teacher: the teacher, which reads what ``evaluation`` gives it.
      readings: split -> dataset under the teacher's tokenizer; empty where both have one.
    """

    config: DistillConfig
    both: opened.Both
    pieces: Pieces
    student: Model
    teacher: Model
    readings: dict[str, Any]

    def evaluation(self, split: str) -> Any:
        """One pass over a split, as the teacher reads it too."""
        passes = self.pieces.evaluation(split)
        if not self.readings:
            return passes
        lengths = setup.buckets(self.pieces.config.data)
        return opened.Readings(passes, self.readings[split], lengths or ())


def build(config: DistillConfig) -> Distilled:
    """Opens and checks both models and the data, and builds the step. Writes nothing but the
    store of the settings, where there is one and this is no dry run.

    Args:
      config: resolved.

    Raises:
      ValueError, OSError: whatever is wrong with the settings, the models or the data.
    """
    both = opened.find(config)
    taught = opened.load_teacher(config, both.teacher)
    together = config.scheme == "ctcd"
    if together and config.drop >= 0:
        taught = dataclasses.replace(taught, model=pieces_.with_drop(taught.model, config.drop))
    training = dataclasses.replace(
        config.training(), model=both.student.given, data=opened.classes(config, taught)
    )
    data = setup.prepare(training.data, both.student.origin, both.student.bare)
    opened.check_classes(taught, data, both.teacher.given)
    check_labels(data, training.data)
    plan = pieces_.plan_of(training, both.student.bare)
    loaded = opened.load_student(config, both.student, data, plan)
    origin = dataclasses.replace(both.student.origin, name=_name(config, both))
    base = pieces_.build(training, data=data, loaded=loaded, origin=origin)
    if together:
        check_one_reading(both)
        base = dataclasses.replace(base, tx=_each(base.tx, training.optim.clip_norm))
        # One norm of both gradients would couple them.
        unclipped = dataclasses.replace(training.optim, clip_norm=0.0)
        training = dataclasses.replace(training, optim=unclipped)
    readings = {} if both.one_reading else _readings(both, data, training.data)
    teacher = taught.model if both.one_reading else opened.reading(taught.model)
    whole = distill.Teacher(teacher, taught.params)
    own = distill.Teacher(teacher)  # its parameters stand in the state
    more = objectives.extra(config, base.model, teacher)
    joint = distill.with_teacher(base.model, whole, extra=more)
    tokenizer = data.tokenizer
    assert tokenizer is not None
    store = None
    if config.store is not None and not config.dry_run:
        store = stored.ready(config, taught, data, both.vocab)
    objective = objectives.make(config, base.model, own, tokenizer, both.vocab, store)
    joint_plan = dataclasses.replace(base.plan, rules=tuple(joint.axes))
    train = pieces_.make_step(
        training, joint, data.task.kind, base.tx, joint_plan, objective=objective
    )
    batches = _batches(config, base, readings)
    if store is not None:
        batches = stored.Stored(batches, store)
    replayed = batches if isinstance(batches, texts.Texts) else None
    step: Any = texts.wrap(
        config,
        train,
        base.model,
        own,
        tokenizer,
        plan=joint_plan,
        steps=base.steps,
        texts=replayed,
        vocab=both.vocab,
    )
    beside = {TEACHER: taught.params}
    if together:  # a student that is cut from it may hold the same arrays
        beside = {TEACHER: jax.tree.map(jnp.copy, taught.params)}
    if more is not None:
        beside[EXTRA] = more(opened.key_of(config))
    trainable = tuple(rf"{STUDENT}/(?:{pattern})" for pattern in base.trainable)
    if together:
        trainable += tuple(rf"{TEACHER}/(?:{pattern})" for pattern in taught.model.trainable)
    pieces = dataclasses.replace(
        base,
        model=joint,
        trainable=trainable if more is None else (*trainable, rf"{EXTRA}/.*"),
        plan=joint_plan,
        train=step,
        batches=batches,
        branch=STUDENT,
        beside=beside,
        extra=texts.empty(config, joint_plan),
        heard=None if replayed is None else replayed.heard,
        teacher=taught.model,
    )
    return Distilled(config, both, pieces, base.model, teacher, readings)


def _name(config: DistillConfig, both: opened.Both) -> str:
    sizes = "".join(f", {name} {value}" for name, value in config.cut.sizes.items())
    return f"{both.student.given}{sizes}"


def check_one_reading(both: opened.Both) -> None:
    """Raises ValueError where the two could not learn from each other's answers token by token."""
    if not both.one_reading:
        raise ValueError(
            f"scheme='ctcd' trains {both.teacher.given} and {both.student.given} on the same "
            "tokens, but their tokenizers differ; cut the student from the teacher, or take "
            "another scheme"
        )


def _each(tx: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
    """``tx`` once for the student and once for the teacher, each with its own clip (0 = none)."""
    if clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    return by_branch({STUDENT: tx, TEACHER: tx})


def check_labels(data: setup.Data, config: Any) -> None:
    """Raises ValueError where not one label of the training split counts."""
    shift = data.task.kind == "lm"
    buckets = setup.buckets(config, training=True)
    problem: ValueError | None = None
    for batch in batches_.evaluate(data.splits["train"], 64, buckets=buckets):
        try:
            distill.check_batch(batch, shift=shift)
        except ValueError as error:
            problem = error
        else:
            return
    assert problem is not None
    raise ValueError(f"the training split: {problem}") from problem


def _readings(both: opened.Both, data: setup.Data, config: Any) -> dict[str, Any]:
    """The same examples as the teacher's tokenizer has them."""
    return {
        name: setup.encode(
            data.task, list(dataset.records), both.teacher.tokenizer, config, training=False
        )
        for name, dataset in data.splits.items()
    }


def _batches(config: DistillConfig, base: Pieces, readings: dict[str, Any]) -> Any:
    batches = base.batches
    if readings:
        lengths = setup.buckets(base.config.data, training=True)
        batches = opened.Readings(batches, readings["train"], lengths or ())
    if config.policy == "replay":
        return texts.Texts(batches)
    if config.scheme == "dwt" and config.weight is None:
        start, end = config.soft_start, config.soft_end
        assert start is not None
        assert end is not None
        schedule = distill.alpha_schedule(start, end, steps=base.steps)
        return Weighted(batches, schedule)
    return batches


class Weighted:
    """Batches that carry the weight of the teacher's loss, with the shapes of those inside."""

    def __init__(self, batches: Any, schedule: Any) -> None:
        made = distill.with_alpha(batches, schedule)
        self.shapes = batches.shapes
        self._next = made.__next__
        self.get_state, self.set_state, self.skip = made.get_state, made.set_state, made.skip

    def __iter__(self) -> Weighted:
        return self

    def __next__(self) -> dict[str, Any]:
        return self._next()
