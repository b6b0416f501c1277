"""``steppe continual``: runs what is left of the streams and writes the table.

OUT/stages.jsonl               a line for every finished task of a stream
OUT/METHOD/SEED/metrics.jsonl  the training, as it happens
OUT/METHOD/SEED/task-N         the overlay after the last finished task, for `steppe evaluate`
OUT/results.json, table.md, report.html
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from steppe.data import batches as batches_
from steppe.launch import config as config_
from steppe.launch import optimiser, outputs, overlays, pieces, setup
from steppe.launch.compare import folders
from steppe.launch.compare.journal import Lines
from steppe.launch.continual import material, table
from steppe.launch.continual.material import Material
from steppe.launch.continual.settings import GROWS, ContinualConfig
from steppe.launch.report import streaming
from steppe.models import pretrained, tree
from steppe.models.overlays import Overlay, files, lora, o_lora
from steppe.models.overlays.overlay import BASE, OVERLAY
from steppe.models.tree import Params
from steppe.optim import basic
from steppe.train import continual, evaluate, loop, metrics, step
from steppe.train.continual import classes, replay, stream
from steppe.train.objectives import classification_ce
from steppe.train.types import LossOut, Objective

FILE = "stages.jsonl"
Key = tuple[str, int, int]


def run(config: ContinualConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in results.json.

    Raises:
      FileExistsError: ``out`` holds another run.
      ValueError, OSError: settings, data or models that do not fit together, or fewer methods or
        seeds than the folder has.
      Interrupted: stopped by Ctrl-C or SIGTERM; finished tasks are kept.
    """
    from rich.console import Console

    folder = Path(config.out)
    folders.check(config, folder, GROWS)
    origin = setup.origin(config.model)
    bare = pretrained.load_config(origin.weights)
    check(config, bare)
    data = material.read(config, origin, bare)
    lines = Lines(folder / FILE)
    done: dict[Key, dict[str, Any]] = lines.by(_key)
    held: dict[str, Iterable[Any]] = {
        "method": [method for method, _, _ in done],
        "seeds": [seed for _, seed, _ in done],
    }
    folders.nothing_lost(folder, held, {name: getattr(config, name) for name in held})
    outputs.write_json(folder / folders.CONFIG, config_.to_dict(config))

    def finished(row: dict[str, Any]) -> None:
        lines.append(row)
        done[_key(row)] = row
        _write(config, done, folder, command)
        _say(row)

    try:
        with folders.terminable():
            for seed in config.seeds:
                for method in config.method:
                    count = sum((method, seed, n) in done for n in range(len(config.tasks)))
                    if count < len(config.tasks):
                        _Stream(config, data, origin, bare, method, seed).learn(count, finished)
    except KeyboardInterrupt:
        raise loop.Interrupted(
            f"interrupted; {len(done)} finished tasks are in {lines.file}. "
            "Give the same command with --resume to go on"
        ) from None
    found = _write(config, done, folder, command)
    Console().print(table.rich_table(found))
    print(folder / "report.html")
    return found


def check(config: ContinualConfig, bare: Any) -> None:
    """Refuses settings that the methods would refuse, before anything is written.

    Raises:
      ValueError: ranks that do not fit into the model, or penalties out of range.
    """
    shapes = bare.build().abstract()
    for method in config.method:
        jax.eval_shape(overlay_of(config, method).init, jax.random.key(0), shapes)
        if method == "o-lora":
            penalised(config, lambda *_: LossOut(0.0, 0.0))


def penalised(config: ContinualConfig, objective: Objective) -> Objective:
    """O-LoRA's loss with the settings' weights."""
    return continual.olora_loss(
        objective, lambda1=config.lambda1, lambda2=config.lambda2, p=config.power
    )


def _key(row: Any) -> Key:
    return str(row["method"]), int(row["seed"]), int(row["number"])


class _Stream:
    """One method and seed: model, step and stages, built from the settings."""

    def __init__(
        self,
        config: ContinualConfig,
        data: Material,
        origin: setup.Origin,
        bare: Any,
        method: str,
        seed: int,
    ) -> None:
        self.config, self.data, self.method, self.seed = config, data, method, seed
        self.origin = origin
        self.folder = Path(config.out) / method / str(seed)
        settings = config.finetune(seed)
        self.settings = settings
        plan = pieces.plan_of(settings, bare)
        whole = setup.Data(data.task, data.tokenizer, {}, config.tasks[0])
        self.loaded = pieces.load(settings, origin, whole, plan)
        self.overlay = overlay_of(config, method)
        bound = pieces.bound(self.overlay, self.loaded)
        self.model = bound if data.groups is None else classes.grouped(bound, data.groups)
        self.plan = dataclasses.replace(plan, rules=tuple(bound.axes))
        schedule = basic.schedule("constant", config.optim.learning_rate, 1)
        self.tx = optimiser.transform(settings, schedule, 1)
        objective = classification_ce(self.model)
        if method == "o-lora":
            objective = penalised(config, objective)
        self.train = step.make(
            objective, self.tx, self.plan, clip_norm=config.optim.clip_norm or None
        )
        self.hashed = overlays.base_hash(self.loaded.params)

    def learn(self, done: int, finished: Callable[[dict[str, Any]], None]) -> None:
        """Trains on the tasks from number ``done`` on; calls ``finished`` with each one's row."""
        config = self.config
        key = jax.random.key(self.seed)
        made = jax.jit(self.model.init)(key)
        params = tree.merge(made, self.model.given or {})
        if done:
            saved = files.load(self._at(done - 1), fingerprint=self.hashed)
            params = tree.replace(params, tree.flatten(saved.params))
        stages = [self._stage(number) for number in range(len(config.tasks))]
        writer = metrics.JsonLines(self.folder / "metrics.jsonl")
        writer.truncate(sum(stage.steps for stage in stages[:done]))
        banked = self.method in ("o-lora", "incremental")
        between = stream.committed(jax.random.fold_in(key, 1)) if banked else stream.sequential
        begin = seconds = time.perf_counter()

        def score(full: Params) -> list[float]:
            nonlocal seconds
            seconds = time.perf_counter() - begin
            return self.score(full)

        for learnt in stream.run(
            self.train,
            self.model,
            self.tx,
            params,
            stages,
            key=key,
            score=score,
            between=between,
            plan=self.plan,
            start=done,
            log_every=config.log_every,
            writers=[writer],
        ):
            full = learnt.state.full()
            row = {
                "method": self.method,
                "seed": self.seed,
                "number": learnt.number,
                "task": self.data.names[learnt.number],
                "examples": len(self.data.train[learnt.number]),
                "steps": stages[learnt.number].steps,
                "accuracy": learnt.scores,
                "train_s": seconds,
                "compiles": self.train.compiles,
            }
            if banked and learnt.number:
                row["cosine"] = float(o_lora.largest_cosine(full[OVERLAY]))
            self._save(learnt.number, full)
            finished(row)
            shutil.rmtree(self._at(learnt.number - 1), ignore_errors=True)
            begin = time.perf_counter()

    def score(self, params: Params) -> list[float]:
        """Test accuracy on every task."""
        found = []
        for data in self.data.test:
            batches = batches_.evaluate(
                data, 64 * self.plan.data_size, buckets=setup.buckets(self.settings.data)
            )
            result = evaluate.run(
                self.model, params, self._tagged(batches), self.data.task, plan=self.plan
            )
            found.append(float(result.metrics["accuracy"]))
        return found

    def _stage(self, number: int) -> stream.Stage:
        config, own = self.config, self.data.train[number]
        if self.method == "replay" and number:
            memory = [
                replay.remember(data, config.memory, self.seed) for data in self.data.train[:number]
            ]
            own = replay.joined([own, *memory])
        batches = batches_.train(
            own,
            config.batch_size,
            seed=self.seed,
            buckets=setup.buckets(self.settings.data, training=True),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        steps = math.ceil(config.epochs * batches.steps_per_epoch)
        return stream.Stage(self.data.names[number], self._tagged(batches), steps)

    def _tagged(self, batches: Any) -> Any:
        groups = self.data.groups
        return batches if groups is None else classes.Tagged(batches, groups)

    def _at(self, number: int) -> Path:
        return self.folder / f"task-{number}"

    def _save(self, number: int, params: Params) -> None:
        own, given = self.origin.tokenizer, self.config.model
        kept = stream.kept(params, self.model, self.loaded.fresh)
        overlays.save(
            self._at(number),
            self.overlay,
            kept,
            base=given if given.startswith("asset:") else str(Path(given).expanduser().resolve()),
            hashed=self.hashed,
            model=self.loaded.model,
            labels=self.data.task.label_names,
            tokenizer_dir=own if own.is_dir() else None,
            top=overlays.top_hash(params[BASE], kept.get(BASE, {})),
        )


def overlay_of(config: ContinualConfig, method: str) -> Overlay:
    """The overlay that a method trains."""
    same: dict[str, Any] = {"rank": config.rank, "alpha": config.alpha, "sites": config.sites}
    same["drop"] = config.drop
    if method in ("o-lora", "incremental"):
        return o_lora.overlay(tasks=len(config.tasks), **same)
    return lora.overlay(**same)


def _write(
    config: ContinualConfig, done: dict[Key, dict[str, Any]], folder: Path, command: Sequence[str]
) -> dict[str, Any]:
    found = table.summary(config, done, command)
    outputs.write_json(folder / "results.json", found)
    outputs.write_text(folder / "table.md", table.markdown(found))
    outputs.write_text(folder / "report.html", streaming.render(found))
    return found


def _say(row: dict[str, Any]) -> None:
    from rich.console import Console

    scores = " ".join(f"{100 * value:.1f}" for value in row["accuracy"])
    text = (
        f"{row['method']} seed {row['seed']}, after {row['task']}: {scores} "
        f"({row['steps']} steps, {row['train_s']:.0f} s)"
    )
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)
