"""Log probabilities of given texts, and the choice between options by them.

  score(c | p) = sum_t log p(c_t | p, c_<t)            nats

All pairs of a call go through fixed shapes: sorted by length, a few rows at a time, padded to a
bucket. Padding changes nothing but rounding.

Normalisations of an option's score: by its tokens (Brown et al. 2020, arXiv 2005.14165), by its
characters (``acc_norm`` of common evaluation harnesses), or by its own probability without the
question, log p(o | q) - log p(o | neutral) (Holtzman et al. 2021, arXiv 2104.08315).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models.decoding import prompts
from steppe.models.decoding.inputs import join_sites, split_sites
from steppe.models.model import Masks
from steppe.models.sites import Site
from steppe.models.tree import Params

Ids = Sequence[int]
NORMALISE = ("sum", "tokens", "chars", "unconditional")


class Scores(NamedTuple):
    """Log probabilities of continuations, on the host, in nats.

    Attributes:
      total: float32 [N], summed over the tokens of each continuation.
      tokens: float32 [N, U], of each token, 0 at padding; U = the longest continuation.
      lengths: int32 [N], tokens of each continuation.
      greedy: bool [N], whether every token is the model's most probable one.
    """

    total: np.ndarray
    tokens: np.ndarray
    lengths: np.ndarray
    greedy: np.ndarray


def score(
    model: Any,
    params: Params,
    prompts_ids: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    rows: int = 8,
    pad_id: int = 0,
    sites: Mapping[str, Site] | None = None,
    masks: Masks | None = None,
    sizes: prompts.Sizes | None = prompts.bucket,
) -> Scores:
    """Log probability of each continuation after its prompt.

    Args:
      model: a decoder with a language-model head, or an encoder-decoder (prompts are its
        sources then, continuations its targets).
      params: of the model.
      prompts_ids: token ids of each prompt [N]; at least one id each.
      continuations: token ids of each continuation [N]; at least one id each. Ids of prompt
        and continuation are joined as they are; an end token counts if it is given.
      rows: pairs a forward pass; the logits take rows * T * V * 4 bytes.
      pad_id: fills the rows; the mask hides it.
      sites, masks: given to the model.
      sizes: maps lengths to the padded ones; None compiles for every length.

    Raises:
      ValueError: no pairs, different numbers of prompts and continuations, an empty one, rows
        < 1, or a pair longer than the model's positions.
    """
    pairs = _pairs(prompts_ids, continuations)
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}; it is the size of a batch")
    source = prompts.reads_source(model)
    vocabulary = prompts.vocabulary_of(model)
    for i, (prompt, continuation) in enumerate(pairs):
        prompts.check_ids(prompt, vocabulary, f"prompt {i}")
        prompts.check_ids(continuation, vocabulary, f"continuation {i}")
    limit = prompts.limit_of(model)
    counts = np.array([len(c) for _, c in pairs], np.int32)
    lengths = [(len(p), len(c)) if source else (len(p) + len(c), len(c)) for p, c in pairs]
    read = [max(pair) for pair in lengths]  # of an encoder-decoder the longer of the two texts
    if limit is not None and max(read) > limit:
        row = read.index(max(read))
        what, cure = "have {} tokens together", "cut the prompt on its left"
        if source:
            what, cure = "have up to {} tokens", "cut the longer one"
        raise ValueError(
            f"prompt and continuation {row} {what.format(max(read))}, the model {limit} "
            f"positions; {cure}"
        )
    tokens = np.zeros((len(pairs), int(counts.max())), np.float32)
    greedy = np.zeros(len(pairs), bool)
    hooks, deltas = split_sites(sites)
    run = _program(model.apply, source)
    order = sorted(range(len(pairs)), key=lambda i: lengths[i])
    for begin in range(0, len(order), rows):
        chunk = order[begin : begin + rows]
        chunk_ids = chunk + chunk[-1:] * (rows - len(chunk))  # the last batch is filled up
        made = _batch([pairs[i] for i in chunk_ids], source, sizes, limit, pad_id)
        logp, best = jax.device_get(run(params, *made, deltas, masks, hooks=hooks))
        for k, i in enumerate(chunk):
            tokens[i, : counts[i]] = logp[k, : counts[i]]
            greedy[i] = best[k, : counts[i]].all()
    total = tokens.astype(np.float64).sum(axis=1).astype(np.float32)
    return Scores(total, tokens, counts, greedy)


def option_scores(
    model: Any,
    params: Params,
    prompts_ids: Sequence[Ids],
    options: Sequence[Sequence[Ids]],
    *,
    normalise: str = "sum",
    chars: Sequence[Sequence[int]] | None = None,
    neutral: Sequence[Any] | None = None,
    **how: Any,
) -> list[np.ndarray]:
    """A score for every option of every prompt; the largest one is the model's answer.

    Args:
      model, params: as in :func:`score`.
      prompts_ids: token ids of each prompt [N].
      options: for each prompt the token ids of its options; their numbers may differ.
      normalise: "sum" = log probability, "tokens" = divided by the number of tokens, "chars" =
        divided by ``chars``, "unconditional" = minus the log probability after ``neutral``.
      chars: for each prompt the lengths of its options in characters (or bytes).
      neutral: ids of a prompt without the question (such as the begin-of-text token, or
        "Answer:"), for all prompts or for each.
      how: ``rows``, ``pad_id``, ``sites``, ``masks``, ``sizes`` of :func:`score`.

    Returns:
      float32 [options of the prompt], for each prompt; in nats (a token, a character).

    Raises:
      ValueError: an unknown ``normalise``, what it needs is missing, a prompt without options,
        or what :func:`score` refuses.
    """
    if normalise not in NORMALISE:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISE)}, got {normalise!r}")
    if len(prompts_ids) != len(options):
        raise ValueError(f"{len(prompts_ids)} prompts, but options for {len(options)}")
    for i, each in enumerate(options):
        if not len(each):
            raise ValueError(f"prompt {i} has no options; give at least one, or leave it out")
    sizes = [len(each) for each in options]
    flat = [option for each in options for option in each]
    owner = [i for i, size in enumerate(sizes) for _ in range(size)]
    divide = np.ones(len(flat))
    if normalise == "tokens":
        divide = np.array([len(option) for option in flat])
    if normalise == "chars":
        if chars is None or [len(c) for c in chars] != sizes:
            raise ValueError('normalise="chars" needs chars, one length for every option')
        divide = np.array([n for each in chars for n in each], float)
        if not (divide > 0).all():
            raise ValueError(f"chars must be above 0, got {divide.min():g}")
    if normalise == "unconditional" and neutral is None:
        raise ValueError(
            'normalise="unconditional" needs neutral, the ids of a prompt without the question'
        )
    found = score(model, params, [prompts_ids[i] for i in owner], flat, **how)
    value = found.total.astype(np.float64) / divide
    if normalise == "unconditional" and neutral is not None:
        single = np.ndim(neutral[0]) == 0
        if not single and len(neutral) != len(sizes):
            raise ValueError(f"{len(sizes)} prompts, but neutral holds {len(neutral)}")
        bare: list[Any] = [neutral if single else neutral[i] for i in owner]
        # The same option after the same prompt is scored once.
        known: dict[Any, int] = {}
        for pair in zip(map(tuple, bare), map(tuple, flat)):
            known.setdefault(pair, len(known))
        prior = score(model, params, [p for p, _ in known], [c for _, c in known], **how).total
        places = [known[pair] for pair in zip(map(tuple, bare), map(tuple, flat))]
        value = value - prior[places]
    return [part.astype(np.float32) for part in np.split(value, np.cumsum(sizes)[:-1])]


@functools.lru_cache(maxsize=32)
def _program(apply: Callable[..., Any], source: bool) -> Any:
    def run(
        params: Params,
        batch: Any,
        targets: jax.Array,
        columns: jax.Array,
        deltas: Any,
        masks: Masks | None,
        *,
        hooks: Any,
    ) -> tuple[jax.Array, jax.Array]:
        logits = apply(params, batch, sites=join_sites(hooks, deltas), masks=masks).logits
        if not source:
            # Only the columns that predict a token of a continuation.
            logits = jnp.take_along_axis(logits, columns[..., None], axis=1)
        logits = logits.astype(jnp.float32)
        taken = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
        best = taken >= logits.max(axis=2)
        return taken - jax.nn.logsumexp(logits, axis=2), best

    return jax.jit(run, static_argnames=("hooks",))


def _batch(
    pairs: Sequence[tuple[Ids, Ids]],
    source: bool,
    sizes: prompts.Sizes | None,
    limit: int | None,
    pad_id: int,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(batch, targets [B, U], columns [B, U] whose logits score them)."""
    longest = max(len(c) for _, c in pairs)
    width = longest if sizes is None else max(sizes(longest), longest)
    if source and limit is not None:
        width = min(width, limit)
    read = [list(p) if source else [*p, *c] for p, c in pairs]
    length = max(len(r) for r in read)
    if sizes is not None:
        length = min(max(sizes(length), length), limit or sizes(length))
    ids, mask = _right(read, length, pad_id)
    targets, real = _right([list(c) for _, c in pairs], width, 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    if source:
        batch["labels"] = np.where(real == 1, targets, -100).astype(np.int32)
        return batch, targets, targets
    first = np.array([[len(p) - 1] for p, _ in pairs])
    columns = np.minimum(first + np.arange(width), length - 1).astype(np.int32)
    return batch, targets, columns


def _right(lists: Sequence[list[int]], length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(lists), length), fill, np.int32)
    mask = np.zeros((len(lists), length), np.int32)
    for i, row in enumerate(lists):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def _pairs(prompts_ids: Sequence[Ids], continuations: Sequence[Ids]) -> list[tuple[Ids, Ids]]:
    if not len(prompts_ids):
        raise ValueError("there is nothing to score: no prompts are given")
    if len(prompts_ids) != len(continuations):
        raise ValueError(f"{len(prompts_ids)} prompts, but {len(continuations)} continuations")
    for name, lists, cure in (
        ("prompt", prompts_ids, "begin it with the begin- or end-of-text token"),
        ("continuation", continuations, "an empty text has no probability; leave it out"),
    ):
        for i, ids in enumerate(lists):
            if not len(ids):
                raise ValueError(f"{name} {i} is empty; {cure}")
    return list(zip(prompts_ids, continuations, strict=True))
