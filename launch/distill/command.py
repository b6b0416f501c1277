"""``steppe distill``: teacher + student + data -> run folder with report and exported student.

The run folder is that of ``steppe finetune``, with ``config.json`` of this command and, in
results.json, ``distillation``: scores of the teacher, agreement, sizes, speed, and for language
models the parts of the KL by difficulty of the tokens and the exposure bias.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from steppe.launch import config as config_
from steppe.launch import finetune, finish, scoring
from steppe.launch.distill import measure, opened, schemes, texts
from steppe.launch.distill.build import Distilled, build
from steppe.launch.distill.settings import DistillConfig, read
from steppe.launch.pods import rank
from steppe.models import tree
from steppe.models.decoding import Settings
from steppe.models.tree import Params
from steppe.train import distill
from steppe.train.distill import policies
from steppe.train.distill.pairs import STUDENT, TEACHER, Pair


def run(config: DistillConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in results.json.

    Raises:
      ValueError, OSError: whatever is wrong with settings, models or data; nothing is written.
      FileExistsError: the run folder holds another run.
      Interrupted: stopped by Ctrl-C or SIGTERM; saved.
    """
    config = schemes.resolved(rank.requeued(config))
    rank.agree("settings", rank.identity(config_.to_dict(config)))
    console = rank.console()
    if rank.lead():
        finetune.check_folder(config, config.run, fixed, read)
    begin = time.perf_counter()
    made = build(config)
    if config.dry_run:
        return _dry(made)
    timings = {"setup_s": time.perf_counter() - begin}
    for line in _described(made):
        console.print(line, highlight=False, soft_wrap=True)

    def more(found: dict[str, Any], params: Params, test: Any) -> None:
        console.print("scoring the teacher, and both beside each other", style="dim")
        compare(made, found, params, test)

    return finetune.carry_out(made.pieces, config, fixed(config), command, timings, more=more)


def fixed(config: DistillConfig) -> dict[str, Any]:
    """The settings that must be the same when a run is resumed."""
    values = config_.to_dict(config)
    return {k: v for k, v in values.items() if k not in finetune.FREE}


def compare(made: Distilled, found: dict[str, Any], params: Params, test: Any) -> None:
    """Adds what the student is beside its teacher to the results.

    Args:
      found: content of results.json; gets ``distillation``, the teacher among the baselines,
        and its texts among the samples.
      params: of both.
      test: the student's evaluation of the test split.
    """
    config, pieces = made.config, made.pieces
    out: dict[str, Any] = {
        "scheme": config.scheme,
        "what": schemes.describe(config),
        "teacher": {"name": config.teacher, "licence": made.both.teacher.origin.licence},
        "student": {"name": pieces.origin.name},
    }
    head = made.teacher.config.head
    speaks = head is not None and head.kind == (
        test.kind if test.kind == "lm" else "classification"
    )
    if speaks:
        theirs = _scored(made, params[TEACHER])
        out["teacher"]["metrics"] = {"test": theirs.metrics}
        found["baselines"]["teacher"] = dict(theirs.metrics)
        if config.scheme == "ctcd":
            before = _scored(made, opened.load_teacher(config, made.both.teacher).params)
            found["baselines"]["teacher, before"] = dict(before.metrics)
            _export_teacher(made, params[TEACHER])
        out["agreement"] = measure.agreement(test, theirs)
        _beside(found, test, theirs)
    if speaks and test.kind == "lm":
        pair = Pair(made.student, distill.Teacher(made.teacher), True, made.both.vocab)
        parts = measure.tokens(
            pair, params, pieces.evaluation("test"), vocab_chunk=config.vocab_chunk
        )
        ratio = 0.5 if config.hard_ratio is None else config.hard_ratio
        out["difficulty"] = measure.difficulty(parts, ratio)
        out["agreement"]["kl"] = out["difficulty"]["all"]["kl"]
        if config.samples and jax.process_count() == 1:
            out["exposure"] = _exposure(made, pair, params)
    out["sizes"] = _sizes(made, params)
    batch = next(iter(made.evaluation("test")))
    sides = ((made.student, params[STUDENT]), (made.teacher, params[TEACHER]))
    out["speed"] = measure.speed(*sides, batch)
    found["distillation"] = out
    found["optimiser"]["method"] = f"{schemes.describe(config)}; {found['optimiser']['method']}"


def _scored(made: Distilled, params: Params) -> Any:
    """The teacher's evaluation of the test split, with its texts."""
    config, pieces = made.config, made.pieces
    return scoring.run(
        made.teacher,
        params,
        made.evaluation("test"),
        pieces.data.task,
        pieces.data.splits["test"],
        made.both.teacher.tokenizer,
        pieces.config.data,
        count=config.samples,
        tokens=config.sample_tokens,
        plan=pieces.plan,
    )


def _export_teacher(made: Distilled, params: Params) -> None:
    """The teacher that has learnt too, as a folder beside the student's."""
    pieces, source = made.pieces, made.both.teacher
    finish.save(
        pieces.config.run / TEACHER,
        made.teacher,
        params,
        pieces.plan,
        pieces.data.task.label_names or None,
        source.origin.tokenizer,
        source.tokenizer,
    )


def _exposure(made: Distilled, pair: Pair, params: Params) -> dict[str, Any] | None:
    """Errors that add up where the student writes, on as many texts as there are samples."""
    config, data = made.config, made.pieces.data
    tokenizer = data.tokenizer
    assert tokenizer is not None
    batch = next(iter(made.pieces.evaluation("test")))
    batch, real = texts.prompted(batch, config, tokenizer.pad_id, texts.PROMPT)
    if not real.any():
        return None
    rows = np.flatnonzero(real)[: config.samples]
    write = policies.student(
        made.student,
        eos_id=tokenizer.stop_ids or None,
        pad_id=tokenizer.pad_id,
        settings=Settings(max_new_tokens=config.sample_tokens),
        vocab=made.both.vocab,
    )
    return measure.exposure(pair, params, {k: v[rows] for k, v in batch.items()}, write)


def _sizes(made: Distilled, params: Params) -> dict[str, Any]:
    student, teacher = tree.count(params[STUDENT]), tree.count(params[TEACHER])
    folder = made.pieces.config.run / "model"
    return {
        "student": {"parameters": student, "bytes": opened.size_on_disk(folder)},
        "teacher": {
            "parameters": teacher,
            "bytes": opened.size_on_disk(made.both.teacher.origin.weights),
        },
        "share": student / teacher,
    }


def _beside(found: dict[str, Any], student: Any, teacher: Any) -> None:
    """Puts the teacher's texts beside the student's, example by example."""
    if student.generated is None or teacher.generated is None:
        return
    said = dict(zip(teacher.generated.rows, teacher.generated.predictions, strict=True))
    for row, number in zip(found.get("samples", []), student.generated.rows, strict=False):
        row["teacher"] = said.get(number, "")[: scoring.TEXT_LIMIT]


def _described(made: Distilled) -> list[str]:
    config, pieces = made.config, made.pieces
    counts = ", ".join(f"{n} {count}" for n, count in pieces.data.counts().items())
    student = tree.count(made.student.abstract())
    teacher = tree.count(made.teacher.abstract())
    lines = [
        f"[bold]{config.teacher}[/bold] teaches [bold]{pieces.origin.name}[/bold] on "
        f"{pieces.data.source} ({counts})",
        schemes.describe(config),
        f"{student:,} parameters learn from {teacher:,}; {pieces.steps} steps of "
        f"{config.batch_size}; run folder {pieces.config.run}",
    ]
    if not made.both.one_reading:
        lines.append("each model reads the texts by its own tokenizer")
    kept = [p for p in pieces.loaded.fresh if not p.startswith("pooler")]
    if kept:
        lines.append(f"initialised: {', '.join(kept)}")
    return lines


def _dry(made: Distilled) -> dict[str, Any]:
    """Prints what would be compared; nothing is written."""
    from rich.console import Console

    console = Console()
    for line in _described(made):
        console.print(line, highlight=False, soft_wrap=True)
    student, teacher = (tree.count(m.abstract()) for m in (made.student, made.teacher))
    return {
        "student_parameters": student,
        "teacher_parameters": teacher,
        "steps": made.pieces.steps,
        "shapes": sorted(made.pieces.batches.shapes),
    }
