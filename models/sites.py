"""Sites: the named places of a network at which an overlay can change what is computed.

A site wraps one computation of the base model. The wrapper receives the computation's input
and the computation itself, so it can add to the output (LoRA), scale the input or the output
((IA)^3), run before or after (adapters), or replace it:

  lora:     y = base(x) + (alpha / r) * (x A) B
  scaling:  y = base(x) * l
  adapter:  y = base(x); y + up(act(down(y)))

====================  =======================================================================
site                  wraps
====================  =======================================================================
``embed``             word embeddings -> input of the first layer (an ``Inputs`` each side)
``attn.q|k|v``        hidden [B, T, D] -> projection [B, T, H * Dh]
``attn.kv_prefix``    hidden [B, T, D] -> (keys, values) in front, [B, P, Hkv, Dh]; P = 0 in
                      the base model; always visible, at no position
``attn.o``            context [B, T, H * Dh] -> attention output [B, T, D]
``ffn.in``            hidden [B, T, D] -> pre-activation [B, T, F]
``ffn.gate``          hidden [B, T, D] -> gate [B, T, F] before its activation; gated FFNs only
``ffn.out``           activation [B, T, F] -> feed-forward output [B, T, D]
``resid``             a whole layer, hidden -> hidden
``logits``            input of the head -> logits
====================  =======================================================================

An encoder-decoder has two stacks: the names of its sites begin with ``encoder.`` or
``decoder.`` (``encoder.embed``, ``decoder.attn.q``), but for ``logits``. Its decoder adds

========================  ===================================================================
``cross.q``               decoder hidden [B, U, D] -> projection [B, U, H * Dh]
``cross.k|v``             encoder output [B, T, D] -> projection [B, T, H * Dh]
``cross.kv_prefix``       encoder output [B, T, D] -> (keys, values) in front, [B, P, H, Dh]
``cross.o``               context [B, U, H * Dh] -> attention output [B, U, D]
``ssru.in|forget``        hidden [B, U, D] -> pre-activation [B, U, D] of the recurrent cell that
                          replaces self-attention in some decoders
========================  ===================================================================

and its encoder ``late``, between two layers of it: states, with their mask, each side (an
``Inputs``). What is attached there is a :class:`LateSite`, which says between which.

Sites inside the layers hold their parameters stacked on axis 0, one slice a layer, so that
they pass through the layer scan. An absent site leaves no trace in the compiled program.

A site that has more to say than its output (a router, how it has chosen) says it by ``tell``;
an objective that wants to hear it runs the model inside ``listening``. Where nobody listens
nothing is computed for it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

OUTER_SITES = ("embed", "logits")
LAYER_SITES = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.kv_prefix",
    "attn.o",
    "ffn.in",
    "ffn.out",
    "resid",
)
# Of gated feed-forward networks only: a model that has one adds it to its sites.
GATE_SITE = "ffn.gate"
# What a layer of an encoder-decoder's decoder has beside, or instead of, those above.
CROSS_SITES = ("cross.q", "cross.k", "cross.v", "cross.kv_prefix", "cross.o")
SSRU_SITES = ("ssru.in", "ssru.forget")
# Between two layers of an encoder-decoder's encoder; its parameters have no layer axis.
LATE = "late"
ENCODER, DECODER = "encoder", "decoder"


class SiteContext(NamedTuple):
    """What a site function may need besides its input.

    Attributes:
      layer: index of the layer (traced), or None at an outer site.
      rng: a key of this layer and call, or None when nothing is random.
      train: whether dropout is on.
      mask: attention mask as given to the model, [B, T] or [B, T, S], or None.
      residual: the residual stream that the sublayer's output is about to be added to.
      norm: the norm that follows the addition (post-norm) or precedes the sublayer
        (pre-norm); adapters that reuse it call it.
      inputs: what the feed-forward that this site is the end of reads, at ``ffn.out``.
      step: whether one token is being read after a prompt (``Decode.step``); what was put in
        front of the prompt is there already.
      reads: at a site between two layers, the position [B] that stands for the whole text: the
        first token's in an encoder, the last one's in a decoder and in the encoder of two stacks.
    """

    layer: jax.Array | None = None
    rng: jax.Array | None = None
    train: bool = False
    mask: jax.Array | None = None
    residual: jax.Array | None = None
    norm: Callable[[jax.Array], jax.Array] | None = None
    inputs: jax.Array | None = None
    step: bool = False
    reads: jax.Array | None = None


SiteFn = Callable[[Any, Any, Callable[[Any], Any], SiteContext], Any]


@dataclass(frozen=True)
class Site:
    """One attached computation.

    Attributes:
      fn: ``(delta, x, base, context) -> y``; pure. ``base(x)`` is the base model's own
        computation, or the previously attached one when several share the site.
      delta: the site's parameters; for a site inside the layers every leaf has a leading
        axis of size L.
      tokenwise: whether every token's output depends on that token's input alone, as LoRA's
        does. The last layer of a model that is read at its first token is then computed at
        that token only.
    """

    fn: SiteFn
    delta: Any
    tokenwise: bool = False


@dataclass(frozen=True)
class LateSite(Site):
    """A site between two layers of a stack.

    Attributes:
      layer: layers below it, 0 to L; -1 = half of them.
      stop: no gradient flows below it.
    """

    layer: int = -1
    stop: bool = True


_LISTENER: contextvars.ContextVar[dict[str, jax.Array] | None] = contextvars.ContextVar(
    "listener", default=None
)


@contextlib.contextmanager
def listening() -> Iterator[dict[str, jax.Array]]:
    """Collects what sites tell while a model runs inside the block.

    The block and what reads its values belong into one trace: listen inside the function that is
    compiled or differentiated, not around it.

    Yields:
      name -> value; of sites inside the layers stacked over them, [L, ...]. What several runs of
      a model in one block tell under a name stands one behind the other along axis 0.
    """
    found: dict[str, jax.Array] = {}
    token = _LISTENER.set(found)
    try:
        yield found
    finally:
        _LISTENER.reset(token)


def heard() -> bool:
    """Whether anybody listens."""
    return _LISTENER.get() is not None


def tell(name: str, value: jax.Array) -> None:
    """Tells whoever listens; a name that includes the site's keeps several sites apart."""
    found = _LISTENER.get()
    if found is not None:
        found[name] = jnp.concatenate([found[name], value]) if name in found else value


def stack_sites(first: Mapping[str, Site], *others: Mapping[str, Site]) -> dict[str, Site]:
    """Attaches several overlays at once; at a shared site the later one wraps the earlier."""
    merged = dict(first)
    for sites in others:
        for name, outer in sites.items():
            merged[name] = _wrap(merged[name], outer) if name in merged else outer
    return merged


def _wrap(inner: Site, outer: Site) -> Site:
    def fn(delta: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
        def inner_base(y: Any) -> Any:
            return inner.fn(delta[0], y, base, context)

        return outer.fn(delta[1], x, inner_base, context)

    return Site(fn, (inner.delta, outer.delta), inner.tokenwise and outer.tokenwise)


def check_sites(sites: Mapping[str, Site] | None, known: tuple[str, ...], layers: int) -> None:
    """Checks names and stacking of ``sites`` once, before anything is traced.

    Raises:
      ValueError: a site that the model lacks, or a delta whose leading axis is not L.
    """
    for name, site in (sites or {}).items():
        if name not in known:
            raise ValueError(f"this model has no site {name!r}; its sites are {', '.join(known)}")
        if name in OUTER_SITES or name == LATE:
            continue
        for leaf in jax.tree.leaves(site.delta):
            if leaf.ndim == 0 or leaf.shape[0] != layers:
                raise ValueError(
                    f"site {name!r} needs parameters stacked over the {layers} layers on axis 0, "
                    f"got shape {tuple(leaf.shape)}"
                )


def within(sites: Mapping[str, Site] | None, part: str) -> dict[str, Site]:
    """The sites of one stack of an encoder-decoder, under the names that the stack knows.

    ``encoder.attn.q`` is ``attn.q`` within ``encoder``.
    """
    prefix = f"{part}."
    return {
        name.removeprefix(prefix): site
        for name, site in (sites or {}).items()
        if name.startswith(prefix)
    }


class Hooks:
    """The sites of one layer (or the outer ones), with that layer's slice of the deltas."""

    def __init__(
        self,
        sites: Mapping[str, Site] | None,
        deltas: Mapping[str, Any],
        context: SiteContext,
    ) -> None:
        self._fns = {name: sites[name].fn for name in deltas} if sites else {}
        self._deltas = deltas
        self._context = context

    def __contains__(self, name: str) -> bool:
        return name in self._fns

    def __call__(self, name: str, x: Any, base: Callable[[Any], Any], **context: Any) -> Any:
        """``base(x)``, through the site when one is attached."""
        fn = self._fns.get(name)
        if fn is None:
            return base(x)
        ctx = self._context
        if ctx.rng is not None:
            # One independent stream a site: two overlays must not share dropout masks.
            ctx = ctx._replace(rng=jax.random.fold_in(ctx.rng, _stream(name)))
        return fn(self._deltas[name], x, base, ctx._replace(**context))


def outer_hooks(
    sites: Mapping[str, Site] | None,
    mask: jax.Array | None,
    rng: jax.Array | None,
    train: bool,
    step: bool = False,
) -> Hooks:
    """The hooks of the sites that stand outside the layers (``OUTER_SITES``)."""
    deltas = {n: s.delta for n, s in (sites or {}).items() if n in OUTER_SITES}
    return Hooks(sites, deltas, SiteContext(rng=rng, train=train, mask=mask, step=step))


def _stream(name: str) -> int:
    if name in CROSS_SITES + SSRU_SITES:
        return 1100 + (CROSS_SITES + SSRU_SITES).index(name)
    return 1000 + (*OUTER_SITES, *LAYER_SITES, GATE_SITE).index(name)
