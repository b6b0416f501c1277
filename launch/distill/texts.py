"""Whose texts a step learns on: what happens between the loop's batches and the compiled step.

Every draw comes from the key of the run and the number of the step, so that a resumed run draws
what an undisturbed one would have drawn. What a policy keeps is saved with the checkpoints: the
buffer of old texts lies in the state (``extra``), its threshold in the position of the batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.data.text import Tokenizer
from steppe.launch.distill import objectives
from steppe.launch.distill.schemes import WRITING
from steppe.launch.distill.settings import DistillConfig
from steppe.models.decoding import Settings
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train import distill
from steppe.train.distill import policies, replay
from steppe.train.mesh import MeshPlan
from steppe.train.step import TrainStep
from steppe.train.types import Metrics, TrainState

REPLAY = "replay"
# Tokens of a plain text that are given where the settings do not say it.
PROMPT = 16
PHI, LAST = "replay_phi", "replay_last"
# Folded into the key of the run, so that texts and dropout are drawn apart.
_STREAM = 0x7E87


class Texts:
    """Batches that also hold the threshold of the replay policy, which is saved with them.

    Attributes:
      threshold: see ``replay.Threshold``.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self.shapes = batches.shapes
        self.threshold = replay.Threshold()

    def __iter__(self) -> Texts:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Where it is: the state of the batches inside, and the threshold."""
        return {**self._batches.get_state(), PHI: self.threshold.phi, LAST: self.threshold.last}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of :meth:`get_state`."""
        last = state[LAST]
        self.threshold = replay.Threshold(float(state[PHI]), None if last is None else float(last))
        self._batches.set_state({k: v for k, v in state.items() if k not in (PHI, LAST)})

    def heard(self, metrics: Mapping[str, float]) -> None:
        """Adapts the threshold to the loss of a validation."""
        self.threshold = replay.adapt(self.threshold, float(metrics["loss"]))


class PolicyStep:
    """A step that writes, scores or mixes the texts of a batch before the compiled one runs.

    Attributes:
      compiles: as of the step inside.
    """

    def __init__(
        self, train: TrainStep, prepare: Callable[[TrainState, Any], tuple[TrainState, Any]]
    ) -> None:
        self._train, self._prepare = train, prepare

    @property
    def compiles(self) -> int:
        return self._train.compiles

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return self._train(*self._prepare(state, batch))


def wrap(
    config: DistillConfig,
    train: TrainStep,
    student: Model,
    teacher: distill.Teacher,
    tokenizer: Tokenizer,
    *,
    plan: MeshPlan,
    steps: int,
    texts: Texts | None,
    vocab: int | None = None,
) -> Any:
    """The step of the settings, with what its policy and its scheme do before it.

    Args:
      student, teacher, vocab: as in ``objectives.make``.
      steps: of the run.
      texts: the batches, where the policy is replay.

    Raises:
      ValueError: texts are to be written by several processes.
    """
    writing = config.policy in WRITING
    if writing and jax.process_count() > 1:
        raise ValueError(f"policy={config.policy!r} writes texts, which takes a single process")
    scored = config.scheme == "minillm"
    # Without it every micro-batch would be split at a median of its own.
    shared = config.scheme == "atkd" and config.microbatches > 1
    sizes: dict[str, Any] = {"vocab": vocab, "vocab_chunk": config.vocab_chunk}
    fill = (
        jax.jit(objectives.fills(config, student, tokenizer, sizes))
        if objectives.filled_before(config)
        else None
    )
    if not (writing or scored or shared):
        return train
    write = _policy(config, student, teacher, tokenizer, vocab) if writing else None

    @jax.jit
    def score(params: Params, batch: Any) -> Any:
        mixing = float(config.share or 0.0) if config.policy == "mix_token" else 0.0
        return distill.minillm_scored(student, teacher, params, batch, mixing=mixing, vocab=vocab)

    limit = jax.jit(
        functools.partial(
            distill.with_threshold,
            teacher,
            hard_ratio=0.5 if config.hard_ratio is None else config.hard_ratio,
            shift=student.config.head.kind == "lm",
            **sizes,
        )
    )

    def rewritten(state: TrainState, params: Params, batch: Any) -> tuple[TrainState, Any]:
        batch, real = prompted(batch, config, tokenizer.pad_id)
        if write is None or not real.any():  # nothing to go on with, nothing to learn
            return state, batch
        step = int(state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.rng, _STREAM), step)
        if texts is None:
            batch = write(params, batch, key)
        else:
            held = state.extra[REPLAY]
            batch, held, choice = replay.adaptive(
                write, held, texts.threshold, params, batch, key, step=step, total=steps
            )
            state = state.replace(extra={**state.extra, REPLAY: placed(held, plan)})
            if choice == replay.REPLAY:  # other rows, all of them texts
                real = np.ones_like(real)
        mask = np.asarray(batch["label_mask"]) * real[:, None].astype(np.float32)
        return state, {**batch, "label_mask": mask}

    def prepare(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        params = state.full(average=False)
        if writing:
            state, batch = rewritten(state, params, batch)
        if scored:
            batch = score(params, batch)
        if shared:
            batch = {k: v for k, v in batch.items() if k != "example_index"}
            if fill is not None:
                key = jax.random.fold_in(jax.random.fold_in(state.rng, _STREAM), int(state.step))
                batch = fill(params, batch, key)
            batch = limit(params, batch)
        # In one order: names of another order would be another program.
        return state, {name: np.asarray(batch[name]) for name in sorted(batch)}

    return PolicyStep(train, prepare)


def _policy(
    config: DistillConfig,
    student: Model,
    teacher: distill.Teacher,
    tokenizer: Tokenizer,
    vocab: int | None,
) -> Any:
    temperature = 1.0 if config.sample_temperature is None else config.sample_temperature
    how: dict[str, Any] = {
        "eos_id": tokenizer.stop_ids or None,
        "pad_id": tokenizer.pad_id,
        "settings": Settings(max_new_tokens=config.max_new_tokens or 64, temperature=temperature),
        "vocab": vocab,
    }

    def signed(policy: Any, by_student: bool) -> Any:
        # Half of this divergence is taken on the texts of each.
        halves = config.scheme == "fdistill" and config.divergence == "jsd"
        return distill.written(policy, by_student) if halves else policy

    share = 0.5 if config.share is None else config.share
    if config.policy == "teacher":
        return signed(policies.teacher(teacher, **how), False)
    if config.policy == "mix_token":
        return policies.mix_token(student, teacher, share=share, **how)
    own = signed(policies.student(student, **how), True)
    if config.policy == "mix_request":
        theirs = config.mix_with == "teacher"
        other = policies.teacher(teacher, **how) if theirs else policies.gt()
        return policies.mix_request(own, signed(other, False), share=share)
    return own


def prompted(
    batch: Mapping[str, Any], config: DistillConfig, pad_id: int, prompt_tokens: int | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A batch that can be gone on with, in one shape; and which of its rows are texts, bool [B].

    Rows are padded to ``max_length``, so that a new text has room and one program serves all.
    Of a plain text (lm) the first tokens, ``prompt_tokens`` or what the settings say, become the
    prompt. Rows without a label, as the last
    batch of an epoch has them, stand for another row: their labels do not count afterwards.
    """
    length = config.data.max_length
    ids = _wide(batch["input_ids"], length, pad_id, np.int32)
    there = _wide(batch["attention_mask"], length, 0, np.int32)
    labels = _wide(batch["labels"], length, 0, np.int32)
    mask = _wide(batch["label_mask"], length, 0, np.float32) * (labels >= 0)
    if config.data.task == "lm":
        counts = there.sum(1)
        # At least one token is given, and one is left to be learnt.
        wanted = prompt_tokens or config.prompt_tokens or 1
        given = np.clip(np.minimum(wanted, counts // 2), 1, None)
        mask = mask * (np.arange(length) >= given[:, None])
    mask[:, 0] = 0.0
    real: np.ndarray = np.asarray((mask > 0).any(1))
    if real.any():
        first = int(real.argmax())
        ids, there, labels, mask = (
            np.where(real[:, None], x, x[first]) for x in (ids, there, labels, mask)
        )
    made = {"input_ids": ids, "attention_mask": there, "labels": labels}
    return {**made, "label_mask": mask.astype(np.float32)}, real


def _wide(values: Any, length: int, fill: int, dtype: Any) -> np.ndarray:
    found = np.full((len(values), length), fill, dtype)
    found[:, : np.shape(values)[1]] = values
    return found


def empty(config: DistillConfig, plan: MeshPlan) -> dict[str, Any]:
    """What the state holds beside the parameters: the buffer of the replay policy."""
    if config.policy != "replay":
        return {}
    shape = (config.batch_size, config.data.max_length)
    whole = dict.fromkeys(("input_ids", "attention_mask", "labels"), np.zeros(shape, np.int32))
    rows = {**whole, "label_mask": np.zeros(shape, np.float32)}
    return {REPLAY: placed(replay.buffer(rows, config.capacity or 1000), plan)}


def placed(held: Any, plan: MeshPlan) -> Any:
    """A full copy on every device of the mesh."""
    return jax.tree.map(lambda leaf: jax.device_put(jnp.asarray(leaf), plan.replicated), held)
