"""Generation by any model that decodes: greedy and sampling, one program for all settings.

Two programs run: one reads the prompt and takes the first token, the other is a
``lax.while_loop`` that takes all others and ends when every row is done. The number of tokens,
the settings and the stop are inputs of the programs; lengths are rounded up to buckets, so that
few programs serve all prompts. With a callback or stop strings the same loop runs a few steps
at a time, and gives the same tokens, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from steppe.models.decoding import loop, prompts, stops
from steppe.models.decoding.inputs import eos_ids, pad_rows, split_sites, threefry
from steppe.models.decoding.processors import Processor, chain
from steppe.models.decoding.settings import Settings
from steppe.models.model import Batch, Decode, Masks
from steppe.models.sites import Site
from steppe.models.tree import Params

OnToken = Callable[[int, np.ndarray], Any]


class Generated(NamedTuple):
    """What was generated, on the host.

    Attributes:
      tokens: int32 [B, N], N = the longest row; padding after a row's end. The
        end-of-sequence token is included, as is the token that completed a stop string.
      lengths: int32 [B], tokens of each row.
      logprobs: float32 [B, N], log probability of each token in nats under the model itself,
        before penalties, processors, temperature and truncation; 0 at padding.
      reasons: why each row ended: "eos", "length" or "stop".
      texts: text of each row, cut before its stop string; None without ``decode``.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    reasons: tuple[str, ...]
    texts: tuple[str, ...] | None = None


class Generator:
    """A model ready to generate: call it as ``run(params, batch, settings)``.

    One program for each bucket of prompt lengths, one for each pair of buckets of prompt and
    room; made by :func:`make`.

    Attributes:
      decode: the model's functions.
      compiles: number of programs compiled so far.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        source: bool = False,
        limit: int | None = None,
        vocabulary: int | None = None,
        sizes: prompts.Sizes | None = prompts.bucket,
        rows: prompts.Sizes | None = None,
    ) -> None:
        self.decode = decode
        self._source, self._limit, self._vocabulary = source, limit, vocabulary
        self._sizes, self._rows = sizes, rows
        self._prefill = jax.jit(
            functools.partial(loop.prefill, decode), static_argnames=("room", "hooks")
        )
        self._advance = jax.jit(
            functools.partial(loop.advance, decode),
            static_argnames=("hooks",),
            donate_argnames=("run",),
        )

    @property
    def compiles(self) -> int:
        programs: tuple[Any, ...] = (self._prefill, self._advance)
        return sum(int(program._cache_size()) for program in programs)

    def __call__(
        self,
        params: Params,
        batch: Batch,
        settings: Settings = Settings(),  # noqa: B008 (frozen)
        *,
        key: jax.Array | None = None,
        eos_id: int | Sequence[int] | None = None,
        pad_id: int = 0,
        processors: Sequence[Processor] = (),
        stop: Sequence[str] | str = (),
        decode: stops.Decoder | None = None,
        on_token: OnToken | None = None,
        every: int = 8,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Generated:
        """Continues every prompt of ``batch``.

        Args:
          params: of the model.
          batch: what ``Decode.start`` reads; ``attention_mask`` may be absent.
          settings: of all rows, or of each.
          key: typed key; with ``settings.seed`` it decides every sample. None is a fixed key,
            allowed where the settings have seeds, or nothing is sampled.
          eos_id: token id or ids that end a row; None = rows end by length only.
          pad_id: fills ``tokens`` after the end.
          processors: change the logits in this order, after the penalties of the settings and
            ``min_new_tokens``, before temperature and truncation.
          stop: a row ends when its text holds one of these.
          decode: (token ids) -> str, for ``stop`` and ``Generated.texts``.
          on_token: called as ``on_token(step, tokens [B])`` for every step in order, rows that
            are done at ``pad_id``.
          every: tokens taken between two looks of the host, with ``stop`` or ``on_token``;
            results do not depend on it.
          sites, masks: given to the model.
          sharding: of arrays with a row for each prompt; None = the default device, or
            whatever the params' shardings imply.

        Raises:
          ValueError: a setting out of range or of the wrong length, an empty batch, a row of
            padding only, a prompt padded on the right or too long, an empty stop string,
            sampling without key and seed.
          FloatingPointError: the logits of a row are NaN, or every token is forbidden.
        """
        count = prompts.count_rows(batch)
        rows = settings.rows(count)
        if key is None and settings.seed is None and (rows.temperature > 0).any():
            raise ValueError(
                "temperature is above 0, but there is no randomness: give key=jax.random.key(...) "
                "or Settings(seed=...)"
            )
        if every < 1:
            raise ValueError(f"every must be at least 1 token, got {every}")
        stop = stops.check(stop, decode)
        eos = eos_ids(eos_id)
        prompts.check_ids(eos, self._vocabulary, "eos_id")
        longest = int(rows.max_new.max())
        prompt = prompts.prepare(
            batch,
            longest,
            source=self._source,
            limit=self._limit,
            sizes=self._sizes,
            rows=self._rows,
            vocabulary=self._vocabulary,
        )
        rows = pad_rows(rows, len(prompt.context))
        hooks, deltas = split_sites(sites)
        inputs, rows, context = prompt.batch, rows, prompt.context
        if sharding is not None:
            inputs, rows, context = jax.device_put((inputs, rows, context), sharding)
        fixed = loop.Fixed(rows, threefry(key), eos, np.int32(pad_id), context)
        run = self._prefill(
            params,
            inputs,
            fixed,
            tuple(processors),
            deltas,
            masks,
            room=prompt.room,
            hooks=hooks,
        )

        both = chain(*processors)
        chains = Processor(both.init, both.apply, both.observe)  # its numbers are in the state

        def advance(run: loop.Run, limit: int, stopped: np.ndarray) -> loop.Run:
            return self._advance(
                params,
                run=run,
                fixed=fixed,
                chains=chains,
                stopped=stopped,
                limit=np.int32(limit),
                deltas=deltas,
                masks=masks,
                hooks=hooks,
            )

        stopped = np.zeros(len(prompt.context), bool)
        matcher = stops.Matcher(stop, decode, count, eos.tolist()) if stop and decode else None
        if matcher is None and on_token is None:
            run = advance(run, longest, stopped)
        else:
            seen = 0
            while True:
                taken = int(run.step)
                tokens, lengths = np.array(run.tokens), np.array(run.lengths)[:count]
                if matcher is not None:
                    stopped[:count] = matcher.update(tokens, lengths)
                if on_token is not None:
                    ends = (
                        np.where(stopped[:count], matcher.lengths, lengths) if matcher else lengths
                    )
                    for step in range(seen, taken):
                        now = np.where(step < ends, tokens[:count, step], pad_id)
                        if (step < ends).any():
                            on_token(step, now.astype(np.int32))
                seen = taken
                if (stopped | (np.array(run.reason) != loop.RUNNING)).all():
                    break
                run = advance(run, taken + every, stopped)
        return _result(run, count, pad_id, matcher, decode, eos)


def make(
    model: Any,
    *,
    sizes: prompts.Sizes | None = prompts.bucket,
    rows: prompts.Sizes | None = None,
) -> Generator:
    """A generator of ``model``, whose compiled programs live as long as it does.

    Args:
      model: a :class:`~steppe.models.model.Model` with ``decode``, or anything like it.
      sizes: maps lengths of prompts and outputs to the padded ones; None pads nothing, and
        compiles for every length.
      rows: maps a number of rows to the padded one, such as ``decoding.rows_bucket``; None
        compiles for every number of rows.

    Raises:
      ValueError: the model does not generate.
    """
    if getattr(model, "decode", None) is None:
        raise ValueError(
            "this model does not generate: its decode is None; load one with a lm head"
        )
    return Generator(
        model.decode,
        source=prompts.reads_source(model),
        limit=prompts.limit_of(model),
        vocabulary=prompts.vocabulary_of(model),
        sizes=sizes,
        rows=rows,
    )


@functools.lru_cache(maxsize=32)
def _shared(decode: Decode, source: bool, limit: int | None, vocabulary: int | None) -> Generator:
    # By the functions and not by the model: a model under an overlay holds parameters.
    return Generator(decode, source=source, limit=limit, vocabulary=vocabulary)


def generate(
    model: Any, params: Params, batch: Batch, settings: Settings | None = None, **options: Any
) -> Generated:
    """Continues every prompt of ``batch``; programs are kept between calls by the model.

    Args:
      model: a model with ``decode``.
      params, batch, settings, options: those of a call of :class:`Generator`.

    Raises:
      ValueError, FloatingPointError: see :class:`Generator`.
    """
    return shared(model)(params, batch, settings or Settings(), **options)


def shared(model: Any) -> Generator:
    """The generator that :func:`generate` uses for this model.

    Raises:
      ValueError: the model does not generate.
    """
    made = make(model)
    return _shared(made.decode, made._source, made._limit, made._vocabulary)


def _result(
    run: loop.Run,
    count: int,
    pad_id: int,
    matcher: stops.Matcher | None,
    decode: stops.Decoder | None,
    eos: np.ndarray,
) -> Generated:
    host = jax.device_get((run.tokens, run.logprobs, run.lengths, run.reason, run.valid))
    tokens, logprobs, lengths, reason, valid = (np.array(x)[:count] for x in host)
    texts: list[str | None] = [None] * count
    if matcher is not None:
        stopped = matcher.lengths >= 0
        lengths = np.where(stopped, matcher.lengths, lengths)
        reason = np.where(stopped, loop.STOP, reason)
        texts = matcher.texts
    # What a row took after its stop string is not part of the result, nor is a failure there.
    if not valid.all() and not (matcher is not None and stopped[~valid].all()):
        raise FloatingPointError(
            f"row {int((~valid).argmax())} had no token to choose: its logits are NaN, or the "
            "processors forbid every token; check the parameters and the processors"
        )
    width = int(lengths.max())
    there = np.arange(width) < lengths[:, None]
    tokens = np.where(there, tokens[:, :width], pad_id).astype(np.int32)
    logprobs = np.where(there, logprobs[:, :width], 0).astype(np.float32)
    written = None
    if decode is not None:
        plain = [t[:n] for t, n in zip(tokens, lengths)]
        plain = [t[:-1] if t[-1] in eos else t for t in plain]
        written = tuple(
            decode(t.tolist()) if text is None else text for t, text in zip(plain, texts)
        )
    return Generated(tokens, lengths, logprobs, tuple(loop.REASONS[r] for r in reason), written)
