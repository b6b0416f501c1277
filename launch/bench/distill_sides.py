"""The two sides of the benchmark of distillation steps; see ``distill_step`` and ``sides``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from steppe.launch.bench import decoders, environment

LABELS, KD, WRITES = "labels", "kd", "on-policy"
OURS = (LABELS, KD, "kd, by tokens", "kid", WRITES)


class _Side:
    """What both sides share: the batches and the turns."""

    def __init__(
        self,
        teacher: str,
        student: str,
        batch: int,
        length: int,
        prompt: int,
        token_chunk: int,
        optimizer: Mapping[str, float],
        seed: int,
    ) -> None:
        """
        Args:
          teacher, student: folders of language models.
          batch, length, prompt, token_chunk, seed: see ``distill_step``.
          optimizer: learning_rate, b1, b2, eps, weight_decay.
        """
        size = json.loads((Path(teacher) / "config.json").read_text("utf-8"))["vocab_size"]
        made = decoders.batches(8, batch, length, size, seed)
        for one in made:
            one["label_mask"][:, :prompt] = 0.0
        self._made, self._chunk, self.optimizer = made, token_chunk, dict(optimizer)
        self._prompt, self._seed = prompt, seed
        self._open(teacher, student)
        self._steps: dict[str, Callable[[Any], Any]] = {}
        self._batches: dict[str, Iterator[Any]] = {}

    def losses(self, method: str, steps: int) -> list[float]:
        """The loss of each of the first steps of a method, nats a labelled token."""
        return [self._wait(self._one(method)) for _ in range(steps)]

    def turn(self, method: str, steps: int) -> float:
        """Takes steps, waits for the last, and returns the seconds."""
        start = time.perf_counter()
        result = None
        for _ in range(steps):
            result = self._one(method)
        self._wait(result)
        return time.perf_counter() - start

    def _one(self, method: str) -> Any:
        if method not in self._steps:
            self._steps[method] = self._build(method)
            self._batches[method] = cycle(self._made)
        return self._steps[method](next(self._batches[method]))

    def _open(self, teacher: str, student: str) -> None:
        raise NotImplementedError

    def _build(self, method: str) -> Callable[[Any], Any]:
        """A step of a method from the beginning: ``batch -> loss, perhaps not computed yet``."""
        raise NotImplementedError

    def _wait(self, loss: Any) -> float:
        raise NotImplementedError


class Steppe(_Side):
    """``train.step.make`` over student and frozen teacher."""

    def _open(self, teacher: str, student: str) -> None:
        from steppe.models import pretrained

        self._teacher = pretrained.load(teacher, head="lm")
        self._student = pretrained.load(student, head="lm")

    def _build(self, method: str) -> Callable[[Any], Any]:
        import jax
        import jax.numpy as jnp
        import optax

        from steppe.train import distill, step

        student, teacher = self._student.model, distill.Teacher(self._teacher.model)
        o = self.optimizer
        tx = optax.adamw(
            o["learning_rate"], o["b1"], o["b2"], o["eps"], weight_decay=o["weight_decay"]
        )
        joint = distill.with_teacher(student, self._teacher)
        given = {"student": self._student.params, "teacher": self._teacher.params}
        # A step gives its state away, and every method begins with the same one.
        given = jax.tree.map(jnp.copy, given)
        state = step.init(
            jax.random.key(self._seed), joint, tx, params=given, trainable=["student/.*"]
        )
        train = step.make(self._objective(method, student, teacher), tx)
        write = self._writing(student) if method == WRITES else None
        key = jax.random.key(self._seed)
        held = [state]

        def one(batch: Any) -> Any:
            if write is not None:
                batch = write(held[0].full(average=False), batch, key)
            held[0], metrics = train(held[0], batch)
            return metrics["loss"]

        return one

    def _objective(self, method: str, student: Any, teacher: Any) -> Any:
        from steppe.train import distill

        if method == LABELS:
            return distill.dwt(student, teacher, alpha_h=1.0, alpha_s=0.0)
        if method == "kd, by tokens":
            return distill.kd(student, teacher, token_chunk=self._chunk)
        if method == "kid":
            fill = distill.imperfect(student, bos_id=0, eos_id=None)
            return distill.kd(student, teacher, kind="reverse_kl", policy=fill)
        return distill.kd(student, teacher, kind="forward_kl" if method == KD else "reverse_kl")

    def _writing(self, student: Any) -> Any:
        from steppe.models.decoding import Settings
        from steppe.train.distill import policies

        # No end token: every answer fills its row, so that the work is the same every time.
        settings = Settings(max_new_tokens=self._made[0]["input_ids"].shape[1], temperature=1.0)
        return policies.student(student, eos_id=None, settings=settings)

    def drawing(self, rounds: int = 3) -> float:
        """Seconds in which the student answers a batch, the median of some rounds."""
        import jax

        write, key = self._writing(self._student.model), jax.random.key(self._seed)
        times = []
        for number in range(rounds + 1):
            start = time.perf_counter()
            write({"student": self._student.params}, self._made[0], key)
            if number:
                times.append(time.perf_counter() - start)
        return float(np.median(times))

    def _wait(self, loss: Any) -> float:
        total, weight = (float(x) for x in loss)
        return total / weight


class Torch(_Side):
    """PyTorch eager: transformers with SDPA attention, and the fused AdamW."""

    def _open(self, teacher: str, student: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(environment.cores())
        self._torch, self._student = torch, student
        self._teacher = self._model(teacher)

    def _model(self, folder: str) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=self._torch.float32
        ).eval()

    def _build(self, method: str) -> Callable[[Any], Any]:
        torch, model, o = self._torch, self._model(self._student), self.optimizer
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=o["learning_rate"],
            betas=(o["b1"], o["b2"]),
            eps=o["eps"],
            weight_decay=o["weight_decay"],
            fused=True,
        )
        functional = torch.nn.functional

        def one(batch: Any) -> Any:
            ids = torch.from_numpy(batch["input_ids"]).long()
            there = torch.from_numpy(batch["attention_mask"]).long()
            learnt = torch.from_numpy(batch["label_mask"])[:, 1:] > 0
            optimizer.zero_grad(set_to_none=True)
            z = model(input_ids=ids, attention_mask=there).logits[:, :-1][learnt]
            if method == LABELS:
                loss = functional.cross_entropy(z, ids[:, 1:][learnt])
            else:
                with torch.no_grad():
                    taught = self._teacher(input_ids=ids, attention_mask=there).logits
                    log_p = torch.log_softmax(taught[:, :-1][learnt], -1)
                log_q = torch.log_softmax(z, -1)
                loss = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return one

    def _wait(self, loss: Any) -> float:
        return float(loss)


def cut(teacher: Path, student: Path, layers: int) -> Path:
    """Writes a student of some of the teacher's layers.

    Raises:
      ValueError: more layers than the teacher has.
    """
    from steppe.models import pretrained, shrink

    loaded = pretrained.load(teacher, head="lm")
    kept = shrink.choose_layers(loaded.model.config.layers, layers)
    made = shrink.keep_layers(loaded.model, loaded.params, kept)
    return pretrained.save(student, made.model, made.params)
