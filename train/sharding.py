"""Sharding rules: which mesh axes split which dimension of a leaf, found by its path.

A rule is a regular expression on a whole path with one mesh axis (several, or None) for each
dimension; the first that matches counts. Every family of ``steppe.models`` has such a table for
its parameters; overlays, teachers and further players put their own beside it under a prefix, and
what shadows parameters (moments, averages, masks) lies like them, see ``MeshPlan.mirror``.

=========  ===================================================================================
axis       splits
=========  ===================================================================================
data       the batch
fsdp       the batch, and the dimension of every matrix that "model" leaves whole
model      heads, feed-forward and vocabulary (tensor parallel)
seq        the tokens of hidden states between layers; no parameter (see ``models.layout``)
expert     the experts of a stack [L, E, ...] where a table names it; no network has any yet
=========  ===================================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from steppe.models import tree

Axis = str | tuple[str, ...] | None
Axes = tuple[Axis, ...]
Rules = Sequence[tuple[str, Sequence[str | tuple[str, ...] | None]]]

REPLICATE: Rules = ((".*", ()),)


def names(axis: str | Iterable[str] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a rule names."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def frozen(rules: Rules | None) -> tuple[tuple[str, Axes], ...]:
    """Rules as a hashable value; None = everything is whole on every device."""
    return tuple(
        (pattern, tuple(tuple(a) if isinstance(a, list) else a for a in axes))
        for pattern, axes in (REPLICATE if rules is None else rules)
    )


def named(rules: Rules) -> set[str]:
    """Every mesh axis that some rule names."""
    return {name for _, axes in rules for axis in axes for name in names(axis)}


def spec(
    rules: Rules, sizes: Mapping[str, int], path: str, shape: Sequence[int]
) -> tuple[Axis, ...]:
    """The mesh axes of each dimension of a leaf, without trailing Nones. A scalar has none.

    Args:
      sizes: mesh axis -> devices along it; axes of a rule that are not there are dropped.

    Raises:
      ValueError: no rule matches (one is suggested), the rule's rank is not the leaf's, or a
        dimension is not divisible by its mesh axis (the nearest sizes are named).
    """
    if not shape:
        return ()
    rule = next((rule for rule in rules if re.fullmatch(rule[0], path)), None)
    if rule is None:
        raise ValueError(
            f"no sharding rule covers {path!r} of shape {tuple(shape)}: add a rule, such as "
            f"{suggestion(path, shape)}, or ('.*', ()) at the end to replicate what is left"
        )
    pattern, axes = rule
    if axes and len(axes) != len(shape):
        raise ValueError(
            f"rule {pattern!r} names {len(axes)} axes {axes}, but {path!r} has "
            f"{len(shape)} dimensions {tuple(shape)}"
        )
    out: list[Axis] = []
    for dim, axis in enumerate(axes):
        present = tuple(name for name in names(axis) if name in sizes)
        parts = math.prod(sizes[name] for name in present)
        if shape[dim] % parts:
            raise ValueError(
                f"dimension {dim} of {path!r} has size {shape[dim]}, not divisible by the "
                f"{parts} devices of mesh axis {'+'.join(present)!r}; nearest sizes of the axis "
                f"{_or(near(shape[dim], parts))}, of the dimension "
                f"{_or(_multiples(shape[dim], parts))}"
            )
        out.append(present if len(present) > 1 else present[0] if present else None)
    # P(None, None) and P() are the same placement but compare unequal, which would make a
    # checkpoint or a compiled step look different from its twin.
    while out and out[-1] is None:
        out.pop()
    return tuple(out)


def near(size: int, parts: int) -> list[int]:
    """The divisors of ``size`` on both sides of ``parts``, the smaller one first."""
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below = [n for n in divisors if n < parts][-1:]
    return below + [n for n in divisors if n > parts][:1]


def uncovered(rules: Rules, params: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the leaves that no rule matches, scalars apart."""
    return {
        path: tuple(leaf.shape)
        for path, leaf in tree.flatten(params).items()
        if leaf.shape and not any(re.fullmatch(pattern, path) for pattern, _ in rules)
    }


def check(rules: Rules, params: Any) -> None:
    """Raises ValueError where leaves are covered by no rule, with a rule for each of them."""
    found = uncovered(rules, params)
    if not found:
        return
    some = [f"{path!r} {shape}" for path, shape in list(found.items())[:3]]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    made = dict.fromkeys(suggestion(path, shape) for path, shape in found.items())
    raise ValueError(
        f"no sharding rule covers {', '.join(some)}{more}: add {', '.join(list(made)[:3])}"
    )


def suggestion(path: str, shape: Sequence[int]) -> str:
    """A rule, as it would be written, for a leaf that none covers.

    The longer of a matrix's two dimensions is taken for the one that heads, feed-forward or a
    vocabulary give it, and split by "model", the other by "fsdp"; layers and what else stands in
    front of a matrix, and leaves without one, are whole.
    """
    layers = int(tree.is_stacked(path))
    inner = len(shape) - layers
    split: Axes = (None,) * inner
    if inner >= 2:
        wide = shape[-1] >= shape[-2]
        split = (None,) * (inner - 2) + (("fsdp", "model") if wide else ("model", "fsdp"))
    return repr((re.escape(path).replace("\\-", "-"), (None,) * layers + split))


def _multiples(size: int, parts: int) -> list[int]:
    low = size // parts * parts
    return ([low] if low else []) + [low + parts]


def _or(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
