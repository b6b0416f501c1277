"""The tasks' data, opened once, and the scores of whatever serves the tasks.

What serves tasks is here a mapping from each task to a model and its parameters: several models,
one trunk with several heads, or the columns of a joined head. Every task is scored on its own
splits, and on the test split of the further data whose classes have the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from steppe.launch import outputs, setup
from steppe.launch.config import DataConfig
from steppe.launch.merge.material import LESS, Task
from steppe.launch.merge.methods import Nets
from steppe.launch.pieces import rows_of
from steppe.launch.tour import graph
from steppe.launch.tour.graph import Done
from steppe.launch.tour.settings import TourConfig, short
from steppe.models import packed, pretrained, quantized, tree
from steppe.models.encoder import EncoderConfig
from steppe.models.families import family as family_of
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train.merge import heads, joined

# (what goes on, done, of how many)
Told: TypeAlias = Callable[[str, int, int], None]
# task -> model and parameters
Served: TypeAlias = Mapping[str, tuple[Model, Params]]
Metrics: TypeAlias = dict[str, float]
# Of a split; fewer decide nothing, and a choice or a claim that they make is chance.
FEW = 20
KEPT = ("examples", "accuracy", "f1_macro", "loss", "ece", "brier")
MODEL = "model"


class World:
    """Data and compiled networks of a run, the same for all its seeds.

    Attributes:
      tasks: name -> task.
      further: name of a task -> names of further data -> that data, read as the task.
      settings: address -> data settings.
      inputs: address -> what stands for its content in a hash.
      tell: shows what goes on.
    """

    def __init__(self, config: TourConfig, tell: Told | None = None) -> None:
        """
        Raises:
          ValueError, OSError: a model or data that does not fit; nothing is written.
        """
        self.config = config
        self.tell: Told = tell or (lambda what, done, total: None)
        self.origin = setup.origin(config.model)
        self.bare = pretrained.load_config(self.origin.weights)
        self._check_model()
        self.nets = Nets()
        self._rounding: dict[Any, Model] = {}
        records = {a: self._records(a) for a in (*config.tasks, *config.further)}
        self.settings = {a: self._settings(a, found) for a, found in records.items()}
        self.tasks = {
            name: self._open(name, self.settings[address], records[address])
            for name, address in zip(config.names, config.tasks, strict=True)
        }
        for task in self.tasks.values():
            _check_task(task)
        self.further: dict[str, dict[str, Task]] = {name: {} for name in self.tasks}
        for address in config.further:
            self._open_further(address, records[address])
        self.inputs = {name: pinned(name) for name in (config.model, *records)}

    def _check_model(self) -> None:
        name, config = self.config.model, self.bare
        if not isinstance(config, EncoderConfig):
            raise ValueError(
                f"model {name} is no encoder; a tour takes one, such as asset:minilm-l6"
            )
        if self.config.layers > config.layers:
            raise ValueError(
                f"layers={self.config.layers} is more than the {config.layers} of {name}, which "
                "the student is cut from"
            )
        if family_of(config.family).heads["classification"].transform is not None:
            raise ValueError(
                f"model {name} is a {config.family}, whose classifier has a hidden layer, so that "
                "heads cannot be joined; take a BERT, such as asset:minilm-l6"
            )

    def _records(self, address: str) -> list[dict[str, Any]]:
        return setup.records(dataclasses.replace(self.config.data, source=address))

    def _settings(self, address: str, found: list[dict[str, Any]]) -> DataConfig:
        """Groups are kept together where the data has them."""
        base = self.config.data
        group = base.group if found and base.group in found[0] else ""
        return dataclasses.replace(base, source=address, group=group)

    def _open(self, name: str, data: DataConfig, found: list[dict[str, Any]]) -> Task:
        tokenizer = setup.fitting(data, self.origin, self.bare)
        task = setup.task(data, found)
        parts = {
            split: setup.encode(task, rows, tokenizer, data, training=False)
            for split, rows in setup.divide(data, found).items()
        }
        metric = outputs.HEADLINE[task.kind]
        rows = rows_of(self.bare, task.kind, data.max_length)
        return Task(
            name, task.kind, metric, metric in LESS, data, task, tokenizer, parts, rows
        )  # fmt: skip

    def _open_further(self, address: str, found: list[dict[str, Any]]) -> None:
        own = self.settings[address]
        names = set(setup.task(own, found).label_names)
        takers = [t for t in self.tasks.values() if set(t.description.label_names) == names]
        if not takers:
            raise ValueError(
                f"elsewhere has {address}, whose classes ({', '.join(sorted(names))}) are those of "
                "no task; leave it out"
            )
        for task in takers:
            data = dataclasses.replace(own, classes=tuple(task.description.label_names))
            self.further[task.name][short(address)] = self._open(task.name, data, found)

    # What serves the tasks -------------------------------------------------------------------

    def individual(self, runs: Mapping[str, Done]) -> Served:
        """Every task by the model that was fine-tuned on it."""
        found = {}
        for task, run in runs.items():
            loaded = pretrained.load(run.folder / "run" / MODEL)
            found[task] = (self.nets.of(loaded.model.config), loaded.params)
        return found

    def several(self, merged: heads.MultiHead) -> Served:
        """Every task by its head on one trunk."""
        pairs = {task: merged.model(task) for task in merged.heads}
        return {task: (self.nets.of(model.config), own) for task, (model, own) in pairs.items()}

    def columns(self, what: joined.Joined, params: Params) -> Served:
        """Every task by its columns of a joined head."""
        return {
            task: (self.nets.of(what.config_of(task)), what.alone(task, params))
            for task in what.classes
        }

    def packed(self, folder: Path) -> Served:
        """Every task by its columns of a quantized model, kernels on their grids."""
        loaded = packed.load(folder)
        what = joined.read(loaded.model, loaded.labels)
        found = {}
        for task in what.classes:
            config = what.config_of(task)
            key = (config, loaded.model.rules)
            if key not in self._rounding:
                self._rounding[key] = quantized.wrap(
                    self.nets.of(config), loaded.model.rules, weights=False
                )
            found[task] = (self._rounding[key], what.alone(task, loaded.params))
        return found

    # Scores ----------------------------------------------------------------------------------

    def score(self, served: Served, split: str) -> dict[str, Metrics]:
        """Metrics of every task on its own split."""
        return {name: _kept(task.score(*served[name], split)) for name, task in self.tasks.items()}

    def scores(self, served: Served) -> dict[str, Any]:
        """All that is reported of what serves the tasks.

        Returns:
          ``valid``, ``test``: task -> metrics; ``further``: task -> data -> metrics;
          ``mean``: means over the tasks: valid, test, further (accuracies), ece (test).
        """
        found: dict[str, Any] = {split: self.score(served, split) for split in ("valid", "test")}
        found["further"] = {
            name: {
                other: _kept(task.score(*served[name], "test")) for other, task in others.items()
            }
            for name, others in self.further.items()
        }
        away = [m["accuracy"] for others in found["further"].values() for m in others.values()]
        found["mean"] = {
            "valid": mean([m["accuracy"] for m in found["valid"].values()]),
            "test": mean([m["accuracy"] for m in found["test"].values()]),
            "further": mean(away) if away else None,
            "ece": mean([m["ece"] for m in found["test"].values()]),
        }
        return found

    def crossed(self, served: Served) -> dict[str, dict[str, float]]:
        """Accuracies of every task's head on every model's trunk: trunk -> task -> accuracy."""
        found: dict[str, dict[str, float]] = {}
        for trunk, (_, params) in served.items():
            found[trunk] = {}
            for name, task in self.tasks.items():
                model, own = served[name]
                mixed = {**params, heads.HEAD: own[heads.HEAD]}
                tree.same_structure(mixed, model.abstract(), (f"the head of {name}", "it"))
                found[trunk][name] = task.score(model, mixed, "test")["accuracy"]
        return found


def _check_task(task: Task) -> None:
    """What would end the run hours later, at the student: its head names columns TASK/CLASS."""
    wrong = [n for n in (task.name, *task.description.label_names) if joined.BETWEEN in n]
    if wrong:
        raise ValueError(
            f"{task.data.source}: {wrong[0]!r} has a {joined.BETWEEN!r}, which stands between task "
            "and class in the student's head; rename the class"
        )


def few(tasks: Mapping[str, Task]) -> list[str]:
    """Warnings of splits that are too small to decide anything."""
    out = []
    for name, task in tasks.items():
        small = {s: len(d) for s, d in task.splits.items() if len(d) < FEW}
        if small:
            said = ", ".join(f"{count} {split}" for split, count in small.items())
            out.append(f"{name} has {said} texts: what they decide is chance")
    return out


def pinned(name: str) -> str:
    """What stands for the content of a model or of data: assets are pinned by their name, files
    and folders are read."""
    kind, _, place = name.partition(":")
    path = Path(place if kind == "file" else name).expanduser()
    if kind in ("asset", "hf", "tfds") or not path.exists():
        return name
    return f"{name}@{graph.content(path)}"


def size(folder: Path) -> int:
    """Bytes of the weights in a folder and below it."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _kept(metrics: Mapping[str, float]) -> Metrics:
    return {name: float(metrics[name]) for name in KEPT if name in metrics}
