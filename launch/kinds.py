"""Which kind of model serves which task: asked before anything large is read."""

from __future__ import annotations

from typing import Any

from steppe.models.families import family

# kind of model -> values of data.task
TASKS = {
    "encoder": ("classification", "pair", "regression", "token", "span", "mlm"),
    "decoder": ("lm", "chat", "classification", "pair", "regression"),
    "encoder-decoder": ("seq2seq",),
    "vision": ("image",),
}
# Kinds of task whose classes are the tokens of a vocabulary, as a text is written.
WRITTEN = ("lm", "seq2seq")


def kind_of(config: Any) -> str:
    """encoder, decoder, encoder-decoder or vision, of a model's configuration."""
    if hasattr(config, "image_size"):
        return "vision"
    if any(site.startswith("decoder.") for site in config.build().sites):
        return "encoder-decoder"
    return "decoder" if "lm" in family(config.family).heads else "encoder"


def head_of(kind: str) -> str:
    """The kind of head that a kind of task (``task.kind``) trains."""
    return "lm" if kind in WRITTEN else kind


def check_task(task: str, config: Any, name: str) -> None:
    """
    Args:
      task: ``data.task``.
      config: of the model, without its head.
      name: of the model, for the message.

    Raises:
      ValueError: models of this kind, or of this family, have no such task.
    """
    kind = kind_of(config)
    heads = family(config.family).heads
    served = [t for t in TASKS[kind] if head_of(_kind(t)) in heads]
    if task in served:
        return
    wanted = [k for k, tasks in TASKS.items() if task in tasks]
    if kind in wanted:
        raise ValueError(
            f"data.task={task!r} is no task of the family {config.family!r} ({name}); "
            f"it has {', '.join(served) or 'none'}"
        )
    raise ValueError(
        f"data.task={task!r} needs a model of kind {' or '.join(wanted)}, but {name} is of kind "
        f"{kind} ({config.family}); it can do {', '.join(served) or 'no task of these'}"
    )


def check_writer(config: Any, name: str) -> str:
    """The kind of a model that generates, by its configuration.

    Raises:
      ValueError: models of this kind write no text.
    """
    kind = kind_of(config)
    if kind not in ("decoder", "encoder-decoder"):
        raise ValueError(
            f"{name} is of kind {kind} ({config.family}) and writes no text; "
            "decoders (llama, gpt2, ...) and encoder-decoders (t5, marian, ...) do"
        )
    return kind


def check_writes(model: Any, name: str) -> str:
    """The same of a model that is built.

    Raises:
      ValueError: it writes no text, or lacks the head that it would need.
    """
    kind = check_writer(model.config.with_head(None), name)
    head = model.config.head
    if model.decode is None or head is None or head.kind != "lm":
        has = "no head" if head is None else f"a {head.kind} head"
        raise ValueError(f"{name} has {has}; writing text takes the head of a language model")
    return kind


def _kind(task: str) -> str:
    """``task.kind`` of a value of ``data.task``."""
    same = {"pair": "classification", "image": "classification", "chat": "lm"}
    return same.get(task, task)
