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
from steppe.train.types import Objective, TrainState

# Enough for two digits of the largest eigenvalue, which is well apart from the others.
ITERATIONS, TOLERANCE = 15, 0.02
ASCENT_STEPS = 5


def measure(
    config: CompareConfig, pieces: Pieces, state: TrainState, objective: Objective
) -> dict[str, float]:
    """Largest eigenvalue of the Hessian of the trainable parameters, and the ball around them.

    The loss is that of the training objective without dropout, with the labels that the run
    was given. The examples are the first of the draw, so that all methods of a seed have the
    same.

    Args:
      objective: one object for all runs of a model: programs are kept by it.

    Returns:
      top_eigenvalue; ball_loss, the largest loss found within ``config.ball`` of the
      parameters; ball_gap, by how much it is above the loss at them.
    """
    batches = few(config, pieces)
    loss = sharpness.batched_loss(objective, state.frozen, batches, plan=pieces.plan)
    params = state.extra.get("ema", state.params)  # of the weights that are scored
    top = sharpness.top_eigenvalues(
        loss, params, jax.random.key(0), iterations=ITERATIONS, tol=TOLERANCE
    )
    ball = sharpness.ball_max(loss, params, config.ball, steps=ASCENT_STEPS)
    return {
        "top_eigenvalue": float(top.values[0]),
        "ball_loss": float(ball.worst),
        "ball_gap": float(ball.gap),
    }


def few(config: CompareConfig, pieces: Pieces) -> Any:
    """``config.curvature_examples`` training examples as one batch of the shortest length that
    so many fit in."""
    train = pieces.data.splits["train"]
    wanted = min(config.curvature_examples or len(train), len(train))
    size = -(-wanted // pieces.plan.data_size) * pieces.plan.data_size
    lengths = setup.buckets(pieces.config.data)
    if lengths is None:  # images
        return list(batches_.evaluate(train, size))[:1]
    length = next((n for n in lengths if (train.lengths <= n).sum() >= wanted), lengths[-1])
    chosen = [i for i in range(len(train)) if train.lengths[i] <= length][:wanted]
    encoded = setup.encode(
        pieces.data.task,
        [train.records[i] for i in chosen],
        pieces.data.tokenizer,
        pieces.config.data,
        training=False,
    )
    encoded = dataclasses.replace(encoded, labels=train.labels[chosen])
    return list(batches_.evaluate(encoded, size, buckets=(length,)))
