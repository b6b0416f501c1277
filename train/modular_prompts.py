"""How modular prompts are trained: many tasks at two speeds, then a new one in two stages.

  many tasks   router at ``router_lr``, modules and head at ``prompt_lr``, AdamW, a task a batch
  new task 1   steps [0, switch): the router alone, K numbers (a layer)
           2   from then on: prompts and head, the router stands still
  answer       the option whose first token begins the span and whose last token ends it best

A task is reading comprehension: the options stand in the text, separated, and the gold one is the
span to find. Its loss is ``objectives.span_ce``, the mean of two cross entropies.

Sun et al., ACL 2023, arXiv 2210.07565.

Deviations: stages freeze what does not train, where the published code gives it a learning rate of
1e-18 or less; the score of an option is the sum of its two logits (``how="product"`` as published,
which two negative logits turn round).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from steppe.models import tree
from steppe.train.types import Params

ROUTER, PROMPT = "router", "prompt"
Rate = float | Callable[[Any], Any]


def labels(params: Params) -> Params:
    """``router`` or ``prompt`` for every leaf of the trainable parameters."""
    return tree.map_with_path(
        lambda path, _: ROUTER if path.split(tree.SEPARATOR)[-1] == ROUTER else PROMPT, params
    )


def pretraining(
    *, router_lr: Rate = 1e-3, prompt_lr: Rate = 1e-3, weight_decay: float = 1e-4
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of many tasks at once; deep modules take 5e-4 and 1e-4.

    Args:
      weight_decay: of both; not known of the published runs, this is optax's default.
    """
    speeds = {
        ROUTER: optax.adamw(router_lr, weight_decay=weight_decay),
        PROMPT: optax.adamw(prompt_lr, weight_decay=weight_decay),
    }
    return optax.partition(speeds, labels)


def two_stage(
    switch: int,
    *,
    router_lr: Rate = 3e-3,
    prompt_lr: Rate = 2e-5,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a new task: the router before step ``switch``, all else from it on.

    What stands still is not moved by weight decay either, and begins its stage with fresh moments.

    Args:
      switch: the first step of the second stage; half of the steps as published.
      router_lr, prompt_lr: of the stages; 3e-4 for shallow prompts.

    Raises:
      ValueError: switch < 0.
    """
    if switch < 0:
        raise ValueError(f"switch must be >= 0 steps, got {switch}")
    router = optax.adamw(router_lr, weight_decay=weight_decay)
    prompts = optax.adamw(prompt_lr, weight_decay=weight_decay)
    stages = {
        ROUTER: optax.conditionally_mask(router, lambda step: step < switch),
        PROMPT: optax.conditionally_mask(prompts, lambda step: step >= switch),
    }
    return optax.partition(stages, labels)


def task_order(
    tasks: int, *, how: Literal["round-robin", "uniform"] = "round-robin", seed: int = 0
) -> Iterator[int]:
    """Endless numbers of tasks, one a batch.

    Args:
      how: ``round-robin``: every task once in each round, rounds in an order of their own;
        ``uniform``: independent draws.

    Raises:
      ValueError: tasks < 1 or an unknown order.
    """
    if tasks < 1:
        raise ValueError(f"tasks must be >= 1, got {tasks}")
    if how not in ("round-robin", "uniform"):
        raise ValueError(f"how must be round-robin or uniform, got {how!r}")

    def numbers() -> Iterator[int]:
        rng = np.random.default_rng(seed)
        while True:
            drawn = (
                rng.permutation(tasks) if how == "round-robin" else rng.integers(0, tasks, tasks)
            )
            yield from (int(n) for n in drawn)

    return numbers()


def option_scores(
    logits: Float[Array, "B T 2"],
    options: Int[Array, "B C 2"],
    *,
    how: Literal["sum", "product"] = "sum",
) -> Float[Array, "B C"]:
    """Scores of the options of every text; the largest is the answer.

    Args:
      logits: of the first and of the last token of the span.
      options: columns of the first and last token of each option; negative = no option (texts
        have different numbers of them), which scores minus infinity.
      how: of the two logits.

    Raises:
      ValueError: an unknown how, or shapes that do not fit.
    """
    if how not in ("sum", "product"):
        raise ValueError(f"how must be sum or product, got {how!r}")
    if logits.ndim != 3 or logits.shape[-1] != 2 or options.shape[::2] != (len(logits), 2):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and options of shape {tuple(options.shape)} "
            "are not [B, T, 2] and [B, C, 2]"
        )
    there = jnp.maximum(options, 0)
    begin, end = (jnp.take_along_axis(logits[..., i], there[..., i], axis=1) for i in (0, 1))
    score: jax.Array = begin + end if how == "sum" else begin * end
    return jnp.where((options >= 0).all(-1), score, -jnp.inf)
