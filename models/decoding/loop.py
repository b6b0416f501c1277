"""The device's side of generation: the prompt's pass and the loop, as pure functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from steppe.models.decoding import sampling
from steppe.models.decoding.inputs import hold_eos, join_sites
from steppe.models.decoding.processors import Processor, Start, chain
from steppe.models.decoding.sampling import NOWHERE
from steppe.models.decoding.settings import Rows
from steppe.models.model import Decode, Masks
from steppe.models.tree import Params

# Why a row ended, by its code on the device; 0 has not ended.
REASONS = ("", "eos", "length", "stop")
RUNNING, EOS, LENGTH, STOP = range(4)


class Run(NamedTuple):
    """Carry of the loop. N = room of the buffers."""

    state: Any
    processors: Any
    last: jax.Array  # [B] token taken last
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array  # [B, N]
    lengths: jax.Array  # [B]
    reason: jax.Array  # [B] int8
    valid: jax.Array  # [B] False once a row had no token to take
    step: jax.Array  # number of tokens taken


class Fixed(NamedTuple):
    """Inputs that no step changes."""

    rows: Rows
    key: jax.Array
    eos: Any  # [E]
    pad: Any
    context: Any  # [B, T]


def prefill(
    decode: Decode,
    params: Params,
    inputs: Any,
    fixed: Fixed,
    processors: tuple[Processor, ...],
    deltas: Any,
    masks: Masks | None,
    *,
    room: int,
    hooks: Any,
) -> Run:
    """Reads the prompts and takes the first token of every row; ``room`` more may follow."""
    sites = join_sites(hooks, deltas)
    logits, state = decode.start(params, inputs, room, sites=sites, masks=masks)
    rows = logits.shape[0]
    both = chain(*processors)
    start = Start(fixed.context, logits.shape[1], room, fixed.eos)
    run = Run(
        state=state,
        processors=both.init(both.values, start),
        last=jnp.zeros(rows, jnp.int32),
        tokens=jnp.full((rows, room), fixed.pad, jnp.int32),
        logprobs=jnp.zeros((rows, room), jnp.float32),
        lengths=jnp.zeros(rows, jnp.int32),
        reason=jnp.where(fixed.rows.max_new > 0, RUNNING, LENGTH).astype(jnp.int8),
        valid=jnp.ones(rows, bool),
        step=jnp.int32(0),
    )
    return take(logits, run, fixed, both)


def advance(
    decode: Decode,
    params: Params,
    run: Run,
    fixed: Fixed,
    chains: Processor,
    stopped: jax.Array,
    limit: jax.Array,
    deltas: Any,
    masks: Masks | None,
    *,
    hooks: Any,
) -> Run:
    """Goes on until no row runs or ``limit`` tokens are there; first ends rows in ``stopped``."""
    sites = join_sites(hooks, deltas)
    ended = stopped & (run.reason == RUNNING)
    run = run._replace(reason=jnp.where(ended, STOP, run.reason).astype(jnp.int8))

    def goes_on(run: Run) -> jax.Array:
        return (run.step < limit) & (run.reason == RUNNING).any()

    def body(run: Run) -> Run:
        logits, state = decode.step(params, run.last, run.state, sites=sites, masks=masks)
        return take(logits, run._replace(state=state), fixed, chains)

    return lax.while_loop(goes_on, body, run)


def take(logits: jax.Array, run: Run, fixed: Fixed, both: Processor) -> Run:
    """Takes one token a row."""
    rows, step = fixed.rows, run.step
    active = run.reason == RUNNING
    logits = logits.astype(jnp.float32)
    ready = jnp.arange(run.tokens.shape[1]) < run.lengths[:, None]
    output = jnp.where(ready, run.tokens, NOWHERE)
    x = sampling.penalise(logits, fixed.context, output, rows, active)
    x = hold_eos(x, fixed.eos, step < rows.min_new)
    state, x = both.apply(run.processors, x)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(fixed.key, seed), step))(
        jnp.asarray(rows.seed)
    )
    tokens, valid = sampling.choose(x, rows, keys, active)
    tokens = jnp.where(active, tokens, fixed.pad)
    logprob = jnp.where(active, sampling.log_probability(logits, tokens), 0)
    lengths = run.lengths + active
    ended = jnp.where(lengths >= rows.max_new, LENGTH, RUNNING)
    ended = jnp.where((tokens[:, None] == fixed.eos).any(axis=1), EOS, ended)
    return Run(
        state=run.state,
        processors=both.observe(state, tokens),
        last=tokens,
        tokens=lax.dynamic_update_index_in_dim(run.tokens, tokens, step, 1),
        logprobs=lax.dynamic_update_index_in_dim(run.logprobs, logprob, step, 1),
        lengths=lengths,
        reason=jnp.where(active, ended, run.reason).astype(jnp.int8),
        valid=run.valid & (valid | ~active),
        step=step + 1,
    )
