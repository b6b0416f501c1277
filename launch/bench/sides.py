"""The two sides of the fine-tuning benchmark: the same AdamW steps in steppe and in PyTorch.

Each opens the same folder, makes the same batches and takes the same hyper-parameters; the
weight decay covers all parameters, the gradient is not clipped, dropout is off. A side runs
in a process of its own (see ``worker``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from steppe.launch.bench import environment, shapes

ADAMW = {"learning_rate": 2e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


class _Side:
    """What both sides share: the batches and the turns."""

    def __init__(
        self,
        directory: str,
        batch: int,
        length: int,
        optimizer: Mapping[str, float] = ADAMW,
        seed: int = 0,
    ) -> None:
        """
        Args:
          directory: the model, as ``shapes.export`` writes it.
          batch, length: shape of a batch; length in tokens.
          optimizer: learning_rate, b1, b2, eps, weight_decay.
        """
        self.optimizer = dict(optimizer)
        vocab_size = json.loads((Path(directory) / "config.json").read_text("utf-8"))["vocab_size"]
        made = self._data(batch, length, vocab_size, seed)
        self._batches: Iterator[dict[str, Any]] = cycle(made)
        self._build(directory)

    def losses(self, steps: int) -> list[float]:
        """Takes steps and returns the loss of each, before its update, in nats."""
        return [float(self._wait(self._step(next(self._batches)))) for _ in range(steps)]

    def turn(self, steps: int) -> float:
        """Takes steps, waits for the last, and returns the seconds."""
        start = time.perf_counter()
        result = None
        for _ in range(steps):
            result = self._step(next(self._batches))
        self._wait(result)
        return time.perf_counter() - start

    def peak_memory(self) -> int:
        """Largest resident memory of this process, bytes."""
        return environment.peak_memory()

    def _data(
        self, batch: int, length: int, vocab_size: int, seed: int
    ) -> list[dict[str, np.ndarray]]:
        return shapes.batches(20, batch, length, vocab_size, seed)

    def _build(self, directory: str) -> None:
        raise NotImplementedError

    def _step(self, batch: dict[str, Any]) -> Any:
        """One step; returns the loss, perhaps before it is computed."""
        raise NotImplementedError

    def _wait(self, loss: Any) -> float:
        raise NotImplementedError


class Steppe(_Side):
    """``train.step.make`` over ``models.pretrained``."""

    kind = "classification"

    def _build(self, directory: str) -> None:
        import jax
        import optax

        from steppe.models import pretrained
        from steppe.train import step
        from steppe.train.objectives import basic

        loaded = pretrained.load(directory)
        o = self.optimizer
        tx = optax.adamw(
            o["learning_rate"], o["b1"], o["b2"], o["eps"], weight_decay=o["weight_decay"]
        )
        objective = basic.for_task(loaded.model, self.kind)
        self._train = step.make(objective, tx)
        self._state = step.init(jax.random.key(0), loaded.model, tx, params=loaded.params)

    def _step(self, batch: dict[str, Any]) -> Any:
        self._state, metrics = self._train(self._state, batch)
        return metrics["loss"]

    def _wait(self, loss: Any) -> float:
        total, weight = (float(x) for x in loss)
        return total / weight

    def compile(self) -> float:
        """Seconds to trace and compile the step for one shape of batch; runs nothing.

        Timed by itself, because a difference of step times is as noisy as the steps are, and
        grows with them.
        """
        batch = next(self._batches)
        start = time.perf_counter()
        self._train.lower(self._state, batch).compile()
        return time.perf_counter() - start

    def compiles(self) -> int:
        """Programs compiled so far."""
        return self._train.compiles


class Torch(_Side):
    """PyTorch eager: transformers with SDPA attention, and the fused AdamW."""

    architecture = "AutoModelForSequenceClassification"

    def _build(self, directory: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(environment.cores())
        self._torch = torch
        # Not .train(): dropout is off, and there is nothing else that the mode changes.
        self._model = (
            getattr(transformers, self.architecture)
            .from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
            .eval()
        )
        self._optimize(self._model.parameters())

    def _optimize(self, parameters: Iterable[Any]) -> None:
        o = self.optimizer
        self._optimizer = self._torch.optim.AdamW(
            parameters,
            lr=o["learning_rate"],
            betas=(o["b1"], o["b2"]),
            eps=o["eps"],
            weight_decay=o["weight_decay"],
            fused=True,  # the fastest that there is, and the default of transformers' Trainer
        )

    def _step(self, batch: dict[str, Any]) -> Any:
        tensors = {
            name: self._torch.from_numpy(value).long()
            for name, value in batch.items()
            if name != "label_mask"
        }
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(**tensors).loss
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _wait(self, loss: Any) -> float:
        return float(loss)


SIDES = {"steppe": f"{__name__}:Steppe", "torch": f"{__name__}:Torch"}
