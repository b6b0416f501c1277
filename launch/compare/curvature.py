"""How flat the minimum is that a run found, on a fixed few of its training examples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

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
    was given. The examples are the same for all methods of a seed.

    Args:
      objective: one object for all runs of a model: programs are kept by it.

    Returns:
      top_eigenvalue; ball_loss, the largest loss found within ``config.ball`` of the
      parameters; ball_gap, by how much it is above the loss at them. What is no number there
      is left out: the scores of the run are kept.
    """
    batches = few(config, pieces)
    loss = sharpness.batched_loss(objective, state.frozen, batches, plan=pieces.plan)
    params = state.extra.get("ema", state.params)  # of the weights that are scored
    ball = sharpness.ball_max(loss, params, config.ball, steps=ASCENT_STEPS)
    found = {"ball_loss": float(ball.worst), "ball_gap": float(ball.gap)}
    try:
        top = sharpness.top_eigenvalues(
            loss, params, jax.random.key(0), iterations=ITERATIONS, tol=TOLERANCE
        )
        found = {"top_eigenvalue": float(top.values[0]), **found}
    except NotFinite:
        pass
    return {name: value for name, value in found.items() if math.isfinite(value)}


def few(config: CompareConfig, pieces: Pieces) -> list[Any]:
    """``config.curvature_examples`` training examples, drawn at random, in batches of one length:
    the shortest bucket that holds all of them."""
    train = pieces.data.splits["train"]
    wanted = min(config.curvature_examples or len(train), len(train))
    # Not the first ones: a source may be ordered by class.
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:wanted])
    encoded = setup.encode(
        pieces.data.task,
        [train.records[int(i)] for i in chosen],
        pieces.data.tokenizer,
        pieces.config.data,
        training=False,
    )
    encoded = dataclasses.replace(encoded, labels=train.labels[chosen])
    parts = pieces.plan.data_size
    size = -(-min(wanted, ROWS) // parts) * parts
    lengths = setup.buckets(pieces.config.data)
    if lengths is not None:  # None: images
        longest = int(encoded.lengths.max())
        lengths = (next((n for n in lengths if n >= longest), lengths[-1]),)
    return list(batches_.evaluate(encoded, size, buckets=lengths))
