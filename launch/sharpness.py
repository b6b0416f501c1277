"""``steppe sharpness``: how sharp the loss is around a run's model, as numbers and pictures."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch import config as config_
from steppe.launch import kinds, machine, opening, outputs, overlays, setup
from steppe.launch.config import DataConfig
from steppe.launch.progress import Line

if TYPE_CHECKING:
    from steppe.train.types import Params

FILE, PAGE = "sharpness.json", "sharpness.html"
MOST = 6  # runs on one page: so many kinds of line can be told apart
# (what is measured, products or evaluations done, of how many)
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measures:
    """What is measured, and how thoroughly.

    Attributes:
      rho: radii of the balls in which the largest loss is searched; none = no ball.
      norm: which norm the radius is of. adaptive: relative to each weight's size, as ASAM's.
      steps: of the ascent in each ball; each costs one gradient of the whole set.
      eigenvalues: how many of the largest are reported.
      iterations: Hessian-vector products a run of Lanczos; each costs about two gradients, and
        holds one more copy of the parameters in memory.
      runs: of Lanczos, for a finer spectral density.
      probes: Hessian-vector products for the trace, besides the starts of Lanczos; 0 = those
        alone.
      points: of the loss along a random direction.
      grid: points a side of the loss over a plane; 0 = no plane.
      span: how far these go, relative to the norm of each filter of the weights.
      seed: of directions, probes and starts; the same for all models.
    """

    rho: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    norm: Literal["l2", "adaptive"] = "l2"
    steps: int = 6
    eigenvalues: int = 5
    iterations: int = 30
    runs: int = 1
    probes: int = 9
    points: int = 21
    grid: int = 11
    span: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for rho in self.rho:
            if not 0 <= rho < math.inf:
                raise ValueError(f"rho must be a finite number >= 0, got {rho}")
        if not 0 < self.span < math.inf:
            raise ValueError(f"span must be a finite number > 0, got {self.span}")
        least = {"steps": 1, "eigenvalues": 1, "iterations": 2, "runs": 1, "points": 2}
        for name, low in (*least.items(), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        for name, none in (("grid", "no plane"), ("probes", "the starts of Lanczos alone")):
            value = getattr(self, name)
            if value < 0 or value == 1:
                raise ValueError(f"{name} must be 0 ({none}) or >= 2, got {value}")
        if self.eigenvalues > self.iterations:
            raise ValueError(
                f"eigenvalues={self.eigenvalues} cannot be more than iterations={self.iterations}"
            )


@dataclass(frozen=True)
class SharpnessConfig(Measures):
    """``steppe sharpness``: the loss around a run's model; writes RUN/sharpness.html.

    MiniLM-L6 on two cores takes a few minutes a model with these settings.

    Attributes:
      run: run folder; its data settings are used for all models.
      against: other runs, measured on the same examples and drawn on the same axes.
      examples: of the split; those whose ids hash lowest, so always the same.
      split: whose loss.
      batch_size: rows at once; does not change the result.
    """

    run: str = ""
    against: tuple[str, ...] = ()
    examples: int = 128
    split: Literal["train", "valid", "test"] = "train"
    batch_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if len(self.against) >= MOST:
            raise ValueError(f"against takes at most {MOST - 1} runs, got {len(self.against)}")


def run(config: SharpnessConfig) -> dict[str, Any]:
    """Measures, prints a table, writes sharpness.json and sharpness.html into the run folder.

    Raises:
      ValueError: a folder holds no exported model, its model has no head for the task, or other
        classes than the data; and whatever is wrong with the data.
      FileNotFoundError: no such folder.
    """
    from rich.console import Console

    from steppe.launch.report import sharpness as page

    names = (config.run, *config.against)
    for name in names:
        check_run(name)
    data = config_.read(Path(config.run).expanduser()).data
    rows = _rows(config, data)
    measures = Measures(**{f.name: getattr(config, f.name) for f in dataclasses.fields(Measures)})
    measured = []
    objectives: dict[Any, Any] = {}
    for name in names[1:]:  # a mistake in the last must not cost the time of the others
        _open(name, config, data, rows, objectives)
    for name in names:
        loss, params, facts = _open(name, config, data, rows, objectives)
        with Line("compiling", name=name if len(names) > 1 else "") as shown:
            begin = time.perf_counter()
            found = measure(loss, params, measures, shown.tell)
        seconds = round(time.perf_counter() - begin, 1)
        measured.append({"run": name, **facts, **found, "seconds": seconds})
        del loss, params
    result = {
        "data": {"source": data.source, "split": config.split, "examples": len(rows[1])},
        "settings": config_.to_dict(measures),
        "models": measured,
        "versions": machine.versions(),
        "hardware": machine.hardware(),
    }
    folder = Path(config.run).expanduser()
    outputs.write_json(folder / FILE, result)
    outputs.write_text(folder / PAGE, page.render(page.finite(result)))
    Console().print(_table(result))
    print(folder / PAGE)
    return result


def measure(
    loss: Any, params: Params, measures: Measures = Measures(), tell: Told | None = None
) -> dict[str, Any]:
    """All measurements of one loss, as JSON values.

    Args:
      loss: from ``steppe.train.evaluate.sharpness.batched_loss``.
      params: the parameters that vary.
      tell: called as the work goes on.

    Raises:
      ValueError: the loss is not finite at ``params``.
    """
    import jax

    from steppe.models import tree
    from steppe.optim.perturbation import global_norm
    from steppe.train.evaluate import sharpness as s

    def telling(name: str) -> Callable[[int, int], None]:
        return lambda done, total: None if tell is None else tell(name, done, total)

    m = measures
    starts, probes, way = jax.random.split(jax.random.key(m.seed), 3)
    balls: list[dict[str, float]] = []
    start = None
    for number, rho in enumerate(m.rho, start=1):
        telling("largest loss in a ball")(number - 1, len(m.rho))
        ball = s.ball_max(loss, params, rho, steps=m.steps, norm=m.norm)
        start = start or ball
        _check(ball.clean)
        trace = [float(x) for x in ball.trace]
        balls.append(
            {
                "rho": rho,
                "gap": float(ball.gap),
                "worst": float(ball.worst),
                "one_step": trace[1] - trace[0],
            }
        )
        telling("largest loss in a ball")(number, len(m.rho))
    start = start or s.ball_max(loss, params, 0.0, steps=1)
    _check(start.clean)
    density = s.spectral_density(
        loss, params, starts, probes=m.runs, iterations=m.iterations, tell=telling("eigenvalues")
    )
    # A run of Lanczos that is better converged at the top than the others speaks for all.
    top = min(
        zip(density.nodes, density.residuals, strict=True),
        key=lambda pair: float(pair[1][-m.eigenvalues :].max()),
    )
    samples = list(density.samples)
    if m.probes:
        samples += list(
            s.trace(loss, params, probes, probes=m.probes, tell=telling("trace")).samples
        )
    total = s.summarise(samples)
    first, second = s.directions(way, params, "filter", count=2)
    telling("loss along a direction")(0, 1)
    curve = s.surface_1d(loss, params, first, m.span, m.points)
    telling("loss along a direction")(1, 1)
    out: dict[str, Any] = {
        "loss": float(start.clean),
        "gradient_norm": float(start.gradient_norm),
        "parameter_norm": float(global_norm(params)),
        "parameters": tree.count(params),
        "balls": balls,
        "eigenvalues": top[0][::-1][: m.eigenvalues].tolist(),
        "residuals": top[1][::-1][: m.eigenvalues].tolist(),
        "trace": {"mean": total.mean, "standard_error": total.standard_error},
        "density": {
            "nodes": [x.tolist() for x in density.nodes],
            "weights": [x.tolist() for x in density.weights],
        },
        "curve": {"at": curve.at.tolist(), "losses": curve.losses.tolist()},
    }
    if m.grid:
        plane = s.surface_2d(
            loss, params, (first, second), m.span, m.grid, tell=telling("loss over a plane")
        )
        out["surface"] = {"at": plane.at.tolist(), "losses": plane.losses.tolist()}
    return out


def _check(clean: Any) -> None:
    if not math.isfinite(float(clean)):
        raise ValueError(f"the loss of this model on these examples is {float(clean)}")


def check_run(name: str) -> None:
    """Raises where ``name`` is not the folder of a run that has exported its model."""
    folder = Path(name).expanduser()
    if not name or name.startswith("asset:"):
        raise ValueError("no run is named: steppe sharpness RUN, the folder of a run")
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"{name} is a file; steppe sharpness takes the folder of a run")
        raise FileNotFoundError(f"run folder {name} does not exist")
    if (folder / "table.json").is_file() or (folder / "runs.jsonl").is_file():
        raise ValueError(
            f"{name} is a comparison, which keeps no models; steppe sharpness takes the folder "
            "of steppe finetune"
        )
    if (folder / "merge.json").is_file():
        raise ValueError(
            f"{name} is a merged model with several heads; steppe sharpness takes the folder of "
            "steppe finetune"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} is not a run folder: it holds no config.json")
    if not (folder / "model").is_dir():
        raise ValueError(
            f"{name} holds no exported model: the run has not ended; go on with "
            f"steppe finetune --out {name} --resume"
        )


def _rows(config: SharpnessConfig, data: DataConfig) -> tuple[list[Any], list[Any]]:
    """All records, and the chosen ones."""
    found = setup.records(data)
    return found, setup.first(setup.divide(data, found)[config.split], config.examples)


def _open(
    name: str,
    config: SharpnessConfig,
    data: DataConfig,
    rows: tuple[list[Any], list[Any]],
    objectives: dict[Any, Any],
) -> tuple[Any, Params, dict[str, Any]]:
    """The loss of a run's model on the chosen records, its parameters, and facts about it."""
    from steppe.data import batches
    from steppe.launch.pieces import rows_of
    from steppe.models import packed, pretrained, tree
    from steppe.train.evaluate import sharpness
    from steppe.train.objectives import basic

    origin = opening.resolve(name)
    if packed.is_packed(origin.weights):
        raise ValueError(
            f"{name} holds integers, in which a loss has no slope; measure the model that it was "
            "made from"
        )
    loaded = opening.with_output(origin.weights, data.task)
    head = loaded.model.config.head
    tokenizer = setup.fitting(data, origin, pretrained.load_config(origin.weights))
    named = tuple(loaded.labels or ())
    if all(label.startswith("LABEL_") for label in named):
        named = ()
    size = getattr(loaded.model.config, "image_size", 224)
    task = setup.task(dataclasses.replace(data, classes=data.classes or named), rows[0], size)
    if head is None or head.kind != kinds.head_of(task.kind):
        has = "no head" if head is None else f"a {head.kind} head"
        raise ValueError(f"the model of {name} has {has}, which has no loss on a {task.kind} task")
    if task.kind in ("classification", "token") and task.num_labels != head.num_labels:
        raise ValueError(
            f"the model of {name} knows {head.num_labels} classes, the data of {config.run} has "
            f"{task.num_labels} ({', '.join(task.label_names)})"
        )
    dataset = setup.encode(task, rows[1], tokenizer, data, training=False)
    most = rows_of(loaded.model.config, task.kind, data.max_length, config.batch_size)
    passes = batches.evaluate(dataset, most, buckets=setup.buckets(data))
    # The same function for the same network, so that the second model compiles nothing.
    own = origin.weights if overlays.is_overlay(origin.weights) else None
    shape = (loaded.model.config, task.kind, own)
    objective = objectives.setdefault(shape, basic.for_task(loaded.model, task.kind))
    params, frozen = tree.split(loaded.params, loaded.model.trainable)
    facts = {"task": task.kind, "label_names": list(task.label_names)}
    return sharpness.batched_loss(objective, frozen, passes), params, facts


def _table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    from steppe.launch.report import sharpness as page

    data = result["data"]
    table = Table(
        f"{data['source']}, {data['split']}, {data['examples']} examples",
        *(Path(model["run"]).name for model in result["models"]),
        box=None,
        header_style="bold",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in page.numbers(result):
        table.add_row(*row)
    return table
