"""The two sides of the language-model training benchmark; see ``sides``."""

from __future__ import annotations

import numpy as np

from steppe.launch.bench import decoders, sides


class _Rows:
    """Full rows of random tokens; the loss is over all of them but the first."""

    def _data(
        self, batch: int, length: int, vocab_size: int, seed: int
    ) -> list[dict[str, np.ndarray]]:
        return decoders.batches(20, batch, length, vocab_size, seed)


class Steppe(_Rows, sides.Steppe):
    """``train.step.make`` on the causal objective."""

    kind = "lm"


class Torch(_Rows, sides.Torch):
    """PyTorch eager, the model's own loss."""

    architecture = "AutoModelForCausalLM"


SIDES = {"steppe": f"{__name__}:Steppe", "torch": f"{__name__}:Torch"}
