"""What every network of the house looks like from outside: a frozen value of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax

from steppe.models.sites import Site
from steppe.models.tree import Params, merge

Batch = Mapping[str, Any]
# (regular expression on the whole path, mesh axis name or None for every dimension)
Rules = tuple[tuple[str, tuple[str | tuple[str, ...] | None, ...]], ...]


class ModelOut(NamedTuple):
    """What a forward pass returns.

    Attributes:
      logits: output of the head, in the compute dtype; None for a model without a head.
        [B, C] classification, [B] regression, [B, T, C] tokens, [B, T, 2] span start and
        end, [B, T, V] language models.
      hidden: final hidden states [B, T, D], or all of them [L + 1, B, T, D] (embeddings
        first) when ``all_hidden=True``.
      state: what a later call needs; None where nothing is carried over (see ``Decode``).
    """

    logits: jax.Array | None
    hidden: jax.Array
    state: Any = None


class Masks(NamedTuple):
    """Soft or hard structure masks; None means ones and costs nothing.

    Attributes:
      head: [L, H], multiplies each head's context vector (the same as multiplying its
        attention probabilities after dropout).
      ffn: [L, F], multiplies the feed-forward activations.
      layer: [L], multiplies both residual branches of a layer; 0 skips the layer but for
        its norms.
    """

    head: jax.Array | None = None
    ffn: jax.Array | None = None
    layer: jax.Array | None = None


class Inputs(NamedTuple):
    """The input of the layer stack, before or after the embedding block.

    Attributes:
      hidden: [B, T, D] word embeddings, or after ``embed`` the first layer's input.
      positions: [B, T] or [T] position ids.
      types: [B, T] token type ids, or None.
      mask: attention mask, [B, T] or [B, T, S] with non-zero = visible, or None = all visible.
      prompt: number of leading rows that overlays have put in front; heads skip them.
    """

    hidden: jax.Array
    positions: jax.Array | None
    types: jax.Array | None
    mask: jax.Array | None
    prompt: int = 0


class Apply(Protocol):
    """The forward pass of a :class:`Model`."""

    def __call__(
        self,
        params: Params,
        batch: Batch,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
    ) -> ModelOut: ...


class Parts(NamedTuple):
    """The stages of ``apply``, for methods that work between layers.

    Attributes:
      embed: ``(params, batch, *, sites, embeds, rng, train) -> Inputs``.
      layers: ``(params, inputs, *, start, stop, sites, masks, rng, train, all_hidden,
        queries) -> hidden`` runs layers ``start <= l < stop`` of the stack: early exit, late
        prompts, and gradients that end at a layer split the stack here. ``queries`` = n asks
        for the first n positions only, of a range that is one layer.
      head: ``(params, hidden, inputs, *, sites, rng, train) -> logits or None``.
    """

    embed: Callable[..., Inputs]
    layers: Callable[..., jax.Array]
    head: Callable[..., jax.Array | None]


class Decode(NamedTuple):
    """Generation by a model, one token a call, with static shapes.

    Attributes:
      start: ``(params, batch, more, *, sites=None, masks=None) -> (logits [B, V], state)``
        reads the prompt and leaves room for ``more`` (a static int) further tokens; the
        logits, float32, score the first of them. The prompt of a decoder is ``input_ids``
        [B, T] with ``attention_mask`` [B, T], padded on the left, so that all rows go on at
        the same column. An encoder-decoder reads its source there (padded on the right) and
        starts with its own start token, or goes on from ``decoder_input_ids``.
      step: ``(params, tokens [B], state, *, sites=None, masks=None) -> (logits [B, V],
        state)`` reads one more token a row. The state that it returns has the shapes and the
        dtypes of the one that it was given: it can be the carry of a loop. Its method
        ``take(rows)`` gives the state of the rows [N] of the batch, in that order: beams, and
        prompts that are continued several times.
    """

    start: Callable[..., tuple[jax.Array, Any]]
    step: Callable[..., tuple[jax.Array, Any]]


@dataclass(frozen=True)
class Model:
    """A network as a value; nothing in it holds parameters.

    Attributes:
      config: the frozen dataclass whose ``build()`` made this model.
      init: ``(key) -> params``, a nested dict of float32 arrays; traceable.
      apply: see :class:`Apply`. It computes in the dtype of the params that it is given;
        norms, softmax and losses are in float32 whatever that dtype is.
      axes: sharding rules, (regex on path, mesh axis or None for each dimension).
      sites: names at which overlays can attach.
      trainable: regexes of the paths that train by default.
      parts: the stages of ``apply``; None where they do not come apart.
      decode: how the model generates; None for one that does not.
      given: part of the params that exists already (the base under an overlay); ``init``
        leaves it out, and it is never copied: full = merge(init(key), given).
    """

    config: Any
    init: Callable[[jax.Array], Params]
    apply: Apply
    axes: Rules
    sites: tuple[str, ...] = ()
    trainable: tuple[str, ...] = (".*",)
    parts: Parts | None = None
    decode: Decode | None = None
    given: Params | None = field(default=None, compare=False, repr=False)

    def abstract(self) -> Params:
        """Shapes and dtypes of all params, without allocating them."""
        made = jax.eval_shape(self.init, jax.random.key(0))
        if self.given is None:
            return made
        return merge(made, jax.eval_shape(lambda tree: tree, self.given))
