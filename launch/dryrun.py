"""``steppe finetune --dry-run``: what the run would need."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from steppe.launch import estimate, optimiser
from steppe.launch.pieces import Pieces
from steppe.train import step
from steppe.train.gradient import known
from steppe.train.types import TrainState


def show(pieces: Pieces) -> dict[str, Any]:
    """Prints model, data, parameter count, memory per device and FLOPs of a step.

    The largest shape of batch counts. Nothing is written and no state is allocated.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    config = pieces.config
    shape, state, batch = abstract(pieces)
    found = estimate.estimate(pieces.train, state, batch)
    gradients = optimiser.gradients(config)
    found["gradients"] = gradients
    found["model_flops"] = gradients * estimate.model_flops(pieces.loaded.model, shape)
    found["steps"] = pieces.steps
    found["shapes"] = sorted(pieces.batches.shapes)

    console = Console()
    table = Table(box=None, show_header=False)
    for name, address in (("model", config.model), ("data", config.data.source)):
        table.add_row(name, escape(address))
    table.add_row("optimiser", optimiser.describe(config))
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("trainable", f"{found['trainable']:,}")
    if "peak_bytes" in found:
        table.add_row("state per device", _mib(found["state_bytes"]))
        table.add_row(f"peak per device, batch {_by(shape)}", _mib(found["peak_bytes"]))
    table.add_row("FLOPs a step, matmuls", f"{found['model_flops']:.3e}")
    table.add_row("shapes of batches", ", ".join(map(_by, found["shapes"])))
    table.add_row("steps", f"{pieces.steps}  ({pieces.epoch} an epoch)")
    for name, count in pieces.data.counts().items():
        table.add_row(f"examples, {name}", f"{count:,}")
    console.print(table)
    return found


def tried(pieces: Pieces) -> None:
    """Traces the step on shapes, so that settings which the step alone can refuse (groups that do
    not divide the rows, heads that do not divide a layer) are refused before anything is written.

    Raises:
      ValueError: whatever the step finds wrong.
    """
    _, state, batch = abstract(pieces)
    with known(pieces.plan):
        jax.eval_shape(pieces.train.fn, state, batch)


def abstract(pieces: Pieces) -> tuple[tuple[int, ...], TrainState, dict[str, Any]]:
    """The largest shape of batch, and what a step of it takes, as shapes."""
    config = pieces.config
    shape = max(pieces.batches.shapes, key=math.prod)
    state = step.abstract(
        pieces.model,
        pieces.tx,
        pieces.plan,
        params=pieces.model.abstract(),
        trainable=pieces.trainable,
        ema=config.ema or None,
    )
    tokenizer = pieces.data.tokenizer
    shapes = estimate.batch_shapes(
        pieces.data.task.kind,
        shape,
        types=tokenizer is not None and tokenizer.has_token_types,
        packed=getattr(pieces.data.splits["train"], "packing", None) is not None,
    )
    if config.balance.beta:  # it asks whose rows these are
        shapes["example_index"] = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=pieces.plan.rows())
        for name, leaf in shapes.items()
    }
    return shape, state, batch


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
