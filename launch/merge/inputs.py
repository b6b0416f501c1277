"""What is merged: run folders, exported folders and assets, as folders that fit together."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from steppe.launch import config as config_
from steppe.launch import opening, setup
from steppe.launch.config import DataConfig, FinetuneConfig
from steppe.launch.merge.settings import MergeConfig
from steppe.models import pretrained
from steppe.train.merge import entries, heads, stream
from steppe.train.merge.inputs import Report

BASE = "the base"


@dataclass(frozen=True)
class Part:
    """One input.

    Attributes:
      name: of its task.
      given: as the user wrote it.
      folder: its weights, in the layout of Hugging Face.
      data: settings of its task's data; None where there is no data.
      run: settings of the run that made it; None for other models.
    """

    name: str
    given: str
    folder: Path
    data: DataConfig | None = None
    run: FinetuneConfig | None = None


def collect(config: MergeConfig) -> tuple[Part, list[Part], Report]:
    """The base, the models, and how they compare; reads headers only.

    Raises:
      FileNotFoundError: an input is missing, or a run has not ended.
      FileExistsError: ``out`` holds files.
      NotADirectoryError: ``out`` would lie in a file.
      ValueError: names that repeat or cannot name a file, or inputs that do not fit together:
        the first differences are printed as a table on stderr.
    """
    if not config.base or not config.models:
        raise ValueError("say what to merge: steppe merge METHOD BASE MODEL MODEL ... --out FOLDER")
    if not config.out:
        raise ValueError("out must name the new folder: --out FOLDER")
    out = target(config)
    if out == Path.cwd():
        raise ValueError("out must not be the folder that you are in, which would be replaced")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{config.out} is there already; choose a new folder with --out")
    if config.method == "slerp" and len(config.models) != 2:
        raise ValueError(f"slerp is between two models, got {len(config.models)}")
    parent = next(p for p in out.absolute().parents if p.exists())
    if not parent.is_dir():
        raise NotADirectoryError(
            f"{config.out} would lie in {parent}, which is a file; choose a folder with --out"
        )
    runs = [run_of(given) for given in config.models]
    names = config.names or tuple(_name(given) for given in config.models)
    own = [None if run is None else run.data for run in runs]
    given = [_data(one) for one in config.data] if config.data else own
    settings = [_limited(one, config.eval_limit) for one in given]
    for name in names:
        heads.check_name(name)
    before = converted(out).exists()
    try:
        models = [
            Part(name, model, folder(model, out, name), data, run)
            for name, model, data, run in zip(names, config.models, settings, runs, strict=True)
        ]
        # No task's name begins with a dot.
        base = Part(BASE, config.base, folder(config.base, out, ".base"))
        report = stream.inspect(base.folder, [part.folder for part in models], names=names)
    except Exception:
        if not before:
            clean(out)
        raise
    if not report.ok:
        if not before:
            clean(out)
        print(report.table(), file=sys.stderr)
        raise ValueError(
            f"the models cannot be merged: they differ in {len(report.differences)} places of "
            "architecture or vocabulary (table above); merge fine-tunes of one base"
        )
    try:
        entries.check(report)
    except ValueError:
        if not before:
            clean(out)
        raise
    return base, models, report


def target(config: MergeConfig) -> Path:
    """Where the result goes, whatever folder the process is in."""
    return Path(config.out).expanduser().resolve()


def run_of(given: str) -> FinetuneConfig | None:
    """Settings of a run folder; None for anything else.

    Raises:
      FileNotFoundError: a run that has exported no model.
    """
    path = Path(given).expanduser()
    if given.startswith("asset:") or not path.is_dir():
        return None
    if (path / "model").is_dir():
        return config_.read(path)
    if (path / "metrics.jsonl").is_file():
        raise FileNotFoundError(
            f"{given} holds no exported model: the run has not ended; go on with "
            f"steppe finetune --out {given} --resume"
        )
    return None


def _name(given: str) -> str:
    if given.startswith("asset:"):
        return given.removeprefix("asset:").replace("/", "-")
    path = Path(given).expanduser().resolve()
    return path.parent.name if path.name == "model" else path.stem if path.is_file() else path.name


def _data(given: str) -> DataConfig:
    """Data settings of a run folder, or plain ones of an address."""
    run = run_of(given)
    return run.data if run is not None else DataConfig(source=given)


def _limited(data: DataConfig | None, limit: int) -> DataConfig | None:
    """At most ``limit`` examples of the splits that are scored."""
    if data is None or not limit or (data.eval_limit and data.eval_limit <= limit):
        return data
    return dataclasses.replace(data, eval_limit=limit)


def folder(given: str, out: Path, name: str) -> Path:
    """The folder with the weights of one input; files of other formats are written out first.

    What is written lies in ``.OUT.inputs`` beside ``out`` until the merge has ended. A second
    call finds it there, with the date of its source, so that an interrupted merge goes on.
    """
    if not given.startswith("asset:") and not Path(given).expanduser().exists():
        raise FileNotFoundError(
            f"model {given!r} does not exist; give a run folder, an exported folder or asset:NAME"
        )
    origin = opening.resolve(given)
    if origin.weights.is_dir():
        return origin.weights
    target = converted(out) / name
    stamp = origin.weights.stat().st_mtime_ns
    if not (target / "config.json").is_file():
        loaded = pretrained.load(origin.weights, head=None)
        model, params = loaded.model, dict(loaded.params)
        if any(path.startswith("pooler/") for path in loaded.fresh):
            # Not in the file: an invented one would be a point that no model came from.
            model = dataclasses.replace(model.config, pooler=False).build()
            params.pop("pooler")
        own = origin.tokenizer if origin.tokenizer.is_dir() else None
        pretrained.save(target, model, params, tokenizer_dir=own)
    for file in target.iterdir():
        os.utime(file, ns=(stamp, stamp))
    return target


def converted(out: Path) -> Path:
    """Where inputs of other formats are written."""
    return out.parent / f".{out.name}.inputs"


def clean(out: Path) -> None:
    """Removes what :func:`folder` wrote."""
    shutil.rmtree(converted(out), ignore_errors=True)


def notes(base: Part, models: list[Part], report: Report) -> list[str]:
    """What a reader of the report has to know of the inputs."""
    said = list(report.notes)
    if report.unbased:
        names = sorted(report.unbased)
        some = ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
        text = f"{some}: not in the base, so averaged over the models"
        seeds = {part.run.seed for part in models if part.run is not None}
        if len(seeds) > 1:
            text += "; the runs began it from different seeds, of which an average means little"
        said.append(text)
    for part in models:
        if part.run is not None and not _same(part.run.model, base.given):
            said.append(f"{part.name} was fine-tuned from {part.run.model}, not {base.given}")
    lacking = [part.given for part in models if part.data is None]
    if lacking and len(lacking) < len(models):
        said.append(
            f"no scores: {', '.join(lacking)} names no data; give --data, one source a model"
        )
    return said


def _same(one: str, other: str) -> bool:
    """Whether two inputs as users write them are the same."""
    if one == other or one.startswith("asset:") or other.startswith("asset:"):
        return one == other
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def licence(data: DataConfig | None) -> str:
    """Of a task's data, where it is known."""
    return "" if data is None else setup.licence(data.source)
