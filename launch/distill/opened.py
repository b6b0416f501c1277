"""Teacher and student: opened, cut, and checked against each other before anything is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from steppe.data.text import Tokenizer
from steppe.launch import config as config_
from steppe.launch import kinds, opening, pieces, setup
from steppe.launch.config import DataConfig
from steppe.launch.distill import schemes
from steppe.launch.distill.settings import TEACHER, DistillConfig
from steppe.models import pretrained, shrink
from steppe.models.families import faithful
from steppe.train import distill


@dataclass(frozen=True)
class Source:
    """A model before its weights are read.

    Attributes:
      given: as the user wrote it.
      origin: where it is.
      bare: its configuration, without a head.
      tokenizer: its own.
    """

    given: str
    origin: setup.Origin
    bare: Any
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Both:
    """What the two sides are, before their weights are read.

    Attributes:
      teacher, student: the student's is the model that it is, or is cut from.
      vocab: common size of two vocabularies that are padded differently; None = they are equal,
        or nothing is compared over them.
      one_reading: whether both have one tokenizer, so that they can read the same tokens.
    """

    teacher: Source
    student: Source
    vocab: int | None
    one_reading: bool


def find(config: DistillConfig) -> Both:
    """Both sides, checked as far as that goes without their weights.

    Raises:
      ValueError: no teacher or student is named, a model of another kind than the task, more
        layers than there are, tokenizers that cannot be compared.
      FileNotFoundError: no such model.
    """
    if not config.teacher:
        raise ValueError("no teacher is named: steppe distill --teacher MODEL --student MODEL")
    cut = config.cut
    if not cut.source:
        raise ValueError(
            "no student is named: --student MODEL, or --student teacher:layers=3 for one that is "
            "cut from the teacher"
        )
    teacher = _source(config.teacher, config.data.task)
    same = cut.source in (TEACHER, config.teacher)
    student = teacher if same else _source(cut.source, config.data.task)
    for name, most in (
        ("layers", student.bare.layers),
        ("heads", student.bare.heads),
        ("ffn_width", student.bare.ffn_width),
        ("width", student.bare.width),
    ):
        if cut.sizes.get(name, 1) > most:
            raise ValueError(
                f"{name}={cut.sizes[name]} is more than the {most} of {student.given}, which the "
                "student is cut from"
            )
    if not same:
        try:
            setup.check_fit(config.data, teacher.bare.max_length)
        except ValueError as error:
            raise ValueError(f"the teacher {teacher.given}: {error}") from error
    one, vocab = (True, None) if same else _agreed(config, student, teacher)
    if not one and config.scheme == "features":
        raise ValueError(
            "scheme='features' compares token by token, and the two models have different "
            f"tokenizers ({student.given} and {teacher.given}): use kd, dkd, atkd or dwt"
        )
    return Both(teacher, student, vocab, one)


def _agreed(config: DistillConfig, student: Source, teacher: Source) -> tuple[bool, int | None]:
    """(whether both can read the same tokens, ``vocab`` of :class:`Both`).

    Raises:
      ValueError: they cannot, and token by token is how they are to be compared.
    """
    written = config.data.task in schemes.WRITTEN_TASKS
    try:
        common = distill.check_tokenizers(student.tokenizer, teacher.tokenizer)
    except ValueError as error:
        if written:
            raise ValueError(_across(config, error)) from error
        return False, None
    new = distill.first_unknown(student.tokenizer, teacher.tokenizer)
    if not written:
        # A token that only one of them has would be another text to the other.
        equal = distill.first_unknown(teacher.tokenizer, student.tokenizer) is None
        return new is None and (equal or config.scheme == "features"), None
    if new is not None:
        differ = f"the tokenizers differ: id {new[0]} is {new[1]!r} to the student and none"
        raise ValueError(_across(config, ValueError(f"{differ} to the teacher")))
    sizes = student.bare.vocab_size, teacher.bare.vocab_size
    return True, None if sizes[0] == sizes[1] else min(common, *sizes)


def _source(given: str, task: str) -> Source:
    origin = opening.resolve(given)
    bare = pretrained.load_config(origin.weights)
    kinds.check_task(task, bare, given)
    tokenizer = Tokenizer.open(origin.tokenizer)
    setup.check_vocabulary(tokenizer, bare.vocab_size, origin.tokenizer)
    return Source(given, origin, bare, tokenizer)


def _across(config: DistillConfig, error: ValueError) -> str:
    first = str(error).split(". A divergence")[0].split(": they are not")[0]
    if config.scheme == "seqkd":
        said = "The teacher's texts are learnt as its own tokens here; across tokenizers"
    else:
        said = f"scheme={config.scheme!r} compares token by token; across tokenizers"
    return (
        f"{first}. {said} sequence-level distillation (SeqKD) works in two commands: let the "
        f"teacher write (steppe generate {config.teacher} --prompts FILE --out TEXTS.jsonl) and "
        "fine-tune the student on it (steppe finetune --data.source file:TEXTS.jsonl --data.task "
        "chat --data.answer text)"
    )


# The teacher ---------------------------------------------------------------------------------


def load_teacher(config: DistillConfig, source: Source) -> pretrained.Loaded:
    """The teacher with its head.

    Raises:
      ValueError: it has none of the kind that the task needs; parameters that are no numbers.
    """
    loaded = _with_head(config, source)
    path = opening.not_finite(loaded.params)
    if path is not None:
        raise ValueError(
            f"the teacher {source.given} holds NaN or infinity in {path!r}: nothing can be "
            "learnt from it; look at how it was trained and saved"
        )
    return loaded


def _with_head(config: DistillConfig, source: Source) -> pretrained.Loaded:
    head = kinds.head_of(_kind(config.data.task))
    # Its head is its own: a fresh one would teach noise.
    loaded = pretrained.load(source.origin.weights, dtype=config.teacher_dtype)
    if head == "lm" and loaded.model.config.head is None:
        # Saved without the class of a head; a tied one needs nothing more.
        loaded = pretrained.load(source.origin.weights, head="lm", dtype=config.teacher_dtype)
        if loaded.fresh:
            raise ValueError(f"{source.given} holds no output layer ({loaded.fresh[0]} is missing)")
    held = loaded.model.config.head
    if held is not None and held.kind == head:
        return loaded
    if config.scheme == "features":
        return loaded
    has = "no head" if held is None else f"a {held.kind} head"
    cure = (
        f"fine-tune it first: steppe finetune --model {source.given} "
        f"--data.source {config.data.source} --data.task {config.data.task} --out RUN, then "
        "--teacher RUN"
        if head == "classification"
        else "take a language model"
    )
    raise ValueError(f"the teacher {source.given} has {has}, but {head} is distilled; {cure}")


def _kind(task: str) -> str:
    return "lm" if task in schemes.WRITTEN_TASKS else "classification"


def classes(config: DistillConfig, teacher: pretrained.Loaded) -> DataConfig:
    """The data settings with the classes in the teacher's order, whose logits are compared.

    Raises:
      ValueError: the settings name other classes than the teacher, or in another order.
    """
    names = named(teacher)
    if config.data.task not in schemes.CLASS_TASKS or not names:
        return config.data
    given = config.data.classes
    if given and given != names:
        raise ValueError(
            f"data.classes names {', '.join(given)}, but the teacher knows {', '.join(names)} in "
            "this order; leave data.classes out"
        )
    return dataclasses.replace(config.data, classes=names)


def named(loaded: pretrained.Loaded) -> tuple[str, ...]:
    """The classes of a fitted head; empty where they are not named."""
    labels = loaded.labels or ()
    head = loaded.model.config.head
    if head is None or head.kind != "classification" or len(labels) != head.num_labels:
        return ()
    return () if all(label.startswith("LABEL_") for label in labels) else tuple(labels)


def check_classes(teacher: pretrained.Loaded, data: setup.Data, given: str) -> None:
    """Raises ValueError where the teacher's head has another number of classes than the task."""
    head = teacher.model.config.head
    if data.task.kind != "classification" or head is None:
        return
    if head.num_labels != data.task.num_labels:
        raise ValueError(
            f"the teacher {given} knows {head.num_labels} classes "
            f"({', '.join(teacher.labels or ())}), the data has {data.task.num_labels} "
            f"({', '.join(data.task.label_names)}): they must be the same"
        )


# The student ---------------------------------------------------------------------------------


def load_student(
    config: DistillConfig, source: Source, data: setup.Data, plan: Any
) -> pretrained.Loaded:
    """The student with the task's head, cut to its sizes, in float32.

    Raises:
      ValueError: it was made for another task or other classes; sizes that it cannot be cut to.
    """
    _check_run(config, source)
    loaded = pieces.load(config.training(), source.origin, data, plan)
    fresh = any(path.startswith("head/") for path in loaded.fresh)
    labels = tuple(label for label in loaded.labels or () if not label.startswith("LABEL_"))
    if data.task.kind == "classification" and labels and labels != tuple(data.task.label_names):
        raise ValueError(
            f"the student {source.given} was made for the classes {', '.join(labels)}, the task "
            f"has {', '.join(data.task.label_names)}: take the pretrained model that it came from"
        )
    if data.task.kind == "lm" and fresh:
        raise ValueError(f"the student {source.given} holds no output layer ({loaded.fresh[0]})")
    sizes = config.cut.sizes
    if not sizes:
        return loaded
    made = shrink.student(loaded.model, loaded.params, **sizes)
    try:
        faithful.check_model(made.model)
    except ValueError as error:
        raise ValueError(
            f"a student of {config.cut.name} could not be saved after its training: {error}; "
            "choose a width and heads whose ratio is that of the model"
        ) from error
    return dataclasses.replace(loaded, model=made.model, params=made.params)


def _check_run(config: DistillConfig, source: Source) -> None:
    """A run of another task has a head of that task, whatever its folder says."""
    folder = Path(source.given).expanduser()
    if source.given.startswith("asset:") or not (folder / "model").is_dir():
        return
    task = config_.read(folder).data.task
    if _kind(task) != _kind(config.data.task) or task not in (
        *schemes.CLASS_TASKS,
        *schemes.WRITTEN_TASKS,
    ):
        raise ValueError(
            f"the student {source.given} is a run of data.task={task!r}, not of "
            f"{config.data.task!r}: take the pretrained model that it came from"
        )


# Two readings --------------------------------------------------------------------------------

PREFIX = "teacher_"
FIELDS = ("input_ids", "attention_mask", "token_type_ids")


def reading(model: Any) -> Any:
    """The teacher as a model that reads ``teacher_input_ids`` and so on of a batch."""

    def apply(params: Any, batch: Any, **options: Any) -> Any:
        own = {k.removeprefix(PREFIX): v for k, v in batch.items() if k.startswith(PREFIX)}
        return model.apply(params, own, **options)

    return dataclasses.replace(model, apply=apply)


class Readings:
    """Batches that hold the same texts as the teacher's tokenizer has them, too.

    They have the position of the batches inside, and so can be resumed as they can.
    """

    def __init__(self, batches: Any, dataset: Any, lengths: tuple[int, ...]) -> None:
        """
        Args:
          batches: of the student, with ``example_index``.
          dataset: the same examples under the teacher's tokenizer.
          lengths: padded lengths.
        """
        self._batches, self._dataset, self._lengths = batches, dataset, lengths
        self.shapes = batches.shapes
        self.get_state, self.set_state = batches.get_state, batches.set_state
        self.steps_per_epoch = getattr(batches, "steps_per_epoch", 0)

    def __iter__(self) -> Any:
        return (self._with(batch) for batch in self._batches)

    def __next__(self) -> dict[str, Any]:
        return self._with(next(self._batches))

    def _with(self, batch: Any) -> dict[str, Any]:
        from steppe.data.collate import collate

        rows = batch["example_index"]
        longest = max((int(self._dataset.lengths[row]) for row in rows if row >= 0), default=1)
        length = next(size for size in self._lengths if size >= longest)
        theirs = collate(self._dataset, rows, length)
        return {**batch, **{PREFIX + k: theirs[k] for k in FIELDS if k in theirs}}


def size_on_disk(path: Path) -> int:
    """Bytes of the weights of a model folder or file."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def key_of(config: DistillConfig) -> jax.Array:
    """The key of what is made beside the student's own parameters."""
    return jax.random.fold_in(jax.random.key(config.seed), 1)
