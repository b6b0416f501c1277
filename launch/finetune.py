"""``steppe finetune``: pretrained model + data -> run folder with report and exported model.

RUN/config.json        resolved settings
RUN/metrics.jsonl      one row a log or evaluation, written as it happens; of other processes,
                       of starts and of a profile see ``watch``
RUN/checkpoints/       state, optimiser and position in the data
RUN/model/             the best-known export: a Hugging Face directory
RUN/before.json        language models: scores and texts of the model before its training
RUN/results.json, predictions.jsonl, report.html
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from steppe.launch import config as config_
from steppe.launch import dryrun, kinds, optimiser, outputs, scoring, watch
from steppe.launch.config import FinetuneConfig
from steppe.launch.finish import More, finish
from steppe.launch.pieces import Pieces, build, start
from steppe.launch.pods import rank, stop
from steppe.models import tree
from steppe.train import checkpoint, loop, metrics
from steppe.train.types import TrainState

CONFIG = "config.json"
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
    "merge",
    "baselines",
    "tensorboard",
    "mesh",
    "microbatches",
    "watchdog",
    "spike_rollbacks",
    "profile",
)


def run(config: FinetuneConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in results.json.

    Raises:
      FileExistsError: the run folder holds another run.
      Interrupted: stopped by Ctrl-C or SIGTERM; saved.
    """
    config = optimiser.resolved(rank.requeued(config))
    folder = config.run
    rank.agree("settings", rank.identity(config_.to_dict(config)))
    console = rank.console()
    if not (config.merge or config.overlay or config.lora.rank):
        raise ValueError("merge=False keeps the delta of an overlay: add --overlay")
    if rank.lead():
        check_folder(config, folder, _fixed)
        _check_export(config, folder)
    begin = time.perf_counter()
    pieces = build(config)
    if config.dry_run:
        return dryrun.show(pieces)
    if config.sharpness != "none":
        dryrun.tried(pieces)
    timings = {"setup_s": time.perf_counter() - begin}
    _describe(console, pieces, folder)
    return carry_out(pieces, config, _fixed(config), command, timings)


def carry_out(
    pieces: Pieces,
    settings: Any,
    fixed: Mapping[str, Any],
    command: Sequence[str],
    timings: dict[str, float],
    *,
    more: More | None = None,
) -> dict[str, Any]:
    """Trains, evaluates, exports and reports in the run folder of ``pieces.config``.

    Args:
      settings: those of the command, a dataclass; written as config.json.
      fixed: of them, those that must be the same when the run is resumed.
      timings: of what came before, seconds.
      more: see ``finish``; with it the model is scored before its training whatever its task.

    Returns:
      What is in results.json.
    """
    console = rank.console()
    since = time.time() - timings.get("setup_s", 0.0)
    config, folder = pieces.config, pieces.config.run
    rank.agree("data", {"batches": pieces.batches.get_state(), "devices": jax.local_device_count()})
    state = start(pieces, donate=True)
    batches = watch.guarded(pieces.batches, config)
    writers: list[Any] = [watch.log(folder)]
    if config.tensorboard and rank.lead():
        writers.append(metrics.TensorBoard(folder / "tensorboard"))
    manifest = {"config": dict(fixed), "base": checkpoint.fingerprint(state.frozen)}
    if not (config.resume and (folder / CONFIG).is_file()):
        outputs.write_json(folder / CONFIG, config_.to_dict(settings))
    checkpoints = checkpoint.Checkpoints(
        folder / "checkpoints",
        keep=config.keep,
        manifest=manifest,
        # A checkpoint of an older version does not know the settings that came after it.
        defaults={"config": config_.to_dict(type(settings)())},
    )
    if config.resume:
        if checkpoints.latest is None:
            console.print("no checkpoint yet: starting from the beginning", style="dim")
            for writer in writers:
                writer.truncate(-1)  # the scores of step 0 are written again
        else:
            state = loop.resume(state, batches, checkpoints, writers)
            console.print(f"resumed at step {int(state.step)} of {pieces.steps}", style="dim")
            done = _finished(folder) if int(state.step) >= pieces.steps else None
            if done is not None:  # its timings and scores stay as they were
                console.print("the run is complete: nothing is left to do", style="dim")
                return _reported(folder, done)

    begin = time.perf_counter()
    try:
        earlier = _before(pieces, state, folder, writers, console, always=more is not None)
        timings["before_s"] = time.perf_counter() - begin
        begin = time.perf_counter()
        if config.probe:
            state = _probe(pieces, state, writers, console)
        else:
            with watch.watching(config, folder, int(state.step), since) as watchers:
                state = _train(pieces, state, batches, checkpoints, writers, watchers, console)
        timings["train_s"] = time.perf_counter() - begin
        results = finish(pieces, state, folder, list(command), timings, earlier, more)
    except loop.Interrupted:
        raise
    except KeyboardInterrupt as stopped:
        kind = loop.Preempted if isinstance(stopped, stop.Stopped) else loop.Interrupted
        raise kind(
            f"interrupted; what {folder} holds is complete as far as it goes. "
            "Give the same command with --resume to go on"
        ) from None
    return _reported(folder, results)


def _reported(folder: Path, results: dict[str, Any]) -> dict[str, Any]:
    if not rank.lead():
        return results
    from rich.console import Console

    from steppe.launch import report

    report.write(folder)
    Console().print(report.summary(folder))
    return results


def _finished(folder: Path) -> dict[str, Any] | None:
    """What results.json holds; None where the run has not written it, or it is damaged."""
    try:
        found = json.loads((folder / "results.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _before(
    pieces: Pieces,
    state: TrainState,
    folder: Path,
    writers: Sequence[Any],
    console: Any,
    *,
    always: bool = False,
) -> dict[str, Any]:
    """The scores of a language model that has not been trained, as step 0 of the log."""
    if pieces.data.task.kind not in kinds.WRITTEN and not always:
        return {}
    if int(state.step) > 0:
        return scoring.read_before(folder)
    console.print("scoring the model before its training", style="dim")
    found = scoring.before(pieces, state.full(), folder)
    for writer in writers:
        writer.write(0, "eval", _shown(found["metrics"]["valid"]))
    return found


def _probe(pieces: Pieces, state: TrainState, writers: Sequence[Any], console: Any) -> TrainState:
    """A fitted head in place of a trained one; the evaluation is the only row of the log."""
    from steppe.launch import probe

    console.print("computing the features of every example once", style="dim")
    fitted = probe.fit(pieces, state.full())
    state = state.replace(params=fitted, step=state.step + 1)
    found = scoring.score(pieces, state.full(), "valid")
    for writer in writers:
        writer.write(1, "eval", _shown(found.metrics))
    return state


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if k not in ("examples", "tokens")}


def _train(
    pieces: Pieces,
    state: TrainState,
    batches: Any,
    checkpoints: Any,
    writers: list[Any],
    watchers: list[Any],
    console: Any,
) -> TrainState:
    from steppe.launch.progress import Progress

    config = pieces.config

    def score(state: TrainState) -> Mapping[str, float]:
        found = scoring.score(pieces, state.full(), "valid").metrics
        if pieces.heard is not None:
            pieces.heard(found)
        return _shown(found)

    with Progress(pieces.steps, console) as progress:
        return loop.run(
            pieces.train,
            state,
            batches,
            steps=pieces.steps,
            checkpoints=checkpoints,
            save_every=config.save_every or pieces.epoch,
            evaluate=score,
            eval_every=config.eval_every or pieces.epoch,
            log_every=config.log_every,
            writers=[*writers, progress],
            schedule=pieces.schedule,
            watchdog=60.0 * config.watchdog,
            flops=watch.flops(pieces),
            peak_flops=watch.peak_flops(),
            watchers=watchers,
        )


def check_folder(
    config: Any,
    folder: Path,
    fixed: Callable[[Any], dict[str, Any]],
    read: Callable[[Path], Any] = config_.read,
) -> None:
    """Refuses to write into a folder that holds something, unless it is this run's.

    Args:
      config: settings with ``resume`` and ``dry_run``.
      fixed: of settings, those that must be the same when the run is resumed.
      read: reads the settings of a run folder.

    Raises:
      FileExistsError: the folder holds another run, or other files.
      FileNotFoundError: there is nothing to resume.
      ValueError: the run has other settings.
    """
    if config.dry_run:
        return
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another out")
    if config.resume:
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"nothing to resume: {folder} holds no {CONFIG}")
        old, new = fixed(read(folder)), fixed(config)
        different = checkpoint.first_difference(old, new)
        if different is not None:
            path, was, now = different
            raise ValueError(
                f"{folder} is a run with other settings: {path} was {was!r}, now it is {now!r}; "
                "resume with the old value or choose a new out"
            )
    elif held:
        if CONFIG not in held:
            raise FileExistsError(
                f"{folder} already holds other files ({held[0]}); choose a new --out"
            )
        raise FileExistsError(
            f"{folder} already holds another run; go on with it by --resume, or choose a new --out"
        )


def _check_export(config: FinetuneConfig, folder: Path) -> None:
    """
    Raises:
      ValueError: a run that is gone on with has exported its model in the other form.
    """
    if config.resume and not config.dry_run and (folder / "model").exists():
        was = config_.read(folder).merge
        if was != config.merge:
            raise ValueError(
                f"{folder} has exported its model with merge={was}, now it is {config.merge}: "
                "resume with the old value or choose a new out"
            )


def _fixed(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that must be the same when a run is resumed."""
    # A setting that is younger than a run had the default then.
    config = optimiser.resolved(config)
    # Checkpoints of a run without a method need not know that there are any.
    free = FREE if config.sharpness != "none" else (*FREE, *optimiser.SETTINGS)
    return {k: v for k, v in config_.to_dict(config).items() if k not in free}


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
    if config.sharpness != "none":
        console.print(optimiser.describe(config), highlight=False)
    packing = getattr(data.splits["train"], "packing", None)
    if packing is not None:
        console.print(f"packed: {packing}", highlight=False)
    cut = sum(getattr(d, "cut", 0) for d in data.splits.values())
    if cut:
        console.print(f"{cut} examples were cut to {config.data.max_length} tokens", style="yellow")
