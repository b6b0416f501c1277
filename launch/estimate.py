"""``--dry-run``: what a run would need, from abstract values; nothing is allocated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.train.step import TrainStep
from steppe.train.types import TrainState


def batch_shapes(kind: str, rows: int, length: int, types: bool) -> dict[str, Any]:
    """Abstract batch of a task: what the collator gives, without its content."""
    per_token = kind in ("token", "mlm")
    label = (rows, length) if per_token else (rows, 2) if kind == "span" else (rows,)
    integers = {"input_ids": (rows, length), "attention_mask": (rows, length), "labels": label}
    if types:
        integers["token_type_ids"] = (rows, length)
    shapes = {n: jax.ShapeDtypeStruct(s, jnp.int32) for n, s in integers.items()}
    if kind == "regression":
        shapes["labels"] = jax.ShapeDtypeStruct(label, jnp.float32)
    mask = (rows, length) if per_token else (rows,)
    shapes["label_mask"] = jax.ShapeDtypeStruct(mask, jnp.float32)
    return shapes


def estimate(train: TrainStep, state: TrainState, batch: dict[str, Any]) -> dict[str, Any]:
    """Compiles the step for abstract values and reads what the compiler says.

    Returns:
      parameters, trainable (counts); state_bytes, peak_bytes (per device: arguments, outputs
      and temporaries); flops (of one step on one device, as the compiler counts them:
      multiply and add are two; a scan's body counts once a layer).
    """
    compiled = train.compile(state, batch)
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    out: dict[str, Any] = {
        "parameters": tree.count(state.params) + tree.count(state.frozen),
        "trainable": tree.count(state.params),
    }
    if memory is not None:
        alive = memory.argument_size_in_bytes + memory.output_size_in_bytes
        alive -= memory.alias_size_in_bytes
        out["state_bytes"] = memory.argument_size_in_bytes
        out["peak_bytes"] = alive + memory.temp_size_in_bytes
    out["compiler_flops"] = cost.get("flops")
    return out


def model_flops(config: Any, rows: int, length: int, trainable: bool = True) -> float:
    """FLOPs of one step by counting: 2 a multiply-add, backward = 2 x forward.

    Matmuls of the layers (q, k, v, o, both feed-forward maps) and attention (scores and
    weighted sum); embeddings, norms and the head are left out, as is usual for MFU.
    """
    width, ffn = config.width, config.ffn_width
    dense = 2 * rows * length * (4 * width * width + 2 * width * ffn)
    attention = 2 * 2 * rows * length * length * width
    forward = config.layers * (dense + attention)
    return float(forward * (3 if trainable else 1))
