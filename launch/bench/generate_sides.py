"""The sides of the generation benchmark: the same greedy tokens in steppe and in PyTorch.

Each opens the same folder and goes on with the same prompts by the same number of tokens; no
token ends a text. A side runs in a process of its own (see ``worker``).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from steppe.launch.bench import decoders, environment


class _Side:
    """What the sides share: the prompts and the turns."""

    def __init__(self, directory: str, batch: int, prompt: int, more: int, seed: int = 0) -> None:
        """
        Args:
          directory: the model, as ``decoders.export`` writes it.
          batch, prompt: rows, and tokens of each prompt.
          more: new tokens of each row.
        """
        raw = json.loads((Path(directory) / "config.json").read_text("utf-8"))
        made = decoders.batches(1, batch, prompt, raw["vocab_size"], seed)[0]
        self._ids, self._more = made["input_ids"], more
        self._build(directory)

    def tokens(self, more: int) -> list[list[int]]:
        """The first ``more`` new tokens of every row."""
        return self._generate(self._ids, more)

    def turn(self, steps: int) -> float:
        """Generates so many times and returns the seconds."""
        start = time.perf_counter()
        for _ in range(steps):
            self._generate(self._ids, self._more)
        return time.perf_counter() - start

    def peak_memory(self) -> int:
        """Largest resident memory of this process, bytes."""
        return environment.peak_memory()

    def _build(self, directory: str) -> None:
        raise NotImplementedError

    def _generate(self, ids: np.ndarray, more: int) -> list[list[int]]:
        raise NotImplementedError


class Steppe(_Side):
    """``models.decoding.generate``."""

    def _build(self, directory: str) -> None:
        from steppe.models import decoding, pretrained

        loaded = pretrained.load(directory)
        self._params, self._settings = loaded.params, decoding.Settings
        self._run = decoding.make(loaded.model)

    def _generate(self, ids: np.ndarray, more: int) -> list[list[int]]:
        settings = self._settings(max_new_tokens=more)
        made = self._run(self._params, {"input_ids": ids}, settings)
        return [row.tolist() for row in made.tokens]

    def compiles(self) -> int:
        """Programs compiled so far."""
        return self._run.compiles

    def other_lengths(self, lengths: list[int]) -> int:
        """Programs that prompts of these lengths compile beyond those that are there."""
        before = self._run.compiles
        for length in lengths:
            self._generate(self._ids[:, -length:], self._more)
        return self._run.compiles - before


class Torch(_Side):
    """transformers' generate in PyTorch eager, with its dynamic cache."""

    cache: str | None = None

    def _build(self, directory: str) -> None:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(environment.cores())
        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="sdpa", dtype=torch.float32
        ).eval()
        # Whatever the folder says: no token ends a text, and nothing is sampled.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, cache_implementation=self.cache
        )

    def _generate(self, ids: np.ndarray, more: int) -> list[list[int]]:
        given = self._torch.from_numpy(ids).long()
        with self._torch.inference_mode():
            out = self._model.generate(
                input_ids=given,
                attention_mask=self._torch.ones_like(given),
                max_new_tokens=more,
                min_new_tokens=more,
            )
        return out[:, ids.shape[1] :].tolist()


class TorchStatic(Torch):
    """The same with a static cache, which transformers runs compiled where it can."""

    cache = "static"

    def _build(self, directory: str) -> None:
        super()._build(directory)
        self._model.forward = self._torch.compile(self._model.forward)


SIDES = {
    "steppe": f"{__name__}:Steppe",
    "torch": f"{__name__}:Torch",
    "torch-static": f"{__name__}:TorchStatic",
}
