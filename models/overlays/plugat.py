"""PlugAT's module: a small defence that is plugged into a classifier which stays as it is.

  deep   K_l = [P_K ; K_l], V_l = [P_V ; V_l] in every layer, learnt through P = MLP(E), E [l, D],
         MLP D -> m -> 2 L E with tanh; ``materialize`` keeps P alone, which is all that is deployed
  input  rows [l, D] behind the first token, which move the text l positions on

It is trained by ``train.plugat``, on adversarial examples that do not make it forget. Its initial
rows are small, so that a classifier begins near its own predictions. Bind it with
``trainable=()``: the head too is the deployed one's. A module fits any network of the same shapes:
``bind`` of another base takes the same delta.

Zheng et al., COLING 2022, pages 2873-2882.

Deviations: the paper was at hand as its abstract alone. Deep prefixes through a network of 512
units are 9.0% of BERT-base, which agrees with the 9.1% that it reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.encoder import EncoderConfig
from steppe.models.model import Inputs, Model
from steppe.models.overlays import prefix
from steppe.models.overlays.inside import inserted, removed
from steppe.models.overlays.overlay import Overlay
from steppe.models.overlays.prompt import table_of
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

MODES = ("deep", "input")


def overlay(
    *, mode: str = "deep", length: int = 20, hidden: int = 512, std: float = 0.02
) -> Overlay:
    """The module.

    Args:
      mode: ``deep`` or ``input``.
      length: l; 0 is the classifier itself.
      hidden: m of the network, 0 = the prefixes themselves are learnt; of ``deep`` alone.
      std: of the initial rows; of a prefix, of what its network makes.

    Returns:
      An overlay whose delta is that of ``prefix.overlay``, or ``{"prompt": [l, D]}``. No merged
      form.

    Raises:
      ValueError: an unknown mode, length or hidden < 0, std <= 0; from ``init`` a model without
        self-attention ``attn`` or (``input``) without words or room for the rows; of ``input``,
        from ``bind`` a model that is no encoder, from ``apply`` another overlay's rows in front.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if length < 0 or hidden < 0:
        raise ValueError(f"length and hidden must be >= 0, got {length} and {hidden}")
    if not 0 < std < math.inf:
        raise ValueError(f"std must be > 0 and finite, got {std}")
    deep = mode == "deep"
    plain = prefix.overlay(length=max(length, 1), hidden=hidden, std=std)

    def init(key: jax.Array, params: Params) -> Params:
        if not length:
            return {}
        if not deep:
            return {"prompt": std * jax.random.normal(key, (length, _width(params, length)))}
        made = plain.init(key, params)
        if not hidden:
            return made
        # The network's own scale would make prefixes that already change what is predicted.
        rows = jnp.stack(jax.tree.leaves(prefix.fold(made)))
        out = {n: leaf * (std / rows.std()) for n, leaf in made["attn"]["out"].items()}
        return {"attn": {**made["attn"], "out": out}}

    def embed(rows: Any, x: Inputs, base: Callable[[Any], Any], context: SiteContext) -> Any:
        if x.prompt:
            raise ValueError(
                "plugat counts columns of the text itself, and an overlay that is attached after "
                "it puts rows in front; attach plugat last, or use mode='deep'"
            )
        return base(inserted(x, jnp.broadcast_to(rows, (len(x.hidden), *rows.shape)), 1))

    def logits(_: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
        # A head of one label a token: the rows are none of the text's.
        return base(x if x.ndim == 2 else removed(x, length, 1))

    def attach(delta: Params) -> dict[str, Site]:
        if not length:
            return {}
        if deep:
            return plain.sites(delta)
        return {"embed": Site(embed, delta["prompt"]), "logits": Site(logits, {})}

    def around(model: Model) -> Model:
        if not isinstance(model.config, EncoderConfig):
            raise ValueError(
                "mode='input' puts rows behind the first token, [CLS] of an encoder; "
                f"use mode='deep' for a {type(model.config).__name__}"
            )
        return model

    settings = (("mode", mode), ("length", length), ("hidden", hidden), ("std", std))
    axes = prefix.RULES if deep else Overlay.axes
    host = None if deep or not length else around
    return Overlay("plugat", init, attach, None, axes, settings=settings, around=host)


def materialize(delta: Params) -> Params:
    """What is deployed of a trained module: the delta of ``overlay(hidden=0)``.

    A prefix that no network makes, and rows at the input, are that already.
    """
    return delta if not delta or "prompt" in delta or tree.STACK in delta else prefix.fold(delta)


def _width(params: Params, length: int) -> int:
    table, positions = table_of(params, "word"), table_of(params, "position")
    if table is None:
        raise ValueError("this model embeds no words: mode='input' has no place in it")
    if positions is not None and length + 1 >= positions.shape[0]:
        raise ValueError(
            f"length={length} leaves the text none of the model's {positions.shape[0]} "
            "positions; take a shorter one, or mode='deep'"
        )
    return int(table.shape[1])
