"""A mesh for a number of devices: as little splitting of the model as its memory asks for.

Meshes are tried with the ``model`` axis growing from 1 (sums over it are waited for in every
layer), and for each with the ``fsdp`` axis growing from 1 (gathers over it can be overlapped); what
is left is ``data``. The first whose state, gradients and estimated activations fit is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from steppe.launch.plan import memory
from steppe.launch.plan.accelerators import Accelerator
from steppe.launch.plan.memory import USABLE
from steppe.launch.plan.work import Work
from steppe.train import mesh
from steppe.train.types import TrainState

GIB = 2.0**30


class Proposal(NamedTuple):
    """A mesh, axis -> size, and the sentences that say why."""

    mesh: dict[str, int]
    why: tuple[str, ...]


def propose(work: Work, accelerator: Accelerator, devices: int, slices: int = 1) -> Proposal:
    """The first mesh that fits.

    Raises:
      ValueError: none does; says what is missing and how many devices would do, or what the
        dimensions allow.
    """
    state = work.state()
    limit = USABLE * accelerator.memory
    best: tuple[float, dict[str, int]] | None = None
    refused: dict[str, str] = {}
    smallest: dict[int, float] = {}
    for sizes in candidates(devices, min(accelerator.domain, devices // slices), slices):
        try:
            need = needed(work, sizes, state)
        except ValueError as error:
            refused.setdefault(str(error), _by(sizes))
            continue
        model = sizes.get("model", 1)
        smallest[model] = min(need, smallest.get(model, math.inf))
        if best is None or need < best[0]:
            best = need, sizes
        if need <= limit:
            return Proposal(sizes, _why(sizes, need, limit, smallest, refused))
    if best is None:
        first, where = next(iter(refused.items()))
        raise ValueError(f"no mesh of {devices} devices is possible: {first} (mesh {where})")
    raise ValueError(_too_small(work, state, accelerator, devices, best, limit))


def candidates(devices: int, domain: int, slices: int = 1) -> Iterator[dict[str, int]]:
    """Meshes of ``data, fsdp, model`` in the order in which they are tried; axes of 1 left out."""
    for model in _divisors(devices):
        if model > domain:
            break
        for fsdp in _divisors(devices // model):
            data = devices // model // fsdp
            if data % slices:
                continue
            sizes = {"data": data, "fsdp": fsdp, "model": model}
            yield {n: s for n, s in sizes.items() if s > 1} or {"data": 1}


def needed(work: Work, sizes: dict[str, int], state: TrainState | None = None) -> float:
    """Bytes of a device on a mesh: state, gradients, copies and estimated activations."""
    plan = mesh.abstract(sizes, work.model.axes)
    shaped = work.state(plan) if state is None else _placed(state, plan)
    return memory.held(work, plan, shaped).total + memory.activations(work, plan)


def _placed(state: TrainState, plan: mesh.MeshPlan) -> TrainState:
    import jax

    placed: TrainState = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
        state,
        plan.state(state),
    )
    return placed


def _why(
    sizes: dict[str, int],
    need: float,
    limit: float,
    smallest: dict[int, float],
    refused: dict[str, str],
) -> tuple[str, ...]:
    model, fsdp = sizes.get("model", 1), sizes.get("fsdp", 1)
    out = [f"it takes about {_gib(need)} of {_gib(limit)} usable a device"]
    if model > 1:
        below = max((m for m in smallest if m < model), default=None)
        if below is not None:
            out.append(
                f"the smallest model axis that fits: model={below} takes at least "
                f"{_gib(smallest[below])} even with all other devices on fsdp"
            )
    elif fsdp > 1:
        out.append("fsdp is as small as the state allows, so that gathers stay short")
    else:
        out.append("the whole state fits a device, so that only gradients move")
    out += [f"mesh {where} is not possible: {text}" for text, where in list(refused.items())[:2]]
    return tuple(out)


def _too_small(
    work: Work,
    state: TrainState,
    accelerator: Accelerator,
    devices: int,
    best: tuple[float, dict[str, int]],
    limit: float,
) -> str:
    need, sizes = best
    more = devices
    enough = None
    while more <= 64 * devices and enough is None:
        more *= 2
        for trial in candidates(more, min(accelerator.domain, more)):
            try:
                if needed(work, trial, state) <= limit:
                    enough = more
                    break
            except ValueError:
                continue
    said = "with these settings 64 times as many devices would not do either"
    if enough:
        said = f"{enough} devices would do"
    return (
        f"{work.config.model} does not fit {devices} devices of {accelerator.name}: even mesh "
        f"{_by(sizes)} takes about {_gib(need)} a device and {_gib(limit)} are usable; {said}, or "
        + "; ".join(cures(work))
    )


def cures(work: Work) -> list[str]:
    """What to change where memory is short, the least harm first."""
    c = work.config
    out = []
    if c.compute_dtype == "float32":
        out.append("compute_dtype=bfloat16 (half the activations)")
    if c.batch_size and c.batch_size % (2 * c.microbatches) == 0:
        out.append(f"microbatches={2 * c.microbatches} (the same result, half the activations)")
    elif work.length > 1:
        out.append(f"length={max(work.length // 2, 1)} (half the tokens, a quarter of the scores)")
    if c.teacher and not (c.token_chunk or c.vocab_chunk) and work.kind == "lm":
        out.append("token_chunk=512 (no logits of both models at once)")
    if c.remat != "full":
        out.append("remat=full (keeps a layer's input only, about a third more FLOPs)")
    adapted = bool(c.overlay or c.lora.rank)
    if adapted and c.frozen_dtype == "float32":
        out.append("frozen_dtype=bfloat16 (half the base)")
    if c.teacher and c.teacher_dtype == "float32":
        out.append("teacher_dtype=bfloat16 (half the teacher)")
    if not adapted:
        out.append("lora.rank=8 (no optimiser state but the adapters')")
    return out


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _by(sizes: dict[str, int]) -> str:
    return ",".join(f"{n}={s}" for n, s in sizes.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
