"""``steppe compare merging``: several tasks are learnt one by one, merged by every method, scored.

All methods of a seed merge the same fine-tuned models. Methods that adapt see the inputs of the
validation split and never a label; methods with a coefficient to choose take it from that split's
labels. What is reported is the test split, which nothing saw, and beside it the validation
split: for an adapted method that is the transductive number.

OUT/tasks/SEED/NAME  runs of ``steppe finetune``, without their checkpoints
OUT/merges.jsonl     a line for every finished merge
OUT/table.json, table.md, report.html
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steppe.launch import config as config_
from steppe.launch import finetune, outputs, setup
from steppe.launch.compare import folders
from steppe.launch.compare.journal import Lines
from steppe.launch.merge import inputs, material, methods, study_table, table
from steppe.launch.merge.inputs import Part
from steppe.launch.merge.material import Task
from steppe.launch.merge.settings import LAM, SWEPT, MergeConfig
from steppe.launch.merge.study_settings import GROWS, StudyConfig, short
from steppe.launch.progress import Line
from steppe.models.tree import Params
from steppe.train import loop, merge

FILE = "merges.jsonl"
Key = tuple[int, str]


def run(config: StudyConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in table.json.

    Raises:
      FileExistsError: ``out`` holds another comparison.
      ValueError: settings, data or models that do not fit together, or fewer methods or seeds
        than the folder has.
      Interrupted: stopped by Ctrl-C or SIGTERM; finished runs and merges are kept.
    """
    from rich.console import Console

    folder = Path(config.out)
    folders.check(config, folder, GROWS)
    for address in config.tasks:  # a mistake is found before anything is trained
        settings_of(config, address)
    lines = Lines(folder / FILE)
    done = finished(lines)
    held: dict[str, Iterable[Any]] = {
        "methods": [name for _, name in done],
        "seeds": [seed for seed, _ in done],
    }
    folders.nothing_lost(folder, held, {"methods": config.rows(), "seeds": config.seeds})
    if config.dry_run:
        return _dry(config, done)
    outputs.write_json(folder / folders.CONFIG, config_.to_dict(config))
    nets = methods.Nets()
    try:
        with folders.terminable():
            for seed in config.seeds:
                left = [name for name in config.rows() if (seed, name) not in done]
                if not left:
                    continue
                runs = [learn(config, address, seed) for address in config.tasks]
                with Line(name=f"seed {seed}", every=20.0) as shown:
                    for row in merged(config, seed, runs, left, nets, shown.tell):
                        lines.append(row)
                        done[seed, row["method"]] = row
                        _write(config, done, folder, command)
                        _say(row)
    except KeyboardInterrupt:
        raise loop.Interrupted(
            f"interrupted; {len(done)} finished merges are in {lines.file}. "
            "Give the same command with --resume to go on"
        ) from None
    found = _write(config, done, folder, command)
    Console().print(study_table.rich_table(found))
    print(folder / "report.html")
    return found


def _dry(config: StudyConfig, done: Mapping[Key, Any]) -> dict[str, Any]:
    """Says what would run; writes nothing."""
    rows = [(seed, name) for seed in config.seeds for name in config.rows()]
    left = [row for row in rows if row not in done]
    seeds = len({seed for seed, _ in left})
    found = {"trainings": seeds * len(config.tasks), "rows": len(rows), "left": len(left)}
    print(
        f"{found['trainings']} fine-tunings ({len(config.tasks)} tasks x {seeds} seeds; steppe "
        f"finetune --dry-run says what one costs), {found['left']} of {found['rows']} rows of the "
        "table are to be made"
    )
    return found


def report(folder: Path) -> dict[str, Any]:
    """Writes table and report again, from the merges that are finished.

    Raises:
      ValueError: config.json or merges.jsonl is damaged.
    """
    config: StudyConfig = folders.read(folder, StudyConfig)
    return _write(config, finished(Lines(folder / FILE)), folder, study_table.command_of(folder))


def finished(lines: Lines) -> dict[Key, dict[str, Any]]:
    """(seed, method) -> row.

    Raises:
      ValueError: a line without them.
    """
    return lines.by(lambda row: (int(row["seed"]), str(row["method"])))


def settings_of(config: StudyConfig, address: str) -> Any:
    """Data settings of a task; groups are kept together where the data has them.

    Raises:
      ValueError, OSError: the data cannot be read.
    """
    base = dataclasses.replace(config.base.data, source=address)
    found = setup.records(base)
    group = base.group if found and base.group in found[0] else ""
    return dataclasses.replace(base, group=group)


def learn(config: StudyConfig, address: str, seed: int) -> Path:
    """The run folder of one task and seed, trained if it is not there yet."""
    folder = Path(config.out) / "tasks" / str(seed) / short(address)
    if (folder / "results.json").is_file() and (folder / "model").is_dir():
        return folder
    begun = (folder / finetune.CONFIG).is_file()
    settings = dataclasses.replace(
        config.base, data=settings_of(config, address), seed=seed, out=str(folder), resume=begun
    )
    finetune.run(settings)
    # The export is what is merged; the optimiser's state would fill the disk.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder


def merged(
    config: StudyConfig,
    seed: int,
    runs: Sequence[Path],
    left: Sequence[str],
    nets: methods.Nets,
    tell: methods.Told,
) -> Any:
    """Yields a row for every method of a seed that is ``left``, in their order."""
    shared = dataclasses.replace(
        config.shared(seed),
        base=config.base.model,
        models=tuple(map(str, runs)),
        out=str(Path(config.out) / "merged"),
    )
    base, models, _ = inputs.collect(shared)
    tasks = [material.open_task(part) for part in models]
    trees = methods.load(base, models, tell)
    inputs.clean(Path(shared.out))
    reference = {s: table.individual(tasks, trees.models, nets, s) for s in ("valid", "test")}
    for name in left:
        begin = time.perf_counter()
        if name == "individual":
            found = _Merge(None)
        elif name == "pretrained":
            found = _Merge(trees.theta0)
        else:
            arm = config.arm(name, shared)
            found = _one(arm, models, tasks, trees, nets, reference, tell)
        row: dict[str, Any] = {"seed": seed, "method": name, **found.said}
        row["merge_s"] = time.perf_counter() - begin
        tell(f"scores of {name}", 0, 1)
        for split in ("valid", "test"):
            scores = reference[split]
            if found.trunk is not None:
                scores = table.score(tasks, trees.multihead(found.trunk), nets, split)
            row[split] = table.row(name, tasks, scores, reference[split])
            row[split].pop("name")
        yield row


@dataclasses.dataclass
class _Merge:
    """A merged trunk (None: every task keeps its own model) and what the row says of it."""

    trunk: Params | None
    said: dict[str, Any] = dataclasses.field(default_factory=dict)


def _one(
    arm: MergeConfig,
    models: Sequence[Part],
    tasks: Sequence[Task],
    trees: methods.Trees,
    nets: methods.Nets,
    reference: dict[str, table.Scores],
    tell: methods.Told,
) -> _Merge:
    """One method on the models of a seed."""
    if arm.method == "average":
        return _Merge(merge.average(trees.thetas))
    if arm.method in SWEPT:
        at = methods.line(arm, trees)
        if arm.lam is not None:
            return _Merge(at(arm.lam), {"lam": arm.lam})
        scores = _valid(tasks, trees, at, arm.sweep, reference, nets, tell)
        known = [value for value in scores if value == value]
        lam = arm.sweep[scores.index(max(known))] if known else LAM
        sweep = {"lambdas": list(arm.sweep), "valid": scores}
        return _Merge(at(lam), {"lam": lam, "sweep": sweep})
    found = methods.with_data(arm, trees, tasks, nets, tell)
    said: dict[str, Any] = {"notes": found.notes}
    if found.entropy:
        ends = {
            phase: [sum(values[0]), sum(values[-1])]
            for phase, (_, values) in found.entropy.items()
            if values
        }
        said["entropy"] = ends
    if found.coefficients:
        said["coefficients"] = np.mean([c for _, c in found.coefficients], axis=0).tolist()
    if found.rates:
        said["mask_rate"] = float(np.mean(list(found.rates.values())))
    return _Merge(found.trunk, said)


def _valid(
    tasks: Sequence[Task],
    trees: methods.Trees,
    at: Callable[[float], Params],
    lambdas: Sequence[float],
    reference: dict[str, table.Scores],
    nets: methods.Nets,
    tell: methods.Told,
) -> list[float]:
    """Normalised mean on the validation split for each coefficient."""
    found = []
    for number, lam in enumerate(lambdas):
        tell(f"coefficient {lam:g}", number, len(lambdas))
        scores = table.score(tasks, trees.multihead(at(lam)), nets, "valid")
        found.append(table.row("", tasks, scores, reference["valid"])["normalised_mean"])
    return found


def _write(
    config: StudyConfig, done: dict[Key, dict[str, Any]], folder: Path, command: Sequence[str]
) -> dict[str, Any]:
    from steppe.launch.report import merge_study

    found = study_table.summary(config, done, command)
    outputs.write_json(folder / "table.json", found)
    outputs.write_text(folder / "table.md", study_table.markdown(found))
    outputs.write_text(folder / "report.html", merge_study.render(found))
    return found


def _say(row: dict[str, Any]) -> None:
    from rich.console import Console

    text = (
        f"seed {row['seed']} {row['method']}: test {row['test']['mean']:.4f}, "
        f"{row['test']['normalised_mean']:.1%} of the individual models ({row['merge_s']:.0f} s)"
    )
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
