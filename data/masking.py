"""Masked-language-model corruption (Devlin et al., NAACL 2019, arXiv:1810.04805, section 3.1).

Of the ordinary tokens, a share (15%) is chosen; of these 80% become [MASK], 10% a random
token, 10% stay. The choice is a pure function of (seed, epoch, example index): it is the same
after a resume, on any number of processes, and for any batch size or padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32

from steppe.data.errors import DataError


@dataclass(frozen=True)
class Masking:
    """How to corrupt token ids.

    Attributes:
      mask_id: id of the mask token.
      vocab_size: random tokens are drawn from [0, vocab_size) without the special ones.
      special: ids that are never chosen and never drawn.
      share: probability that a token is chosen.
      replaced, random: of the chosen, the shares that become [MASK] and a random token.
    """

    mask_id: int
    vocab_size: int
    special: tuple[int, ...]
    share: float = 0.15
    replaced: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if self.mask_id < 0:
            raise DataError("the tokenizer has no mask token, so it cannot serve a MaskedLM task")
        if not 0 < self.share < 1:
            raise DataError(f"share must be between 0 and 1, got {self.share}")
        if self.replaced < 0 or self.random < 0 or self.replaced + self.random > 1:
            raise DataError(
                f"replaced and random must be >= 0 and sum to at most 1, "
                f"got {self.replaced} and {self.random}"
            )

    def __call__(
        self, ids: Int32[np.ndarray, " t"], *, seed: int, epoch: int, index: int
    ) -> tuple[Int32[np.ndarray, " t"], Int32[np.ndarray, " t"], Float32[np.ndarray, " t"]]:
        """Corrupts one example.

        At least one ordinary token is always chosen, so that no example is without a target.

        Returns:
          (input ids, labels, label mask): labels are the original ids, the mask is 1 where a
          token was chosen.
        """
        generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence((seed, epoch, index)))
        )
        ordinary = ~np.isin(ids, self.special)
        draw = generator.random(len(ids))
        chosen = ordinary & (draw < self.share)
        if ordinary.any() and not chosen.any():
            chosen[np.argmin(np.where(ordinary, draw, 2.0))] = True
        fate = generator.random(len(ids))
        noise = self._ordinary_ids(generator.random(len(ids)))
        corrupted = np.where(chosen & (fate < self.replaced), np.int32(self.mask_id), ids)
        swapped = chosen & (fate >= self.replaced) & (fate < self.replaced + self.random)
        corrupted = np.where(swapped, noise, corrupted)
        return corrupted.astype(np.int32), ids.astype(np.int32), chosen.astype(np.float32)

    def _ordinary_ids(self, uniform: np.ndarray) -> np.ndarray:
        """Maps uniform numbers in [0, 1) to ids that are not special."""
        holes = np.sort(np.asarray([i for i in set(self.special) if 0 <= i < self.vocab_size]))
        number = (uniform * (self.vocab_size - len(holes))).astype(np.int64)
        # The k-th ordinary id is k plus the number of special ids below it.
        shift = holes - np.arange(len(holes))
        return (number + np.searchsorted(shift, number, side="right")).astype(np.int32)
