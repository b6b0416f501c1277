"""One training run of a comparison, and what its runs share.

Trials of one cell and seed differ in the optimiser alone: the draw of training examples, the
label noise, the new head, the order of the batches and the dropout are functions of the seed.
A program is compiled once for a method and a number of steps: rho is an array in the state, so
that all radii, seeds and sources run the same one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from steppe.launch import dryrun, optimiser, overlays, pieces, scoring, setup
from steppe.launch.compare.journal import Trial
from steppe.launch.compare.material import Material
from steppe.launch.compare.settings import Arm, Cell, CompareConfig
from steppe.models import pretrained
from steppe.optim import basic
from steppe.optim.esam import EsamState
from steppe.optim.keys import key_words
from steppe.train import loop
from steppe.train.objectives import basic as objectives
from steppe.train.types import TrainState

# Scores that a trial leaves for each split.
KEPT = ("examples", "accuracy", "f1_macro", "loss", "ece", "brier")


class Trials:
    """Runs trials one after the other and keeps what the next one can use."""

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.arms = {arm.name: arm for arm in config.arms()}
        self.origin = setup.origin(config.base.model)
        self.bare = pretrained.load_config(self.origin.weights)
        self.material = Material(config, self.origin, self.bare)
        self._shared: dict[Any, tuple[Any, Any]] = {}
        # By classes and dropout: one model, so that compiled evaluations are found again.
        self._models: dict[Any, Any] = {}
        self._objectives: dict[Any, Any] = {}
        self._loaded = functools.lru_cache(maxsize=1)(self._load)

    @property
    def compiles(self) -> int:
        """Programs compiled for training so far."""
        return sum(train.compiles for _, train in self._shared.values())

    def open(self) -> None:
        """Reads the data and tries every arm, so that a mistake is found before any training.

        Raises:
          ValueError, OSError: as ``steppe finetune``; data that are too few.
        """
        bare = self.bare.build()
        for arm in self.arms.values():
            if arm.config.overlay:
                overlay = overlays.parse(arm.config.overlay)
                jax.eval_shape(overlay.init, jax.random.key(0), bare.abstract())
        self.material.open()
        for arm in self.arms.values():
            if arm.config.sharpness == "none":
                continue
            try:
                dryrun.tried(self.build(self.config.cells()[0], arm, self.config.seeds[0]))
            except ValueError as error:
                raise ValueError(f"methods: {arm.name}: {error}") from error

    def build(self, cell: Cell, arm: Arm, seed: int) -> pieces.Pieces:
        """Model, data, batches and step of a trial; rho is still open.

        Raises:
          ValueError, OSError: as ``steppe finetune``.
        """
        settings = self.material.source(cell.source).settings
        config = dataclasses.replace(arm.config, data=settings, seed=seed)
        data = self.material.draw(cell, seed)
        classes = data.task.num_labels
        built = pieces.build(config, data=data, loaded=self._loaded(cell, seed, config.drop))
        # The overlay's first leaves do not depend on the head, in which alone the seeds differ.
        model = self._models.setdefault((classes, config.drop, config.overlay), built.model)
        key = (arm.name, built.steps, classes)
        if key not in self._shared:
            tx = _open(config, built)
            self._shared[key] = tx, pieces.make_step(config, model, data.task.kind, tx, built.plan)
        tx, train = self._shared[key]
        return dataclasses.replace(built, model=model, tx=tx, train=train)

    def run(self, trial: Trial) -> dict[str, Any]:
        """Trains and scores.

        Returns:
          steps; gradients (a step); train_s, seconds of the steps without compiling; train_loss,
          mean over the last epoch, or over what there is of it. Trials that choose: valid.
          Trials that are reported: test, correct (a digit for each test example), transfer, and
          curvature where asked for.
          A run that diverged has ``diverged`` in place of scores.
        """
        arm = self.arms[trial.arm]
        built = self.build(trial.cell, arm, trial.seed)
        state = with_seed(with_rho(pieces.start(built), trial.rho), trial.seed)
        found: dict[str, Any] = {
            "steps": built.steps,
            "gradients": gradients(arm, trial.rho),
            "trained": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        }
        rows = _Rows()
        try:
            state = loop.run(
                built.train,
                state,
                built.batches,
                steps=built.steps,
                log_every=built.epoch,
                writers=[rows],
            )
            found |= {"train_s": rows.seconds(), "train_loss": rows.rows[-1]["loss"]}
            found |= self._scores(trial, built, state)
        except (loop.NonFiniteLoss, ValueError) as error:
            # Scoring refuses outputs that are not numbers.
            if isinstance(error, ValueError) and "not a number" not in str(error):
                raise
            found["diverged"] = str(error)
        return found

    def _scores(self, trial: Trial, built: pieces.Pieces, state: TrainState) -> dict[str, Any]:
        params = state.full()
        if not trial.reported:
            return {"valid": _kept(scoring.score(built, params, "valid").metrics)}
        result = scoring.score(built, params, "test")
        found: dict[str, Any] = {
            "test": _kept(result.metrics),
            "correct": "".join("01"[int(right)] for right in result.correct),
            "transfer": {},
        }
        for source in self.config.transfer:
            if source == trial.cell.source:
                continue
            task, examples = self.material.whole(source)
            if task.label_names != built.data.task.label_names:
                continue
            other = dataclasses.replace(built.data, task=task, splits={"test": examples})
            there = dataclasses.replace(built, data=other)
            found["transfer"][source] = _kept(scoring.score(there, params, "test").metrics)
        if self.config.curvature:
            from steppe.launch.compare import curvature

            key = (built.data.task.num_labels, built.config.drop, built.config.overlay)
            if key not in self._objectives:
                self._objectives[key] = objectives.for_task(built.model, built.data.task.kind)
            objective = self._objectives[key]
            found["curvature"] = curvature.measure(self.config, built, state, objective)
        return found

    def _load(self, cell: Cell, seed: int, drop: float) -> pretrained.Loaded:
        config = dataclasses.replace(self.config.base, drop=drop, seed=seed)
        return pieces.load(
            config, self.origin, self.material.draw(cell, seed), pieces.plan_of(config, self.bare)
        )


def gradients(arm: Arm, rho: float) -> float:
    """Gradients that a step of the arm takes."""
    config = dataclasses.replace(arm.config, rho=rho) if arm.grid else arm.config
    return optimiser.gradients(config)


def _open(config: Any, built: pieces.Pieces) -> Any:
    """The transform with rho as an array in its state."""
    o = config.optim
    schedule = basic.schedule(o.schedule, o.learning_rate, built.steps, warmup=o.warmup)
    if config.sharpness == "none":
        return optimiser.transform(config, schedule, built.steps)

    def at(rho: Any) -> Any:
        return optimiser.transform(config, schedule, built.steps, rho=rho)

    return optax.inject_hyperparams(at)(rho=0.0)


def with_rho(state: TrainState, rho: float) -> TrainState:
    """The state with the radius filled in, where its transform has one."""
    held = getattr(state.opt_state, "hyperparams", None)
    if held is None:
        return state
    old = held["rho"]
    value = jax.device_put(jnp.asarray(rho, old.dtype), old.sharding)
    return state.replace(opt_state=state.opt_state._replace(hyperparams={**held, "rho": value}))


def with_seed(state: TrainState, seed: int) -> TrainState:
    """The state with ESAM's draws those of ``seed``: all seeds share the transform of the first."""

    def one(node: Any) -> Any:
        if not isinstance(node, EsamState):
            return node
        return node._replace(key=jax.device_put(key_words(seed), node.key.sharding))

    found = jax.tree.map(one, state.opt_state, is_leaf=lambda node: isinstance(node, EsamState))
    return state.replace(opt_state=found)


def _kept(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in KEPT if name in metrics}


class _Rows:
    """A writer that keeps the rows of the loop."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "train":
            self.rows.append({"step": step, **values})

    def truncate(self, step: int) -> None:
        """Nothing is resumed within a trial."""

    def seconds(self) -> float:
        """Of all steps: each row's mean step time holds for the steps since the row before."""
        total, before = 0.0, 0
        for row in self.rows:
            total += row["step_time"] * (row["step"] - before)
            before = row["step"]
        return total
