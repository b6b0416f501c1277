"""Whose texts to distil on: functions ``(params, batch, key) -> batch`` before any divergence.

  gt           the data set's
  teacher      the teacher's continuation of the prompts, drawn now (or once, into a data set)
  student      the student's own, drawn from its current parameters (on-policy)
  mix_request  one coin a batch: with probability ``share`` the first policy, else the second
  mix_token    every token drawn from (1 - share) q + share p
  imperfect    the student's one-pass fills of masked gold tokens, see ``kid``
  replay       the student's old texts, see ``replay.adaptive``, which also keeps the state

``gt`` and ``imperfect`` are traced, and may be given to an objective as ``policy=``. The others
generate: call them between the loop's batches and its step, ``step(state, policy(params, batch,
key))``. Batches keep their shapes, so that nothing is compiled twice. No gradient runs through
the drawing: tokens are integers.

A prompt is what stands before a row's first labelled token; the answer that is drawn is
labelled up to its first end token, which counts, and what follows is padding.

Lin et al. 2020 (ImitKD, arXiv 2009.07253); Agarwal et al. 2024 (GKD, 2306.13649); Gu et al. 2024
(MiniLLM, 2306.08543).

Deviations: "each token from student or teacher, with probability 1/2" is drawn from the
average of both distributions, which is the same draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models.decoding import Settings, make, pad_prompts, streams
from steppe.models.decoding.generate import Generated
from steppe.models.decoding.streams import Streams
from steppe.models.model import Decode, Model
from steppe.train.distill.divergences import fraction
from steppe.train.distill.kd import Rewrite
from steppe.train.distill.kid import imperfect
from steppe.train.distill.pairs import STUDENT, TeacherLike, parameters

__all__ = ["cut", "gt", "imperfect", "mix_request", "mix_token", "student", "teacher"]

SAMPLE = Settings(temperature=1.0)


def gt() -> Rewrite:
    """The texts of the data set."""
    return lambda params, batch, key: batch


def cut(model: Model, vocab: int | None) -> Model:
    """``model``, which writes its first ``vocab`` tokens only; what is behind them is padding."""
    if vocab is None or model.decode is None:
        return model

    def first(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> tuple[jax.Array, Any]:
            logits, state = fn(*args, **options)
            return logits[..., :vocab], state

        return call

    return dataclasses.replace(model, decode=Decode(*(first(fn) for fn in model.decode)))


def student(
    model: Model,
    *,
    eos_id: int | Sequence[int] | None,
    pad_id: int = 0,
    settings: Settings | None = None,
    vocab: int | None = None,
) -> Rewrite:
    """The student's own continuations of the prompts of a batch, drawn now.

    Args:
      model: a causal language model.
      eos_id: tokens that end a text.
      pad_id: fills the rows.
      settings: default: samples at temperature 1. ``max_new_tokens`` is cut to the room that
        the longest prompt of the batch leaves.
      vocab: common size of vocabularies that are padded differently; no token beyond it is
        written, which the other model would not know.

    Raises:
      ValueError: the model does not generate; from a call, rows without prompt or without room,
        packed rows.
    """
    run = make(cut(model, vocab))

    def policy(params: Any, batch: Mapping[str, Any], key: Any) -> dict[str, Any]:
        own = params.get(STUDENT, params)
        return _continued(
            batch,
            lambda prompts, how: run(own, prompts, how, key=key, eos_id=eos_id, pad_id=pad_id),
            settings or SAMPLE,
            pad_id,
        )

    return policy


def teacher(
    whose: TeacherLike,
    *,
    eos_id: int | Sequence[int] | None,
    pad_id: int = 0,
    settings: Settings | None = None,
    vocab: int | None = None,
) -> Rewrite:
    """The teacher's continuations; arguments and errors as in :func:`student`."""
    run = make(cut(whose.model, vocab))

    def policy(params: Any, batch: Mapping[str, Any], key: Any) -> dict[str, Any]:
        other = parameters(params, whose)[1]
        return _continued(
            batch,
            lambda prompts, how: run(other, prompts, how, key=key, eos_id=eos_id, pad_id=pad_id),
            settings or SAMPLE,
            pad_id,
        )

    return policy


def mix_token(
    model: Model,
    whose: TeacherLike,
    *,
    share: float = 0.5,
    eos_id: int | Sequence[int] | None,
    pad_id: int = 0,
    settings: Settings | None = None,
    vocab: int | None = None,
) -> Rewrite:
    """Continuations whose every token is the teacher's with probability ``share``.

    ``share`` = 0.2 is MiniLLM's teacher-mixed sampling. Other arguments and errors as in
    :func:`student`; the settings' temperature divides the logarithm of the mixture.

    Raises:
      ValueError: share outside [0, 1].
    """
    fraction(share, "share")
    cache: dict[Any, Any] = {}
    writers = cut(model, vocab), cut(whose.model, vocab)

    def policy(params: Any, batch: Mapping[str, Any], key: Any) -> dict[str, Any]:
        own, other = parameters(params, whose)

        def generated(prompts: Any, how: Settings) -> Generated:
            sides = zip(("student", "teacher"), writers, (own, other), strict=True)
            parts = {name: (writer, its, prompts) for name, writer, its in sides}
            joint: Streams = streams(parts, _mixture, np.float32(share))
            # One generator for all calls, or every batch would compile anew.
            if joint.model.decode not in cache:
                cache[joint.model.decode] = make(joint.model)
            run = cache[joint.model.decode]
            return run(joint.params, joint.batch, how, key=key, eos_id=eos_id, pad_id=pad_id)

        return _continued(batch, generated, settings or SAMPLE, pad_id)

    return policy


def mix_request(first: Rewrite, second: Rewrite | None = None, *, share: float = 0.5) -> Rewrite:
    """One coin a batch: ``first`` with probability ``share``, else ``second`` (default: gt).

    GKD's and ImitKD's lambda. Decided on the host, so that only one of them runs.

    Raises:
      ValueError: share outside [0, 1].
    """
    fraction(share, "share")
    other = gt() if second is None else second

    def policy(params: Any, batch: Any, key: Any) -> Any:
        coin, more = jax.random.split(key)
        chosen = first if float(jax.random.uniform(coin)) < share else other
        return chosen(params, batch, more)

    return policy


def _mixture(logits: dict[str, jax.Array], share: jax.Array) -> jax.Array:
    log_q, log_p = (jax.nn.log_softmax(logits[name]) for name in ("student", "teacher"))
    return jnp.logaddexp(log_q + jnp.log1p(-share), log_p + jnp.log(share))


def _continued(
    batch: Mapping[str, Any],
    generate: Callable[[dict[str, np.ndarray], Settings], Generated],
    settings: Settings,
    pad_id: int,
) -> dict[str, Any]:
    """The batch with its answers replaced by generated ones, in the same shapes."""
    ids, prompts = split_prompts(batch)
    real = np.array([bool(prompt) for prompt in prompts])
    if not real.any():
        return dict(batch)
    # The padding rows of an epoch's last batch are drawn along with another's prompt, unused.
    prompts = [prompt or prompts[real.argmax()] for prompt in prompts]
    length = ids.shape[1]
    longest = max(map(len, prompts))
    room = length - longest
    if room < 1:
        raise ValueError(
            f"the longest prompt fills the {length} tokens of a row: there is no room for an "
            "answer; cut the prompts, or make the rows longer"
        )
    most = np.minimum(np.asarray(settings.max_new_tokens), room)
    least = np.minimum(np.asarray(settings.min_new_tokens), most)
    how = {f: getattr(settings, f) for f in settings.__dataclass_fields__}
    how.update(max_new_tokens=most, min_new_tokens=least)
    done = generate(pad_prompts(prompts, pad_id), Settings(**how))

    new = np.full(ids.shape, pad_id, np.int32)
    there = np.zeros(ids.shape, np.int32)
    answer = np.zeros(ids.shape, np.float32)
    for row, prompt in enumerate(prompts):
        begin, count = len(prompt), int(done.lengths[row])
        new[row, :begin] = prompt
        new[row, begin : begin + count] = done.tokens[row, :count]
        there[row, : begin + count] = 1
        answer[row, begin : begin + count] = real[row]
    kept = {n: v for n, v in batch.items() if np.shape(v)[:2] != ids.shape}
    given = {"input_ids": new, "attention_mask": there, "labels": new, "label_mask": answer}
    return {**kept, **given}


def split_prompts(batch: Mapping[str, Any]) -> tuple[np.ndarray, list[list[int]]]:
    """(input_ids, the real tokens of each row before its first labelled one).

    A row of at most one token and no label is padding; its prompt is empty.

    Raises:
      ValueError: packed rows; another row without labels; a row whose first real token is
        labelled.
    """
    if "segment_ids" in batch:
        raise ValueError(
            "batch has segment_ids: rows of several texts cannot be continued; give one text a row"
        )
    ids = np.asarray(batch["input_ids"])
    labels = np.asarray(batch["labels"])
    counts = labels >= 0
    if batch.get("label_mask") is not None:
        counts = counts & (np.asarray(batch["label_mask"]) > 0)
    real = np.asarray(batch.get("attention_mask", np.ones_like(ids))) != 0
    prompts: list[list[int]] = []
    for row in range(len(ids)):
        if not counts[row].any():
            if real[row].sum() <= 1:
                prompts.append([])
                continue
            raise ValueError(
                f"row {row} has no labelled token, so that nobody knows where its prompt ends"
            )
        prompt = ids[row, : counts[row].argmax()][real[row, : counts[row].argmax()]]
        if not len(prompt):
            raise ValueError(
                f"row {row} has no token before its first labelled one: there is nothing to "
                "continue; begin it with the begin-of-text token, unlabelled"
            )
        prompts.append([int(token) for token in prompt])
    return ids, prompts
