"""``steppe quantize``: rounds, scores, measures, writes the integers and the report.

OUT/BITS-METHOD      a folder that ``steppe evaluate`` and ``models.packed`` open
OUT/rows.jsonl       a line for every finished row of the table
OUT/quantize.json, report.html
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.launch import config as config_
from steppe.launch import machine, outputs
from steppe.launch.compare import folders
from steppe.launch.compare.journal import Lines
from steppe.launch.progress import Line
from steppe.launch.quantize import methods, table
from steppe.launch.quantize.opened import Opened, noise, open_model
from steppe.launch.quantize.settings import QuantizeConfig, folder_of
from steppe.models import integer, packed, quantized
from steppe.train import loop
from steppe.train.quantize import baselines, generator

FILE, RESULT, PAGE = "rows.jsonl", "quantize.json", "report.html"
GROWS = ("out", "bits", "method", "seeds", "resume", "speed")
Key = tuple[str, str, int]


def run(config: QuantizeConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in quantize.json.

    Raises:
      FileExistsError: ``out`` holds something else.
      FileNotFoundError, ValueError: a model, data or scheme that does not fit.
      Interrupted: stopped by Ctrl-C or SIGTERM; finished rows are kept.
    """
    from rich.console import Console

    if not config.out:
        raise ValueError("out must name the new folder: --out FOLDER")
    out = Path(config.out)
    folders.check(config, out, GROWS)
    lines = Lines(out / FILE)
    done = finished(lines)
    for key in config.rows():
        _check_folder(out / folder_of(*key))
    opened = open_model(config)
    methods.check(opened, config)
    for bits in config.bits:  # before anything is computed
        for method in config.method:
            try:
                quantized.resolve(opened.model, methods.rules_of(bits, method, config))
            except ValueError as error:
                where = f"bits={bits}" + (", head" if config.head else "")
                raise ValueError(f"{where}: {error}") from error
    asked = set(config.rows())
    if (out / folders.CONFIG).is_file():  # of a resumed run, which held other rows too
        config = _both(folders.read(out, QuantizeConfig), config)
    known: dict[str, Any] = {"command": shlex.join(command), "config": config_.to_dict(config)}
    known |= {"versions": machine.versions(), "hardware": machine.hardware()}
    outputs.write_json(out / folders.CONFIG, config_.to_dict(config))
    try:
        with folders.terminable(), Line(every=20.0) as shown:
            known["float"] = _float(opened, shown.tell)
            for key in config.rows():
                if key in asked and key not in done:
                    done[key] = row(opened, config, *key, out, shown.tell)
                    lines.append(done[key])
                    _write(config, out, known, done)
    except KeyboardInterrupt:
        raise loop.Interrupted(
            f"interrupted; {len(done)} finished rows are in {lines.file}. "
            "Give the same command with --resume to go on"
        ) from None
    found = _write(config, out, known, done)
    Console().print(table.terminal(found))
    for line in table.warnings(found):
        print(line)
    print(out / PAGE)
    return found


def finished(lines: Lines) -> dict[Key, dict[str, Any]]:
    """(bits, method, seed) -> row, where its folder is still there.

    Raises:
      ValueError: a line without what a row has.
    """

    def key(row: Mapping[str, Any]) -> Key:
        for name in ("folder", "size", "errors"):
            row[name]
        return str(row["bits"]), str(row["method"]), int(row["seed"])

    rows = lines.by(key).items()
    return {key: row for key, row in rows if packed.is_packed(lines.file.parent / row["folder"])}


def _check_folder(folder: Path) -> None:
    """Refuses a row's folder that holds what no row has written."""
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if held and not packed.is_packed(folder):
        raise FileExistsError(f"{folder} holds other files ({held[0]}); choose another --out")


def _both(old: QuantizeConfig, new: QuantizeConfig) -> QuantizeConfig:
    """``new`` with the bits, methods and seeds of ``old`` before its own."""
    names = ("bits", "method", "seeds")
    joined: dict[str, Any] = {
        n: tuple(dict.fromkeys((*getattr(old, n), *getattr(new, n)))) for n in names
    }
    return dataclasses.replace(new, **joined)


def _float(opened: Opened, tell: methods.Told) -> dict[str, Any]:
    """Scores of the model as it is."""
    if opened.task is None:
        return {}
    tell("scores of the float model", 0, 1)
    found: dict[str, Any] = {"metrics": opened.task.score(opened.model, opened.params, "test")}
    if methods.classifies(opened):
        answers = [logits[real] for real, logits in _answers(opened, opened.model, opened.params)]
        found["information"] = float(generator.information(jnp.concatenate(answers)))
    return found


def row(
    opened: Opened,
    config: QuantizeConfig,
    bits: str,
    method: str,
    seed: int,
    out: Path,
    tell: methods.Told,
) -> dict[str, Any]:
    """Quantizes once, writes the folder, and tells what it costs."""
    folder = out / folder_of(bits, method, seed)
    begin = time.perf_counter()
    made = methods.quantize(opened, config, bits, method, seed, out / f"{folder.name}-game", tell)
    found: dict[str, Any] = {"bits": bits, "method": method, "seed": seed, "folder": folder.name}
    found["seconds"] = time.perf_counter() - begin
    packed.save(
        folder,
        opened.model,
        made.params,
        made.rules,
        labels=opened.labels,
        tokenizer_dir=opened.tokenizer_dir,
        notes={"bits": bits, "seed": seed, **methods.describe(opened, config, method)},
    )
    found["size"] = _sizes(folder)
    errors = baselines.errors(opened.params, made.params)
    found["errors"] = {name: error._asdict() for name, error in errors.items()}
    student = quantized.wrap(opened.model, made.rules, weights=False)
    params = quantized.dequantize(made.params)
    if opened.task is not None:
        tell(f"scores of {folder.name}", 0, 1)
        found["metrics"] = opened.task.score(student, params, "test")
        found["agreement"] = agreement(opened, student, params)
    if config.speed:
        tell(f"speed of {folder.name}", 0, 1)
        found["speed"] = _speed(opened, config, student, params, made)
    if made.told is not None:
        found["information"] = made.told
    if made.samples is not None and opened.task is not None and opened.task.tokenizer is not None:
        found["samples"] = [opened.task.tokenizer.decode(list(ids)) for ids in made.samples]
    return found


def _sizes(folder: Path) -> dict[str, Any]:
    """Bytes of packed kernels beside float32, and of the folder's weights."""
    kernels = packed.sizes(folder)
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {**kernels._asdict(), "files": files}


def agreement(opened: Opened, student: Any, params: Any) -> float | None:
    """Share of test examples (of classifiers) on which both give the same class."""
    task = opened.task
    if task is None or task.kind != "classification":
        return None
    equal, count = 0, 0
    both = (_answers(opened, student, params), _answers(opened, opened.model, opened.params))
    for (real, ours), (_, theirs) in zip(*both, strict=True):
        equal += int((ours.argmax(-1) == theirs.argmax(-1))[real].sum())
        count += int(real.sum())
    return equal / count if count else None


def _answers(opened: Opened, model: Any, params: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(which rows are examples, logits) of every batch of the test split."""
    from steppe.data import batches
    from steppe.launch import setup

    task = opened.task
    assert task is not None
    answer = jax.jit(lambda own, batch: model.apply(own, batch).logits)
    for batch in batches.evaluate(task.splits["test"], task.rows, buckets=setup.buckets(task.data)):
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_mask")}
        yield np.asarray(batch["example_index"]) >= 0, np.asarray(answer(params, inputs))


def _speed(
    opened: Opened, config: QuantizeConfig, student: Any, params: Any, made: methods.Made
) -> dict[str, Any]:
    """Forward passes of float, rounded and (where there is one) integer model, in turns."""
    from steppe.launch.bench import harness

    rows = config.batch_size
    made_inputs, key = noise(opened, config, rows), jax.random.key(0)
    batch, embeds = made_inputs.apply(made_inputs.init(key), opened.params, key)
    runs: dict[str, Any] = {"float": (opened.model, opened.params), "rounded": (student, params)}
    if any(c.w_bits <= 8 and c.a_bits <= 8 for c in student.chosen.values()):
        runs["integer"] = (integer.wrap(opened.model, made.rules), made.params)
    programs = {}
    for name, (model, own) in runs.items():
        fn = jax.jit(lambda p, b, e, model=model: model.apply(p, b, embeds=e).logits)
        once = functools.partial(fn, own, dict(batch), embeds)
        programs[name] = harness.timed(once, jax.block_until_ready)
    times = harness.interleave(programs, harness.Protocol(1, config.speed, 1))
    return {
        "rows": rows,
        "seconds": {name: harness.spread(values)._asdict() for name, values in times.items()},
        "ratio": {
            name: harness.ratio(values, times["float"])._asdict() for name, values in times.items()
        },
    }


def _write(
    config: QuantizeConfig, out: Path, known: Mapping[str, Any], done: Mapping[Key, Any]
) -> dict[str, Any]:
    from steppe.launch.report import quantizing

    found = table.summary(config, known, done)
    outputs.write_json(out / RESULT, found)
    outputs.write_text(out / PAGE, quantizing.render(found, out))
    return found
