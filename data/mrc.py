"""Classification as reading comprehension: the options stand in the text, the right one is a span.

  [CLS] text option_1 , option_2 , ... , option_C [SEP]      labels: columns of the gold option

One network and one span head then serve tasks of any number of classes. Sun et al., ACL 2023,
arXiv 2210.07565.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """One text with its options.

    Attributes:
      ids: tokens, int32 [T].
      options: columns of the first and the last token of every option, int32 [C, 2].
      label: number of the gold option, or -1.
    """

    ids: np.ndarray
    options: np.ndarray
    label: int


def classification_example(
    text: Sequence[int],
    options: Sequence[Sequence[int]],
    label: int = -1,
    *,
    first: int,
    last: int,
    between: int,
    max_length: int,
) -> Example:
    """A text and its options in one row of tokens; a text that is too long is cut at its end.

    Args:
      text: tokens of the template with its text, without special tokens.
      options: tokens of every option.
      label: number of the gold one; -1 = not known.
      first, last, between: ids of the first and the last token of the row, and of what separates
        options, such as a comma.
      max_length: tokens of a row, prompts that an overlay puts into it not counted.

    Raises:
      ValueError: fewer than two options, an empty one, a label that is none of them, or options
        that leave the text no room.
    """
    if len(options) < 2 or not all(len(option) for option in options):
        raise ValueError(f"options must be at least two, none empty, got {[*map(len, options)]}")
    if not -1 <= label < len(options):
        raise ValueError(f"label must be in 0..{len(options) - 1}, or -1, got {label}")
    room = max_length - 2 - sum(len(option) + 1 for option in options) + 1
    if room < 1:
        raise ValueError(
            f"{len(options)} options leave the text no room in max_length={max_length}; give more"
        )
    ids = [first, *text[:room]]
    spans = []
    for number, option in enumerate(options):
        if number:
            ids.append(between)
        spans.append((len(ids), len(ids) + len(option) - 1))
        ids.extend(option)
    ids.append(last)
    return Example(np.array(ids, np.int32), np.array(spans, np.int32), label)


def collate(
    examples: Sequence[Example], *, pad_id: int, length: int | None = None, task: int | None = None
) -> dict[str, np.ndarray]:
    """A batch: ``input_ids``, ``attention_mask`` [B, T], ``options`` [B, C, 2], ``labels`` [B, 2].

    Rows have as many options as the row with the most; -1 stands for those that they lack.
    ``label_mask`` [B] is 0 where the label is not known.

    Args:
      length: T; None = that of the longest row.
      task: number of the task that all rows are of, as ``task_ids``.

    Raises:
      ValueError: no example, or one longer than ``length``.
    """
    if not examples:
        raise ValueError("examples must hold at least one, got none")
    longest = max(len(e.ids) for e in examples)
    width = longest if length is None else length
    if longest > width:
        raise ValueError(f"a row has {longest} tokens, more than length={width}")
    rows, most = len(examples), max(len(e.options) for e in examples)
    ids = np.full((rows, width), pad_id, np.int32)
    mask = np.zeros((rows, width), np.int32)
    options = np.full((rows, most, 2), -1, np.int32)
    labels = np.zeros((rows, 2), np.int32)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        mask[row, : len(example.ids)] = 1
        options[row, : len(example.options)] = example.options
        labels[row] = example.options[max(example.label, 0)]
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "options": options}
    batch |= {"labels": labels}
    batch["label_mask"] = np.array([e.label >= 0 for e in examples], np.float32)
    if task is not None:
        batch["task_ids"] = np.full(rows, task, np.int32)
    return batch
