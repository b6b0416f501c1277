"""Beam search: the n best continuations of every prompt, as one compiled loop.

A step extends all K beams of a prompt by all tokens, takes the best 2K (K + K for every further
end-of-sequence id), sets those that end here aside and goes on with the best K of the others.
The score of a finished sequence of n new tokens is

  sum_t log p(y_t) / n ** length_penalty

The rules for stopping and for keeping finished sequences are those of ``transformers``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from steppe.models.decoding import prompts, sampling
from steppe.models.decoding.generate import make
from steppe.models.decoding.inputs import eos_ids, hold_eos, join_sites, split_sites
from steppe.models.decoding.processors import Processor, Start, chain
from steppe.models.decoding.sampling import NOWHERE
from steppe.models.decoding.settings import Rows, Settings
from steppe.models.model import Batch, Decode, Masks
from steppe.models.sites import Site
from steppe.models.tree import Params

# Below every score of a sequence; finite, so that sums and comparisons stay in order.
FAR = -1.0e9
STOPPING = {False: 0, True: 1, "never": 2}


class Beams(NamedTuple):
    """The best continuations, on the host, best first.

    Attributes:
      tokens: int32 [B, n, N], N = the longest; padding after the end.
      lengths: int32 [B, n].
      scores: float32 [B, n], see the module; in nats.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    scores: np.ndarray


class _Beams(NamedTuple):
    """Carry of the loop; B prompts, K beams, N room."""

    state: Any  # rows B * K
    processors: Any
    last: jax.Array  # [B * K]
    tokens: jax.Array  # [B, K, N] running
    scores: jax.Array  # [B, K]
    done_tokens: jax.Array  # [B, K, N] finished
    done_scores: jax.Array  # [B, K]
    done_lengths: jax.Array  # [B, K]
    finished: jax.Array  # [B, K] whether that place holds a finished sequence
    improves: jax.Array  # [B] whether a running beam may still beat a finished one
    step: jax.Array


class _Options(NamedTuple):
    rows: Rows  # [B * K]
    eos: Any  # [E]
    pad: Any
    context: Any  # [B * K, T]
    penalty: Any  # length penalty
    stopping: Any  # a code of STOPPING
    limit: Any  # new tokens at most


def beam_search(
    model: Any,
    params: Params,
    batch: Batch,
    *,
    beams: int = 4,
    best: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    processors: Sequence[Processor] = (),
    sites: Mapping[str, Site] | None = None,
    masks: Masks | None = None,
    sizes: prompts.Sizes | None = prompts.bucket,
) -> Beams:
    """The ``best`` most probable continuations of each prompt that the search finds.

    Args:
      model: a model with ``decode``; its state's rows are reordered by ``state.take``.
      params, batch, eos_id, pad_id, processors, sites, masks: as in ``generate``; processors
        see log probabilities [B * beams, V] instead of logits.
      beams: K; 1 is greedy.
      best: sequences returned for each prompt, at most ``beams``.
      length_penalty: exponent of the length that divides the scores; above 0 favours longer
        sequences, because log probabilities are negative.
      early_stopping: True = end as soon as K sequences are finished; False = when no beam is
        likely to become better, judged at its length now; "never" = when none can.
      max_new_tokens, min_new_tokens, repetition_penalty: as in ``Settings``, one number each.
      sizes: maps lengths to the padded ones.

    Raises:
      ValueError: beams < 1, best outside [1, beams], an unknown ``early_stopping``, more beams
        than the vocabulary allows, or what ``generate`` refuses.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}; 1 is greedy search")
    if not 1 <= best <= beams:
        raise ValueError(f"best must be from 1 to beams = {beams}, got {best}; raise beams")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be a finite number, got {length_penalty}")
    if not any(early_stopping is known for known in STOPPING):
        if early_stopping != "never":
            raise ValueError(
                f'early_stopping must be False, True or "never", got {early_stopping!r}'
            )
        early_stopping = "never"
    settings = Settings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        repetition_penalty=repetition_penalty,
    )
    count = prompts.count_rows(batch)
    rows = settings.rows(count * beams)
    made = make(model, sizes=sizes)
    prompt = prompts.prepare(
        batch,
        int(max_new_tokens),
        source=made._source,
        limit=made._limit,
        sizes=sizes,
        vocabulary=made._vocabulary,
    )
    hooks, deltas = split_sites(sites)
    options = _Options(
        rows=rows,
        eos=eos_ids(eos_id),
        pad=np.int32(pad_id),
        context=np.repeat(prompt.context, beams, axis=0),
        penalty=np.float32(length_penalty),
        stopping=np.int32(STOPPING[early_stopping]),
        limit=np.int32(max_new_tokens),
    )
    found = program(model.decode)(
        params,
        prompt.batch,
        options,
        tuple(processors),
        deltas,
        masks,
        room=prompt.room,
        beams=beams,
        hooks=hooks,
    )
    tokens, lengths, scores = (np.array(x)[:, :best] for x in jax.device_get(found))
    width = int(lengths.max())
    there = np.arange(width) < lengths[..., None]
    return Beams(
        np.where(there, tokens[..., :width], pad_id).astype(np.int32),
        lengths.astype(np.int32),
        scores,
    )


@functools.lru_cache(maxsize=32)
def program(decode: Decode) -> Any:
    """The jitted search of a model; its compiled programs live as long as it is in use."""
    return jax.jit(functools.partial(_search, decode), static_argnames=("room", "beams", "hooks"))


def _search(
    decode: Decode,
    params: Params,
    inputs: Any,
    options: _Options,
    processors: tuple[Processor, ...],
    deltas: Any,
    masks: Masks | None,
    *,
    room: int,
    beams: int,
    hooks: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    sites = join_sites(hooks, deltas)
    logits, state = decode.start(params, inputs, room, sites=sites, masks=masks)
    count, vocab = logits.shape
    both = chain(*processors)
    context = jnp.asarray(options.context)
    known = both.init(both.values, Start(context[::beams], vocab, room, jnp.asarray(options.eos)))
    copies = jnp.repeat(jnp.arange(count), beams)
    known = jax.tree.map(lambda x: x[copies], known)
    # Only the first beam counts at first, or all beams would be the same one.
    first = jnp.where(jnp.arange(beams) == 0, 0.0, FAR)
    empty = jnp.full((count, beams, room), options.pad, jnp.int32)
    search = _Beams(
        state=state,
        processors=known,
        last=jnp.zeros(count * beams, jnp.int32),
        tokens=empty,
        scores=jnp.broadcast_to(first, (count, beams)),
        done_tokens=empty,
        done_scores=jnp.full((count, beams), FAR),
        done_lengths=jnp.zeros((count, beams), jnp.int32),
        finished=jnp.zeros((count, beams), bool),
        improves=jnp.ones(count, bool),
        step=jnp.int32(0),
    )
    search, parents = _extend(logits[copies], search, options, both)
    search = search._replace(state=state.take(copies[parents]))

    def goes_on(search: _Beams) -> jax.Array:
        full = search.finished.all() & (options.stopping == STOPPING[True])
        return search.improves.any() & ~full & (search.step < options.limit)

    def body(search: _Beams) -> _Beams:
        logits, state = decode.step(params, search.last, search.state, sites=sites, masks=masks)
        search, parents = _extend(logits, search, options, both)
        return search._replace(state=state.take(parents))

    search = lax.while_loop(goes_on, body, search)
    return search.done_tokens, search.done_lengths, search.done_scores


def _extend(
    logits: jax.Array, search: _Beams, options: _Options, both: Processor
) -> tuple[_Beams, jax.Array]:
    """One token more; also the beam [B * K] that each new beam continues."""
    count, beams, room = search.tokens.shape
    step, eos = search.step, jnp.asarray(options.eos)
    index = jnp.arange(count)[:, None]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=1)
    flat = search.tokens.reshape(count * beams, room)
    output = jnp.where(jnp.arange(room) < step, flat, NOWHERE)
    everyone = jnp.ones(count * beams, bool)
    log_p = sampling.penalise(log_p, jnp.asarray(options.context), output, options.rows, everyone)
    log_p = hold_eos(log_p, eos, step < options.rows.min_new)
    known, log_p = both.apply(search.processors, log_p)

    # The best of every beam first, then of all beams of a prompt.
    vocab = log_p.shape[1]
    wide = max(2, 1 + eos.shape[0]) * beams
    each = min(wide, vocab)
    if each * beams < wide:
        raise ValueError(
            f"{beams} beams need {wide} continuations, a vocabulary of {vocab} tokens has "
            f"{each * beams}; lower beams"
        )
    top, token = lax.top_k(log_p, each)
    total = (top.reshape(count, beams, each) + search.scores[..., None]).reshape(count, -1)
    total, at = lax.top_k(total, wide)
    token = jnp.take_along_axis(token.reshape(count, -1), at, axis=1)
    parent = at // each
    history = search.tokens[index, parent]
    history = lax.dynamic_update_index_in_dim(history, token, step, 2)
    ends = (token[..., None] == eos).any(axis=2) | (step + 1 >= options.limit)

    running, kept = lax.top_k(jnp.where(ends, total + FAR, total), beams)

    # A sequence counts as finished only if it is among the best K.
    score = total / (step + 1).astype(jnp.float32) ** options.penalty
    now = ends & (jnp.arange(wide) < beams)
    full = search.finished.all(axis=1) & (options.stopping == STOPPING[True])
    blocked = ~now | full[:, None] | ~search.improves[:, None]
    score = jnp.where(blocked, score + FAR, score)
    # Earlier ones first: of equal scores they stay.
    scores = jnp.concatenate([search.done_scores, score], axis=1)
    done_scores, chosen = lax.top_k(scores, beams)

    def merged(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.concatenate([old, new], axis=1)[index, chosen]

    finished = merged(search.finished, now)
    last = token[index, kept]
    parents = (parent[index, kept] + index * beams).reshape(-1)
    known = jax.tree.map(lambda x: x[parents], known)
    length = jnp.where(
        (options.stopping == STOPPING["never"]) & (options.penalty > 0), options.limit, step + 1
    )
    hope = running[:, 0] / length.astype(jnp.float32) ** options.penalty
    worst = jnp.where(finished, done_scores.min(axis=1, keepdims=True), FAR)
    new = search._replace(
        processors=both.observe(known, last.reshape(-1)),
        last=last.reshape(-1),
        tokens=history[index, kept],
        scores=running,
        done_tokens=merged(search.done_tokens, history),
        done_scores=done_scores,
        done_lengths=merged(search.done_lengths, jnp.full_like(token, step + 1)),
        finished=finished,
        improves=search.improves & (hope[:, None] > worst).any(axis=1),
        step=step + 1,
    )
    return new, parents
