"""Settings of ``steppe quantize``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from steppe.launch.config import DataConfig
from steppe.models import fake_quant, quantized

Method = Literal["rtn", "mse", "gptq", "smooth", "awq", "zsaq", "sgd-sga", "random", "data", "qat"]
METHODS: tuple[str, ...] = Method.__args__  # type: ignore[attr-defined]
# What they need beside the parameters.
GRAMS, MAGNITUDES = ("gptq", "awq"), ("smooth",)
# Games, and those of them whose generator learns.
GENERATES = ("zsaq", "sgd-sga")
GAMES = (*GENERATES, "random")
# What learns from the training split: the teacher's answers, or the labels.
FROM_DATA = ("data", "qat")
LEARNS = (*GAMES, *FROM_DATA)


@dataclass(frozen=True)
class QuantizeConfig:
    """``steppe quantize MODEL``: a model as integers, with a table of what that costs.

    Every pair of ``bits`` and ``method`` is one row and one folder, OUT/BITS-METHOD, which
    ``steppe evaluate`` opens. Methods that learn make one row a seed, OUT/BITS-METHOD-seedN.

    Attributes:
      model: run folder, exported folder, file of weights, or ``asset:NAME``.
      out: the new folder.
      bits: schemes such as w8a8, w4a16 (inputs as they are) or w4a8-g64 (64 inputs of a kernel
        share a step).
      method: rtn, to nearest; mse, to nearest with the step of least squared error; gptq, second
        order; smooth, SmoothQuant; awq; zsaq, zero-shot sharpness-aware; sgd-sga, the same
        without sharpness; random, the same on inputs that nobody learns (tokens, or ``images``).
        Two that need the training split, as ceilings of those: data, the same on its inputs; qat,
        fine-tuning on its labels.
      data: what the model is scored on, and calibrated with; of a run its own. Without any there
        are no scores.
      calibration: inputs of gptq, smooth, awq, ``start`` and static ranges (a game's too):
        ``data``, of the training split, or ``noise``, which needs no data: tokens drawn at random,
        or ``images``.
      examples: of those.
      activations: range of a layer's input: of each token, of each batch (tensor), or static.
      fit: step of a kernel's channel: absmax, its largest magnitude is the largest integer, or mse,
        the step of least squared error (in every step of a method that learns).
      start: of what learns: nearest, the float kernels, or gptq, kernels that round to what gptq
        gives, with its steps, which then stay; it reads the inputs that ``calibration`` names.
      embed, head: also round embeddings, a step for every column whatever the groups of ``bits``
        are, and what stands behind the layers.
      rho: zsaq: radius of the perturbation (at 2 and 3 bits 0.005 was seen to be small enough).
      k_min: games: steps of the student for one of the generator.
      steps: games: iterations; data and qat take steps * k_min steps of the student.
      student_lr, generator_lr: of Adam, for what learns.
      divergence: games: kl, l1 or mse, of the logits.
      inter_layer, act_bonus: games: weight of the distance of hidden states (10 was seen to help),
        of the bonus for large activations.
      info_bonus: games with a generator, classifiers: weight of the bonus for inputs that the
        float model tells apart.
      adapter: zsaq and sgd-sga on texts: what maps the generator to embeddings: soft_embed,
        gumbel (words; what was seen to teach) or linear.
      candidates: zsaq and sgd-sga with soft_embed or gumbel: words that a made text may choose
        from, others each time; 0 = the whole vocabulary.
      images: games, noise, of vision models: what images are drawn from, dead leaves (regions of
        texture with the statistics of photographs; a generator adds to them) or noise, what an
        untrained network makes of normal noise.
      length: games, noise: tokens of a made text.
      batch_size: games, calibration: rows at once.
      seeds: of generator, noise and the order of the data, for what learns.
      eval_limit: test examples; 0 = as the run.
      speed: forward passes of float, rounded and integer model that are timed in turns; 0 = none.
      resume: go on with what ``out`` holds; bits, methods and seeds may be added.
    """

    model: str = ""
    out: str = ""
    bits: tuple[str, ...] = ("w8a8",)
    method: tuple[Method, ...] = ("rtn",)
    data: DataConfig = field(default_factory=lambda: DataConfig(source=""))
    calibration: Literal["data", "noise"] = "data"
    examples: int = 128
    activations: Literal["token", "tensor", "static"] = "token"
    fit: Literal["absmax", "mse"] = "absmax"
    start: Literal["nearest", "gptq"] = "nearest"
    embed: bool = False
    head: bool = False
    rho: float = 0.05
    k_min: int = 5
    steps: int = 100
    student_lr: float = 1e-5
    generator_lr: float = 1e-3
    divergence: Literal["kl", "l1", "mse"] = "kl"
    inter_layer: float = 0.0
    act_bonus: float = 0.0
    info_bonus: float = 0.0
    adapter: Literal["soft_embed", "gumbel", "linear"] = "soft_embed"
    candidates: int = 0
    images: Literal["leaves", "noise"] = "leaves"
    length: int = 32
    batch_size: int = 16
    seeds: tuple[int, ...] = (0,)
    eval_limit: int = 1000
    speed: int = 10
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("bits", "method", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must not be empty")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not hold a value twice, got {values}")
        known: dict[quantized.QuantConfig, str] = {}
        for text in self.bits:
            try:
                scheme = quantized.parse(text)
            except ValueError as error:
                raise ValueError(
                    "bits must be schemes such as w8a8, w4a16 or w4a8-g64, of 2 to 8 bits (16: as "
                    f"it is), got {text!r}"
                ) from error
            if scheme.w_bits == scheme.a_bits == fake_quant.BYPASS:
                raise ValueError(f"bits must round something, got {text!r}: take w8a16 or w16a8")
            other = known.setdefault(scheme, text)
            if other != text:
                raise ValueError(
                    f"bits must not hold a scheme twice, {other} and {text} are one: leave one out"
                )
        for name in self.method:
            if name not in METHODS:
                raise ValueError(f"method must be of {', '.join(METHODS)}, got {name!r}")
        least = {"examples": 1, "k_min": 1, "steps": 1, "length": 3, "batch_size": 1}
        for name, low in (least | {"candidates": 0, "eval_limit": 0, "speed": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        for name in ("rho", "student_lr", "generator_lr", "inter_layer", "act_bonus", "info_bonus"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        if self.candidates and self.adapter == "linear":
            raise ValueError(
                f"candidates must be 0 with adapter='linear', which chooses no words, got "
                f"{self.candidates}"
            )
        if self.start != "nearest" and not set(self.method) & set(LEARNS):
            raise ValueError(
                f"start={self.start!r} is of methods that learn ({', '.join(LEARNS)}), and method "
                "has none of them: leave it out"
            )
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must be >= 0, got {min(self.seeds)}")

    def rows(self) -> tuple[tuple[str, str, int], ...]:
        """(bits, method, seed) of every row; methods that do not learn have seed 0."""
        return tuple(
            (bits, method, seed)
            for bits in self.bits
            for method in self.method
            for seed in (self.seeds if method in LEARNS else (0,))
        )


def folder_of(bits: str, method: str, seed: int) -> str:
    """The name of a row's folder."""
    return f"{bits}-{method}" + (f"-seed{seed}" if method in LEARNS else "")
