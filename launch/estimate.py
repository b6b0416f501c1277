"""``--dry-run``: what a run would need, from abstract values; nothing is allocated."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.train.step import TrainStep
from steppe.train.types import TrainState


def batch_shapes(kind: str, shape: tuple[int, ...], *, types: bool, packed: bool) -> dict[str, Any]:
    """Abstract batch of a task: what the collator gives, without its content.

    Args:
      kind: of the task.
      shape: as the batches' ``shapes`` hold it: (B, T), (B, S, U) of two texts, or (B, H, W, 3).
      types: whether the model has token types.
      packed: whether rows hold several texts.
    """
    rows, tokens = shape[0], shape[:2]
    if len(shape) == 4:
        shapes = {"pixel_values": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        integers: dict[str, tuple[int, ...]] = {}
    else:
        shapes = {}
        integers = dict.fromkeys(("input_ids", "attention_mask"), tokens)
        if types:
            integers["token_type_ids"] = tokens
        if packed:
            integers |= dict.fromkeys(("segment_ids", "position_ids"), tokens)
    label: tuple[int, ...] = (rows,)
    if kind in ("token", "mlm", "lm"):
        label = tokens
    elif kind == "seq2seq":
        label = (rows, shape[2])
    integers["labels"] = (rows, 2) if kind == "span" else label
    shapes |= {n: jax.ShapeDtypeStruct(s, jnp.int32) for n, s in integers.items()}
    if kind == "regression":
        shapes["labels"] = jax.ShapeDtypeStruct(label, jnp.float32)
    shapes["label_mask"] = jax.ShapeDtypeStruct(label, jnp.float32)
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


def model_flops(model: Any, shape: tuple[int, ...]) -> float:
    """FLOPs of one gradient by counting: 2 a multiply-add, backward = 2 x forward.

    A step takes one gradient, or two with most sharpness-aware methods: see
    ``launch.optimiser.gradients``.

    Matmuls of the layers and attention (scores and weighted sum), and the logits of a language
    model; embeddings, norms and other heads are left out, as is usual for MFU.

    Args:
      model: without an overlay.
      shape: of a batch, as in :func:`batch_shapes`.
    """
    config, params = model.config, tree.flatten(model.abstract())
    rows = shape[0]
    lengths = {"": shape[1]}  # of the stack of layers whose paths begin so
    if len(shape) == 4:
        lengths = {"": 1 + (shape[1] // config.patch) * (shape[2] // config.patch)}
    elif len(shape) == 3:
        lengths = {"encoder/": shape[1], "decoder/": shape[2]}
    forward = 0.0
    for prefix, length in lengths.items():
        kernels = {
            p: leaf.shape
            for p, leaf in params.items()
            if p.startswith(f"{prefix}layers/") and p.endswith("/kernel")
        }
        forward += 2.0 * rows * length * sum(math.prod(s) for s in kernels.values())
        queries = [s for p, s in kernels.items() if p.endswith("attn/q/kernel")]
        forward += sum(4.0 * rows * length**2 * s[0] * s[-1] for s in queries)
    if config.head is not None and config.head.kind == "lm":
        forward += 2.0 * rows * shape[-1] * config.width * config.vocab_size
    return 3.0 * forward
