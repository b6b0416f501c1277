"""The methods by name: from float parameters to parameters with integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from steppe.launch.quantize import opened as opened_
from steppe.launch.quantize.opened import Opened
from steppe.launch.quantize.settings import GAMES, GRAMS, MAGNITUDES, QuantizeConfig
from steppe.models import quantized
from steppe.models.tree import Params
from steppe.train import loop, metrics
from steppe.train.distill.pairs import Teacher
from steppe.train.quantize import baselines, calibrate, gptq, zsaq
from steppe.train.quantize.game import Terms

Told = Callable[[str, int, int], None]
LOG_EVERY = 5


class Made(NamedTuple):
    """A quantized model.

    Attributes:
      params: kernels in integers, see ``models.quantized``.
      rules: what was rounded, and how.
      samples: texts of the generator of a game, [rows, length] ids, or None.
    """

    params: Params
    rules: quantized.QuantRules
    samples: Any


def rules_of(bits: str, method: str, config: QuantizeConfig) -> quantized.QuantRules:
    """What is rounded by a scheme and method."""
    scheme = quantized.parse(bits, a_mode=config.activations, smooth=method in ("smooth", "awq"))
    return quantized.rules(scheme, quantize_embed=config.embed, quantize_head=config.head)


def quantize(
    opened: Opened,
    config: QuantizeConfig,
    bits: str,
    method: str,
    seed: int,
    folder: Path,
    tell: Told,
) -> Made:
    """One row of the table.

    Args:
      folder: where a game leaves its metrics.jsonl.

    Raises:
      ValueError: rules that do not fit the model, no data to calibrate with.
    """
    rules = rules_of(bits, method, config)
    params = opened.params
    quantized.resolve(opened.model, rules)  # a scheme that does not fit ends here
    static = config.activations == "static" and any(
        c.a_bits < 32 for c in quantized.resolve(opened.model, rules).values()
    )
    reads, batches = opened.model, list[Any]()
    if method in (*GRAMS, *MAGNITUDES) or static:
        tell(f"{bits} {method}: inputs of the layers", 0, 1)
        reads, batches = opened_.calibration(opened, config, seed)
    if method in MAGNITUDES:
        params = baselines.smooth(params, calibrate.magnitudes(reads, params, batches), rules)
    grams = calibrate.grams(reads, params, batches) if method in GRAMS else None
    if method == "awq":
        assert grams is not None
        params = baselines.awq(params, grams, rules)
    if static:
        params = calibrate.ranges(reads, params, batches, rules)
    if method in GAMES:
        params, samples = _game(opened, config, rules, params, method, seed, folder, tell)
        return Made(quantized.quantize(params, rules), rules, samples)
    tell(f"{bits} {method}: rounding", 0, 1)
    if method == "gptq":
        assert grams is not None
        return Made(gptq(params, grams, rules), rules, None)
    clip: Any = "mse" if method == "mse" else "absmax"
    return Made(baselines.rtn(params, rules, clip=clip), rules, None)


def _game(
    opened: Opened,
    config: QuantizeConfig,
    rules: quantized.QuantRules,
    params: Params,
    method: str,
    seed: int,
    folder: Path,
    tell: Told,
) -> tuple[Params, Any]:
    """The student's float parameters after a game, and what its generator makes."""
    student = quantized.wrap(opened.model, rules)
    teacher = Teacher(opened.model, opened.params)
    random = method == "random"
    made = (
        opened_.noise(opened, config, config.batch_size)
        if random
        else opened_.learned(opened, config)
    )
    opt = zsaq.players(
        config.rho if method == "zsaq" else 0.0,
        config.k_min,
        student_lr=config.student_lr,
        generator_lr=config.generator_lr,
        freeze_generator=random,
    )
    terms = Terms(config.divergence, config.inter_layer, config.act_bonus)
    start = quantized.with_entries(student, params)
    state = zsaq.init(jax.random.key(seed), student, teacher, made, opt, params=start)
    step = zsaq.make_zsaq_step(student, opened.model, made, opt, terms=terms)
    said = _Said(tell, f"{method}, game", config.steps)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.jsonl"
    file.unlink(missing_ok=True)
    state = loop.run(
        step,
        state,
        zsaq.Noise(),
        steps=config.steps,
        log_every=max(1, min(LOG_EVERY, config.steps // 10)),
        writers=[metrics.JsonLines(file), said],
    )
    return zsaq.result(state), _samples(opened, made, state, seed)


def _samples(opened: Opened, made: Any, state: Any, seed: int) -> Any:
    """The nearest words of what a generator of texts makes, [4, length] ids; else None."""
    import jax.numpy as jnp

    if opened.vision:
        return None
    y = state.params.get(zsaq.GENERATOR, {})

    @jax.jit
    def nearest(y: Params, params: Params, key: jax.Array) -> jax.Array:
        embeds = made.apply(y, params, key).embeds[:4]
        table = params["embed"]["word"]["table"]
        near = embeds @ table.T - 0.5 * jnp.square(table).sum(-1)
        return near.argmax(-1)

    return jax.device_get(nearest(y, opened.params, jax.random.key(seed)))


class _Said:
    """A writer of rows that tells how far a game is."""

    def __init__(self, tell: Told, name: str, steps: int) -> None:
        self._tell, self._name, self._steps = tell, name, steps

    def write(self, step: int, kind: str, values: Any) -> None:
        loss = values.get("loss")
        shown = "" if loss is None else f", f {loss:.4f}"
        self._tell(f"{self._name}{shown}", step, self._steps)

    def truncate(self, step: int) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


def describe(config: QuantizeConfig, method: str) -> dict[str, Any]:
    """The settings that a method has used, for the model's record."""
    names = ["activations", "embed", "head"]
    if method in (*GRAMS, *MAGNITUDES) or config.activations == "static":
        names += ["calibration", "examples"]
    if method in GAMES:
        names += ["k_min", "steps", "student_lr", "generator_lr", "divergence", "inter_layer"]
        names += ["act_bonus", "adapter", "length", "batch_size"]
    if method == "zsaq":
        names.append("rho")
    known = dataclasses.asdict(config)
    return {"method": method, **{name: known[name] for name in names}}
