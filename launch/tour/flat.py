"""Fine-tuning with two optimisers, how flat what they found is, and a picture of both."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steppe.data import batches as batches_
from steppe.launch import finetune, setup
from steppe.launch.merge import methods
from steppe.launch.merge.material import Task
from steppe.launch.tour.graph import Done, Result
from steppe.launch.tour.world import MODEL, Served, World, mean
from steppe.models import tree
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train.evaluate import sharpness
from steppe.train.objectives import basic

RUN = "run"
# Of the validation that a run makes by itself, after every epoch; it decides nothing here.
GLANCE = 64
# As ``steppe compare`` measures them; fewer products, as so few examples need.
ITERATIONS, TOLERANCE, ASCENT_STEPS = 10, 0.05, 4
SPAN = 0.5


def learn(world: World, address: str, optimiser: str, seed: int, folder: Path) -> Result:
    """One run of ``steppe finetune``, gone on with where an attempt before has begun it."""
    run = folder / RUN
    results = run / "results.json"
    if not (results.is_file() and (run / MODEL).is_dir()):
        settings = world.config.finetune(address, optimiser, seed, str(run))
        data = dataclasses.replace(world.settings[address], eval_limit=GLANCE)
        begun = (run / finetune.CONFIG).is_file()
        with quiet():
            finetune.run(dataclasses.replace(settings, data=data, resume=begun))
    found = json.loads(results.read_text("utf-8"))
    # The export is what goes on; the optimiser's state would fill the disk.
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    losses = _losses(run / "metrics.jsonl")
    return {
        "train_s": found["timings"].get("train_s"),
        "gradients_a_step": found["optimiser"]["gradients_a_step"],
        "parameters": found["model"]["parameters"],
        "loss": losses[-1] if losses else None,
    }


def _losses(file: Path) -> list[float]:
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    return [float(row["loss"]) for row in rows if row.get("kind") == "train" and row.get("loss")]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What a command prints of its own result is left out; its progress is shown."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def choose(scores: Mapping[str, Done]) -> Result:
    """The optimiser of the best mean accuracy on the validation splits; of equal ones the first."""
    marks = {name: float(done.result["mean"]["valid"]) for name, done in scores.items()}
    best = max(marks, key=lambda name: (marks[name], -list(marks).index(name)))
    return {"best": best, "valid": marks}


# The landscape -------------------------------------------------------------------------------


class Landscape:
    """Losses of tasks on a few of their training examples; programs are kept by network."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._objectives: dict[Any, Any] = {}

    def loss(self, task: Task, model: Model, params: Params) -> tuple[Any, Params]:
        """(loss of the trainable parameters, these)."""
        # Second derivatives of layers that are written out take minutes to compile.
        config = methods.rolled(model.config)
        if config not in self._objectives:
            self._objectives[config] = basic.for_task(self.world.nets.of(config), task.kind)
        objective = self._objectives[config]
        live, frozen = tree.split(params, model.trainable)
        return sharpness.batched_loss(objective, frozen, self._few(task)), live

    def _few(self, task: Task) -> Any:
        """The first examples whose ids hash lowest; the same for all models."""
        dataset = task.splits["train"]
        rows = setup.first(list(dataset.records), self.world.config.curvature or GLANCE)
        few = setup.encode(task.description, rows, task.tokenizer, task.data, training=False)
        return list(batches_.evaluate(few, len(rows), buckets=setup.buckets(task.data)))

    def flatness(self, served: Served, what: str) -> Result:
        """Largest eigenvalue of the Hessian and rise of the loss in a ball, of every task.

        Returns:
          ``tasks``: name -> top_eigenvalue, ball_gap, loss; ``mean``: of the first two.
        """
        config = self.world.config
        found: dict[str, dict[str, float]] = {}
        for number, (name, task) in enumerate(self.world.tasks.items()):
            self.world.tell(f"flatness of {what}, {name}", number, len(self.world.tasks))
            loss, live = self.loss(task, *served[name])
            top = sharpness.top_eigenvalues(
                loss, live, jax.random.key(0), iterations=ITERATIONS, tol=TOLERANCE
            )
            ball = sharpness.ball_max(loss, live, config.ball, steps=ASCENT_STEPS)
            found[name] = {
                "top_eigenvalue": float(top.values[0]),
                "ball_gap": float(ball.gap),
                "loss": float(ball.clean),
            }
        names = ("top_eigenvalue", "ball_gap")
        means = {key: mean([one[key] for one in found.values()]) for key in names}
        return {"tasks": found, "mean": means}

    def surfaces(self, runs: Mapping[str, Served], name: str) -> Result:
        """The loss of one task over a plane around several models, along the same directions.

        Args:
          runs: name of the optimiser -> what serves the task.
          name: of the task.
        """
        grid = self.world.config.grid
        found: dict[str, Any] = {}
        for optimiser, served in runs.items():
            loss, live = self.loss(self.world.tasks[name], *served[name])
            one, two = sharpness.directions(jax.random.key(0), live, "filter", count=2)

            def tell(done: int, total: int, optimiser: str = optimiser) -> None:
                self.world.tell(f"surface of {optimiser}", done, total)

            plane = sharpness.surface_2d(loss, live, (one, two), SPAN, grid, tell=tell)
            losses = np.asarray(plane.losses, np.float64).tolist()
            found[optimiser] = {
                "at": np.asarray(plane.at).tolist(),
                "losses": [[v if math.isfinite(v) else None for v in row] for row in losses],
            }
        return {"task": name, "planes": found}
