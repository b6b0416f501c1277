"""Several overlays on one model, as one overlay.

  sites    at a shared site the later overlay wraps the earlier one
  merge    each folds in turn, the first one first, which is the order of the computation

LoRA and (IA)^3 on ``attn.k`` give ``(x W + s x A B) * l``; the other way round ``(x W) * l + s x
A B``. Of two prompts the first one stands in front; two prefixes are one longer one.
"""

from __future__ import annotations

import functools
import re

import jax

from steppe.models.model import Model, Rules
from steppe.models.overlays.overlay import Overlay
from steppe.models.sites import Site, stack_sites
from steppe.models.tree import Params


def compose(*overlays: Overlay) -> Overlay:
    """One overlay that attaches all of ``overlays``.

    Returns:
      An overlay whose delta is ``{name: delta}`` with each overlay's name, ``NAME-2`` for the
      second one of a name, and so on. It can be merged where all of them can. Of one overlay, that
      overlay itself, with its own delta: its name would not tell a file of the two apart.

    Raises:
      ValueError: no overlay is given.
    """
    if not overlays:
        raise ValueError("compose needs at least one overlay")
    if len(overlays) == 1:
        return overlays[0]
    names = _names([overlay.name for overlay in overlays])
    parts = dict(zip(names, overlays, strict=True))

    def init(key: jax.Array, params: Params) -> Params:
        keys = jax.random.split(key, len(parts))
        return {n: o.init(k, params) for (n, o), k in zip(parts.items(), keys, strict=True)}

    # An overlay that adds nothing has an empty tree, which no tree of leaves keeps.
    def sites(delta: Params) -> dict[str, Site]:
        return stack_sites(*(o.sites(delta.get(n, {})) for n, o in parts.items()))

    def merge(params: Params, delta: Params) -> Params:
        def fold(params: Params, item: tuple[str, Overlay]) -> Params:
            name, overlay = item
            assert overlay.merge is not None
            return overlay.merge(params, delta.get(name, {}))

        return functools.reduce(fold, parts.items(), params)

    axes: Rules = tuple(
        (rf"{re.escape(name)}/(?:{pattern})", places)
        for name, overlay in parts.items()
        for pattern, places in overlay.axes
    )

    def around(model: Model) -> Model:
        return functools.reduce(lambda m, o: o.around(m) if o.around else m, overlays, model)

    mergeable = all(overlay.merge is not None for overlay in overlays)
    also = tuple(dict.fromkeys(pattern for overlay in overlays for pattern in overlay.trainable))
    return Overlay(
        "+".join(names),
        init,
        sites,
        merge if mergeable else None,
        axes,
        also,
        tuple((name, overlay.settings) for name, overlay in parts.items()),
        tuple(rf"{re.escape(n)}/(?:{path})" for n, o in parts.items() for path in o.fixed),
        around=around if any(overlay.around for overlay in overlays) else None,
        stops=tuple(path for overlay in overlays for path in overlay.stops),
    )


def _names(given: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in given:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return out
