"""``steppe merge``: reads, merges, scores, reports."""

from __future__ import annotations

import contextlib
import errno
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from steppe.launch import config as config_
from steppe.launch import machine, outputs
from steppe.launch.merge import geometry, inputs, material, methods, table
from steppe.launch.merge.inputs import Part
from steppe.launch.merge.material import Task
from steppe.launch.merge.settings import ADAPTED, LAM, STREAMED, SWEPT, MergeConfig
from steppe.launch.progress import Line
from steppe.models import tree
from steppe.models.tree import Params
from steppe.train.merge import heads, stream
from steppe.train.merge.inputs import Report, word_heads

RESULT, PAGE, MASK = "merge.json", "report.html", "mask.safetensors"
EVERY = 20.0  # seconds between two plain lines


def run(config: MergeConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """Merges, scores, and writes ``out``: the model, merge.json and report.html.

    Raises:
      FileNotFoundError, FileExistsError: an input is missing; ``out`` is there already.
      ValueError: inputs that do not fit together or hold NaN, data of another task.
      OSError: no space on the disk. What a streamed merge had done is taken up by the same
        command.
    """
    from rich.console import Console

    console = Console()
    begin = time.perf_counter()
    base, models, report = inputs.collect(config)
    out = inputs.target(config)
    with_data = all(part.data is not None for part in models)
    if config.method not in STREAMED and not with_data:
        lacking = next(part for part in models if part.data is None)
        raise ValueError(
            f"{config.method} needs data, and {lacking.given} is no run folder that would name "
            "it; give --data, one source a model"
        )
    _check_space(out, report)
    timings: dict[str, float] = {}
    result: dict[str, Any] = {
        "method": config.method,
        "command": shlex.join(command),
        "config": config_.to_dict(config),
        "base": config.base,
        "notes": inputs.notes(base, models, report),
    }
    with Line(every=EVERY) as shown, _tidied(out):
        tasks = _tasks(models, shown) if with_data else []
        timings["data_s"] = time.perf_counter() - begin
        if config.method in STREAMED:
            _streamed(config, base, models, report, tasks, result, timings, shown)
        else:
            _in_memory(config, base, models, report, tasks, result, timings, shown)
        if config.maps:
            mark = time.perf_counter()
            found = geometry.measure(
                report,
                config.k,
                lambda done, total, name: shown.tell("angles of the task vectors", done, total),
            )
            result["geometry"] = {**found._asdict(), "disagreement": found.disagreement}
            timings["maps_s"] = time.perf_counter() - mark
    timings["total_s"] = time.perf_counter() - begin
    result |= {
        "tasks": _described(models, tasks),
        "timings": {name: round(value, 2) for name, value in timings.items()},
        "versions": machine.versions(),
        "hardware": machine.hardware(),
    }
    from steppe.launch.report import merging

    outputs.write_json(out / RESULT, result)
    outputs.write_text(out / PAGE, merging.render(merging.finite(result)))
    inputs.clean(out)
    if tasks:
        console.print(table.terminal(result))
    for line in table.said(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    print(Path(config.out).expanduser() / PAGE)
    return result


def report(out: Path) -> Path:
    """Draws report.html of a merged folder again, from its merge.json.

    Raises:
      ValueError: merge.json is damaged.
    """
    from steppe.launch.report import merging

    found = outputs.read_json(out / RESULT)
    return outputs.write_text(out / PAGE, merging.render(merging.finite(found)))


@contextlib.contextmanager
def _tidied(out: Path) -> Iterator[None]:
    """Inputs that cannot be merged leave nothing behind; an interrupted merge needs its own."""
    try:
        yield
    except ValueError:
        inputs.clean(out)
        raise


def _tasks(models: Sequence[Part], shown: Line) -> list[Task]:
    found = []
    for number, part in enumerate(models):
        shown.tell(f"data of {part.name}", number, len(models))
        found.append(material.open_task(part))
    return found


def _described(models: Sequence[Part], tasks: Sequence[Task]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"name": p.name, "model": p.given} for p in models]
    for row, task in zip(found, tasks, strict=False):
        row |= {
            "kind": task.kind,
            "metric": task.metric,
            "label_names": list(task.description.label_names),
            "data": config_.to_dict(task.data),
            "licence": inputs.licence(task.data),
            "examples": {name: len(dataset) for name, dataset in task.splits.items()},
        }
    return found


def _leave(
    config: MergeConfig, models: Sequence[Part], tasks: Sequence[Task], result: dict[str, Any]
) -> None:
    """Writes what is known as soon as the model is saved: scores may be interrupted."""
    known = {**result, "tasks": _described(models, tasks)}
    outputs.write_json(inputs.target(config) / RESULT, known)


def _streamed(
    config: MergeConfig,
    base: Part,
    models: Sequence[Part],
    report: Report,
    tasks: Sequence[Task],
    result: dict[str, Any],
    timings: dict[str, float],
    shown: Line,
) -> None:
    """From disk to disk; trees are read only where there is data to score them on."""
    lam, by = (LAM, "default") if config.lam is None else (config.lam, "given")
    trees = methods.load(base, models, shown.tell) if tasks else None
    nets = methods.Nets()
    reference: dict[str, table.Scores] = {}
    if trees is not None:
        mark = time.perf_counter()
        for split in ("valid", "test"):
            shown.tell(f"individual models, {split}", 0, 1)
            reference[split] = table.individual(tasks, trees.models, nets, split)
        if config.method in SWEPT and config.sweep:
            at = methods.line(config, trees)
            found = table.sweep(
                tasks, lambda x: trees.multihead(at(x)), config.sweep, reference, nets, shown.tell
            )
            if config.lam is None and found["best"] is not None:
                lam, by = found["best"], "validation"
            result["sweep"] = {**found, "used": lam, "by": by}
            if config.method in ("dare", "dare-ties"):
                result["notes"].append(
                    "the sweep and the merged model dropped entries by different draws"
                )
        timings["sweep_s"] = time.perf_counter() - mark
    try:
        done = stream.merge(
            methods.streamed(config, lam),
            [part.folder for part in models],
            inputs.target(config),
            base=base.folder,
            names=[part.name for part in models],
            progress=lambda done, total, name: shown.tell(f"merging {name}", done, total),
            resume=not config.anew,
            # Scored, every task keeps its head over words, as in the sweep.
            heads=word_heads(report) if trees is not None else (),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted; the same command goes on with the next tensor"
        ) from None
    timings["merge_s"] = done.seconds
    read = done.bytes * (len(models) + 1)
    result["stream"] = {
        "tensors": done.tensors,
        "resumed": done.resumed,
        "bytes": done.bytes,
        "gigabytes_a_second": (read + done.bytes) / done.seconds / 1e9,
    }
    result["coefficients"] = _rows(methods.constants(config, len(models), lam))
    _leave(config, models, tasks, result)
    if trees is not None:
        shown.tell("scores", 0, 1)
        if not (done.out / heads.HEADS).is_file():  # heads that are tied have no tensor
            own = trees.multihead(trees.theta0).heads
            entries = {name: heads.describe(h.config, h.labels) for name, h in own.items()}
            heads.write(done.out, entries, {name: {} for name in own})
        merged = heads.load(done.out)
        result["table"] = _table(config, tasks, trees, merged, nets, reference["test"])


def _in_memory(
    config: MergeConfig,
    base: Part,
    models: Sequence[Part],
    report: Report,
    tasks: Sequence[Task],
    result: dict[str, Any],
    timings: dict[str, float],
    shown: Line,
) -> None:
    if config.method in ADAPTED:
        material.check_adaptable(tasks)
    nets = methods.Nets()
    trees = methods.load(base, models, shown.tell)
    mark = time.perf_counter()
    found = methods.with_data(config, trees, tasks, nets, shown.tell)
    timings["merge_s"] = time.perf_counter() - mark
    out = inputs.target(config)
    # As a streamed merge does: in the format of the base, which is also what is scored.
    merged = trees.multihead(_stored(found.trunk, report))
    shown.tell("saving", 0, 1)
    heads.save(out, merged, tokenizer_dir=_tokenizer(base, models))
    if found.mask is not None:
        methods.save_mask(out / MASK, found.mask)
        drawn = methods.densities(found.mask)
        result["mask"] = [
            {"tensor": name, "density": drawn[name], "rate": rate}
            for name, rate in found.rates.items()
        ]
    result["coefficients"] = _rows(found.coefficients)
    result["notes"] += found.notes
    if config.method in ADAPTED:
        transductive = config.adapt_on == "test"
        result["adaptation"] = {
            "on": config.adapt_on,
            "transductive": transductive,
            "entropy": {
                name: {"steps": steps, "tasks": values}
                for name, (steps, values) in found.entropy.items()
            },
        }
        if transductive:
            result["notes"].append(
                "transductive: adaptation saw the inputs, not the labels, of the test split that "
                "the scores are of"
            )
    _leave(config, models, tasks, result)
    mark = time.perf_counter()
    swept = found.line is not None and bool(config.sweep)
    reference = {}
    for split in ("valid", "test") if swept else ("test",):
        shown.tell(f"individual models, {split}", 0, 1)
        reference[split] = table.individual(tasks, trees.models, nets, split)
    if found.line is not None and swept:
        at = found.line
        values = table.sweep(
            tasks, lambda x: trees.multihead(at(x)), config.sweep, reference, nets, shown.tell
        )
        lam = LAM if config.lam is None else config.lam
        # The mask was learnt under this coefficient, without labels: it is not chosen by them.
        by = "default" if config.lam is None else "given"
        result["sweep"] = {**values, "used": lam, "by": by}
    timings["sweep_s"] = time.perf_counter() - mark
    merged = trees.multihead(tree.cast(merged.trunk, jnp.float32))
    result["table"] = _table(config, tasks, trees, merged, nets, reference["test"])


def _stored(trunk: Params, report: Report) -> Params:
    """A trunk in the dtype of the base's tensors, where they are all of one narrow dtype."""
    held = {report.origin(name).tensors[name].dtype for name in report.shared}
    dtypes = {dtype for dtype in held if jnp.issubdtype(dtype, jnp.floating)}
    narrow = len(dtypes) == 1 and next(iter(dtypes)).itemsize < 4
    return tree.cast(trunk, next(iter(dtypes))) if narrow else trunk


def _table(
    config: MergeConfig,
    tasks: Sequence[Task],
    trees: methods.Trees,
    merged: heads.MultiHead,
    nets: methods.Nets,
    reference: table.Scores,
) -> list[dict[str, Any]]:
    untouched = table.score(tasks, trees.multihead(trees.theta0), nets, "test")
    own = table.score(tasks, merged, nets, "test")
    return [
        table.row("pretrained", tasks, untouched, reference),
        table.row("individual", tasks, reference, reference),
        table.row(config.method, tasks, own, reference),
    ]


def _rows(found: Sequence[tuple[str, list[float]]]) -> list[dict[str, Any]]:
    return [{"tensor": tensor, "values": values} for tensor, values in found]


def _tokenizer(base: Part, models: Sequence[Part]) -> Path | None:
    folders = [models[0].folder, base.folder]
    marks = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer_config.json")
    return next((f for f in folders if any((f / n).is_file() for n in marks)), None)


def _check_space(out: Path, report: Report) -> None:
    """
    Raises:
      OSError: the disk has less room than the merged model takes.
    """
    need = sum(_nbytes(report, name) for name in report.shared)
    parent = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    partial = out.absolute().parent / f".{out.name}.partial"
    free = shutil.disk_usage(parent).free
    if not partial.exists() and free < need:
        raise OSError(
            errno.ENOSPC,
            f"the merged model needs {need / 1e9:.2f} GB in {parent}, where {free / 1e9:.2f} GB "
            "are free; free some space or choose another disk",
        )


def _nbytes(report: Report, name: str) -> int:
    tensor = report.origin(name).tensors[name]
    count = 1
    for size in tensor.shape:
        count *= size
    return count * tensor.dtype.itemsize
