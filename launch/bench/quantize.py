"""``steppe bench quantize``: what zero-shot quantization costs by step, and what integers gain.

Two tables, each measured in turns in one process:

  steps     of the student of a game, to a step of distillation on given inputs: the teacher's
            forward pass, and the student's, rounded, with its gradient. An iteration with K_x
            steps of the student also makes inputs K_x + 1 times and moves the generator once.
  passes    of the network in float, with rounded weights and inputs, and on integers, with the
            largest difference between the logits of the last two.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steppe.launch.bench import environment, finetune, harness
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.shapes import Shapes, batches, export
from steppe.launch.bench.worker import Worker, interleave

if TYPE_CHECKING:
    from rich.console import RenderableType

    from steppe.train.quantize.adapters import Kind

KD = "kd"


class Played(NamedTuple):
    """A game that is measured.

    Attributes:
      rho: of the student's perturbation; None = random words, and nothing to learn.
      k: steps of the student for one of the generator.
      adapter, candidates: of the generator, see ``train.quantize.adapters``.
    """

    rho: float | None
    k: int
    adapter: Kind = "soft_embed"
    candidates: int = 0


GAMES = {
    "random inputs, K=1": Played(None, 1),
    "SGD-SGA, K=1": Played(0.0, 1),
    "SAM-SGA, K=1": Played(0.05, 1),
    "SAM-SGA, K=1, gumbel": Played(0.05, 1, "gumbel"),
    "SAM-SGA, K=1, gumbel of 1,024 words": Played(0.05, 1, "gumbel", 1024),
    "SAM-SGA, K=1, 1,024 words": Played(0.05, 1, "soft_embed", 1024),
    "SAM-SGA, K=1, linear": Played(0.05, 1, "linear"),
    "SAM-SGA, K=5": Played(0.05, 5),
}
GOAL = 3.2
FLOAT = "float"


@dataclass(frozen=True)
class QuantizeBench:
    """Measure steps of zero-shot quantization and passes of quantized networks.

    Attributes:
      model: folder with a pretrained encoder; None = random tensors of ``shapes``.
      shapes: size of the encoder without ``model``; MiniLM-L6's by default.
      games: names of ``GAMES``; () = all of them.
      bits: schemes whose forward passes are measured; the first is the student's.
      batch: rows of a batch.
      length: tokens of a row.
      threads: processor cores; 0 = all that there are.
      protocol: warm-up, rounds and steps.
      seed: of tensors and batches.
      out: file for the result as JSON.
    """

    model: Path | None = None
    shapes: Shapes = field(default_factory=Shapes)
    games: tuple[str, ...] = ()
    bits: tuple[str, ...] = ("w8a8", "w4a8", "w4a8g64")
    batch: int = 32
    length: int = 32
    threads: int = 0
    protocol: Protocol = field(default_factory=lambda: Protocol(1, 5, 2))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        from steppe.models import quantized

        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in self.games:
            if name not in GAMES:
                raise ValueError(f"unknown game {name!r}; known: {', '.join(GAMES)}")
        if not self.bits:
            raise ValueError("bits must name at least one scheme, such as w8a8")
        for scheme in self.bits:
            found = quantized.parse(scheme)
            if found.w_bits > 8 or found.a_bits > 8:
                raise ValueError(f"bits must be schemes of integers such as w8a8, got {scheme!r}")
        if self.model is None and self.length > self.shapes.positions:
            raise ValueError(
                f"length must be at most shapes.positions = {self.shapes.positions}, "
                f"got {self.length}"
            )
        environment.check_threads(self.threads)


class Side:
    """All programs, in a process of their own (see ``worker``)."""

    def __init__(
        self,
        directory: str,
        games: list[str],
        bits: list[str],
        batch: int,
        length: int,
        seed: int,
    ) -> None:
        """
        Args:
          directory: the model, as ``shapes.export`` writes it.
          games, bits, batch, length, seed: see :class:`QuantizeBench`.
        """
        from steppe.models import pretrained

        self._loaded = pretrained.load(directory)
        self._shape, self._seed = (batch, length), seed
        vocabulary = self._loaded.model.config.vocab_size
        self._batch = batches(1, batch, length, vocabulary, seed)[0]
        self._rules = {scheme: _rules(scheme) for scheme in bits}
        self._programs: dict[str, Callable[[], Any]] = {KD: self._kd(bits[0])}
        for name in games:
            self._programs[name] = self._game(bits[0], GAMES[name])
        self._differences: dict[str, float] = {}
        self._passes(bits)

    def turn(self, name: str, steps: int) -> float:
        """Runs a program so many times and returns the seconds."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            result = self._programs[name]()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    def passes(self) -> list[str]:
        """Names of the forward passes, float first."""
        return [name for name in self._programs if name != KD and name not in GAMES]

    def differences(self) -> dict[str, float]:
        """Integer pass -> the largest difference of a logit from the rounded pass."""
        return self._differences

    def _kd(self, bits: str) -> Callable[[], Any]:
        import jax
        import jax.numpy as jnp
        import optax

        from steppe.models import quantized
        from steppe.train import distill, step

        model, params = self._loaded.model, self._loaded.params
        student = quantized.wrap(model, self._rules[bits])
        tx = optax.adam(1e-5)
        joint = distill.with_teacher(student, self._loaded)
        given = {"student": quantized.with_entries(student, params)}
        state = step.init(
            jax.random.key(self._seed),
            joint,
            tx,
            params=jax.tree.map(jnp.copy, {**given, "teacher": params}),
            trainable=["student/(?!quant/).*"],
        )
        train = step.make(distill.kd(student, distill.Teacher(model)), tx)
        return _stepping(train, state, self._batch)

    def _game(self, bits: str, played: Played) -> Callable[[], Any]:
        import jax

        from steppe.models import quantized
        from steppe.train.distill.pairs import Teacher
        from steppe.train.quantize import generator, zsaq

        model, params = self._loaded.model, self._loaded.params
        rows, length = self._shape
        student = quantized.wrap(model, self._rules[bits])
        made = (
            generator.random_tokens(model, rows=rows, length=length)
            if played.rho is None
            else generator.noise(
                model,
                rows=rows,
                length=length,
                adapter=played.adapter,
                candidates=min(played.candidates, model.config.vocab_size),
            )
        )
        opt = zsaq.players(played.rho or 0.0, played.k, freeze_generator=played.rho is None)
        own = quantized.with_entries(student, params)
        key = jax.random.key(self._seed)
        state = zsaq.init(key, student, Teacher(model, params), made, opt, params=own)
        # The looks at the champion are not part of a step.
        train = zsaq.make_zsaq_step(student, model, made, opt, judge_every=0)
        return _stepping(train, state, {})

    def _passes(self, bits: list[str]) -> None:
        import jax
        import numpy as np

        from steppe.models import integer, quantized

        model, params = self._loaded.model, self._loaded.params
        inputs = {k: v for k, v in self._batch.items() if not k.startswith("label")}

        def program(network: Any, own: Any) -> Callable[[], Any]:
            run = jax.jit(lambda own, batch: network.apply(own, batch).logits)
            return lambda: run(own, inputs)

        self._programs[FLOAT] = program(model, params)
        for scheme in bits:
            rules = self._rules[scheme]
            held = quantized.quantize(params, rules)
            rounded = quantized.wrap(model, rules, weights=False)
            made = {
                f"{scheme}, rounded": program(rounded, quantized.dequantize(held)),
                f"{scheme}, integer": program(integer.wrap(model, rules), held),
            }
            self._programs |= made
            one, other = (np.asarray(run()) for run in made.values())
            self._differences[f"{scheme}, integer"] = float(np.abs(one - other).max())


def _rules(scheme: str) -> Any:
    from steppe.models import quantized

    return quantized.rules(quantized.parse(scheme))


def _stepping(train: Any, state: Any, batch: Mapping[str, Any]) -> Callable[[], Any]:
    held = [state]

    def one() -> Any:
        held[0], metrics = train(held[0], batch)
        return metrics

    return one


def run(config: QuantizeBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      worker.WorkerError: the process failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    result: dict[str, Any] = {
        "bench": "quantize",
        "config": environment.plain(config),
        "threads": threads,
        "load_average": load,
        "goal": GOAL,
        **environment.environment(),
    }
    with tempfile.TemporaryDirectory(prefix="steppe-bench-") as scratch:
        folder = Path(scratch) / "model"
        export(folder, config.shapes if config.model is None else config.model, config.seed)
        result["parameters"] = finetune.parameters(folder)
        arguments = {
            "directory": str(folder),
            "games": list(config.games or GAMES),
            "bits": list(config.bits),
            **{name: getattr(config, name) for name in ("batch", "length", "seed")},
        }
        with Worker(f"{__name__}:Side", arguments, threads=threads) as worker:
            steps = interleave(worker, (KD, *arguments["games"]), config.protocol)
            names = worker.call("passes")
            passes = interleave(worker, names, config.protocol)
            differences = worker.call("differences")
    result |= {
        "steps": {
            name: {
                **_row(seconds, steps[KD]),
                # Of one step of the student, where an iteration has several.
                "a_student_step": harness.ratio(
                    [s / (GAMES[name].k if name in GAMES else 1) for s in seconds], steps[KD]
                )._asdict(),
            }
            for name, seconds in steps.items()
        },
        "passes": {
            name: {**_row(seconds, passes[FLOAT]), "difference": differences.get(name)}
            for name, seconds in passes.items()
        },
        "unsteady": harness.unsteady({**steps, **passes}),
        "load_average_after": environment.load_average(),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _row(seconds: list[float], against: list[float]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        **harness.spread(seconds)._asdict(),
        "ratio": harness.ratio(seconds, against)._asdict(),
    }


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    where = (
        f"batch {config['batch']} x {config['length']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['threads']} threads"
    )

    def grid(title: str, columns: tuple[str, ...]) -> Table:
        made = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
        for number, column in enumerate(columns):
            made.add_column(column, justify="left" if number == 0 else "right")
        return made

    def shown(ratio: Mapping[str, float]) -> str:
        return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"

    steps = grid(
        f"Iterations of a game ({config['bits'][0]}), {where}",
        ("", "ms", "to a step of kd", "by step of the student"),
    )
    for name, row in result["steps"].items():
        each = shown(row["a_student_step"])
        steps.add_row(name, f"{1e3 * row['median']:.1f}", shown(row["ratio"]), each)
    passes = grid(f"Forward passes, {where}", ("", "ms", "to float", "from rounded"))
    for name, row in result["passes"].items():
        away = "" if row["difference"] is None else f"{row['difference']:.1e}"
        passes.add_row(name, f"{1e3 * row['median']:.1f}", shown(row["ratio"]), away)
    lines = [f"goal: an iteration of SAM-SGA with K=1 within {result['goal']:g} steps of kd"]
    lines += [f"warning: {reason}" for reason in result["unsteady"]]
    return Group(steps, passes, *(Text(line) for line in lines))
