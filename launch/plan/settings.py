"""Settings of ``steppe plan``: those of ``finetune`` and ``distill`` that change the step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from steppe.launch import config as config_
from steppe.launch.config import FinetuneConfig
from steppe.launch.plan import accelerators

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class PlanConfig(FinetuneConfig):
    """``steppe plan``: bytes, collectives, FLOPs and time of a step on devices that are not here.

    The settings of ``steppe finetune`` mean what they mean there; those that do not change the
    step (epochs, seed, out, ...) are not used.

    Attributes:
      model: a shape such as ``llama-70b`` or ``bert-base``, a folder, a config.json, or
        ``asset:NAME``.
      on: accelerator and number: ``v5e-16``, ``v5p-128`` (TensorCores, two a device),
        ``v6e-256``, ``h100-8``, ``h200-8``, ``b200-8``, ``cpu``.
      mesh: devices by axis, such as ``fsdp=16,model=4``; empty = one is proposed.
      slices: TPU slices (or groups of GPU nodes) that the outermost data axis runs across; ``on``
        is all of them together.
      batch_size: rows of a step over all devices; 0 = one row a data shard and micro-batch.
      layers: of the model that trains, where it is cut to fewer than it has; 0 = all.
      length: tokens of a row; 0 = the recipe's, else 4096 for decoders and 128 for others, at
        most the model's positions.
      remat: what the backward pass keeps, see ``run_stack``; empty = the model's own.
      teacher: a model that is distilled into this one; empty = fine-tuning.
      teacher_dtype, frozen_dtype: of the teacher's parameters, and of a base under an overlay.
      divergence, weight, temperature, top_k, vocab_chunk, token_chunk: of the distillation, as
        in ``steppe distill``.
      compiled: partition the program and count in it; False = state and estimates only.
      json: print JSON in place of the table.
    """

    model: str = ""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    batch_size: int = 0
    on: str = "cpu"
    slices: int = 1
    layers: int = 0
    length: int = 0
    remat: Literal["", "auto", "dots", "full", "none"] = ""
    teacher: str = ""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    divergence: str = "forward_kl"
    weight: float = 0.5
    temperature: float = 1.0
    top_k: int | None = None
    vocab_chunk: int | None = None
    token_chunk: int | None = None
    compiled: bool = True
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("top_k", "vocab_chunk", "token_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.slices < 1:
            raise ValueError(f"slices must be >= 1, got {self.slices}")
        place = accelerators.parse(self.on)
        if place.devices % self.slices:
            raise ValueError(
                f"slices={self.slices} does not divide the {place.devices} devices of {self.on}"
            )
        accelerators.check_slices(place, self.slices)
        if self.mesh:
            config_.parse_mesh(self.mesh, place.devices)
        self.training()

    @property
    def place(self) -> accelerators.Place:
        """The devices."""
        return accelerators.parse(self.on)

    def training(self) -> FinetuneConfig:
        """The settings as ``steppe finetune`` has them.

        Raises:
          ValueError: as there.
        """
        names = {f.name for f in dataclasses.fields(FinetuneConfig)}
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["batch_size"] = max(self.batch_size, 1)
        return FinetuneConfig(**values)


def of_recipe(recipe: Any) -> PlanConfig:
    """The settings of a recipe of ``finetune`` or ``distill`` as a plan's defaults.

    Every scheme of distillation is planned as ``kd`` with its divergence.

    Raises:
      ValueError: a student that is cut by more than its layers.
    """
    from steppe.launch.distill import schemes
    from steppe.launch.distill.settings import DistillConfig

    more: dict[str, Any] = {}
    training = recipe
    if isinstance(recipe, DistillConfig):
        recipe = schemes.resolved(recipe)
        training = recipe.training()
        sizes = {n: s for n, s in recipe.cut.sizes.items() if n != "how"}
        if set(sizes) - {"layers"}:
            raise ValueError(
                f"a student cut to {sizes} is not planned: write its config.json and plan that"
            )
        more = {
            "layers": sizes.get("layers", 0),
            "teacher": recipe.teacher,
            "teacher_dtype": recipe.teacher_dtype,
            "vocab_chunk": recipe.vocab_chunk,
            "token_chunk": recipe.token_chunk,
        }
        more |= {"divergence": recipe.divergence} if recipe.divergence else {}
        more |= {"weight": recipe.weight} if recipe.weight is not None else {}
        more |= {"temperature": recipe.temperature} if recipe.temperature is not None else {}
    names = {f.name for f in dataclasses.fields(FinetuneConfig)}
    values = {name: getattr(training, name) for name in names}
    return PlanConfig(**{**values, "length": training.data.max_length, **more})


def to_dict(config: PlanConfig) -> dict[str, Any]:
    """As JSON values."""
    return config_.to_dict(config)


def from_dict(values: dict[str, Any]) -> PlanConfig:
    """Inverse of :func:`to_dict`."""
    made: PlanConfig = config_.from_dict(PlanConfig, values)
    return made
