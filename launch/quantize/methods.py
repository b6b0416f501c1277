"""The methods by name: from float parameters to parameters with integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.data import batches as batches_
from steppe.launch import opening, setup
from steppe.launch.quantize import opened as opened_
from steppe.launch.quantize.opened import Opened
from steppe.launch.quantize.settings import (
    FROM_DATA,
    GAMES,
    GENERATES,
    GRAMS,
    LEARNS,
    MAGNITUDES,
    QuantizeConfig,
)
from steppe.models import quantized
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.tree import Params
from steppe.models.vision import VisionConfig
from steppe.train import distill, loop, metrics, step
from steppe.train.distill.pairs import Teacher
from steppe.train.objectives import basic
from steppe.train.quantize import baselines, calibrate, generator, zsaq
from steppe.train.quantize.game import Terms
from steppe.train.quantize.gptq import gptq, start

Told = Callable[[str, int, int], None]
LOG_EVERY = 5


class Made(NamedTuple):
    """A quantized model.

    Attributes:
      params: kernels in integers, see ``models.quantized``.
      rules: what was rounded, and how.
      samples: texts of the generator of a game, [rows, length] ids, or None.
      told: nats that the float classifier's answers tell of a game's inputs, or None.
    """

    params: Params
    rules: quantized.QuantRules
    samples: Any
    told: float | None = None


def rules_of(bits: str, method: str, config: QuantizeConfig) -> quantized.QuantRules:
    """What is rounded by a scheme and method."""
    scheme = quantized.parse(
        bits, a_mode=config.activations, smooth=method in ("smooth", "awq"), fit=config.fit
    )
    return quantized.rules(scheme, quantize_embed=config.embed, quantize_head=config.head)


def check(opened: Opened, config: QuantizeConfig) -> None:
    """Refuses methods that have nothing to learn from in this model or its data.

    Raises:
      ValueError: naming the method, and what goes; parameters that are no numbers; a generator
        that does not fit the model.
    """
    path = opening.not_finite(opened.params)
    if path is not None:
        raise ValueError(
            f"{config.model} holds NaN or infinity in {path!r}: look at how it was trained and "
            "saved"
        )
    for name in ("adapter", "length") if opened.vision else ("images",):
        value, usual = getattr(config, name), getattr(QuantizeConfig, name)
        if value != usual:
            kind = "images" if opened.vision else "texts"
            raise ValueError(
                f"{name}={value} does not go with {config.model}, which reads {kind}: leave it out"
            )
    head = opened.model.config.head
    numbers = head is not None and head.kind == "regression"
    made_for = isinstance(opened.model.config, EncoderConfig | DecoderConfig | VisionConfig)
    static = config.activations == "static" and any(
        quantized.parse(bits).a_bits < 32 for bits in config.bits
    )
    for method in config.method:
        reads = static or reads_inputs(config, method)
        if reads and config.calibration == "data" and opened.task is None:
            raise ValueError(
                f"method {method!r} reads inputs of the layers, and {config.model} names no data "
                "to calibrate with: give --data.source, or --calibration noise"
            )
        invents = method in GAMES or (reads and config.calibration == "noise")
        if invents and not made_for:
            raise ValueError(
                f"method {method!r} makes inputs, which goes for encoders, decoders and vision "
                f"models; {config.model} is none: take methods and --calibration that use data"
            )
        if method in LEARNS and head is None:
            raise ValueError(
                f"method {method!r} learns the answers of a head, and {config.model} has none: "
                "fine-tune it first, or take rtn, mse, gptq, smooth or awq"
            )
        if method in FROM_DATA and opened.task is None:
            raise ValueError(
                f"method {method!r} learns from the training split, and no data is named: give "
                "--data.source, or a run folder"
            )
        if method == "data" and numbers:
            raise ValueError(
                f"method 'data' compares distributions over classes, and {config.model} predicts "
                "numbers (regression): take qat, which learns its labels, or zsaq with "
                "--divergence mse"
            )
        if method in GAMES and config.info_bonus and not classifies(opened):
            raise ValueError(
                f"info_bonus={config.info_bonus} is for classifiers, and {config.model} is none: "
                "leave it at 0"
            )
        if method in GENERATES:
            opened_.learned(opened, config)  # a generator that does not fit ends here
        if method in GAMES and numbers and config.divergence == "kl":
            raise ValueError(
                f"divergence='kl' of method {method!r} compares distributions, and {config.model} "
                "predicts numbers (regression): give --divergence l1 or mse"
            )


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
    rules: quantized.QuantRules = rules_of(bits, method, config)
    params = opened.params
    quantized.resolve(opened.model, rules)  # a scheme that does not fit ends here
    static = config.activations == "static" and any(
        c.a_bits < 32 for c in quantized.resolve(opened.model, rules).values()
    )
    reads, batches = opened.model, list[Any]()
    compensated = compensates(config, method)
    if reads_inputs(config, method) or static:
        tell(f"{bits} {method}: inputs of the layers", 0, 1)
        reads, batches = opened_.calibration(opened, config, seed)
    if method in MAGNITUDES:
        params = baselines.smooth(params, calibrate.magnitudes(reads, params, batches), rules)
    grams = calibrate.grams(reads, params, batches) if method in GRAMS or compensated else None
    if method == "awq":
        assert grams is not None
        params = baselines.awq(params, grams, rules)
    if static:
        params = calibrate.ranges(reads, params, batches, rules)
    if compensated:
        assert grams is not None
        params, rules = start(params, grams, rules)
    if method in GAMES:
        params, samples, told = _game(opened, config, rules, params, method, seed, folder, tell)
        return Made(quantized.quantize(params, rules), rules, samples, told)
    if method in FROM_DATA:
        params = _learned(opened, config, rules, params, method, seed, folder, tell)
        return Made(quantized.quantize(params, rules), rules, None)
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
) -> tuple[Params, Any, float | None]:
    """The student's float parameters after a game, what its generator makes, and what that tells
    the teacher."""
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
    terms = Terms(config.divergence, config.inter_layer, config.act_bonus, config.info_bonus)
    given = quantized.with_entries(student, params)
    state = zsaq.init(jax.random.key(seed), student, teacher, made, opt, params=given)
    ask = _asking(opened, made)
    if not bool(jnp.isfinite(ask(state, jax.random.key(0), 1)).all()):
        raise ValueError(
            f"{config.model} answers made inputs with NaN or infinity, from which nothing can be "
            "learnt: its parameters are finite, its activations overflow; look at how it was "
            "trained"
        )
    train = zsaq.make_zsaq_step(student, opened.model, made, opt, terms=terms, steps=config.steps)
    said = _Said(tell, f"{method}, game", config.steps)
    state = _run(train, state, zsaq.Noise(), config.steps, folder, said)
    told = None
    if classifies(opened):
        answers = ask(state, jax.random.key(seed), max(1, 256 // config.batch_size))
        told = float(generator.information(answers))
    return zsaq.result(state), _samples(opened, made, state, seed), told


def _learned(
    opened: Opened,
    config: QuantizeConfig,
    rules: quantized.QuantRules,
    params: Params,
    method: str,
    seed: int,
    folder: Path,
    tell: Told,
) -> Params:
    """The student's float parameters after as many steps as a game has, on the training split."""
    task = opened.task
    assert task is not None, "see check"
    student = quantized.wrap(opened.model, rules)
    joint = distill.with_teacher(student, Teacher(opened.model, opened.params))
    given = quantized.with_entries(student, params)
    tx = optax.adam(config.student_lr)
    state = step.init(
        jax.random.key(seed),
        joint,
        tx,
        params=jax.tree.map(jnp.copy, {"student": given, "teacher": opened.params}),
        trainable=[rf"student/(?!{quantized.QUANT}/).*"],
    )
    kind = task.kind
    objective = (
        basic.for_task(joint, kind)
        if method == "qat"
        else distill.kd(student, Teacher(opened.model))
    )
    fed = batches_.train(
        task.splits["train"], config.batch_size, seed=seed, buckets=setup.buckets(task.data)
    )
    steps = config.steps * config.k_min
    state = _run(step.make(objective, tx), state, fed, steps, folder, _Said(tell, method, steps))
    found: Params = state.full(average=False)["student"]
    return found


def _run(train: Any, state: Any, fed: Any, steps: int, folder: Path, said: Any) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.jsonl"
    file.unlink(missing_ok=True)
    return loop.run(
        train,
        state,
        fed,
        steps=steps,
        log_every=max(1, min(LOG_EVERY, steps // 10)),
        writers=[metrics.JsonLines(file), said],
    )


def classifies(opened: Opened) -> bool:
    """Whether the model's answers are one distribution over classes."""
    head = opened.model.config.head
    return head is not None and head.kind == "classification"


def _asking(opened: Opened, made: Any) -> Callable[[Any, jax.Array, int], jax.Array]:
    """(state, key, count) -> the float model's logits of ``count`` batches that are made in that
    state; one program for all calls."""
    reads = generator.feeding(opened.model)
    answer = jax.jit(lambda own, batch: reads.apply(own, batch).logits)

    def ask(state: Any, key: jax.Array, count: int) -> jax.Array:
        y = state.params.get(zsaq.GENERATOR, {})
        some = generator.batches(made, y, opened.params, key, count)
        return jnp.concatenate([answer(opened.params, batch) for batch in some])

    return ask


def _samples(opened: Opened, made: Any, state: Any, seed: int) -> Any:
    """The nearest words of what a generator of texts makes, [4, length] ids; else None."""

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


def describe(opened: Opened, config: QuantizeConfig, method: str) -> dict[str, Any]:
    """The settings that a method has used on this model, for its record."""
    known = dataclasses.asdict(config)
    if not opened.vision:
        known["length"] = opened_.length(opened, config)
    made = "images" if opened.vision else "length"  # what a made input is asked for
    names = ["activations", "fit", "embed", "head"]
    if reads_inputs(config, method) or config.activations == "static":
        names += ["calibration", "examples"]
        names += [made] if config.calibration == "noise" else []
    if method in LEARNS:
        names += ["start", "k_min", "steps", "student_lr", "batch_size"]
    if method in GAMES:
        names += ["divergence", "inter_layer", made]
    if method in GENERATES:
        names += ["generator_lr", "act_bonus", "info_bonus"]
        names += [] if opened.vision else ["adapter", "candidates"]
    if method == "zsaq":
        names.append("rho")
    return {"method": method, **{name: known[name] for name in names}}


def reads_inputs(config: QuantizeConfig, method: str) -> bool:
    """Whether a method looks at inputs of the layers before it rounds or learns."""
    return method in (*GRAMS, *MAGNITUDES) or compensates(config, method)


def compensates(config: QuantizeConfig, method: str) -> bool:
    """Whether a method learns from where GPTQ ends."""
    return config.start == "gptq" and method in LEARNS
