"""What a comparison compares: settings of the command, cells of the table, arms in each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from steppe.data.errors import near
from steppe.launch import optimiser
from steppe.launch.config import FinetuneConfig

# Names of arms that are a method; AdamW is what a run without a method uses.
ADAMW = "adamw"
# What an arm may say beside the settings of its method: anything that keeps the pairs pairs.
RATE = "learning_rate"
FREE = ("epochs", "ema", "drop", RATE, *(n for n in optimiser.SETTINGS[1:] if n != "exclude"))
METRICS = Literal["accuracy", "f1_macro", "loss"]


class Cell(NamedTuple):
    """One block of the table.

    Attributes:
      source: address of the data.
      size: training examples, of each class where the comparison counts so; 0 = all.
      noise: share of the training labels that is wrong.
    """

    source: str
    size: int
    noise: float


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Attributes:
      name: as the user wrote it, without the grid.
      config: base settings with those of the arm; rho is open.
      grid: radii to choose from; none for AdamW, and one is no choice.
    """

    name: str
    config: FinetuneConfig
    grid: tuple[float, ...]

    @property
    def chooses(self) -> bool:
        """Whether rho has to be chosen on the validation split."""
        return len(self.grid) > 1


@dataclass(frozen=True)
class CompareConfig:
    """``steppe compare``: several methods on several seeds, sizes and sources, in one table.

    Every seed has one initial head, one order of the data, one dropout and one draw of training
    examples, which all methods share: differences are taken within a seed. rho is chosen for
    each method, source, size and noise by the mean score of ``select_seeds`` on the validation
    split; the test split is scored once for each of ``seeds``, at the rho that was chosen.

    Attributes:
      base: model, data, optimiser, epochs and batch of every run; its source, limit, seed and
        sharpness come from the fields below.
      out: folder for runs.jsonl, table.json, table.md and report.html.
      sources: addresses of the data, one block of the table each.
      transfer: sources on which every trained model is scored too, without training on them;
        one is left out where it is the run's own, or where its classes have other names.
      transfer_limit: use only so many examples of each of those; 0 = all.
      sizes: numbers of training examples; 0 = all.
      per_class: sizes count the examples of each class, which are then as many of all.
      noise: shares of the training labels that are replaced by another class.
      methods: arms, the first of which the others are compared with. ``NAME`` or
        ``NAME:SETTING=VALUE,...``, NAME being adamw or a value of ``finetune --sharpness``;
        several radii are separated by slashes: ``fsam:keep_ratio=0.1,rho=0.01/0.02/0.05``.
        epochs, ema, drop and learning_rate may be set as well, such as ``adamw:epochs=10``. NAME
        may also be an overlay, which AdamW trains: ``prefix:length=10,learning_rate=1e-3``, or
        another method: ``lora:rank=8,sharpness=fsam,rho=0.01/0.02``.
      seeds: of the runs that are reported.
      select_seeds: of those that choose rho.
      select_by: score on the validation split that decides; ties take the smaller rho.
      valid_limit: use only so many validation examples; 0 = all.
      resample: every seed draws its own training examples; otherwise all have those that
        ``steppe finetune --data.limit`` takes.
      curvature: also measure the largest eigenvalue of the loss's Hessian and the largest loss
        in a ball around the parameters, on training examples.
      ball: radius of that ball.
      curvature_examples: training examples for them.
      resume: go on with what ``out`` holds; methods, seeds, sizes, sources may be added.
      dry_run: print the number of runs and the estimated time, and stop.
    """

    base: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(baselines=False))
    out: str = "runs/compare"
    sources: tuple[str, ...] = ("asset:vader/movies",)
    transfer: tuple[str, ...] = ()
    transfer_limit: int = 1000
    sizes: tuple[int, ...] = (250,)
    noise: tuple[float, ...] = (0.0,)
    methods: tuple[str, ...] = (
        "adamw",
        "sam:rho=0.002/0.005/0.01/0.02/0.05",
        "asam:rho=0.02/0.05/0.1/0.2/0.5",
        "fsam:rho=0.01/0.02/0.05/0.1",
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    select_seeds: tuple[int, ...] = (100, 101)
    select_by: METRICS = "accuracy"
    valid_limit: int = 1000
    resample: bool = True
    per_class: bool = False
    curvature: bool = False
    ball: float = 0.05
    curvature_examples: int = 128
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("sources", "sizes", "noise", "methods", "seeds", "select_seeds"):
            values = getattr(self, name)
            if not values and name != "select_seeds":
                raise ValueError(f"{name} must not be empty")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not hold a value twice, got {values}")
        for name in ("transfer_limit", "valid_limit", "curvature_examples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.per_class and not (self.resample and all(self.sizes)):
            raise ValueError("per_class needs sizes > 0 and resample: it draws them for every seed")
        if min(self.sizes) < 0:
            raise ValueError(f"sizes must be >= 0 (0 = all examples), got {min(self.sizes)}")
        if not all(0.0 <= share < 1.0 for share in self.noise):
            raise ValueError(f"noise must be shares in [0, 1), got {self.noise}")
        for name in ("seeds", "select_seeds"):
            for seed in getattr(self, name):
                if not 0 <= seed < 2**32:
                    raise ValueError(f"{name} must be in [0, 2^32), got {seed}")
        shared = sorted(set(self.seeds) & set(self.select_seeds))
        if shared:
            raise ValueError(
                f"seeds and select_seeds must not share any, both have {shared}: rho would be "
                "chosen on runs that are reported"
            )
        if not 0 < self.ball < math.inf:
            raise ValueError(f"ball must be > 0 and finite, got {self.ball}")
        base, neutral = self.base, FinetuneConfig()
        for name, cure in _ELSEWHERE.items():
            if getattr(base, name) != getattr(neutral, name):
                raise ValueError(f"base.{name} is not used here: {cure}")
        if base.data.limit:
            raise ValueError("base.data.limit is not used here: sizes has the training examples")
        if base.data.task not in ("classification", "pair", "image"):
            raise ValueError(
                f"base.data.task must be classification, pair or image, got {base.data.task!r}"
            )
        found = self.arms()
        names = [arm.name for arm in found]
        if len(set(names)) != len(names):
            raise ValueError(f"methods must differ in more than rho, got {', '.join(names)}")
        if any(arm.chooses for arm in found) and not self.select_seeds:
            raise ValueError("select_seeds must not be empty where a method has several rho")

    def arms(self) -> tuple[Arm, ...]:
        """The methods, parsed.

        Raises:
          ValueError: an unknown method or setting, or a value out of range.
        """
        return tuple(self._arm(text) for text in self.methods)

    def _arm(self, text: str) -> Arm:
        try:
            return parse_arm(text, self.base)
        except ValueError as error:
            said = str(error)
            where = "" if said.startswith("methods ") else f"methods has {text!r}: "
            raise ValueError(where + said) from None

    def cells(self) -> tuple[Cell, ...]:
        """The blocks of the table, the smallest training sizes of all sources first."""
        return tuple(
            Cell(source, size, noise)
            for size in sorted(self.sizes, key=lambda n: n or 10**12)
            for noise in self.noise
            for source in self.sources
        )


_ELSEWHERE = {
    "sharpness": "methods says which methods run",
    "overlay": "methods says which overlays run",
    "rho": "methods has the radii",
    "seed": "seeds has the seeds",
    "probe": "a fitted head has no steps",
    "resume": "it is a setting of the comparison itself",
    "dry_run": "it is a setting of the comparison itself",
}


def parse_arm(text: str, base: FinetuneConfig) -> Arm:
    """``"fsam:keep_ratio=0.1,rho=0.01/0.02"`` or ``"lora:rank=8"`` as an :class:`Arm`.

    Raises:
      ValueError: an unknown method or setting, or a value that it cannot have.
    """
    method, _, rest = text.partition(":")
    own: Mapping[str, Any] = {}  # settings of an overlay come before those of the run
    sharpness = "none" if method == ADAMW else method
    attaches = method == "none" or sharpness not in optimiser.DEFAULTS
    if attaches:
        from steppe.launch import overlays  # imports jax, which the names of a recipe do not need

        if method not in overlays.KNOWN:
            known = [ADAMW, *(m for m in optimiser.DEFAULTS if m != "none"), *overlays.KNOWN]
            raise ValueError(
                f"methods must be among {', '.join(known)}, got {method!r}{near(method, known)}"
            )
        sharpness, own = "none", overlays.settings_of(method)
    free = (*own, "sharpness", *FREE) if attaches else FREE
    values: dict[str, Any] = {"sharpness": sharpness}
    grid: tuple[float, ...] = ()
    seen, attached, kept = set(), [], []
    for part in filter(None, rest.split(",")):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in free:
            raise ValueError(
                f"methods has {part!r} in {text!r}; it must be SETTING=VALUE with one of "
                f"{', '.join(dict.fromkeys(free))}{near(name, free)}"
            )
        if name in seen:
            raise ValueError(f"methods has {name} twice in {text!r}")
        seen.add(name)
        if name in own:
            attached.append(f"{name}={value}")
        elif name == "rho":
            grid = tuple(sorted(_number(v, text) for v in value.split("/")))
            if len(set(grid)) != len(grid):
                raise ValueError(f"methods has a radius twice in {text!r}; give each once")
            continue
        else:
            values[name] = _value(name, value, text)
        kept.append(f"{name}={value}")
    if attaches:
        values["overlay"] = (method + (":" + ",".join(attached) if attached else ""),)
        overlays.parse(values["overlay"])  # a value out of range is refused before anything runs
    if values["sharpness"] != "none" and not grid:
        grid = (optimiser.DEFAULTS[values["sharpness"]]["rho"],)
    if RATE in values:
        rate = values.pop(RATE)
        if rate < 0:
            raise ValueError(f"methods has {RATE}={rate:g} in {text!r}; it must be >= 0")
        values["optim"] = dataclasses.replace(base.optim, learning_rate=rate)
    for rho in grid:  # out of range, or given for AdamW: refused as finetune refuses it
        dataclasses.replace(base, **values, rho=rho)
    config = dataclasses.replace(base, **values)
    return Arm(method + (":" + ",".join(kept) if kept else ""), config, grid)


def _value(name: str, text: str, arm: str) -> Any:
    if name == RATE:
        return _number(text, arm)
    kinds = {f.name: str(f.type) for f in dataclasses.fields(FinetuneConfig)}
    if "float" in kinds[name]:
        return _number(text, arm)
    if "int" in kinds[name]:
        if not text.isdecimal():
            raise ValueError(f"methods has {name}={text!r} in {arm!r}; it must be a whole number")
        return int(text)
    return text


def _number(text: str, arm: str) -> float:
    try:
        if math.isfinite(value := float(text)):
            return value
        raise ValueError
    except ValueError:
        raise ValueError(f"methods has {text!r} in {arm!r}; it must be a finite number") from None
