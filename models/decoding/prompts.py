"""Prompts in static shapes: padded to a bucket, checked, and never silently misread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from steppe.models.decoding.sampling import NOWHERE

Sizes = Callable[[int], int]
SMALLEST = 16


def bucket(size: int, smallest: int = SMALLEST) -> int:
    """The next of 16, 24, 32, 48, 64, 96, 128, ... that is at least ``size``.

    Powers of two and the numbers half-way between them: a few programs serve all lengths, and
    at most a third of a padded length is padding.
    """
    step = smallest
    while step < size:
        if step + step // 2 >= size:
            return step + step // 2
        step *= 2
    return step


def rows_bucket(rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least ``rows``."""
    return rows if rows <= 2 else bucket(rows, 2)


def pad_prompts(
    prompts: Sequence[Sequence[int]],
    pad_id: int = 0,
    *,
    length: int | None = None,
    sizes: Sizes | None = bucket,
) -> dict[str, np.ndarray]:
    """Lists of token ids as a batch that is padded on the left, as decoders read them.

    Args:
      prompts: token ids of each prompt; at least one each.
      pad_id: fills the rows; the mask hides it.
      length: padded length; None = that of the longest prompt, rounded up by ``sizes``.
      sizes: maps a length to the padded one; None pads to the longest prompt only.

    Returns:
      ``input_ids`` and ``attention_mask``, int32 [B, T].

    Raises:
      ValueError: no prompts, an empty prompt, or one longer than ``length``.
    """
    if not len(prompts):
        raise ValueError("prompts is empty: there is nothing to continue; give at least one")
    counts = [len(p) for p in prompts]
    if min(counts) == 0:
        raise ValueError(
            f"prompt {counts.index(0)} is empty; begin it with the tokenizer's begin- or "
            "end-of-text token"
        )
    longest = max(counts)
    if length is None:
        length = longest if sizes is None else sizes(longest)
    if longest > length:
        raise ValueError(
            f"prompt {counts.index(longest)} has {longest} tokens, length is {length}; cut the "
            "prompt, or raise length"
        )
    ids = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros((len(prompts), length), np.int32)
    for i, prompt in enumerate(prompts):
        ids[i, length - counts[i] :] = np.asarray(prompt, np.int32)
        mask[i, length - counts[i] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Prompt(NamedTuple):
    """A batch that is ready for ``Decode.start``.

    Attributes:
      batch: arrays with padded rows and lengths.
      context: ids that the output continues, int32 [B, T]; ``NOWHERE`` at padding.
      rows: number of rows that are the caller's; padding rows follow them.
      room: tokens for which the cache leaves room.
    """

    batch: dict[str, Any]
    context: np.ndarray
    rows: int
    room: int


def reads_source(model: Any) -> bool:
    """Whether the model is an encoder-decoder, whose ``input_ids`` are a source text."""
    return any(name.startswith("encoder.") for name in getattr(model, "sites", ()))


def limit_of(model: Any) -> int | None:
    """Positions of the model, or None where nothing limits them (relative positions)."""
    config = model.config
    if getattr(config, "position_kind", None) == "relative":
        return None
    limit: int | None = getattr(config, "max_length", None)
    return limit


def vocabulary_of(model: Any) -> int | None:
    """Number of token ids of the model, or None where its config does not say."""
    size: int | None = getattr(model.config, "vocab_size", None)
    return size


def check_ids(ids: Any, vocabulary: int | None, name: str) -> None:
    """Checks that ids are the model's.

    Raises:
      ValueError: one is not; usually the tokenizer is another model's.
    """
    if vocabulary is None:
        return
    flat = np.asarray(ids).reshape(-1)
    outside = flat[(flat < 0) | (flat >= vocabulary)]
    if len(outside):
        raise ValueError(
            f"{name} holds the token id {int(outside[0])}, the model has {vocabulary} tokens "
            f"(0 to {vocabulary - 1}); is the tokenizer that of the model?"
        )


def count_rows(batch: Mapping[str, Any]) -> int:
    """Number of rows of a batch.

    Raises:
      ValueError: no ``input_ids`` [B, T] with B, T >= 1.
    """
    ids = batch.get("input_ids")
    if ids is None:
        raise ValueError(f"the batch holds no input_ids, only {sorted(batch)}")
    if np.ndim(ids) != 2:
        raise ValueError(f"input_ids must be [rows, tokens], got shape {np.shape(ids)}")
    if 0 in np.shape(ids):
        raise ValueError(f"the batch is empty: input_ids has shape {np.shape(ids)}")
    return int(np.shape(ids)[0])


def prepare(
    batch: Mapping[str, Any],
    max_new: int,
    *,
    source: bool,
    limit: int | None,
    sizes: Sizes | None = bucket,
    rows: Sizes | None = None,
    vocabulary: int | None = None,
) -> Prompt:
    """Checks a batch and pads it: prompts on the left, sources on the right.

    Args:
      batch: ``input_ids`` [B, T], ``attention_mask`` (None = all ones); other entries with a
        row for each prompt go through as they are.
      max_new: new tokens of the row that gets most.
      source: the model is an encoder-decoder.
      limit: positions of the model, or None where there is no limit.
      sizes: maps a length to the padded one; None leaves lengths alone.
      rows: maps a number of rows to the padded one; None leaves it alone.
      vocabulary: number of token ids; None = not checked.

    Raises:
      ValueError: an empty batch, a row of padding only, a prompt that is padded on the right,
        one that leaves no room for ``max_new`` tokens, a source that is longer than the
        model's positions, or a token id outside the vocabulary.
    """
    count = count_rows(batch)
    out = dict(batch)
    names = ("input_ids", "attention_mask")
    ids, mask = _read(out, *names)
    check_ids(ids[mask != 0], vocabulary, names[0])
    ready = NOWHERE * np.ones((count, 1), np.int32)
    if source:
        # Padding that all rows share is cut before it is rounded up again.
        keep = int(np.flatnonzero(mask.any(axis=0))[-1]) + 1
        if limit is not None and keep > limit:
            raise ValueError(
                f"a source of {keep} tokens is longer than the model's {limit} positions; cut it"
            )
        if limit is not None and max_new >= limit:
            raise ValueError(
                f"max_new_tokens = {max_new} and the start token need {max_new + 1} positions, "
                f"the model has {limit}; ask for {limit - 1}"
            )
        width = keep if sizes is None else sizes(keep)
        if limit is not None:
            width = min(width, limit)
        fill = (0, max(0, width - keep))
        for name, value in zip(names, (ids, mask)):
            out[name] = np.pad(value[:, :keep], ((0, 0), fill))
        prefix = 1
        names = ("decoder_input_ids", "decoder_attention_mask")
        if out.get(names[0]) is not None:
            ids, mask = _read(out, *names)
            check_ids(ids[mask != 0], vocabulary, names[0])
            prefix = ids.shape[1]
    if not source or (names[0] in out and out[names[0]] is not None):
        _check_left(mask, names)
        first = int(np.flatnonzero(mask.any(axis=0))[0])
        length = ids.shape[1] - first
        if limit is not None and length + max_new > limit:
            cures = [f"cut the prompt to {limit - max_new} tokens"] if limit > max_new else []
            cures += [f"ask for {limit - length} new ones"] if limit > length else []
            raise ValueError(
                f"a prompt of {length} tokens and max_new_tokens = {max_new} need "
                f"{length + max_new} positions, the model has {limit}; "
                f"{' or '.join(cures) or 'shorten both'}"
            )
        width = length if sizes is None else sizes(length)
        if limit is not None:
            width = min(width, limit - max_new)
        for name in (*names, "position_ids"):
            value = out.get(name)
            if name == names[1]:
                value = mask
            if value is not None and np.ndim(value) == 2:
                cut = np.asarray(value)[:, first:]
                out[name] = np.pad(cut, ((0, 0), (width - length, 0)))
        real = out[names[1]] != 0
        ready = np.where(real, out[names[0]], NOWHERE).astype(np.int32)
        prefix = width
    room = max_new if sizes is None else sizes(max_new)
    if limit is not None and prefix + max_new <= limit:
        room = min(room, limit - prefix)
    total = count if rows is None else rows(count)
    if total > count:
        take = np.r_[np.arange(count), np.zeros(total - count, np.int64)]
        out = jax.tree.map(lambda x: np.asarray(x)[take], out)
        ready = ready[take]
    return Prompt({k: v for k, v in out.items() if v is not None}, ready, count, room)


def _read(batch: Mapping[str, Any], ids_name: str, mask_name: str) -> tuple[Any, Any]:
    ids = np.asarray(batch[ids_name])
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{ids_name} must be whole numbers, got {ids.dtype}")
    mask = batch.get(mask_name)
    mask = np.ones(ids.shape, np.int32) if mask is None else np.asarray(mask).astype(np.int32)
    if mask.shape != ids.shape:
        raise ValueError(
            f"{mask_name} must have the shape of {ids_name} {ids.shape}, got {mask.shape}"
        )
    empty = np.flatnonzero(~(mask != 0).any(axis=1))
    if len(empty):
        raise ValueError(
            f"row {int(empty[0])} of {ids_name} holds no token, only padding; give it at least "
            "one, or leave the row out"
        )
    return ids.astype(np.int32), mask


def _check_left(mask: np.ndarray, names: tuple[str, str]) -> None:
    right = np.flatnonzero(mask[:, -1] == 0)
    if len(right):
        raise ValueError(
            f"row {int(right[0])} of {names[0]} ends in padding: prompts are padded on the left, "
            "so that all rows continue at the same column; use decoding.pad_prompts, or the "
            "tokenizer with padding_side='left'"
        )
