"""The search of a run: generation by generation, each on the disk before the next one begins.

RUN/generations.jsonl holds the losses of every candidate. Asking and telling cost next to nothing
beside the forward passes, so that a search is gone on with by telling it those losses again; no
state is kept but them.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.launch.blackbox.opened import Opened
from steppe.launch.blackbox.settings import BlackboxConfig
from steppe.launch.compare.journal import Lines
from steppe.train import blackbox
from steppe.train.blackbox import tuning
from steppe.train.blackbox.losses import LOSSES, Loss

FILE = "generations.jsonl"


class Chosen(NamedTuple):
    """The prompt that did best on the development examples.

    Attributes:
      rows: prompts [S, D].
      calls: forward passes until then.
      accuracy, loss: on the development examples.
    """

    rows: Any
    calls: int
    accuracy: float
    loss: float


class Found(NamedTuple):
    """A finished search.

    Attributes:
      chosen: see there.
      state: after the last generation.
      generations: in all; ``resumed`` of them were read from the disk.
      failed: candidates without a loss.
      passes: forward passes that this process has made: (of the search, of the trials on the
        development examples).
    """

    chosen: Chosen
    state: tuning.BlackBoxState
    generations: int
    resumed: int
    failed: int
    passes: tuple[int, int]


class Programs(NamedTuple):
    """The compiled parts of a generation."""

    ask: Callable[..., tuning.Asked]
    evaluate: Callable[[jax.Array, tuning.Asked], tuning.Evaluated]
    tell: Callable[..., tuning.BlackBoxState]
    metrics: Callable[..., dict[str, jax.Array]]
    dev: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def total(config: BlackboxConfig, prompts: int) -> int:
    """Generations of the whole search."""
    return tuning.generations(config.budget, config.popsize, prompts)


def programs(config: BlackboxConfig, opened: Opened, algorithm: blackbox.BlackBox) -> Programs:
    """Compiles nothing yet."""
    loss = loss_of(config)
    at_once = config.at_once or (1 if jax.default_backend() == "cpu" else config.popsize)
    scores = functools.partial(opened.scores, left_out=True)
    evaluate = jax.jit(blackbox.evaluator(scores, loss, plan=opened.plan, at_once=at_once))

    params, batches = opened.params, opened.batches
    return Programs(
        jax.jit(algorithm.ask),
        lambda prompts, asked: opened.plan.settle(
            evaluate(params, batches["train"], prompts, asked)
        ),
        jax.jit(algorithm.tell),
        jax.jit(tuning.metrics),
        trial(config, opened),
    )


def trial(
    config: BlackboxConfig, opened: Opened
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Prompts [S, D] -> (accuracy, loss) on the development examples."""
    loss = loss_of(config)

    @jax.jit
    def dev(params: Any, batch: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = loss(opened.scores(params, rows, batch), batch["labels"], batch.get("label_mask"))
        right, weight = out.aux["accuracy"]
        return right / weight, jnp.float32(out.total / out.weight)

    return lambda rows: dev(opened.params, opened.batches["dev"], rows)


def loss_of(config: BlackboxConfig) -> Loss:
    """The loss of the settings."""
    if config.loss != "hinge":
        return LOSSES[config.loss]
    return lambda *args: blackbox.verbalizer_hinge(*args, margin=config.margin)


def run(
    config: BlackboxConfig,
    opened: Opened,
    space: tuning.Space,
    folder: Path,
    writers: Sequence[Any],
    made: Programs | None = None,
) -> Found:
    """Searches until the budget is used, from where the folder's journal ends.

    Args:
      writers: of the metrics; truncated to what the journal holds.
      made: compiled parts, where they exist already.

    Raises:
      ValueError: a damaged journal.
      FloatingPointError: no candidate of a generation had a loss.
    """
    algorithm = blackbox.black_box(popsize=config.popsize, sigma=config.step, rank=config.rank)
    parts = programs(config, opened, algorithm) if made is None else made
    key = jax.random.key(config.seed)
    state = algorithm.init(space)
    lines = Lines(folder / FILE)
    rows = _ordered(lines, config)
    count = total(config, len(space.start))
    chosen, failed, passes = None, 0, [0, 0]
    for row in rows[:count]:
        asked = parts.ask(state, key)
        losses = np.array([math.nan if v is None else v for v in row["losses"]], np.float32)
        state = parts.tell(state, asked, losses)
        failed += int(np.sum(~(losses < math.inf)))
        if row.get("dev") is not None:
            tried = _tried(config, state)
            chosen = _better(chosen, tried, int(state.calls), *row["dev"])
    done = min(len(rows), count)
    for writer in writers:
        writer.truncate(done * config.popsize if done else -1)
    if not done:
        start = [float(v) for v in parts.dev(state.prompts)]
        passes[1] += 1
        _write(writers, 0, "eval", {"accuracy": start[0], "loss": start[1]})
    warned = failed > 0
    for number in range(done, count):
        begin = time.perf_counter()
        asked = parts.ask(state, key)
        found = parts.evaluate(state.prompts, asked)
        losses = np.asarray(found.losses)
        passes[0] += len(losses)
        broken = int(np.sum(~(losses < math.inf)))
        failed += broken
        if broken == len(losses):
            raise FloatingPointError(
                f"no candidate of generation {number} has a loss (all are NaN or infinite): the "
                "prompts break the model; lower alpha or take another projection"
            )
        if broken and not warned:
            warned = True
            warnings.warn(
                f"{broken} of {len(losses)} candidates of generation {number} have no loss (NaN or "
                "infinite); they are never selected. This is said once",
                RuntimeWarning,
                stacklevel=2,
            )
        state = parts.tell(state, asked, losses)
        calls = (number + 1) * config.popsize
        values = {k: float(v) for k, v in parts.metrics(state, asked.layer, found).items()}
        values["step_time"] = time.perf_counter() - begin
        row = {"generation": number, "losses": [_plain(v) for v in losses]}
        if _due(config, number, count):
            tried = _tried(config, state)
            passes[1] += 1
            dev = [float(v) for v in parts.dev(tried)]
            chosen = _better(chosen, tried, calls, *dev)
            row["dev"] = dev
        _write(writers, calls, "train", values)
        if "dev" in row:
            _write(writers, calls, "eval", {"accuracy": row["dev"][0], "loss": row["dev"][1]})
        lines.append(row)
    assert chosen is not None  # the last generation is always tried
    return Found(chosen, state, count, done, failed, (passes[0], passes[1]))


def _due(config: BlackboxConfig, number: int, count: int) -> bool:
    """Whether the prompt is tried after this generation: wherever another ``dev_every`` forward
    passes are reached, and at the end."""
    before, after = number * config.popsize, (number + 1) * config.popsize
    return after // config.dev_every > before // config.dev_every or number == count - 1


def _tried(config: BlackboxConfig, state: tuning.BlackBoxState) -> jax.Array:
    return state.prompts if config.select == "best" else state.last


def _better(
    old: Chosen | None, rows: jax.Array, calls: int, accuracy: float, loss: float
) -> Chosen:
    """The better of two on the development examples; of equally right ones that of less loss."""
    if old is not None and (old.accuracy, -old.loss) >= (accuracy, -loss):
        return old
    return Chosen(rows, calls, accuracy, loss)


def _ordered(lines: Lines, config: BlackboxConfig) -> list[dict[str, Any]]:
    """The rows of the journal, each generation once, none missing.

    Raises:
      ValueError: a row that is none of this search.
    """
    for number, row in enumerate(lines.read):
        losses = row.get("losses")
        if row.get("generation") != number:
            raise lines.damaged(number + 1, f"generation {number} is wanted")
        if not isinstance(losses, list) or len(losses) != config.popsize:
            raise lines.damaged(number + 1, f"{config.popsize} losses are wanted")
    return lines.read


def _plain(value: Any) -> float | None:
    """A loss as JSON holds it: a float32 comes back as it was, NaN and infinities as nothing."""
    return float(value) if math.isfinite(value) else None


def _write(writers: Sequence[Any], calls: int, kind: str, values: Mapping[str, float]) -> None:
    for writer in writers:
        writer.write(calls, kind, values)
