"""The types of a run's examples, for the balancing constraint of LoRAMoE."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.data.dataset import Dataset
from steppe.launch.config import BalanceConfig
from steppe.models import tree
from steppe.train.objectives import loramoe_loss
from steppe.train.types import Batch, LossOut, Objective, Params

TYPES = "sample_type"


def types_of(config: BalanceConfig, dataset: Dataset) -> np.ndarray:
    """The type of every example of a split: int32 [N], 1 = of the first, 0 = of the other.

    Raises:
      ValueError: rows of several texts, a column that the data lacks, one type only.
    """
    if dataset.packing is not None:
        raise ValueError(
            "balance: a packed row holds texts of both types; --data.no-packed gives each its own"
        )
    missing = next((r for r in dataset.records if config.column not in r), None)
    if missing is not None:
        raise ValueError(
            f"balance.column={config.column!r} is no column of the data; it has "
            f"{', '.join(map(str, missing))}"
        )
    values = np.asarray([str(r[config.column]) for r in dataset.records])
    kinds = (values == config.first).astype(np.int32)[dataset.record_index]
    if kinds.all() or not kinds.any():
        seen = sorted(set(values.tolist()))
        shown = ", ".join(map(repr, seen[:8])) + (", ..." if len(seen) > 8 else "")
        raise ValueError(
            f"balance.first={config.first!r} makes all {len(kinds)} examples of one type: "
            f"{config.column} has the values {shown}"
        )
    return kinds


def check_experts(delta: Params) -> None:
    """Two halves need an even number of experts.

    Raises:
      ValueError: an odd one.
    """
    for path, leaf in tree.flatten(delta).items():
        if path.endswith("/router") and leaf.shape[-1] % 2:
            raise ValueError(
                f"balance.beta sends examples to two halves of the experts: their number must be "
                f"even, got {leaf.shape[-1]}; --overlay loramoe:experts={leaf.shape[-1] + 1}"
            )


def balanced(config: BalanceConfig, objective: Objective, dataset: Dataset) -> Objective:
    """``objective`` with the constraint, on batches of ``dataset``.

    A batch names its examples in ``example_index``; rows that fill it up count for nothing.

    Raises:
      ValueError: as :func:`types_of`; what ``loramoe_loss`` raises.
    """
    kinds = types_of(config, dataset)
    inner = loramoe_loss(objective, beta=config.beta, delta=config.delta, types=TYPES)

    def typed(params: Params, batch: Batch, key: jax.Array) -> LossOut:
        rows: Any = jnp.maximum(jnp.asarray(batch["example_index"]), 0)
        return inner(params, {**batch, TYPES: jnp.asarray(kinds)[rows]}, key)

    return typed
