"""What a tensor is for, by its name: which ones a model may lack, and which make it another one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from steppe.models.families.names import Family

if TYPE_CHECKING:
    from steppe.train.merge.inputs import Input

# trunk   what every model of the family has; "layer": a part of it in a numbered layer
# head    of a task, or nothing that the family reads
# buffer  carries nothing, such as stored position ids
# unread  of a pooler that no head reads
# base    of the base alone, in a family that is not known
Role: TypeAlias = Literal["trunk", "layer", "head", "buffer", "unread", "base"]
# A tensor of a numbered layer belongs to the trunk, whatever the family.
LAYER = re.compile(r"(^|\.)(layers?|h|blocks?|resblocks)\.\d+\.")


class Roles(NamedTuple):
    """Names of a family's tensors, without its prefix, by what they are for.

    Attributes:
      trunk: what every model of the family has, as one pattern.
      pooler: of its pooler, which a file may lack.
      heads: of heads of all kinds.
      buffers: endings of tensors that carry nothing.
    """

    trunk: re.Pattern[str]
    pooler: frozenset[str]
    heads: frozenset[str]
    buffers: tuple[str, ...]

    @classmethod
    def of(cls, inputs: Sequence[Input]) -> Roles | None:
        """Those of all inputs together; None where a family or a configuration is not known."""
        trunk: set[str] = set()
        pooler: set[str] = set()
        heads: set[str] = set()
        buffers: tuple[str, ...] = ()
        for one in inputs:
            family = one.family
            if family is None:
                continue
            try:
                # What is tied, or has no bias, may be told by the tensors that a file holds.
                config = family.settle(family.read(one.raw), one.tensors)
            except (KeyError, TypeError, ValueError):
                return None
            trunk |= {name.tensor for name in family.names(config)}
            pooler |= {name.tensor for name in family.pooler}
            for kind in family.heads:
                heads |= head_names(config, family, kind)
            buffers += family.ignored
        if not trunk:
            return None
        # "{}" stands for the number of a layer.
        forms = (re.escape(name).replace(r"\{\}", r"\d+") for name in sorted(trunk - pooler))
        return cls(re.compile("|".join(forms)), frozenset(pooler), frozenset(heads), buffers)


def role_of(
    name: str, roles: Roles | None, *, in_base: bool, in_models: bool, pooled: bool
) -> Role:
    """What a tensor that some inputs lack is for.

    Args:
      name: without the family's prefix.
      roles: None = not known; then what base and models have is taken for the trunk.
      in_base, in_models: whether the base has it, and any of the models.
      pooled: whether the head of one of these models reads the pooler.
    """
    layered = LAYER.search(name) is not None
    if roles is None:
        if layered:
            return "layer"
        if not in_base:
            return "head"
        return "trunk" if in_models else "base"
    if roles.trunk.fullmatch(name):
        return "layer" if layered else "trunk"
    if name in roles.pooler:
        return "trunk" if pooled else "unread"
    if name in roles.heads:
        return "head"
    if name.endswith(roles.buffers):
        return "buffer"
    return "layer" if layered else "head"


def head_names(config: Any, family: Family, kind: str) -> set[str]:
    """Tensors of a kind of head on a network."""
    count = 1 if kind == "regression" else 2
    names = family.heads[kind].of(config.with_head(family.head(kind, count, 0.0)))
    return {name.tensor for name in names if name.path.startswith("head/")}
