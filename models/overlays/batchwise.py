"""A site that sees the whole batch: of what is attached to it other sites are made, call by call.

Sites inside a network see hidden states alone. An overlay whose parameters act through something
that stands in the batch (which task a row is of) or that takes a run of the model by itself (a
feature of the text) attaches to a site of its own name here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from steppe.models.model import Batch, Masks, Model, ModelOut
from steppe.models.sites import Site, SiteContext, stack_sites
from steppe.models.tree import Params


class Call(NamedTuple):
    """What ``apply`` of a model was called with.

    Attributes:
      params, batch, masks, embeds: as they were given.
      rng: a key, or None where nothing is random (evaluation).
      others: names of the other sites that are attached.
    """

    params: Params
    batch: Batch
    masks: Masks | None
    embeds: jax.Array | None
    rng: jax.Array | None
    others: tuple[str, ...]


def sees_batch(
    model: Model, name: str, make: Callable[[Params, Call], dict[str, Site]], *, stream: int
) -> Model:
    """``model`` with one more site, ``name``.

    Args:
      make: ``(delta, call) -> sites`` to attach in place of it; others wrap them.
      stream: number of its random stream, beside those of the model (0 to 7).

    Returns:
      A model of the same parameters that does not generate: its answer grows token by token.

    Raises:
      ValueError: from ``apply``, two overlays at the site.
    """

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
        own = others.pop(name, None)
        if own is not None:
            if own.fn is not attached:
                raise ValueError(f"one overlay can be attached at {name!r}, and one is already")
            key = jax.random.fold_in(rng, stream) if train and rng is not None else None
            made = make(own.delta, Call(params, batch, masks, embeds, key, tuple(others)))
            others = stack_sites(made, others)
        return model.apply(
            params,
            batch,
            sites=others,
            masks=masks,
            embeds=embeds,
            rng=rng,
            train=train,
            all_hidden=all_hidden,
        )

    return dataclasses.replace(
        model, apply=apply, sites=(*model.sites, name), parts=None, decode=None
    )


def attached(delta: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
    """The site function of an overlay at such a site; ``make`` does what there is to do."""
    return base(x)
