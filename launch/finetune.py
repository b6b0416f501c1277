"""``steppe finetune``: pretrained model + data -> run folder with report and exported model.

RUN/config.json        resolved settings
RUN/metrics.jsonl      one row a log or evaluation, written as it happens
RUN/checkpoints/       state, optimiser and position in the data
RUN/model/             the best-known export: a Hugging Face directory
RUN/results.json, predictions.jsonl, report.html
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steppe.launch import config as config_
from steppe.launch import machine, outputs
from steppe.launch.config import FinetuneConfig
from steppe.launch.pieces import Pieces, build
from steppe.models import pretrained, tree
from steppe.models.overlays.overlay import BASE
from steppe.train import checkpoint, evaluate, loop, metrics, step
from steppe.train.types import Params, TrainState

CONFIG = "config.json"
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Settings that may differ when a run is resumed: they change nothing that is computed, or only
# how it is spread (equal to 1e-5, and no longer bit for bit).
FREE = (
    "resume",
    "dry_run",
    "out",
    "log_every",
    "save_every",
    "eval_every",
    "keep",
    "baselines",
    "tensorboard",
    "mesh",
    "microbatches",
)


def run(config: FinetuneConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in results.json.

    Raises:
      FileExistsError: the run folder holds another run.
      Interrupted: stopped by Ctrl-C or SIGTERM; saved.
    """
    from rich.console import Console

    console = Console(stderr=True)
    folder = config.run
    _check_folder(config, folder)
    begin = time.perf_counter()
    pieces = build(config)
    if config.dry_run:
        from steppe.launch import dryrun

        return dryrun.show(pieces)
    timings = {"setup_s": time.perf_counter() - begin}
    _describe(console, pieces, folder)

    params = pieces.loaded.params
    if pieces.overlay is not None:
        made = jax.jit(pieces.model.init)(jax.random.key(config.seed))
        params = tree.merge(made, {BASE: params})
    state = step.init(
        jax.random.key(config.seed),
        pieces.model,
        pieces.tx,
        pieces.plan,
        params=params,
        trainable=pieces.trainable,
        ema=config.ema or None,
        donate=True,
    )
    del params
    writers: list[Any] = [metrics.JsonLines(folder / "metrics.jsonl")]
    if config.tensorboard:
        writers.append(metrics.TensorBoard(folder / "tensorboard"))
    manifest = {"config": _fixed(config), "base": checkpoint.fingerprint(state.frozen)}
    if not (config.resume and (folder / CONFIG).is_file()):
        outputs.write_json(folder / CONFIG, config_.to_dict(config))
    checkpoints = checkpoint.Checkpoints(
        folder / "checkpoints", keep=config.keep, manifest=manifest
    )
    if config.resume:
        if checkpoints.latest is None:
            console.print("no checkpoint yet: starting from the beginning", style="dim")
            for writer in writers:
                writer.truncate(0)
        else:
            state = loop.resume(state, pieces.batches, checkpoints, writers)
            console.print(f"resumed at step {int(state.step)} of {pieces.steps}", style="dim")

    begin = time.perf_counter()
    try:
        state = _train(pieces, state, checkpoints, writers, console)
        timings["train_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        results = _finish(pieces, state, folder, list(command), timings, begin)
    except loop.Interrupted:
        raise
    except KeyboardInterrupt:
        raise loop.Interrupted(
            f"interrupted; what {folder} holds is complete as far as it goes. "
            "Give the same command with --resume to go on"
        ) from None
    from steppe.launch import report

    report.write(folder)
    Console().print(report.summary(folder))
    return results


def _train(
    pieces: Pieces,
    state: TrainState,
    checkpoints: Any,
    writers: list[Any],
    console: Any,
) -> TrainState:
    from steppe.launch.progress import Progress

    config = pieces.config

    def score(state: TrainState) -> Mapping[str, float]:
        result = evaluate.run(
            pieces.model,
            state.full(),
            pieces.evaluation("valid"),
            pieces.data.task,
            plan=pieces.plan,
        )
        return {k: v for k, v in result.metrics.items() if k != "examples"}

    with Progress(pieces.steps, console) as progress:
        return loop.run(
            pieces.train,
            state,
            pieces.batches,
            steps=pieces.steps,
            checkpoints=checkpoints,
            save_every=config.save_every or pieces.epoch,
            evaluate=score,
            eval_every=config.eval_every or pieces.epoch,
            log_every=config.log_every,
            writers=[*writers, progress],
            schedule=pieces.schedule,
        )


def _finish(
    pieces: Pieces,
    state: TrainState,
    folder: Path,
    command: list[str],
    timings: dict[str, float],
    begin: float,
) -> dict[str, Any]:
    """Evaluates every split but the training one, fits the baselines, exports, writes."""
    config, data = pieces.config, pieces.data
    params = state.full()
    results = {
        split: evaluate.run(
            pieces.model, params, pieces.evaluation(split), data.task, plan=pieces.plan
        )
        for split in ("valid", "test")
    }
    test = results["test"]
    outputs.write_predictions(
        folder / "predictions.jsonl",
        outputs.predictions(test, data.splits["test"], config.data),
    )
    labels = data.task.label_names or None
    merge_difference = export(pieces, params, folder / "model", labels)
    timings["evaluate_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    baselines = _baselines(pieces) if config.baselines else {}
    timings["baselines_s"] = time.perf_counter() - begin
    found: dict[str, Any] = {
        "task": {"kind": data.task.kind, "label_names": list(data.task.label_names)},
        "metrics": {split: result.metrics for split, result in results.items()},
        "baselines": baselines,
        "intervals": outputs.interval(test, data.task.kind),
        "command": " ".join(command),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "data": {"source": data.source, "licence": data.licence, **data.counts()},
        "model": {
            "name": pieces.origin.name,
            "licence": pieces.origin.licence,
            "parameters": tree.count(state.params) + tree.count(state.frozen),
            "trainable": tree.count(state.params),
        },
        "timings": timings,
        "shapes": sorted(pieces.batches.shapes),
    }
    if merge_difference is not None:
        found["model"]["largest_logit_difference_after_merge"] = merge_difference
    outputs.write_json(folder / "results.json", found)
    return found


def export(
    pieces: Pieces, params: Params, target: Path, labels: Sequence[str] | None
) -> float | None:
    """Writes the Hugging Face folder; an overlay is merged, in float32, and the largest logit
    difference that this makes on a batch of the test split is returned."""
    difference = None
    if pieces.overlay is not None:
        batch = next(iter(pieces.evaluation("test")))
        inputs = {k: np.asarray(v) for k, v in batch.items() if k in _INPUTS}
        merged = pieces.overlay.merged(pieces.loaded.model, params, inputs)
        params, difference = merged.params, merged.largest_difference
    pretrained.save(
        target,
        pieces.loaded.model,
        params,
        labels=labels,
        tokenizer_dir=pieces.origin.tokenizer,
    )
    return difference


def _baselines(pieces: Pieces) -> dict[str, dict[str, float]]:
    """What a result must be compared with: the majority class, and the frozen encoder."""
    if pieces.data.task.kind != "classification":
        return {}
    # Loaded again: the parameters that were fine-tuned have been given up.
    frozen = pretrained.load(pieces.origin.weights, head=None, plan=None)

    def feats(split: str) -> Any:
        return evaluate.features(frozen.model, frozen.params, pieces.evaluation(split))

    train, valid, test = feats("train"), feats("valid"), feats("test")
    count = pieces.data.task.num_labels
    fitted = evaluate.logistic_regression(
        (train.x, train.labels), (valid.x, valid.labels), num_labels=count
    )
    return {
        "majority class": {"accuracy": evaluate.majority(train.labels, test.labels).accuracy},
        "frozen features + logistic regression": {
            "accuracy": evaluate.accuracy(fitted.predict(test.x), test.labels)
        },
    }


def _check_folder(config: FinetuneConfig, folder: Path) -> None:
    """Refuses to write into a folder that holds something, unless it is this run's."""
    if config.dry_run:
        return
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another out")
    if config.resume:
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"nothing to resume: {folder} holds no {CONFIG}")
        old, new = _fixed(config_.read(folder)), _fixed(config)
        different = checkpoint.first_difference(old, new)
        if different is not None:
            path, was, now = different
            raise ValueError(
                f"{folder} is a run with other settings: {path} was {was!r}, now it is {now!r}; "
                "resume with the old value or choose a new out"
            )
    elif held:
        kind = "another run" if CONFIG in held else f"other files ({held[0]})"
        raise FileExistsError(
            f"{folder} already holds {kind}; go on with it by --resume, or choose a new --out"
        )


def _fixed(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that must be the same when a run is resumed."""
    return {k: v for k, v in config_.to_dict(config).items() if k not in FREE}


def _describe(console: Any, pieces: Pieces, folder: Path) -> None:
    data, config = pieces.data, pieces.config
    counts = ", ".join(f"{n} {count}" for n, count in data.counts().items())
    console.print(f"[bold]{pieces.origin.name}[/bold] on [bold]{data.source}[/bold] ({counts})")
    total = tree.count(pieces.model.abstract())
    kept = [p for p in pieces.loaded.fresh if not p.startswith("pooler")]
    fresh = f", initialised: {', '.join(kept)}" if kept else ""
    shape = ", ".join(f"{k}={v}" for k, v in pieces.plan.mesh.shape.items())
    console.print(
        f"{total:,} parameters{fresh}; {pieces.steps} steps of {config.batch_size} on mesh "
        f"{shape}; run folder {folder}",
        highlight=False,
    )
    cut = sum(getattr(d, "cut", 0) for d in data.splits.values())
    if cut:
        console.print(f"{cut} examples were cut to {config.data.max_length} tokens", style="yellow")
