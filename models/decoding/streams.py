"""Several models, or one model under several prompts, in step on the same tokens.

Every stream reads its own prompt; at every step ``combine`` makes one row of logits out of the
streams' logits, one token is chosen from them, and all streams read that token. Contrastive
decoding, ensembles, guidance and proxy tuning are a ``combine``:

  expert and amateur:  combine = lambda z: log_softmax(z["expert"]) - log_softmax(z["amateur"])
  classifier-free guidance:  lambda z: z["plain"] + g * (z["prompt"] - z["plain"])

Streams of the same model with the same parameters run as one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from steppe.models.decoding import prompts
from steppe.models.model import Batch, Decode, Masks
from steppe.models.sites import Site
from steppe.models.tree import Params

Combine = Callable[..., jax.Array]
VALUES = "combine"


class Joint(NamedTuple):
    """What several streams are to the outside: a model that decodes.

    Attributes:
      decode: start and step of all streams at once.
      config: ``max_length`` and ``vocab_size``.
      sites: none; bind overlays to the models of the streams.
    """

    decode: Decode
    config: JointConfig
    sites: tuple[str, ...] = ()


class JointConfig(NamedTuple):
    """Limits of a :class:`Joint`; ``max_length`` is the least of its models'."""

    max_length: int | None


class Streams(NamedTuple):
    """The arguments of ``generate``: ``generate(*streams(...), settings)``."""

    model: Joint
    params: dict[str, Any]
    batch: dict[str, Any]


@struct.dataclass
class JointState:
    """States of the groups of streams that run as one batch.

    Attributes:
      groups: one state a group; a group of n streams has n * B rows, stream by stream.
      sizes: n of each group.
      rows: B.
    """

    groups: tuple[Any, ...]
    sizes: tuple[int, ...] = struct.field(pytree_node=False)
    rows: int = struct.field(pytree_node=False)

    def take(self, rows: jax.Array) -> JointState:
        """The state of these rows of the batch [N], in every stream."""
        groups = tuple(
            state.take(jnp.concatenate([rows + i * self.rows for i in range(size)]))
            for state, size in zip(self.groups, self.sizes)
        )
        return JointState(groups, self.sizes, rows.shape[0])


def streams(
    parts: Mapping[str, tuple[Any, Params, Batch]],
    combine: Combine,
    values: Any = None,
    *,
    sizes: prompts.Sizes | None = prompts.bucket,
) -> Streams:
    """Several streams as one model.

    Args:
      parts: name -> (model, params, batch). Batches have the same number of rows; row i of
        all of them reads the same tokens. The prompt of the first stream is the one that
        repetition penalties and processors see.
      combine: ``({name: logits float32 [B, V]}) -> logits [B, V]``, or with ``values``
        ``(logits, values) -> logits``. Programs are kept by this function: make it once.
      values: a pytree of arrays that ``combine`` reads, such as its strength; changing them
        compiles nothing.
      sizes: maps the longest prompt's length to the padded one, as in ``make``.

    Returns:
      (model, params, batch) for ``generate`` and ``beam_search``.

    Raises:
      ValueError: no streams, a name that is taken, batches with different numbers of rows,
        encoder-decoders beside decoders, a model that does not generate, or a prompt that is
        not padded on the left.
    """
    if not parts:
        raise ValueError("parts is empty; give at least one stream")
    if VALUES in parts:
        raise ValueError(f"a stream cannot be called {VALUES!r}; choose another name")
    names = tuple(parts)
    for name, (model, _, _) in parts.items():
        if getattr(model, "decode", None) is None:
            raise ValueError(f"the model of stream {name!r} does not generate: its decode is None")
    counts = {name: prompts.count_rows(batch) for name, (_, _, batch) in parts.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"all streams need the same number of rows, got {counts}")
    kinds = {name: prompts.reads_source(model) for name, (model, _, _) in parts.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError("streams must be all decoders or all encoder-decoders")
    source = kinds[names[0]]
    limits = [prompts.limit_of(model) for model, _, _ in parts.values()]
    limit = min((n for n in limits if n is not None), default=None)
    ready = {
        name: prompts.prepare(
            batch,
            1,
            source=source,
            limit=limit,
            sizes=None,
            vocabulary=prompts.vocabulary_of(model),
        )
        for name, (model, _, batch) in parts.items()
    }
    # One width for all, so that they can run as one batch and stop at the same column.
    batches = {name: dict(prompt.batch) for name, prompt in ready.items()}
    _widen(batches, ("input_ids", "attention_mask", "position_ids"), sizes, limit, not source)
    if source:
        prefixed = {n: b for n, b in batches.items() if "decoder_input_ids" in b}
        _widen(prefixed, ("decoder_input_ids", "decoder_attention_mask"), None, limit, True)
    groups: list[list[str]] = []
    for name in names:
        model, params, _ = parts[name]
        for group in groups:
            other, others, _ = parts[group[0]]
            same_keys = set(batches[name]) == set(batches[group[0]])
            if model.decode == other.decode and params is others and same_keys:
                group.append(name)
                break
        else:
            groups.append([name])
    order = tuple(tuple(group) for group in groups)
    decodes = tuple(parts[group[0]][0].decode for group in order)
    model = _joint(order, decodes, combine, values is not None, limit, source)
    params = {group[0]: parts[group[0]][1] for group in order}
    if values is not None:
        params[VALUES] = values
    first = {k: v for k, v in batches[names[0]].items() if np.ndim(v) == 2}
    return Streams(model, params, {**first, "streams": batches})


def _widen(
    batches: Mapping[str, dict[str, Any]],
    names: tuple[str, ...],
    sizes: prompts.Sizes | None,
    limit: int | None,
    left: bool,
) -> None:
    if not batches:
        return
    longest = max(np.shape(batch[names[0]])[1] for batch in batches.values())
    width = longest if sizes is None else sizes(longest)
    if limit is not None and left:
        width = max(longest, min(width, limit // 2))
    for batch in batches.values():
        more = width - np.shape(batch[names[0]])[1]
        for name in names:
            if np.ndim(batch.get(name, 0)) == 2:
                pad = (more, 0) if left else (0, more)
                batch[name] = np.pad(np.asarray(batch[name]), ((0, 0), pad))


@functools.lru_cache(maxsize=32)
def _joint(
    groups: tuple[tuple[str, ...], ...],
    decodes: tuple[Decode, ...],
    combine: Combine,
    with_values: bool,
    limit: int | None,
    source: bool,
) -> Joint:
    def joined(params: Params, parts: list[jax.Array]) -> jax.Array:
        logits: dict[str, jax.Array] = {}
        for group, stacked in zip(groups, parts):
            pieces = jnp.split(stacked.astype(jnp.float32), len(group))
            logits.update(zip(group, pieces))
        sizes = {name: z.shape[1] for name, z in logits.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the streams score vocabularies of different sizes {sizes}: they need the same "
                "tokenizer; cut the logits inside the models if only padding differs"
            )
        return combine(logits, params[VALUES]) if with_values else combine(logits)

    def start(
        params: Params,
        batch: Batch,
        more: int,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        **options: Any,
    ) -> tuple[jax.Array, JointState]:
        _alone(sites, masks)
        states, parts = [], []
        for group, decode in zip(groups, decodes):
            each = [batch["streams"][name] for name in group]
            both = jax.tree.map(lambda *x: jnp.concatenate(x), *each) if len(each) > 1 else each[0]
            logits, state = decode.start(params[group[0]], both, more, **options)
            states.append(state)
            parts.append(logits)
        sizes = tuple(len(group) for group in groups)
        rows = parts[0].shape[0] // sizes[0]
        return joined(params, parts), JointState(tuple(states), sizes, rows)

    def step(
        params: Params,
        tokens: jax.Array,
        state: JointState,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        **options: Any,
    ) -> tuple[jax.Array, JointState]:
        _alone(sites, masks)
        states, parts = [], []
        for group, decode, one in zip(groups, decodes, state.groups):
            fed = jnp.tile(tokens, len(group))
            logits, new = decode.step(params[group[0]], fed, one, **options)
            states.append(new)
            parts.append(logits)
        return joined(params, parts), JointState(tuple(states), state.sizes, state.rows)

    marks = ("encoder.embed",) if source else ()
    return Joint(Decode(start, step), JointConfig(limit), marks)


def _alone(sites: Any, masks: Any) -> None:
    if sites or masks is not None:
        raise ValueError("streams take no sites or masks: bind overlays to the models instead")
