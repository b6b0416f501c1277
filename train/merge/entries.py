"""What ``heads.json`` says of the heads that stay with their tasks, checked before any work."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from steppe.models.families.names import Family
from steppe.models.heads import HeadConfig
from steppe.train.merge import heads
from steppe.train.merge.inputs import TASK_HEADS, Input, Report, declared


def check(report: Report) -> None:
    """Refuses heads that could not be opened again from the output.

    Raises:
      ValueError: a head that config.json declares is not whole or has other shapes, its settings
        are damaged, or a tensor that stays with its task holds NaN or infinity (names the file
        and the tensor or the key).
    """
    for one in report.models:
        found = declared(one)
        if found is not None and (found[0] in TASK_HEADS or report.apart.get(one.name)):
            _check_tensors(one, _head_config(one, *found), found[1])
        for name in report.apart.get(one.name, ()):
            tensor = one.tensors[name]
            moves = jnp.issubdtype(tensor.dtype, jnp.floating)
            if moves and not np.isfinite(np.array(one.read(name))).all():
                raise ValueError(
                    f"{tensor.file}: tensor {tensor.stored!r} holds NaN or infinity; the training "
                    "that made it diverged"
                )


def entry(one: Input) -> dict[str, Any]:
    """What ``heads.json`` says of a model's head.

    Raises:
      ValueError: settings in config.json that are no head's.
    """
    found = declared(one)
    if found is None:
        return {"kind": None, "labels": None}
    labels = _labels(one)
    head = _head_config(one, *found)
    return heads.describe(head, labels if labels and len(labels) == head.num_labels else None)


def _head_config(one: Input, kind: str, family: Family) -> HeadConfig:
    """The configuration of the head that a model declares.

    Raises:
      ValueError: ``id2label`` or ``classifier_dropout`` is none.
    """
    labels = _labels(one)
    count = {"regression": 1, "span": 2}.get(kind, len(labels) if labels else 2)
    given = one.raw.get("classifier_dropout")
    try:
        drop = 0.0 if given is None else float(given)
    except (TypeError, ValueError):
        drop = -1.0
    if not 0 <= drop < 1:
        raise ValueError(
            f"{one.folder / 'config.json'}: classifier_dropout must be a rate in [0, 1), "
            f"got {given!r}"
        )
    return family.head(kind, count, drop)


def _labels(one: Input) -> list[str] | None:
    table = one.raw.get("id2label")
    if not table:
        return None
    try:
        return [str(table[key]) for key in sorted(table, key=int)]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{one.folder / 'config.json'}: id2label must be an object of numbers and names such "
            f'as {{"0": "negative"}}, got {str(table)[:60]}'
        ) from error


def _check_tensors(one: Input, head: HeadConfig, family: Family) -> None:
    for name, (_, _, shape) in heads.stored(family.read(one.raw).with_head(head), family).items():
        tensor = one.tensors.get(name)
        if tensor is None:
            raise ValueError(
                f"{one.folder} lacks the tensor {name!r} of the {head.kind} head that its "
                "config.json declares; export the model again"
            )
        if tensor.shape != shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{tensor.file}: tensor {tensor.stored!r} of the {head.kind} head must be "
                f"{list(shape)} numbers with a point, got {tensor}; config.json has "
                f"{head.num_labels} labels"
            )
