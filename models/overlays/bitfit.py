"""BitFit: only the biases train.

Every bias of projections, feed-forward and norms of the base trains, with the head; nothing is
added. Dense layers that have no bias, as T5's, get one that begins at 0.

Ben Zaken, Goldberg, Ravfogel, ACL 2022, arXiv 2106.10199.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.model import Rules
from steppe.models.overlays.overlay import WHOLE, Overlay, kernel_paths
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

# A head trains or not by itself: that of a language model is tied to frozen embeddings.
BIASES = (r"(?!head/)(?:.*/)?bias",)
RULES: Rules = ((r"layers/.*", (None, "model")), WHOLE)


def overlay() -> Overlay:
    """The BitFit overlay.

    Returns:
      An overlay whose delta is ``{"layers": {site: [L, d_out]}}`` for dense layers without a bias,
      and ``{}`` where all have one. Biases of the base are trained where they are, so a bound
      model holds two kinds of them; it can be merged where nothing had to be added.
    """

    def init(key: jax.Array, params: Params) -> Params:
        known = set(tree.paths(params))
        added = {}
        for site, path in kernel_paths(params).items():
            if path.removesuffix("kernel") + "bias" not in known:
                kernel = tree.get(params, path)
                added[site] = jnp.zeros((kernel.shape[0], kernel.shape[-1]))
        return {tree.STACK: added} if added else {}

    def attach(delta: Params) -> dict[str, Site]:
        return {
            name: Site(_add, b, tokenwise=True) for name, b in delta.get(tree.STACK, {}).items()
        }

    def merge(params: Params, delta: Params) -> Params:
        if delta.get(tree.STACK):
            raise ValueError(
                f"bitfit added biases at {', '.join(delta[tree.STACK])}, which this model has no "
                "place for; keep the overlay attached"
            )
        return params

    return Overlay("bitfit", init, attach, merge, RULES, trainable=BIASES)


def _add(bias: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
    y = base(x)
    return y + bias.astype(y.dtype)
