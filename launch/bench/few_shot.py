"""``steppe bench few-shot``: BBT, BBTv2 and the same deep prompts by gradient, a few examples each.

All three share the examples, the fixed head of class means, the loss (every example scored by means
that leave it out), the number of forward passes and the choice of the prompt by the development
examples. A step of the gradient (Adam, one rate, not searched for) is a forward and a backward
pass, of which the forward one is counted: it has the easier task.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steppe.launch.bench import environment

if TYPE_CHECKING:
    from rich.console import RenderableType

    from steppe.launch.blackbox.settings import BlackboxConfig

METHODS = ("bbt", "bbtv2", "gradient")


@dataclasses.dataclass(frozen=True)
class FewShotBench:
    """Compare prompts from forward passes alone with prompts by gradient.

    Attributes:
      model: folder or ``asset:NAME``.
      source: address of the data.
      budget: forward passes of all examples.
      seeds: how many, from 0: other examples, other candidates.
      shots: examples a class.
      rank, length, popsize: of the search, see ``steppe blackbox``.
      max_length: tokens of an example.
      rate: Adam's.
      out: file for the result as JSON.
    """

    model: str = "asset:minilm-l3"
    source: str = "asset:vader/movies"
    budget: int = 300
    seeds: int = 2
    shots: int = 16
    rank: int = 30
    length: int = 4
    popsize: int = 10
    max_length: int = 24
    rate: float = 1e-2
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.rate > 0:
            raise ValueError(f"rate must be > 0, got {self.rate}")


def run(config: FewShotBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given."""
    from steppe.launch.blackbox import command

    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "bench": "few-shot",
        "config": environment.plain(config),
        **environment.environment(),
        "rows": rows,
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        for seed in range(config.seeds):
            for method in METHODS:
                if method == "gradient":
                    found = _by_gradient(config, seed, scratch)
                else:
                    made = command.run(_settings(config, method, seed, scratch))
                    found = {
                        "test": made["metrics"]["test"]["accuracy"],
                        "dev": made["search"]["dev"]["accuracy"],
                        "train_loss": min(made["search"]["best_loss"]),
                        "baselines": {k: v["accuracy"] for k, v in made["baselines"].items()},
                    }
                rows.append({"seed": seed, "method": method, **found})
                say(f"seed {seed}, {method}: {100 * found['test']:.1f}% of the test examples")
                if config.out is not None:
                    environment.write_json(config.out, result)
    return result


def _settings(config: FewShotBench, method: str, seed: int, folder: str) -> BlackboxConfig:
    from steppe.launch.blackbox.settings import BlackboxConfig
    from steppe.launch.config import DataConfig

    data = DataConfig(
        source=config.source, max_length=config.max_length, buckets=(config.max_length,)
    )
    names = ("model", "shots", "budget", "popsize", "rank", "length")
    return BlackboxConfig(
        out=f"{folder}/{method}-{seed}",
        data=data,
        method=method,  # type: ignore[arg-type]
        seed=seed,
        baselines=method == METHODS[0],
        **{name: getattr(config, name) for name in names},
    )


def _by_gradient(config: FewShotBench, seed: int, folder: str) -> dict[str, Any]:
    """The deep prompts of BBTv2 by Adam: the best on the development examples."""
    import jax
    import jax.numpy as jnp
    import optax

    from steppe.launch.blackbox import command, opened, search

    settings = _settings(config, "bbtv2", seed, folder)
    held = opened.open_all(settings)
    loss, tx = search.loss_of(settings), optax.adam(config.rate)
    batch, count = held.batches["train"], held.shape[0]
    rows = jnp.zeros((count, int(np.prod(held.shape[1:]))))

    @jax.jit
    def step(params: Any, rows: jax.Array, state: Any) -> tuple[jax.Array, Any, jax.Array]:
        def mean(rows: jax.Array) -> jax.Array:
            logits = held.scores(params, rows, batch, left_out=True)
            out = loss(logits, batch["labels"])
            return out.total / out.weight

        value, grads = jax.value_and_grad(mean)(rows)
        updates, state = tx.update(grads, state)
        return rows + updates, state, value

    judged = search.trial(settings, held)
    state, value = tx.init(rows), jnp.inf
    best: tuple[float, float, jax.Array] = (-1.0, 0.0, rows)
    for number in range(1, config.budget + 1):
        rows, state, value = step(held.params, rows, state)
        if number % settings.dev_every == 0 or number == config.budget:
            accuracy, dev = (float(v) for v in judged(rows))
            if (accuracy, -dev) > best[:2]:
                best = (accuracy, -dev, rows)
    test = command.score(settings, held, held.with_prompt(best[2]), "test").metrics
    return {"test": test["accuracy"], "dev": best[0], "train_loss": float(value)}


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.table import Table

    config = result["config"]
    title = (
        f"{config['shots']} examples a class of {config['source']}, {config['model']}, "
        f"{config['budget']} forward passes; test accuracy, %"
    )
    names = list(METHODS)
    baselines = sorted({name for row in result["rows"] for name in row.get("baselines", {})})
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for name in ("seed", *baselines, *names):
        grid.add_column(name, justify="right")
    for seed in sorted({row["seed"] for row in result["rows"]}):
        found = {row["method"]: row for row in result["rows"] if row["seed"] == seed}
        beside: Mapping[str, float] = next(
            (row["baselines"] for row in found.values() if "baselines" in row), {}
        )
        cells = [beside.get(name) for name in baselines]
        cells += [found[name]["test"] if name in found else None for name in names]
        grid.add_row(f"{seed}", *("" if c is None else f"{100 * c:.1f}" for c in cells))
    return grid
