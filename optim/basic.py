"""The optimiser that fine-tuning starts from: AdamW with schedules, thin over optax.

Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from steppe.models import tree

# Biases, norms and everything else with one dimension a layer are not decayed, as usual.
NO_DECAY = (r"(.*/)?(bias|scale)",)
SCHEDULES = ("linear", "cosine", "constant")


def adamw(
    learning_rate: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    no_decay: Sequence[str] = NO_DECAY,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose decay spares the parameters that match ``no_decay``.

    Args:
      learning_rate: a number or a schedule (step -> number).
      b1, b2, eps: of Adam.
      weight_decay: decoupled: each step subtracts learning_rate * weight_decay * parameter.
      no_decay: regular expressions on whole paths.

    Raises:
      ValueError: a rate outside its range.
    """
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")

    def decayed(params: Any) -> Any:
        return tree.map_with_path(lambda path, _: not tree.matches(path, no_decay), params)

    return optax.with_extra_args_support(
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed)
    )


def schedule(
    kind: str, peak: float, steps: int, *, warmup: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from 0, then linear or cosine decay to ``end``, or a constant rate.

    Args:
      kind: "linear", "cosine" or "constant".
      peak: largest rate.
      steps: length of the run, in updates.
      warmup: share of the steps over which the rate rises; the first update's rate is above 0.
      end: rate after the last update.

    Raises:
      ValueError: an unknown kind, peak or end < 0, steps < 1, warmup outside [0, 1).
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    if not peak >= 0 or not end >= 0:
        raise ValueError(f"learning rates must be >= 0, got peak={peak}, end={end}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if not 0.0 <= warmup < 1.0:
        raise ValueError(f"warmup must be in [0, 1), got {warmup}")
    rise = round(warmup * steps)
    fall = max(steps - rise, 1)
    after: optax.Schedule
    if kind == "constant":
        after = optax.constant_schedule(peak)
    elif kind == "linear":
        after = optax.linear_schedule(peak, end, fall)
    else:
        after = optax.cosine_decay_schedule(peak, fall, alpha=end / peak if peak else 0.0)
    if rise == 0:
        return after
    # Counts from 1: an update with rate 0 would be a step for nothing.
    up = optax.linear_schedule(peak / rise, peak, max(rise - 1, 1))
    return optax.join_schedules([up, after], [rise])
