"""A place between two layers at which rows can be put in front: the stack, run in two parts.

  layers 1..k on n tokens  ->  site ``late``  ->  layers k+1..L on what the site returns

The site wraps an ``Inputs`` each side: hidden states [B, n, D] after layer k with their mask and
positions. Where nothing below trains, the states may be cut off from the gradient, and the
backward pass of layers 1..k is then not in the compiled program at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.attention import columns_of, last_column
from steppe.models.decoder import DecoderConfig
from steppe.models.decoder_block import norm
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import POOLED
from steppe.models.layers import run
from steppe.models.model import Batch, Inputs, Masks, Model, ModelOut
from steppe.models.sites import OUTER_SITES, Site, SiteContext, check_sites
from steppe.models.tree import Params

# Number of the site's random stream, beside those of embeddings, layers and head.
_STREAM = 7
SITE = "late"


def insert_after(model: Model, layer: int, *, stop: bool = True) -> Model:
    """``model`` with one more site after its first ``layer`` layers.

    In the site's context ``mask`` is [B, n]: the tokens that what is put in front may depend on.
    Of a language model those are the tokens before the first label of each row, and None where
    the batch holds no labels.

    Args:
      model: an encoder or a decoder; not one with an overlay bound to it.
      layer: k, 0 (after the embeddings) to L.
      stop: no gradient flows below the site.

    Returns:
      A model of the same parameters that does not generate. With the site attached ``hidden``
      has the rows in front, which are 0 in the hidden states below it.

    Raises:
      ValueError: another kind of model, or a layer outside it; from ``apply`` with the site
        attached, packed texts, a site ``resid``, or ``stop`` where other sites are attached.
    """
    parts, config = model.parts, model.config
    if not isinstance(config, EncoderConfig | DecoderConfig):
        raise ValueError(
            "a prompt between two layers needs an encoder or a decoder, got a "
            f"{type(config).__name__}; in an encoder-decoder it stands in the encoder, with "
            "stack=encoder"
        )
    if parts is None:
        raise ValueError(
            "the model does not come in parts: another overlay that needs it as a whole (a late "
            "prompt, idpg, mp2 with several tasks) is attached already; attach one of them"
        )
    depth = config.layers
    if not 0 <= layer <= depth:
        raise ValueError(f"layer must be in 0..{depth} for a model of {depth} layers, got {layer}")
    embed, layers, head = parts

    def apply(
        params: Params,
        batch: Batch,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
    ) -> ModelOut:
        others = dict(sites or {})
        site = others.pop(SITE, None)
        mode: dict[str, Any] = {"sites": others, "rng": rng, "train": train}
        if site is None:
            return model.apply(
                params, batch, masks=masks, embeds=embeds, all_hidden=all_hidden, **mode
            )
        check_sites(others, model.sites, depth)
        trained = [n for n in others if n != "logits"]
        if stop and trained:
            raise ValueError(
                f"stop=True ends the gradient after layer {layer}, below which other sites are "
                f"attached ({', '.join(trained)}); use stop=False"
            )
        if "resid" in others:
            raise ValueError(
                "a site 'resid' adds to columns of the text (idpg, mp2, added prompts), which move "
                f"after layer {layer}; attach one of the overlays"
            )
        if "segment_ids" in batch:
            raise ValueError("rows cannot be put in front of packed texts; give one text a row")
        inputs = embed(params, batch, embeds=embeds, **mode)
        mode["masks"] = masks
        below = layers(params, inputs, stop=layer, all_hidden=all_hidden, **mode)
        if stop:
            below = jax.lax.stop_gradient(below)
        states = inputs._replace(hidden=below[-1] if all_hidden else below)
        key = jax.random.fold_in(rng, _STREAM) if train and rng is not None else None
        told = _told(model, batch, states)
        reads = jnp.full(len(states.hidden), states.prompt)
        if isinstance(config, DecoderConfig) and told is not None:
            reads = last_column(told)
        context = SiteContext(rng=key, train=train, mask=told, reads=reads)
        after: Inputs = site.fn(site.delta, states, lambda x: x, context)
        _check_length(config, after)
        first_only = isinstance(config, EncoderConfig) and layer < depth and not all_hidden
        if first_only and _reads_first_token(config, others):
            # As in the model itself: the head needs the last layer at one token only.
            last = depth - 1
            after = after._replace(hidden=layers(params, after, start=layer, stop=last, **mode))
            one = layers(params, after, start=last, queries=after.prompt + 1, **mode)
            logits = head(params, one, after, sites=others, rng=rng, train=train)
            return ModelOut(logits, layers(params, after, start=last, **mode))
        hidden = layers(params, after, start=layer, all_hidden=all_hidden, **mode)
        final = hidden[-1] if all_hidden else hidden
        logits = head(params, final, after, sites=others, rng=rng, train=train)
        if isinstance(config, DecoderConfig):
            final = run(norm(config), params["norm"], final)
        if not all_hidden:
            return ModelOut(logits, final)
        rows = after.hidden.shape[1] - states.hidden.shape[1]
        lower = jnp.pad(below[:-1], ((0, 0), (0, 0), (rows, 0), (0, 0)))
        return ModelOut(logits, jnp.concatenate([lower, hidden]).at[-1].set(final))

    return dataclasses.replace(
        model, apply=apply, sites=(*model.sites, SITE), parts=None, decode=None
    )


def _told(model: Model, batch: Batch, states: Inputs) -> jax.Array | None:
    """Tokens [B, n] that rows in front may depend on; of a language model, those of the question.

    None: a language model's batch does not say where its answer begins.
    """
    rows, n, _ = states.hidden.shape
    seen = columns_of(states.mask)
    mask = jnp.ones((rows, n), bool) if seen is None else seen
    mask = mask & (jnp.arange(n) >= states.prompt)  # rows of other prompts are no text
    head = model.config.head
    if not isinstance(model.config, DecoderConfig) or head is None or head.kind != "lm":
        return mask
    if "labels" not in batch:
        return None
    known = jnp.asarray(batch["labels"]) >= 0
    if "label_mask" in batch:
        known = known & (jnp.asarray(batch["label_mask"]) > 0)
    before = n - known.shape[1]
    # Nothing predicts the first token: that it is labelled hides nothing.
    known = known & (jnp.cumsum(mask[:, before:], axis=1) > 1)
    return mask & (jnp.cumsum(jnp.pad(known, ((0, 0), (before, 0))), axis=1) == 0)


def _check_length(config: EncoderConfig | DecoderConfig, after: Inputs) -> None:
    """Rows between layers take positions only where layers turn queries and keys by them."""
    length = after.hidden.shape[1]
    if isinstance(config, DecoderConfig) and config.rotary and length > config.max_length:
        raise ValueError(
            f"{length} rows, those in front included, are more than the model's "
            f"{config.max_length} positions; take fewer in front or truncate the text"
        )


def _reads_first_token(config: EncoderConfig, sites: Mapping[str, Site]) -> bool:
    inside = (site for name, site in sites.items() if name not in OUTER_SITES)
    return (
        config.head is not None
        and config.head.kind in POOLED
        and all(site.tokenwise for site in inside)
    )
