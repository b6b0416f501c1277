"""Whether a family's files can hold a configuration: what is written is read back at once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from steppe.models import tree
from steppe.models.families.names import Family

# Fields that say how a model is trained or run, and not what it computes.
RUNNING = frozenset(
    {"head", "drop", "attn_drop", "ffn_drop", "drop_path", "remat", "unroll", "attention"}
)
# Fields that may be left open, and the property that says what that comes to.
MEANING = {"kv_heads": "groups", "head_dim": "dim", "query_scale": "scale", "windowed": "local"}


def essence(config: Any) -> dict[str, Any]:
    """What a configuration computes, as plain values."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name in RUNNING:
            continue
        value = getattr(config, field.name)
        meaning = MEANING.get(field.name)
        if meaning is not None and hasattr(config, meaning):
            value = getattr(config, meaning)
        out[field.name] = essence(value) if dataclasses.is_dataclass(value) else value
    return out


def check(family: Family, config: Any, raw: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Refuses a model that the family's files cannot describe, before anything is written.

    Args:
      raw: the config.json that is about to be written.
      tensors: names of the tensors that are, without the family's prefix.

    Raises:
      ValueError: what would be read back computes something else (the setting is named).
    """
    try:
        back = family.read(json.loads(json.dumps(raw))).with_head(config.head)
        back = family.settle(back, tensors)
    except ValueError as error:
        raise ValueError(f"files of the family {family.name!r} cannot hold it: {error}") from error
    ours, theirs = essence(config), essence(back)
    for name, value in ours.items():
        if theirs[name] != value:
            raise ValueError(
                f"files of the family {family.name!r} cannot hold {name}={value!r}: they would be "
                f"read back as {theirs[name]!r}; save under a family that has that setting"
            )


def check_model(model: Any) -> None:
    """Refuses a model whose parameters could not be saved, before they are trained.

    Raises:
      ValueError: as :func:`check`.
    """
    from steppe.models import families

    family = families.family(model.config.family)
    abstract = tree.flatten(model.abstract())
    found = (n.tensors(abstract[n.path].shape) for n in family.names(model.config))
    prefix = f"{family.prefix}." if family.prefix else ""
    tensors = [name.removeprefix(prefix) for group in found for name in group]
    raw = {"model_type": family.name, **family.write(model.config)}
    check(family, model.config, raw, tensors)
