"""Texts that a model writes for a sample of the test split, beside what should stand there.

A sample is cut out of the encoded examples, so that it needs no template and no second
tokenizer: the prompt of an answer is what precedes the last run of labelled tokens, the prompt
of a plain text its first half, the prompt of a translation its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from steppe.data import splits
from steppe.data.text import Tokenizer
from steppe.launch import kinds, writing
from steppe.launch.config import DataConfig
from steppe.train.evaluate import Generated
from steppe.train.types import Params

# Tokens of a plain text that a model goes on from.
START = 32


@dataclass(frozen=True)
class Sample:
    """Some examples of the test split. N of them.

    Attributes:
      prompts: token ids that the model is given, N int arrays.
      sources: the same for a reader.
      references: the texts that should follow.
      index: positions in the dataset.
      scored: whether there is one right text, so that metrics over texts mean something.
    """

    prompts: list[np.ndarray]
    sources: list[str]
    references: list[str]
    index: list[int]
    scored: bool


def choose(
    dataset: Any,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    count: int,
    tokens: int,
    limit: int | None,
) -> Sample | None:
    """A sample of a dataset; None where there is nothing to write.

    Args:
      dataset: of kind lm (one text a row) or seq2seq.
      data: its settings.
      count: examples.
      tokens: new tokens at most.
      limit: positions of the model.

    Raises:
      ValueError: no prompt leaves room for so many tokens.
    """
    if dataset.kind not in kinds.WRITTEN or not count or not tokens:
        return None
    ranked = sorted(range(len(dataset)), key=lambda i: splits.position(f"{dataset.ids[i]}", "s"))
    found = Sample([], [], [], [], scored=data.task != "lm")
    for number in ranked:
        cut = _cut(dataset, number, data.task)
        if cut is None:
            continue
        prompt, answer = cut
        fits = dataset.kind == "seq2seq" or limit is None or len(prompt) + tokens <= limit
        if not fits:
            continue
        record = dataset.record(number)
        if dataset.kind == "seq2seq":
            source, reference = str(record[data.input]), str(record[data.target])
        else:
            source = tokenizer.decode(prompt.tolist())
            reference = tokenizer.decode(answer[: None if found.scored else tokens].tolist())
        found.prompts.append(prompt)
        found.sources.append(source)
        found.references.append(reference)
        found.index.append(number)
        if len(found.prompts) == count:
            break
    if not found.prompts and limit is not None and tokens >= limit // 2:
        raise ValueError(_no_room(tokens, limit))
    return found if found.prompts else None


def check_room(kind: str, count: int, tokens: int, limit: int | None) -> None:
    """Refuses before a run what :func:`choose` could only refuse after it.

    Args:
      kind: of the task; count, tokens, limit: as :func:`choose` is to be given them.

    Raises:
      ValueError: not even an empty prompt leaves room for so many tokens.
    """
    goes_on = kind in kinds.WRITTEN and kind != "seq2seq"
    if goes_on and count and limit is not None and tokens >= limit:
        raise ValueError(_no_room(tokens, limit))


def _no_room(tokens: int, limit: int) -> str:
    return (
        f"sample_tokens={tokens} leaves no room for a prompt in the model's {limit} positions; "
        "lower it"
    )


def _cut(dataset: Any, number: int, task: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(prompt, what follows) of an example, as token ids; None where there is nothing to write."""
    ids = np.asarray(dataset.input_ids[number])
    if task == "seq2seq":
        return ids, np.asarray(dataset.labels[number])
    if task == "lm":
        at = min(len(ids) // 2, START)
        return (ids[:at], ids[at:]) if at else None
    mask = np.asarray(dataset.label_mask[number]) > 0
    labelled = np.flatnonzero(mask)
    if not len(labelled):
        return None
    gaps = np.flatnonzero(np.diff(labelled) > 1)
    first = labelled[gaps[-1] + 1] if len(gaps) else labelled[0]
    return (ids[:first], ids[first : labelled[-1] + 1]) if first else None


def write(
    model: Any, tokenizer: Tokenizer, params: Params, sample: Sample, tokens: int
) -> Generated:
    """Greedy texts of the model for the sample, of at most ``tokens`` tokens."""
    writer = writing.Writer(model, tokenizer, tokens)
    texts = [said.text for said in writer.write(params, sample.prompts)]
    return Generated(texts, sample.references, sample.sources, sample.index)
