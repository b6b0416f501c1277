"""Settings of ``steppe compare merging``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steppe.data.errors import near
from steppe.launch.config import FinetuneConfig
from steppe.launch.merge.settings import METHODS, MergeConfig

# Rows that need no merging: the base with the tasks' heads, and every task's own model.
REFERENCES = ("pretrained", "individual")
# What may change when a comparison is gone on with: more rows, not other ones.
GROWS = ("out", "methods", "seeds", "resume", "dry_run")
# What a method may say; the others are the same for all.
FREE = (
    "lam", "k", "merge", "p", "a", "examples", "fisher", "level", "plus", "steps", "lr",
    "tta_steps", "mask_lr", "base_lr", "temperature", "final",
)  # fmt: skip
LEFT_OUT = ("weighted", "slerp")


def short(address: str) -> str:
    """The last part of an address, which names the task; of a file without its ending."""
    kind, _, place = address.partition(":")
    return Path(place).stem if kind == "file" else place.rstrip("/").split("/")[-1]


@dataclass(frozen=True)
class StudyConfig:
    """``steppe compare merging``: tasks x merging methods x seeds, in one table.

    Attributes:
      base: model, data settings, optimiser, epochs and batch of every fine-tuning; its source,
        seed and folder come from the fields below.
      out: folder for the fine-tuned models, merges.jsonl, table.json, table.md, report.html.
      tasks: addresses of the data, one task each.
      methods: rows of the table, the first of which the others are compared with:
        ``METHOD`` or ``METHOD:SETTING=VALUE,...`` with the settings of ``steppe merge``, such
        as ``adamerging:level=task,steps=200``. task-arithmetic, ties, dare and dare-ties
        without ``lam`` choose it on the validation split.
      sweep: coefficients that they choose from.
      seeds: of fine-tuning (head, order, dropout) and of merging.
      batch_size: examples a task and adaptation step.
      eval_limit: validation and test examples a task, each; 0 = all.
      resume: go on with what ``out`` holds; methods and seeds may be added.
      dry_run: print how many runs and merges there are, what is done of them, and stop.
    """

    base: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(baselines=False))
    out: str = "runs/compare-merging"
    tasks: tuple[str, ...] = ()
    methods: tuple[str, ...] = (
        "average",
        "task-arithmetic",
        "ties",
        "dare",
        "fisher",
        "regmean",
        "adamerging:level=task",
        "adamerging",
        "concrete-ta",
        "concrete-adamerging",
    )
    sweep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 16
    eval_limit: int = 1000
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "methods", "seeds", "sweep"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not hold a value twice, got {values}")
            if not values:
                raise ValueError(f"{name} must not be empty")
        if len(self.tasks) < 2:
            raise ValueError(f"tasks must be two or more, got {len(self.tasks)}")
        names = [short(task) for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks must differ in the last part of their addresses, got {names}")
        for name, why in (
            ("seed", "seeds has the seeds"),
            ("resume", "it is a setting of the comparison itself"),
            ("dry_run", "it is a setting of the comparison itself"),
            ("lora", "steppe merge takes LoRA runs; full fine-tunes are compared here"),
        ):
            if getattr(self.base, name) != getattr(FinetuneConfig(), name):
                raise ValueError(f"base.{name} is not used here: {why}")
        if self.base.out or self.base.data.source != FinetuneConfig().data.source:
            raise ValueError("base.out and base.data.source are not used here: see out and tasks")
        for seed in self.seeds:
            self.shared(seed)
        known: dict[MergeConfig, str] = {}
        for name in self.methods:
            arm = self.arm(name, self.shared(self.seeds[0]))
            if arm in known:
                raise ValueError(
                    f"methods must not hold a row twice: {known[arm]!r} and {name!r} are the same "
                    "settings; leave one out"
                )
            known[arm] = name

    def rows(self) -> tuple[str, ...]:
        """All rows of the table, the references first."""
        return (*REFERENCES, *self.methods)

    def shared(self, seed: int) -> MergeConfig:
        """What all methods share under a seed, the models apart.

        Raises:
          ValueError: a value out of range.
        """
        return MergeConfig(
            eval_limit=self.eval_limit,
            batch_size=self.batch_size,
            seed=seed,
            adapt_on="valid",
            sweep=self.sweep,
        )

    def arm(self, text: str, shared: MergeConfig) -> MergeConfig:
        """``"ties:k=0.1"`` on top of what all methods share.

        Raises:
          ValueError: an unknown method or setting, or a value that it cannot have.
        """
        method, _, rest = text.partition(":")
        if method not in METHODS or method in LEFT_OUT:
            known = [m for m in METHODS if m not in LEFT_OUT]
            raise ValueError(
                f"methods must be among {', '.join(known)}, got {method!r}{near(method, known)}"
            )
        values: dict[str, Any] = {"method": method}
        for part in filter(None, rest.split(",")):
            name, equals, value = part.partition("=")
            name = name.strip().replace("-", "_")
            if not equals or name not in FREE:
                raise ValueError(
                    f"methods has {part!r} in {text!r}; it must be SETTING=VALUE with one of "
                    f"{', '.join(FREE)}{near(name, FREE)}"
                )
            values[name] = _value(name, value, text)
        try:
            return dataclasses.replace(shared, **values)
        except ValueError as error:
            raise ValueError(f"methods has {text!r}: {error}") from None


def _value(name: str, text: str, arm: str) -> Any:
    kind = {f.name: str(f.type) for f in dataclasses.fields(MergeConfig)}[name]
    try:
        if "Literal" in kind:
            options = [option.strip(" '\"") for option in kind[kind.index("[") + 1 : -1].split(",")]
            if text not in options:
                raise ValueError
            return text
        if "bool" in kind:
            return {"true": True, "false": False}[text.lower()]
        return int(text) if "int" in kind else float(text)
    except (KeyError, ValueError):
        raise ValueError(f"methods has {name}={text!r} in {arm!r}; it must be {kind}") from None
