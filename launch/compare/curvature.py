"""How flat the minimum is that a run found, on a fixed few of its training examples."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from steppe.data import batches as batches_
from steppe.launch import setup
from steppe.launch.compare.settings import CompareConfig
from steppe.launch.pieces import Pieces
from steppe.train.evaluate import sharpness
from steppe.train.evaluate.curvature import NotFinite
from steppe.train.types import Objective, TrainState

# Enough for two digits of the largest eigenvalue, which is well apart from the others.
ITERATIONS, TOLERANCE = 15, 0.02
ASCENT_STEPS = 5
ROWS = 64  # of a batch; the loss is that of all batches together


def measure(
    config: CompareConfig, pieces: Pieces, state: TrainState, objective: Objective
) -> dict[str, float]:
    """Largest eigenvalue of the Hessian of the trainable parameters, and the ball around them.

    The loss is that of the training objective without dropout, with the labels that the run
    was given. The examples are the first of the draw, whatever their length, so that all
    methods of a seed have the same.

    Args:
      objective: one object for all runs of a model: programs are kept by it.

    Returns:
      top_eigenvalue; ball_loss, the largest loss found within ``config.ball`` of the
      parameters; ball_gap, by how much it is above the loss at them. Nothing where the loss
      has no second derivative that is a number there: the scores of the run are kept.
    """
    batches = few(config, pieces)
    loss = sharpness.batched_loss(objective, state.frozen, batches, plan=pieces.plan)
    params = state.extra.get("ema", state.params)  # of the weights that are scored
    try:
        top = sharpness.top_eigenvalues(
            loss, params, jax.random.key(0), iterations=ITERATIONS, tol=TOLERANCE
        )
    except NotFinite:
        return {}
    ball = sharpness.ball_max(loss, params, config.ball, steps=ASCENT_STEPS)
    return {
        "top_eigenvalue": float(top.values[0]),
        "ball_loss": float(ball.worst),
        "ball_gap": float(ball.gap),
    }


def few(config: CompareConfig, pieces: Pieces) -> list[Any]:
    """The first ``config.curvature_examples`` training examples, in batches of one length: the
    shortest bucket that holds all of them."""
    train = pieces.data.splits["train"]
    wanted = min(config.curvature_examples or len(train), len(train))
    encoded = setup.encode(
        pieces.data.task,
        list(train.records[:wanted]),
        pieces.data.tokenizer,
        pieces.config.data,
        training=False,
    )
    encoded = dataclasses.replace(encoded, labels=train.labels[:wanted])
    parts = pieces.plan.data_size
    size = -(-min(wanted, ROWS) // parts) * parts
    lengths = setup.buckets(pieces.config.data)
    if lengths is not None:  # None: images
        longest = int(encoded.lengths.max())
        lengths = (next((n for n in lengths if n >= longest), lengths[-1]),)
    return list(batches_.evaluate(encoded, size, buckets=lengths))
