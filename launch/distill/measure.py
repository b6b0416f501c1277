"""What a distilled student is beside its teacher: agreement, difficulty of tokens, size, speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.launch.bench import harness
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train import evaluate
from steppe.train.distill.atkd import decompose_pair
from steppe.train.distill.pairs import Pair
from steppe.train.evaluate import exposure as biases

GROUPS = 10
ROUNDS = 7
# Tokens of a forward pass that is timed, about.
TIMED = 512
# Vocabularies above it are taken in pieces when nothing else is said.
WHOLE = 16384
# Logits of a model that are in memory at once where texts are compared step by step.
LOGITS = 1 << 24


def agreement(student: Any, teacher: Any) -> dict[str, Any]:
    """How often both say the same: ``top1``, of how many ``items``, and for classes the 95%
    interval over examples and ``kl``, the mean of KL(teacher || student) in nats.

    Args:
      student, teacher: two ``EvalResult`` of one split.
    """
    if student.kind != "classification":
        pairs = list(zip(student.predictions, teacher.predictions, strict=True))
        same = np.concatenate([np.asarray(a) == np.asarray(b) for a, b in pairs])
        return {"top1": float(same.mean()), "items": len(same), "unit": "tokens"}
    q, p = (np.maximum(r.probs.astype(np.float64), 1e-30) for r in (student, teacher))
    found = evaluate.bootstrap(evaluate.accuracy, student.predictions, teacher.predictions)
    same = student.predictions == teacher.predictions
    return {
        "top1": float(same.mean()),
        "items": len(same),
        "unit": "examples",
        "interval": [found.low, found.high],
        "kl": float((p * (np.log(p) - np.log(q))).sum(1).mean()),
    }


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The parts of KL(teacher || student) at every labelled token, [M] each.

    Attributes:
      tkd, dkd: nats, see ``steppe.train.distill.atkd``.
      unc: the teacher's 1 - p_y.
    """

    tkd: np.ndarray
    dkd: np.ndarray
    unc: np.ndarray

    @property
    def kl(self) -> np.ndarray:
        """KL(teacher || student), nats."""
        return self.tkd + self.unc * self.dkd


def tokens(
    pair: Pair, params: Params, batches: Iterable[Any], *, vocab_chunk: int | None = None
) -> Tokens:
    """The parts of the KL over one pass.

    Args:
      pair: student and teacher, decoders.
      params: of both, ``{"student": ..., "teacher": ...}``.
      vocab_chunk: None = pieces of 8,192 where the vocabulary is large.
    """
    size = pair.vocab or pair.student.config.vocab_size
    chunk = 8192 if vocab_chunk is None and size > WHOLE else vocab_chunk

    @jax.jit
    def fn(params: Params, batch: Any) -> Any:
        return decompose_pair(pair, params, batch, None, chunk)

    parts: list[list[np.ndarray]] = []
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "example_index"}
        found, mask = jax.device_get(fn(params, inputs))
        there = mask > 0
        parts.append([np.asarray(x, np.float64)[there] for x in found])
    return Tokens(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def difficulty(found: Tokens, hard_ratio: float = 0.5, groups: int = GROUPS) -> dict[str, Any]:
    """Means over tokens of rising difficulty, which is the teacher's uncertainty.

    Returns:
      ``groups``: equally many tokens each; ``easy`` and ``hard``: below the quantile
      1 - hard_ratio, and from it on; ``all``. Each holds tokens, unc, tkd, dkd and kl.
    """
    order = np.argsort(found.unc, kind="stable")
    cuts = [part for part in np.array_split(order, groups) if len(part)]
    limit = np.sort(found.unc)[int(np.floor((1 - hard_ratio) * (len(order) - 1) + 1e-4))]
    hard = found.unc >= limit

    def means(chosen: np.ndarray) -> dict[str, float]:
        columns = {"unc": found.unc, "tkd": found.tkd, "dkd": found.dkd, "kl": found.kl}
        count = int(chosen.sum()) if chosen.dtype == bool else len(chosen)
        if not count:
            return {"tokens": 0}
        return {"tokens": count} | {k: float(v[chosen].mean()) for k, v in columns.items()}

    return {
        "groups": [means(part) for part in cuts],
        "easy": means(~hard),
        "hard": means(hard),
        "all": means(np.ones(len(order), bool)),
        "hard_ratio": hard_ratio,
    }


def exposure(
    pair: Pair,
    params: Params,
    batch: Mapping[str, Any],
    write: Callable[[Params, Any, jax.Array], Any],
) -> dict[str, Any] | None:
    """The exposure bias of the student, see ``steppe.train.evaluate.exposure``.

    Args:
      pair, params: as in :func:`tokens`.
      batch: texts of the data, of which the student goes on with the prompts.
      write: ``(params, batch, key) -> batch``, the student's greedy texts.

    Returns:
      ``ex_acc_err`` (per cent), ``acc_err``, ``regret``, ``per_step`` (nats), ``length``, as
      there, and ``texts``, their number; None where the student makes no error on the data.
    """
    rows, length = np.shape(batch["labels"])
    size = pair.vocab or pair.student.config.vocab_size
    some = max(1, min(rows, LOGITS // (length * size)))

    @jax.jit
    def fn(params: Params, batch: Any) -> biases.StepErrors:
        z_s, z_t, _, mask = pair.dense(params, batch, None)
        return biases.step_errors(z_s, z_t, mask, length=length)

    def sums(batch: Mapping[str, Any]) -> biases.StepErrors:
        held = {k: np.asarray(batch[k]) for k in ("input_ids", "attention_mask", "labels")}
        held["label_mask"] = np.asarray(batch["label_mask"])
        found = None
        for at in range(0, rows - rows % some, some):
            part = jax.device_get(fn(params, {k: v[at : at + some] for k, v in held.items()}))
            found = part if found is None else found.add(part)
        assert found is not None
        return found

    given = sums(batch)
    if not given.error.any():
        return None
    found = biases.exposure_bias(sums(write(params, batch, jax.random.key(0))), given)
    return {**found._asdict(), "texts": rows - rows % some}


def speed(
    student: tuple[Model, Params],
    teacher: tuple[Model, Params],
    batch: Any,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """How much faster the student's forward pass is: both on the same rows, in turn.

    Returns:
      ``ratio``: the teacher's time over the student's, the median of the rounds, with ``low``
      and ``high`` of them; ``teacher_s`` and ``student_s``, medians; ``shape``, ``rounds``.
    """
    rows, length = batch["input_ids"].shape
    keep = max(1, min(rows, TIMED // length))
    inputs = {
        k: np.asarray(v)[:keep]
        for k, v in batch.items()
        if k not in ("labels", "label_mask", "example_index")
    }

    def compiled(model: Model) -> Any:
        # One number comes back: what is moved is no part of a forward pass.
        def fn(params: Params, inputs: Any) -> Any:
            out = model.apply(params, inputs)
            return jnp.max(out.hidden if out.logits is None else out.logits)

        return jax.jit(fn)

    def turn(model: Model, params: Params) -> harness.Turn:
        fn = compiled(model)
        return harness.timed(lambda: fn(params, inputs), jax.block_until_ready)

    taught, own = harness.compare(turn(*teacher), turn(*student), harness.Protocol(1, rounds, 1))
    found = harness.ratio(taught, own)
    return {
        "ratio": found.median,
        "low": found.low,
        "high": found.high,
        "teacher_s": harness.spread(taught).median,
        "student_s": harness.spread(own).median,
        "shape": [keep, length],
        "rounds": rounds,
    }
