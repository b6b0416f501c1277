"""Student and teacher side by side: which parameters are whose, and what both say of a batch.

The teacher's parameters never train, have no optimiser state and are never donated. For a step
that runs on a mesh, or has a teacher of any size, ``with_teacher`` makes one model of both:

  params = {"student": ..., "teacher": ...}        frozen below "teacher", sharded by its rules

An objective that is given other parameters takes them for the student's, and closes over the
teacher's: right for experiments, but a compiled program then holds a whole copy of the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from steppe.models.decoder import DecoderConfig
from steppe.models.model import Decode, Model, ModelOut, Parts, Rules
from steppe.train.distill import divergences
from steppe.train.distill.readout import Readout, readout_of
from steppe.train.types import Batch, Params

STUDENT, TEACHER, EXTRA = "student", "teacher", "extra"


class TeacherLike(Protocol):
    """A model with its parameters: :class:`Teacher`, or what ``pretrained.load`` returns."""

    @property
    def model(self) -> Model: ...

    @property
    def params(self) -> Any: ...


class Teacher(NamedTuple):
    """A model with its parameters.

    Attributes:
      model: any model over the student's vocabulary.
      params: its parameters; None where they are part of the training state.
    """

    model: Model
    params: Any = None


def with_teacher(
    student: Model, teacher: TeacherLike, *, extra: Callable[[jax.Array], Params] | None = None
) -> Model:
    """The student as a model whose parameters hold the frozen teacher too.

    ``init``, ``apply``, ``decode`` and what trains are the student's, its parameters below
    ``student/``. To start from pretrained parameters, give
    ``step.init(..., params={"student": ..., "teacher": ...})``.

    Args:
      extra: makes further parameters, which train and are replicated, below ``extra/``:
        projections of features, for instance.

    Raises:
      ValueError: the teacher comes without parameters.
    """
    if teacher.params is None:
        raise ValueError("with_teacher needs the teacher's parameters, got None")
    made = beside({STUDENT: student, TEACHER: teacher.model}, front=STUDENT)
    given = {TEACHER: teacher.params}
    if student.given is not None:
        given[STUDENT] = student.given

    def init(key: jax.Array) -> Params:
        if extra is None:
            return {STUDENT: student.init(key)}
        own, more = jax.random.split(key)
        return {STUDENT: student.init(own), EXTRA: extra(more)}

    trains = tuple(rf"{STUDENT}/(?:{pattern})" for pattern in student.trainable)
    rules = made.axes
    if extra is not None:
        trains, rules = (*trains, rf"{EXTRA}/.*"), (*rules, (rf"{EXTRA}/.*", ()))
    return dataclasses.replace(made, init=init, given=given, trainable=trains, axes=rules)


def beside(models: Mapping[str, Model], *, front: str) -> Model:
    """One model of several: parameters ``{name: ...}``; it answers as the one called ``front``."""
    first = models[front]

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(models))
        return {name: model.init(k) for (name, model), k in zip(models.items(), keys, strict=True)}

    def inside(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args, **options: fn(params[front], *args, **options)

    def apply(params: Params, batch: Batch, **options: Any) -> ModelOut:
        return first.apply(params[front], batch, **options)

    rules: Rules = tuple(
        (rf"{name}/(?:{pattern})", axes)
        for name, model in models.items()
        for pattern, axes in model.axes
    )
    return Model(
        config=first.config,
        init=init,
        apply=apply,
        axes=rules,
        sites=first.sites,
        trainable=tuple(
            rf"{name}/(?:{pattern})"
            for name, model in models.items()
            for pattern in model.trainable
        ),
        parts=None if first.parts is None else Parts(*(inside(fn) for fn in first.parts)),
        decode=None if first.decode is None else Decode(*(inside(fn) for fn in first.decode)),
    )


def parameters(params: Params, teacher: TeacherLike | None) -> tuple[Params, Params]:
    """(the student's, the teacher's) parameters, the latter without gradient.

    Raises:
      ValueError: the teacher's are nowhere.
    """
    if STUDENT in params and TEACHER in params:
        return params[STUDENT], jax.lax.stop_gradient(params[TEACHER])
    if teacher is None or teacher.params is None:
        raise ValueError(
            f"params hold no {TEACHER!r} beside {STUDENT!r}, and the teacher was given without "
            "parameters: use with_teacher(student, teacher) for the state, or give "
            "Teacher(model, params)"
        )
    return params, jax.lax.stop_gradient(teacher.params)


# What both say -------------------------------------------------------------------------------


class Dense(NamedTuple):
    """Logits [..., V] of both at the same positions, and the label [...] and mask of each."""

    z_s: jax.Array
    z_t: jax.Array
    labels: jax.Array
    mask: jax.Array


class Hidden(NamedTuple):
    """Hidden states of both, what reads them, and the label and mask of each position."""

    h_s: jax.Array
    readout_s: Readout
    h_t: jax.Array
    readout_t: Readout
    labels: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Pair:
    """A student and a teacher over one vocabulary.

    Attributes:
      student, teacher: see the module.
      shift: whether the logits at t answer for the label at t + 1; None = for language models.
      vocab: common size of vocabularies that are padded differently; None = they are equal.
    """

    student: Model
    teacher: TeacherLike
    shift: bool | None = None
    vocab: int | None = None

    def __post_init__(self) -> None:
        for name in ("model", "params"):
            if not hasattr(self.teacher, name):
                raise TypeError(
                    "teacher must be Teacher(model, params) or what pretrained.load returns, got "
                    f"{type(self.teacher).__name__}"
                )
        sizes = [_size(self.student), _size(self.teacher.model)]
        known = [size for size in sizes if size is not None]
        if self.vocab is not None:
            if isinstance(self.vocab, bool) or not isinstance(self.vocab, int) or self.vocab < 2:
                raise ValueError(f"vocab must be a whole number >= 2, or None, got {self.vocab!r}")
            if known and self.vocab > min(known):
                raise ValueError(
                    f"vocab={self.vocab} is more than the smaller vocabulary, {min(known)}: give "
                    "the number of tokens that both know"
                )
        elif None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(divergences.unlike(*known))

    @property
    def classes(self) -> int | None:
        """What the two distributions are over, where the student's configuration says it."""
        return _size(self.student) if self.vocab is None else self.vocab

    @property
    def shifted(self) -> bool:
        """``shift``, with what None stands for filled in."""
        return shifts(self.student) if self.shift is None else self.shift

    def dense(self, params: Params, batch: Batch, key: jax.Array | None) -> Dense:
        """Logits of both, float32; 0 where no label counts.

        Raises:
          ValueError: logits that fit neither each other nor the labels, rows longer than a
            model's positions, no label at all.
        """
        own, other = parameters(params, self.teacher)
        self._check_length(batch)
        labels, mask = targets(batch, self.shifted)
        out_s = self.student.apply(own, batch, rng=key, train=key is not None)
        out_t = self.teacher.model.apply(other, batch, train=False)
        z_s = require_logits(out_s, STUDENT)[..., : self.vocab]
        z_t = require_logits(out_t, TEACHER)[..., : self.vocab]
        divergences.check_logits(z_s, z_t)
        if z_s.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits of shape {z_s.shape} do not fit labels of shape {labels.shape}; the head "
                "and the task must be of the same kind"
            )
        z_s, z_t = (divergences.shown(mask, z) for z in (z_s, z_t))
        return Dense(z_s, jax.lax.stop_gradient(z_t), labels, mask)

    def hidden(self, params: Params, batch: Batch, key: jax.Array | None) -> Hidden:
        """Last hidden states of both, 0 where no label counts, with the matrices that read them.

        Raises:
          ValueError: as :meth:`dense`; a model whose output matrix is not known.
        """
        own, other = parameters(params, self.teacher)
        self._check_length(batch)
        labels, mask = targets(batch, self.shifted)
        h_s = self.student.apply(own, batch, rng=key, train=key is not None).hidden
        h_t = self.teacher.model.apply(other, batch, train=False).hidden
        h_s, h_t = (divergences.shown(mask, aligned(h, labels)) for h in (h_s, h_t))
        return Hidden(
            h_s,
            readout_of(self.student, own).cut(self.vocab),
            jax.lax.stop_gradient(h_t),
            readout_of(self.teacher.model, other).cut(self.vocab),
            labels,
            mask,
        )

    def _check_length(self, batch: Batch) -> None:
        ids = batch.get("input_ids")
        for name, model in ((STUDENT, self.student), (TEACHER, self.teacher.model)):
            most = getattr(model.config, "max_length", None)
            if ids is not None and most is not None and ids.shape[1] > most:
                raise ValueError(
                    f"the batch has rows of {ids.shape[1]} tokens, the {name} {most} positions: "
                    "cut the rows, or take a model with more"
                )


def require_logits(out: ModelOut, name: str) -> jax.Array:
    """Logits in float32.

    Raises:
      ValueError: the model has no head.
    """
    if out.logits is None:
        raise ValueError(f"the {name} has no head, so it returns no logits; load it with head=...")
    return out.logits.astype(jnp.float32)


def aligned(hidden: jax.Array, labels: jax.Array) -> jax.Array:
    """Hidden states of the labelled positions: rows that an overlay put in front are left out."""
    return hidden[:, hidden.shape[1] - labels.shape[1] :]


def targets(batch: Batch, shift: bool) -> tuple[jax.Array, jax.Array]:
    """(labels, float32 mask), moved to where the logits that answer for them stand.

    A negative label counts as masked.

    Raises:
      ValueError: no labels, or (outside jit) none that counts.
    """
    if "labels" not in batch:
        raise ValueError(
            "batch has no 'labels': give the target tokens, and label_mask for those that count"
        )
    labels = jnp.asarray(batch["labels"])
    mask = (labels >= 0).astype(jnp.float32)
    if batch.get("label_mask") is not None:
        mask = mask * jnp.asarray(batch["label_mask"]).astype(jnp.float32)
    if shift:
        labels = jnp.roll(labels, -1, axis=1)
        mask = jnp.roll(mask, -1, axis=1).at[:, -1].set(0.0)
    # Inside jit nobody knows the numbers yet; the loss is then 0 with weight 0, never NaN.
    if not isinstance(mask, jax.core.Tracer) and not bool((mask > 0).any()):
        raise ValueError(
            "no label counts: label_mask is 0 (or labels negative) at every position"
            + (" but the first" if shift else "")
            + ", so that there is nothing to learn from; check how the batch was masked"
        )
    return labels, mask


def check_batch(batch: Batch, *, shift: bool = True) -> None:
    """Raises ValueError for a batch on the host that holds nothing to learn from."""
    targets(batch, shift)


def shifts(model: Model) -> bool:
    """Whether the labels of a model are its inputs, one token later."""
    head = getattr(model.config, "head", None)
    return isinstance(model.config, DecoderConfig) and head is not None and head.kind == "lm"


def shards_of(size: int, given: int | None) -> int:
    """Parts of a vocabulary: ``given``, or for None the "model" axis of the mesh in use."""
    if given is not None:
        return given
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else int(mesh.shape.get("model", 1))
    return parts if size % parts == 0 else 1


def _size(model: Model) -> int | None:
    head = getattr(model.config, "head", None)
    if head is None:
        return None
    if head.kind in ("lm", "mlm"):
        return int(model.config.vocab_size)
    return int(head.num_labels)
