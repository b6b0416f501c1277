"""A network split between two layers, for ascents that stop there; see ``train.ascent``.

``below`` is the embedding and the layers l < k, ``above`` an objective on a model whose forward
pass starts from what ``below`` returned. Both draw the dropout of the uncut network: its keys
are folded in by stage and by layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from steppe.models.encoder import EncoderConfig
from steppe.models.heads import POOLED
from steppe.models.model import Batch, Inputs, Masks, Model, ModelOut, Parts
from steppe.models.tree import Params
from steppe.models.vision import VisionConfig
from steppe.train.ascent import CARRIED, Cut
from steppe.train.types import Objective

# In place of hidden states whose final norm is not among a model's parts.
NOTHING: Any = None
_CURE = (
    "must make the step's objective of a model, such as "
    'lambda m: objectives.for_task(m, "classification")'
)


def at_layer(model: Model, layer: int, objective: Callable[[Model], Objective]) -> Cut:
    """The cut below layer ``layer`` of a model that comes in parts.

    Args:
      model: encoder, decoder or vision tower; not one with an overlay bound to it.
      layer: k, the number of layers below, 1 to L - 1.
      objective: makes the step's objective of a model, such as
        ``lambda m: objectives.for_task(m, "classification")``. What is given to
        ``step.make`` must be ``objective(model)``.

    Raises:
      ValueError: the model has no parts, or the layer is not inside the stack.
      TypeError: ``objective`` makes no objective of a model; it may be one itself.

    The model that ``objective`` is given returns logits; its ``hidden`` is None but for encoders.
    """
    parts = model.parts
    if parts is None:
        raise ValueError(
            "the model does not come in parts (embed, layers, head), so it cannot be cut; "
            "climb on a share of the rows instead (fraction)"
        )
    depth = getattr(model.config, "layers", 0)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= layer < depth:
        raise ValueError(f"layer must be in 1..{depth - 1} for {depth} layers, got {layer!r}")
    embed, layers, head = parts

    def below(params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
        mode: dict[str, Any] = {"rng": key, "train": key is not None}
        inputs = embed(params, batch, **mode)
        return layers(params, inputs, stop=layer, **mode)

    def start(params: Params, batch: Batch, **options: Any) -> Inputs:
        # Positions and mask are those of the batch; the look-up of the words is not needed.
        return embed(params, batch, **options)._replace(hidden=batch[CARRIED])

    def rest(params: Params, inputs: Inputs, *, start: int = 0, **options: Any) -> jax.Array:
        return layers(params, inputs, start=max(start, layer), **options)

    last = depth - 1
    # Encoders return the last layer's output as it is; the others' final norm is not a part.
    plain = isinstance(model.config, EncoderConfig)

    def apply(
        params: Params,
        batch: Batch,
        *,
        sites: Any = None,
        masks: Masks | None = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
    ) -> ModelOut:
        if sites or embeds is not None or all_hidden:
            raise ValueError("a model that is cut takes neither sites nor embeds nor all_hidden")
        mode: dict[str, Any] = {"rng": rng, "train": train}
        inputs = start(params, batch, **mode)
        if not _first_token(model):
            hidden = layers(params, inputs, start=layer, masks=masks, **mode)
            return ModelOut(head(params, hidden, inputs, **mode), hidden if plain else NOTHING)
        # As in the uncut model: the last layer at the first token, for heads that read no other.
        if last > layer:
            middle = layers(params, inputs, start=layer, stop=last, masks=masks, **mode)
            inputs = inputs._replace(hidden=middle)
        one = layers(params, inputs, start=last, queries=inputs.prompt + 1, masks=masks, **mode)
        whole = layers(params, inputs, start=last, masks=masks, **mode) if plain else NOTHING
        return ModelOut(head(params, one, inputs, **mode), whole)

    upper = dataclasses.replace(model, apply=apply, parts=Parts(start, rest, head), decode=None)
    try:
        above = objective(upper)
    except TypeError as error:
        raise TypeError(f"objective {_CURE}, got {objective!r} ({error})") from error
    if not callable(above):
        raise TypeError(f"objective {_CURE}, got {type(above).__name__} from {objective!r}")
    return Cut(below, above, layer)


def _first_token(model: Model) -> bool:
    """Whether the model's own forward pass computes the last layer at the first token only."""
    config = model.config
    if isinstance(config, EncoderConfig):
        return config.head is not None and config.head.kind in POOLED
    if isinstance(config, VisionConfig):
        alone = jax.sharding.get_abstract_mesh().empty
        return bool(alone and config.reads == "class" and (config.projection or config.head))
    return False
