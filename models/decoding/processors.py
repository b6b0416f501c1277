"""Logits processors: pure functions ``(state, logits) -> (state, logits)`` that compose.

A processor is a pytree. Its functions are static and its numbers are arrays, so that a program
compiled with one penalty, ban list or mask serves all others of the same shape. The rows of
every leaf of its state are the rows of the batch, so that a beam can be continued by another.

  init(values, start) -> state             once, after the prompt is known
  apply(state, logits [B, V]) -> (state, logits)    before every choice
  observe(state, tokens [B]) -> state      after every choice

To forbid a token is to put its logit at -inf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from steppe.models.decoding.sampling import NOWHERE

State = Any
NEVER = float("-inf")


class Start(NamedTuple):
    """What a processor may know at the start.

    Attributes:
      context: ids of the prompt int32 [B, T], ``NOWHERE`` at padding; an encoder-decoder's
        forced prefix, or one column of padding.
      vocab: size of the vocabulary V.
      room: tokens that can follow at most.
      eos: ids that end a sequence, int32 [E]; E may be 0.
    """

    context: jax.Array
    vocab: int
    room: int
    eos: jax.Array


def _same(state: State, tokens: jax.Array) -> State:
    return state


@struct.dataclass
class Processor:
    """One processor; see the module for its three functions.

    Make the functions once, at module level or by a cached factory: programs are kept by them.

    Attributes:
      init: ``(values, start) -> state``; leaves [B, ...].
      apply: ``(state, logits float32 [B, V]) -> (state, logits)``.
      observe: ``(state, tokens int32 [B]) -> state``.
      values: the numbers of this processor, any pytree of arrays.
    """

    init: Callable[[Any, Start], State] = struct.field(pytree_node=False)
    apply: Callable[[State, jax.Array], tuple[State, jax.Array]] = struct.field(pytree_node=False)
    observe: Callable[[State, jax.Array], State] = struct.field(pytree_node=False, default=_same)
    values: Any = None


def chain(*processors: Processor) -> Processor:
    """One processor that runs several, the first one first."""
    parts = _parts(tuple((p.init, p.apply, p.observe) for p in processors))
    return Processor(parts.init, parts.apply, parts.observe, tuple(p.values for p in processors))


# Bound methods are equal only if they are bound to one object, and programs are kept by them.
@functools.lru_cache(maxsize=256)
def _parts(functions: tuple[tuple[Callable[..., Any], ...], ...]) -> _Parts:
    return _Parts(functions)


@dataclass(frozen=True)
class _Parts:
    functions: tuple[tuple[Callable[..., Any], ...], ...]

    def init(self, values: Any, start: Start) -> State:
        return tuple(f[0](v, start) for f, v in zip(self.functions, values, strict=True))

    def apply(self, state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        new = []
        for functions, part in zip(self.functions, state, strict=True):
            part, logits = functions[1](part, logits)
            new.append(part)
        return tuple(new), logits

    def observe(self, state: State, tokens: jax.Array) -> State:
        return tuple(f[2](s, tokens) for f, s in zip(self.functions, state, strict=True))


# --- numbers a row, an entry of the vocabulary, or both ------------------------------------


def temperature(value: Any) -> Processor:
    """logits / value; a number, or one a row. For sampling use ``Settings.temperature``.

    Raises:
      ValueError: a value that is not above 0.
    """
    return Processor(_init_column, _divide, values=_positive(value, "temperature"))


def _init_column(value: Any, start: Start) -> State:
    return _rows(value, start)


def _divide(state: State, logits: jax.Array) -> tuple[State, jax.Array]:
    return state, logits / state[:, None]


def repetition_penalty(value: Any) -> Processor:
    """Divides positive and multiplies negative logits of tokens of the prompt and the output.

    ``Settings.repetition_penalty`` does the same before all processors; this one is for
    another place in their order.

    Raises:
      ValueError: a value that is not above 0.
    """
    value = _positive(value, "repetition_penalty")
    return Processor(_init_seen, _penalise_seen, _see, value)


def _init_seen(value: Any, start: Start) -> State:
    rows = start.context.shape[0]
    seen = jnp.zeros((rows, start.vocab), bool)
    return _set(seen, start.context, True), _rows(value, start)


def _penalise_seen(state: State, logits: jax.Array) -> tuple[State, jax.Array]:
    seen, rate = state
    value = jnp.where(logits < 0, logits * rate[:, None], logits / rate[:, None])
    return state, jnp.where(seen, value, logits)


def _see(state: State, tokens: jax.Array) -> State:
    return _set(state[0], tokens[:, None], True), state[1]


def logit_bias(bias: Any, vocab: int | None = None) -> Processor:
    """Adds a bias: ``{token id: bias}`` (needs ``vocab``), an array [V], or one [B, V].

    Raises:
      ValueError: a token id outside the vocabulary, or a mapping without ``vocab``.
    """
    if isinstance(bias, Mapping):
        size = _vocab(vocab, "a bias for single tokens")
        array = np.zeros(size, np.float32)
        for token, value in bias.items():
            array[_token(token, size)] = value
        bias = array
    return Processor(_init_table, _add, values=np.asarray(bias, np.float32))


def allowed_tokens(tokens: Any, vocab: int | None = None) -> Processor:
    """Forbids all tokens but these: ids (needs ``vocab``), or a bool mask [V] or [B, V].

    Raises:
      ValueError: an id outside the vocabulary, ids without ``vocab``, or nothing allowed.
    """
    mask = _mask(tokens, vocab)
    if not mask.any(axis=-1).all():
        raise ValueError("allowed_tokens allows no token (in some row): nothing can be generated")
    return Processor(_init_table, _add, values=np.where(mask, 0, NEVER).astype(np.float32))


def forbidden_tokens(tokens: Any, vocab: int | None = None) -> Processor:
    """Forbids these tokens everywhere; arguments and errors as :func:`allowed_tokens`."""
    return allowed_tokens(~_mask(tokens, vocab))


def _init_table(table: Any, start: Start) -> State:
    table = jnp.asarray(table)
    if table.shape[-1] != start.vocab:
        raise ValueError(
            f"a table over the vocabulary has {table.shape[-1]} entries, the model scores "
            f"{start.vocab} tokens; build it with vocab={start.vocab}"
        )
    return jnp.broadcast_to(table, (start.context.shape[0], start.vocab))


def _add(state: State, logits: jax.Array) -> tuple[State, jax.Array]:
    return state, logits + state


# --- functions of the position ---------------------------------------------------------------


def min_length(tokens: Any, eos_id: Any) -> Processor:
    """Forbids the ``eos_id`` (one or several) for the first ``tokens`` new tokens.

    ``Settings.min_new_tokens`` does this with the ids that end a sequence anyhow.
    """
    ids = np.atleast_1d(np.asarray(eos_id, np.int32))
    return Processor(_init_least, _hold, _count, (np.asarray(tokens, np.int32), ids))


def _init_least(values: Any, start: Start) -> State:
    rows = start.context.shape[0]
    ids = jnp.broadcast_to(values[1], (rows, values[1].shape[-1]))
    return jnp.zeros(rows, jnp.int32), _rows(values[0], start), ids


def _hold(state: State, logits: jax.Array) -> tuple[State, jax.Array]:
    step, least, ids = state
    ids = jnp.where((step < least)[:, None], ids, NOWHERE)
    return state, _set(logits, ids, NEVER)


def _count(state: State, tokens: jax.Array) -> State:
    return (state[0] + 1, *state[1:])


def forced_tokens(tokens: Any) -> Processor:
    """Forces the first new tokens: ids [P], or [B, P]; a negative id leaves its place free.

    Raises:
      ValueError: no ids, or ids of another shape.
    """
    ids = np.asarray(tokens, np.int32)
    if ids.ndim not in (1, 2) or ids.size == 0:
        raise ValueError(f"tokens must be [places] or [rows, places], got shape {ids.shape}")
    return Processor(_init_forced, _force, _count, ids)


def _init_forced(ids: Any, start: Start) -> State:
    rows = start.context.shape[0]
    return jnp.zeros(rows, jnp.int32), jnp.broadcast_to(ids, (rows, ids.shape[-1]))


def _force(state: State, logits: jax.Array) -> tuple[State, jax.Array]:
    step, ids = state
    at = jnp.minimum(step, ids.shape[1] - 1)
    wanted = jnp.take_along_axis(ids, at[:, None], axis=1)
    wanted = jnp.where((step < ids.shape[1])[:, None], wanted, -1)
    column = jnp.arange(logits.shape[1])
    return state, jnp.where((wanted < 0) | (column == wanted), logits, NEVER)


# --- functions of the tokens so far ------------------------------------------------------------


def no_repeat_ngram(n: int) -> Processor:
    """Forbids every token that would repeat n tokens of the prompt or the output in a row.

    Raises:
      ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}; 3 forbids repeated triples")
    return Processor(_init_history, _ngram_apply(n), _append)


def _init_history(values: Any, start: Start) -> State:
    rows, length = start.context.shape
    room = jnp.full((rows, start.room), NOWHERE, jnp.int32)
    history = jnp.concatenate([start.context, room], axis=1)
    return history, jnp.full(rows, length, jnp.int32)


def _append(state: State, tokens: jax.Array) -> State:
    history, at = state
    return _write(history, at, tokens), at + 1


def _write(history: jax.Array, at: jax.Array, tokens: jax.Array) -> jax.Array:
    return history.at[jnp.arange(history.shape[0]), at].set(tokens, mode="drop")


@functools.cache
def _ngram_apply(n: int) -> Callable[[State, jax.Array], tuple[State, jax.Array]]:
    def apply(state: State, logits: jax.Array) -> tuple[State, jax.Array]:
        history, at = state
        size = history.shape[1] - n + 1
        if size < 1:
            return state, logits
        match = jnp.ones((history.shape[0], size), bool)
        for i in range(n - 1):
            # The i-th of the last n - 1 tokens beside the i-th token of every window.
            column = at - (n - 1) + i
            last = jnp.take_along_axis(history, jnp.maximum(column, 0)[:, None], axis=1)
            real = (last != NOWHERE) & (column >= 0)[:, None]
            match &= (history[:, i : i + size] == last) & real
        banned = jnp.where(match, history[:, n - 1 :], NOWHERE)
        return state, _set(logits, banned, NEVER)

    return apply


def sequence_bias(biases: Mapping[tuple[int, ...], float]) -> Processor:
    """Adds a bias to the last token of a sequence wherever its other tokens come before.

    Args:
      biases: token ids of a sequence -> bias; -inf forbids the sequence.

    Raises:
      ValueError: no sequences, or an empty one.
    """
    if not biases:
        raise ValueError("biases is empty; give at least one sequence, or leave it out")
    sequences = [tuple(int(t) for t in s) for s in biases]
    if not all(sequences) or min(min(s) for s in sequences) < 0:
        raise ValueError(f"every sequence needs token ids >= 0, got {list(biases)}")
    before = max(len(s) for s in sequences) - 1
    prefixes = np.full((len(sequences), before), -1, np.int32)  # -1 matches all
    for row, sequence in zip(prefixes, sequences):
        row[before - len(sequence) + 1 :] = sequence[:-1]
    final = np.asarray([s[-1] for s in sequences], np.int32)
    bias = np.asarray(list(biases.values()), np.float32)
    return Processor(_init_suffix, _add_matching, _shift, (prefixes, final, bias))


def bad_words(words: Sequence[Sequence[int]]) -> Processor:
    """Never completes one of these sequences of token ids; errors as :func:`sequence_bias`."""
    return sequence_bias({tuple(word): NEVER for word in words})


def _init_suffix(values: Any, start: Start) -> State:
    rows = start.context.shape[0]
    before = values[0].shape[1]
    padded = jnp.pad(start.context, ((0, 0), (before, 0)), constant_values=NOWHERE)
    last = padded[:, padded.shape[1] - before :]
    return (last, *(jnp.broadcast_to(v, (rows, *jnp.shape(v))) for v in values))


def _add_matching(state: State, logits: jax.Array) -> tuple[State, jax.Array]:
    last, prefixes, final, bias = state
    match = ((prefixes < 0) | (prefixes == last[:, None])).all(axis=2)
    index = jnp.arange(logits.shape[0])[:, None]
    return state, logits.at[index, final].add(jnp.where(match, bias, 0), mode="drop")


def _shift(state: State, tokens: jax.Array) -> State:
    last = jnp.concatenate([state[0], tokens[:, None]], axis=1)[:, 1:]
    return (last, *state[1:])


# --- helpers ----------------------------------------------------------------------------------


def _set(x: jax.Array, ids: jax.Array, value: Any) -> jax.Array:
    """x [B, V] with ``value`` at the ids [B, K]; ids outside V are dropped."""
    return x.at[jnp.arange(x.shape[0])[:, None], ids].set(value, mode="drop")


def _rows(value: Any, start: Start) -> jax.Array:
    value = jnp.asarray(value)
    rows = start.context.shape[0]
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != rows):
        raise ValueError(
            f"a processor has values of shape {value.shape}, the batch {rows} rows (padding rows "
            "included); give one number, or one for each row"
        )
    return jnp.broadcast_to(value, (rows,))


def _positive(value: Any, name: str) -> np.ndarray:
    array = np.asarray(value, np.float32)
    if not (array > 0).all():
        raise ValueError(f"{name} must be above 0, got {value}; 1 changes nothing")
    return array


def _vocab(vocab: int | None, what: str) -> int:
    if vocab is None:
        raise ValueError(f"{what} need vocab, the number of tokens that the model scores")
    return vocab


def _token(token: Any, vocab: int) -> int:
    if not 0 <= int(token) < vocab:
        raise ValueError(f"token id {token} is outside the vocabulary of {vocab} tokens")
    return int(token)


def _mask(tokens: Any, vocab: int | None) -> np.ndarray:
    array = np.asarray(tokens)
    if array.dtype == bool:
        return array
    size = _vocab(vocab, "token ids")
    mask = np.zeros(size, bool)
    mask[[_token(t, size) for t in array.ravel()]] = True
    return mask
