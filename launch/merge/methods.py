"""The methods by name: as values for a streamed merge, and on trees with the tasks' data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.launch.merge.inputs import Part
from steppe.launch.merge.material import Task, check_adaptable
from steppe.launch.merge.settings import LAM, MergeConfig
from steppe.models import pretrained, tree
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train import merge
from steppe.train.merge import adaptive, concrete, fisher, heads, stream
from steppe.train.merge.inputs import open_input

# (what goes on, done, of how many)
Told = Callable[[str, int, int], None]
# Thins the curves of an adaptation to about so many points.
POINTS = 200


@dataclass(frozen=True)
class Trees:
    """All models in memory.

    Attributes:
      names: of the tasks.
      theta0: the base's trunk; leaves that the base lacks are the average of the models.
      thetas: the models' trunks.
      taus: task vectors of the leaves that the base has, stacked on axis 0.
      models: task -> (configuration, parameters) of the whole model.
      labels: task -> names of the classes, or None.
    """

    names: tuple[str, ...]
    theta0: Params
    thetas: tuple[Params, ...]
    taus: Params
    models: Mapping[str, tuple[Any, Params]]
    labels: Mapping[str, tuple[str, ...] | None]

    def multihead(self, trunk: Params) -> heads.MultiHead:
        """A trunk with the heads of all tasks that have one."""
        config = next(iter(self.models.values()))[0]
        held = {name: pair for name, pair in self.models.items() if pair[0].head is not None}
        return heads.gather(config, trunk, held, self.labels)


@dataclass
class Outcome:
    """What a method gives.

    Attributes:
      trunk: merged parameters.
      coefficients: rows (tensor or "", one number a task), for the report.
      line: lam -> the trunk that it would give; None for methods without it.
      mask: the drawn mask; rates: tensor -> mean of sigma(x). Of concrete only.
      entropy: phase -> (steps, [len(steps), N] nats).
      notes: what a reader has to know.
    """

    trunk: Params
    coefficients: list[tuple[str, list[float]]] = field(default_factory=list)
    line: Callable[[float], Params] | None = None
    mask: Params | None = None
    rates: dict[str, float] = field(default_factory=dict)
    entropy: dict[str, tuple[list[int], list[list[float]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Nets:
    """One compiled network for every kind of head, whatever model has it."""

    def __init__(self) -> None:
        self._built: dict[Any, Model] = {}
        self._logits: dict[Any, Callable[[Params, Any], jax.Array]] = {}

    def of(self, config: Any) -> Model:
        """The model of a configuration."""
        if config not in self._built:
            self._built[config] = config.build()
        return self._built[config]

    def logits(self, config: Any) -> Callable[[Params, Any], jax.Array]:
        """``(params, batch) -> logits`` of a configuration, always the same function."""
        if config not in self._logits:
            model = self.of(config)

            def logits(params: Params, batch: Any) -> jax.Array:
                out = model.apply(params, batch).logits
                assert out is not None
                return out

            self._logits[config] = logits
        return self._logits[config]


def load(base: Part, models: Sequence[Part], tell: Told | None = None) -> Trees:
    """Reads all models.

    Raises:
      ValueError: NaN or infinity in one of them (names file and tensor), or trunks that
        hold other parameters.
    """
    trunks, whole, labels = [], {}, {}
    for number, part in enumerate(models):
        if tell is not None:
            tell(f"reading {part.name}", number, len(models) + 1)
        loaded = pretrained.load(part.folder)
        _check_finite(loaded.params, part.folder)
        whole[part.name] = (loaded.model.config, loaded.params)
        labels[part.name] = loaded.labels
        trunks.append(heads.split(loaded.params)[0])
    if tell is not None:
        tell("reading the base", len(models), len(models) + 1)
    for part, trunk in zip(models[1:], trunks[1:], strict=True):
        tree.same_structure(trunks[0], trunk, (models[0].name, part.name))
    found = pretrained.load(base.folder, head=None)
    _check_finite(found.params, base.folder)
    flats = [tree.flatten(trunk) for trunk in trunks]
    held = {p: x for p, x in tree.flatten(found.params).items() if p not in found.fresh}
    theta0 = {
        path: held[path] if path in held else _mean([flat[path] for flat in flats])
        for path in flats[0]
    }
    common = [path for path in flats[0] if path in held]

    def part_of(flat: Mapping[str, Any]) -> Params:
        return tree.unflatten({path: flat[path] for path in common})

    taus = jax.jit(merge.task_vectors)(part_of(held), [part_of(flat) for flat in flats])
    if tell is not None:
        tell("reading the base", len(models) + 1, len(models) + 1)
    names = tuple(part.name for part in models)
    return Trees(names, tree.unflatten(theta0), tuple(trunks), taus, whole, labels)


def _mean(leaves: Sequence[Any]) -> Any:
    return sum(leaf.astype(jnp.float32) for leaf in leaves) / len(leaves)


def _check_finite(params: Params, folder: Path) -> None:
    for path, leaf in tree.flatten(params).items():
        # By numpy: jax would compile a program for every shape.
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(
                f"{_place(folder, path)} holds NaN or infinity; the training that made it diverged"
            )


def _place(folder: Path, path: str) -> str:
    """File and tensor with the first value that is not finite, as a streamed merge names it."""
    opened = open_input(folder, folder.name)
    for name, tensor in opened.tensors.items():
        view = opened.read(name)
        if jnp.issubdtype(view.dtype, jnp.floating) and not np.isfinite(view).all():
            return f"{tensor.file}: tensor {tensor.stored!r}"
    return f"{folder}: parameter {path!r}"  # one that is computed when the model is opened


def streamed(config: MergeConfig, lam: float) -> stream.Method:
    """The value that ``stream.merge`` takes."""
    method = config.method
    arithmetic = stream.TaskArithmetic(lam)
    ties = stream.Ties(config.k, lam, config.merge)
    if method == "average":
        return stream.Average(config.weights or None)
    if method == "weighted":
        return stream.Weighted(config.weights)
    if method == "slerp":
        return stream.Slerp(config.t)
    if method in ("dare", "dare-ties"):
        then = arithmetic if method == "dare" else ties
        return stream.Dare(config.p, then, config.seed)
    return arithmetic if method == "task-arithmetic" else ties


def line(config: MergeConfig, trees: Trees) -> Callable[[float], Params]:
    """lam -> merged trunk, of the methods that add one direction to the base."""
    taus = trees.taus
    if config.method in ("dare", "dare-ties"):
        taus = merge.dare(jax.random.key(config.seed), taus, config.p)
    if config.method in ("ties", "dare-ties"):
        end = merge.ties(trees.theta0, taus, config.k, 1.0, config.merge)
    else:
        end = merge.task_arithmetic(trees.theta0, taus, 1.0)
    return between(trees.theta0, end)


def between(start: Params, end: Params) -> Callable[[float], Params]:
    """lam -> start + lam (end - start)."""
    return lambda lam: start if lam == 0 else _between(start, end, jnp.float32(lam))


# The trees are arguments: as constants of the program they would take XLA half a minute to fold.
@jax.jit
def _between(start: Params, end: Params, lam: Any) -> Params:
    return jax.tree.map(lambda a, b: (a + lam * (b - a)).astype(a.dtype), start, end)


def constants(config: MergeConfig, count: int, lam: float) -> list[tuple[str, list[float]]]:
    """The coefficients of a method that learns none."""
    if config.method == "slerp":
        return [("", [1 - config.t, config.t])]
    if config.method == "average" and not config.weights:
        return [("", [1.0 / count] * count)]
    if config.method == "average":
        return [("", [w / sum(config.weights) for w in config.weights])]
    if config.method == "weighted":
        return [("", list(config.weights))]
    return [("", [lam] * count)]


def with_data(
    config: MergeConfig, trees: Trees, tasks: Sequence[Task], nets: Nets, tell: Told | None = None
) -> Outcome:
    """A method that needs data.

    Raises:
      ValueError: tasks that the method is not for; an entropy that is not finite.
    """
    if config.method == "fisher":
        return _fisher(config, trees, tasks, nets, tell)
    if config.method == "regmean":
        return _regmean(config, trees, tasks, nets, tell)
    return _adapted(config, trees, tasks, nets, tell)


def _fisher(
    config: MergeConfig, trees: Trees, tasks: Sequence[Task], nets: Nets, tell: Told | None
) -> Outcome:
    found = []
    for number, task in enumerate(tasks):
        if tell is not None:
            tell(f"Fisher information of {task.name}", number, len(tasks))
        own, params = trees.models[task.name]
        many = task.kind in ("mlm", "lm", "seq2seq")  # a class a word: too many to sum over
        mode = "sampled" if many and config.fisher == "exact" else config.fisher
        some = task.some(config.examples, config.batch_size, config.seed)
        key = jax.random.key(config.seed)
        logits = nets.logits(rolled(own))
        whole = merge.diag_fisher(logits, params, some, mode, key=key, kind=task.kind)
        found.append(heads.split(whole)[0])
    c = fisher.coefficients(fisher.norms(found), None, True, 1e-6)
    trunk = merge.fisher_merge(trees.thetas, found)
    return Outcome(trunk, [("", [float(x) for x in c])])


def _regmean(
    config: MergeConfig, trees: Trees, tasks: Sequence[Task], nets: Nets, tell: Told | None
) -> Outcome:
    grams = []
    for number, task in enumerate(tasks):
        if tell is not None:
            tell(f"inputs of the layers on {task.name}", number, len(tasks))
        own, params = trees.models[task.name]
        some = task.some(config.examples, config.batch_size, config.seed)
        grams.append(merge.collect_grams(nets.of(rolled(own)), params, some))
    if tell is not None:
        tell("solving", len(tasks) - 1, len(tasks))
    return Outcome(merge.regmean(trees.thetas, grams, config.a), [])


def _adapted(
    config: MergeConfig, trees: Trees, tasks: Sequence[Task], nets: Nets, tell: Told | None
) -> Outcome:
    check_adaptable(tasks)
    named = [task.name for task in tasks]
    own = [trees.models[name] for name in named]
    tails = [{"head": heads.split(params)[1]} for _, params in own]
    objective = adaptive.entropies([nets.of(rolled(c)) for c, _ in own], tails)
    draws = [t.draws(config.adapt_on, config.batch_size, config.seed) for t in tasks]

    def data(number: int) -> tuple[Any, ...]:
        return tuple(one(number) for one in draws)

    lam = LAM if config.lam is None else config.lam
    totals = {"adamerging": config.updates, "concrete adaptation": config.tta_steps}

    def watch(phase: str, step: int, state: Any, window: Any) -> None:
        if tell is not None:
            said = f"{phase}, entropy {float(np.sum(window.entropy)):.3f}"
            tell(said, step, totals.get(phase, config.updates))

    theta0, taus = trees.theta0, trees.taus
    if config.method == "adamerging":
        ties = config.k if config.plus else None
        cfg = adaptive.AdaMergingConfig(config.updates, config.lr, lam, ties=ties)
        got = adaptive.adamerging(
            theta0, taus, objective, data, config.level, cfg, watch=watch, names=named
        )
        curve = {"coefficients": _curve(got.run.entropy)}
        return Outcome(
            got.params, rows(got.lambdas, taus), entropy=curve, notes=list(got.run.notes)
        )
    settings = concrete.ConcreteConfig(
        steps=config.updates,
        temperature=config.temperature,
        lam=lam,
        mask_lr=config.mask_lr,
        base_lr=config.base_lr,
        tta_steps=config.tta_steps,
        tta_lr=config.lr,
        final=config.final,
    )
    key = jax.random.key(config.seed)
    if config.method == "concrete-ta":
        result = concrete.concrete_task_arithmetic(
            theta0, taus, objective, data, settings, key, watch=watch, names=named
        )
        ones = jnp.ones(len(trees.names), jnp.float32)
        end = concrete.masked_merge(theta0, taus, ones, result.mask)
        at = between(theta0, end)
        found = [("", [lam] * len(trees.names))]
    else:
        result = concrete.concrete_adamerging(
            theta0,
            taus,
            objective,
            data,
            settings,
            key,
            level=config.level,
            watch=watch,
            names=named,
        )
        at, found = None, rows(result.lambdas, taus)
    names = ("mask", "coefficients")
    curves = {name: _curve(one.entropy) for name, one in zip(names, result.runs, strict=False)}
    return Outcome(
        result.params,
        found,
        at,
        result.mask,
        concrete.mask_rates(result.state.logits),
        curves,
        list(result.notes),
    )


def rows(lambdas: Any, taus: Params) -> list[tuple[str, list[float]]]:
    """Coefficients as rows: one a tensor, or one of all."""
    if not isinstance(lambdas, Mapping):
        return [("", [float(x) for x in np.asarray(lambdas)])]
    found = []
    for path, values in tree.flatten(lambdas).items():
        table = np.asarray(values, np.float64)  # [N], or [N, L]
        if table.ndim == 1:
            found.append((path, table.tolist()))
            continue
        for layer in range(table.shape[1]):
            found.append((layer_name(path, layer), table[:, layer].tolist()))
    return found


def layer_name(path: str, layer: int) -> str:
    """The name of layer l of a stacked leaf, as ``tree.tensors`` gives it."""
    parts = path.split(tree.SEPARATOR)
    return tree.SEPARATOR.join(f"{p}.{layer}" if p == tree.STACK else p for p in parts)


def densities(mask: Params) -> dict[str, float]:
    """Mean of the drawn mask of every tensor."""
    means = jax.jit(lambda t: tree.map_tensors(jnp.mean, t))(mask)
    return {name: float(value) for name, value in tree.tensors(jax.device_get(means))}


def save_mask(file: Path, mask: Params) -> None:
    """Writes the drawn mask, leaf by leaf under the parameters' paths."""
    from safetensors.numpy import save_file

    arrays = {p: np.asarray(x, np.float32, order="C") for p, x in tree.flatten(mask).items()}
    save_file(arrays, file)


def rolled(config: Any) -> Any:
    """The network with its layers in a loop: a step that holds it once a task, forwards and
    backwards, would take minutes to compile with the layers written out."""
    if getattr(config, "unroll", 1) == 1:
        return config
    return dataclasses.replace(config, unroll=1)


def _curve(entropy: np.ndarray) -> tuple[list[int], list[list[float]]]:
    """Steps and entropies a task, means of equal stretches."""
    count = len(entropy)
    if not count:
        return [], []
    width = max(1, count // POINTS)
    starts = range(0, count - width + 1, width)
    return [s + width for s in starts], [entropy[s : s + width].mean(0).tolist() for s in starts]
