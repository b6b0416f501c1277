"""Merging on disk: folders of safetensors in, one folder out, a piece of a tensor at a time.

Inputs are read through memory maps, merged in pieces of a million entries by compiled functions,
and written into files whose headers were laid out first. Memory is a few pieces an input
whatever the models' sizes. What a method must know of the whole model (the thresholds of TIES,
the norms of Fisher merging) is found by passes over the files before the first tensor is
written; it is kept in the journal, so that an interrupted merge goes on with the next tensor.

The formulas are those of ``leafwise``, ``ties``, ``dare`` and ``fisher``. Draws of DARE depend
on the tensor's name and differ from those of ``dare`` on a tree.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from steppe.models import pretrained
from steppe.train.merge import entries as entries_
from steppe.train.merge import heads as heads_
from steppe.train.merge import methods
from steppe.train.merge.inputs import Report, digest, head_of, inspect
from steppe.train.merge.job import Job, open_fishers
from steppe.train.merge.methods import (
    Average,
    Dare,
    Fisher,
    Method,
    Slerp,
    TaskArithmetic,
    Ties,
    Weighted,
)
from steppe.train.merge.output import Output, explained

__all__ = [
    "Average",
    "Dare",
    "Fisher",
    "Method",
    "Report",
    "Result",
    "Slerp",
    "TaskArithmetic",
    "Ties",
    "Weighted",
    "inspect",
    "merge",
]

# (tensors done, tensors in all, name of the one just done)
Progress: TypeAlias = Callable[[int, int, str], None]


class Result(NamedTuple):
    """What :func:`merge` did.

    Attributes:
      out: the folder.
      tensors: how many were merged; resumed: how many of them by an earlier call.
      bytes: size of the merged files.
      seconds: of this call.
      report: the comparison of the inputs.
    """

    out: Path
    tensors: int
    resumed: int
    bytes: int
    seconds: float
    report: Report


def merge(
    method: Method,
    models: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    heads: Sequence[str] = (),
    progress: Progress | None = None,
    resume: bool = True,
    tokenizer: str | os.PathLike[str] | None = None,
    shard_bytes: int = 5 * 2**30,
) -> Result:
    """Merges folders into a folder.

    Args:
      method: one of the values above.
      models: folders of the fine-tuned models, in order.
      out: the new folder: the trunk, and the heads beside it (see ``heads``).
      base: folder of the base model; task arithmetic, TIES and DARE need it.
      names: of the tasks; default the folders' names.
      heads: regular expressions on tensor names that stay with their task, besides the heads
        that the family knows.
      progress: called after every tensor.
      resume: go on with what an interrupted call left.
      tokenizer: folder whose tokenizer files are copied; default the first input that has some.
      shard_bytes: largest file.

    Raises:
      FileNotFoundError: an input is missing.
      FileExistsError: ``out`` holds files, or another process is merging into it.
      ValueError: inputs that do not fit together (with a table), settings out of range, NaN or
        infinity in an input (names file and tensor), a partial output of another merge.
      OSError: no space on the disk; nothing was written then, or what was can be resumed.
    """
    begun = time.perf_counter()
    report = inspect(base, models, heads, names)
    report.check()
    methods.check(method, report)
    for one in report.models:
        heads_.check_name(one.name)
    fishers = open_fishers(method, report)
    layout = {}
    names_ = (*report.shared, *report.copied)
    for name in names_:
        tensor = report.origin(name).tensors[name]
        layout[tensor.stored] = (tensor.shape, tensor.dtype)
    entries_.check(report)
    run = {
        "method": repr(method),
        "inputs": digest([*report.inputs, *fishers]),
        "names": [one.name for one in report.models],
        "apart": report.apart,
    }
    output = Output(Path(out), layout, run, resume=resume, shard_bytes=shard_bytes)
    resumed = len(output.done)
    job = Job(method, report, fishers)
    try:
        if output.state is None:
            output.remember(job.prepare())
        else:
            job.restore(output.state)
        for number, name in enumerate(names_, 1):
            stored = report.origin(name).tensors[name].stored
            if stored not in output.done:
                for start, values in job.pieces(name):
                    output.write(stored, start, values)
                output.finish(stored)
            if progress is not None:
                progress(number, len(names_), name)
        with explained(output.folder):
            _beside(output.folder, report, tokenizer)
        output.publish()
    except ValueError:
        output.discard()  # the inputs are at fault: nothing of it can be used
        raise
    except BaseException:
        output.interrupt()
        raise
    seconds = time.perf_counter() - begun
    return Result(output.target, len(layout), resumed, output.bytes, seconds, report)


def _beside(folder: Path, report: Report, tokenizer: str | os.PathLike[str] | None) -> None:
    """config.json, tokenizer files and heads of the output."""
    source = report.reference
    if source.raw:
        raw = dict(source.raw)
        family = source.family
        headless = any(name in source.tensors for name in _apart(report))
        # A head of the base that no model has is not in the output either.
        headless = headless or bool(report.apart.get(source.name))
        if family is not None and (head_of(source) is not None or headless):
            raw["architectures"] = [family.base]
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    given = [Path(tokenizer)] if tokenizer is not None else [one.folder for one in report.inputs]
    origin = next((f for f in given if any((f / n).is_file() for n in pretrained.TOKENIZER_FILES)),
                  None)  # fmt: skip
    for name in pretrained.TOKENIZER_FILES if origin is not None else ():
        if origin is not None and (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    preprocessor = source.folder / pretrained.PREPROCESSOR
    if preprocessor.is_file():
        shutil.copyfile(preprocessor, folder / pretrained.PREPROCESSOR)
    kept = [one for one in report.models if report.apart.get(one.name)]
    if not kept:
        return
    entries: dict[str, Any] = {}
    for one in kept:
        entries[one.name] = entries_.entry(one)
        tensors = {n: np.array(one.read(n)).reshape(one.tensors[n].shape)
                   for n in report.apart[one.name]}  # fmt: skip
        heads_.write(folder, entries, {one.name: tensors})


def _apart(report: Report) -> set[str]:
    """Tensors that stay with their task."""
    return {name for one in report.models for name in report.apart.get(one.name, ())}
