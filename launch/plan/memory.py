"""Bytes a device by group, from shapes and shardings alone; and an estimate of the activations.

What the state holds is exact: every leaf's shard, as ``NamedSharding.shard_shape`` gives it.
What lives only inside a step is either counted in the partitioned program (see ``count``) or,
before there is one, estimated by :func:`activations`.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steppe.launch.plan.work import Work
from steppe.models import tree
from steppe.train.distill.pairs import TEACHER
from steppe.train.mesh import MeshPlan
from steppe.train.types import TrainState

# Share of a device's memory that a plan may fill: the runtime, the program itself and gaps
# between buffers take the rest.
USABLE = 0.92


class Held(NamedTuple):
    """Bytes on every device.

    Attributes:
      state: group -> bytes that live from step to step: parameters, frozen parameters, teacher,
        each kind of optimiser state, ema, batch.
      gradients: of the trainable parameters, in their dtype.
      ascent: the displaced copy of a method with two gradients.
      copies: parameters in the compute dtype, where that is another one.
    """

    state: dict[str, int]
    gradients: int
    ascent: int
    copies: int

    @property
    def total(self) -> int:
        """All of it but the activations."""
        return sum(self.state.values()) + self.gradients + self.ascent + self.copies


def shard_bytes(leaf: Any) -> int:
    """Bytes of one device's shard of an abstract or real array with a sharding."""
    shape = leaf.sharding.shard_shape(tuple(leaf.shape))
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return math.prod(shape) * 8  # threefry: two words of 32 bits
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def held(work: Work, plan: MeshPlan, state: TrainState | None = None) -> Held:
    """What a device holds; ``state`` is the abstract one of ``work.state(plan)``.

    Raises:
      ValueError: a leaf that no rule covers, a dimension that its mesh axis does not divide,
        rows that the mesh does not divide.
    """
    state = work.state(plan) if state is None else state
    groups: dict[str, int] = {}

    def add(name: str, leaves: Any) -> None:
        size = sum(map(shard_bytes, jax.tree.leaves(leaves)))
        if size:
            groups[name] = groups.get(name, 0) + size

    add("parameters", state.params)
    frozen = dict(state.frozen)
    add("teacher", frozen.pop(TEACHER, {}))
    add("frozen parameters", frozen)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]:
        add(f"optimiser: {_kind(jax.tree_util.keystr(keys))}", leaf)
    for name, leaves in state.extra.items():
        add(str(name), leaves)
    add("step and key", (state.step, state.rng))
    add("batch", work.batch(plan))
    own = groups["parameters"]
    copies = 0
    if work.config.compute_dtype != "float32":
        itemsize = jnp.dtype(work.config.compute_dtype).itemsize
        for leaf in jax.tree.leaves((state.params, state.frozen)):
            if jnp.dtype(leaf.dtype).itemsize > itemsize:
                copies += shard_bytes(leaf) * itemsize // jnp.dtype(leaf.dtype).itemsize
    # A second copy of what trains stands displaced beside it during the second gradient.
    ascent = own if work.gradients > 1 else 0
    return Held(groups, own, ascent, copies)


def _kind(path: str) -> str:
    """``.base.inner_state[0].mu['layers']...`` -> ``mu``."""
    fields = re.findall(r"\.([A-Za-z_]\w*)", path.split("['")[0])
    return fields[-1] if fields else "state"


def activations(work: Work, plan: MeshPlan) -> int:
    """Bytes of a device's activations at the start of the backward pass, by counting.

    Per layer what ``remat`` keeps: the layer's input for "full"; the outputs of the projections
    too for "dots" (what "auto" means for layers in a loop); for "none" twice these and the
    attention probabilities. Beside them one layer's scores and projections, forward and backward,
    and the logits of a vocabulary with their gradient, in float32. Micro-batches divide it all.
    """
    c = work.bare.config
    sizes = plan.mesh.shape
    parts, model = plan.data_size * sizes.get("seq", 1), sizes.get("model", 1)
    rows = work.rows(plan) / work.config.microbatches / plan.data_size
    length = work.length or 1 + (c.image_size // c.patch) ** 2
    tokens = rows * length / (parts / plan.data_size)
    unit = 2 if work.config.compute_dtype == "bfloat16" else 4
    flat = tree.flatten(work.bare.abstract())
    outputs = layers = 0
    for path, leaf in flat.items():
        if tree.is_stacked(path) and path.endswith("/kernel"):
            split = plan.under(work.bare.axes).sharding(path, leaf.shape).spec
            shared = model if len(split) > 2 and split[2] == "model" else 1
            outputs += leaf.shape[0] * leaf.shape[2] // shared
            layers = max(layers, leaf.shape[0])
    heads = getattr(c, "heads", 1)
    scores = rows * max(heads // model, 1) * length**2
    remat = getattr(c, "remat", "auto")
    if remat == "auto":
        remat = "none" if layers <= getattr(c, "unroll", 0) else "dots"
    kept = layers * tokens * c.width * unit
    if remat != "full":
        kept += tokens * outputs * unit
    if remat == "none":
        kept += tokens * outputs * unit + layers * scores * unit
    layer = tokens * (outputs / max(layers, 1)) * unit * 2 + scores * (4 + unit) * 2
    head = 0.0
    if getattr(c, "head", None) is not None and c.head.kind in ("lm", "mlm"):
        head = rows * length * c.vocab_size / model * (2 * 4 + unit)
        if work.config.token_chunk or work.config.vocab_chunk:
            head /= 8
        if work.config.teacher:
            head *= 2
    return int(kept + max(layer, head))
