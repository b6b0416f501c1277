"""Settings of generation, one value for all rows of a batch or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import numpy as np

# A number for all rows, or one number for each.
PerRow = float | int | Sequence[float] | Sequence[int] | np.ndarray | jax.Array


class Rows(NamedTuple):
    """:class:`Settings` as arrays [B], the form that compiled programs read.

    ``tail`` is 1 - top_p, subtracted in float64: the mass that top-p may drop.
    """

    temperature: Any
    top_k: Any
    tail: Any
    min_p: Any
    repetition: Any
    presence: Any
    frequency: Any
    max_new: Any
    min_new: Any
    seed: Any


@dataclass(frozen=True)
class Settings:
    """How to generate. Every field is one number, or an array [B] with one for each row.

    One compiled program serves all values, in any mix. The defaults are greedy.

    Attributes:
      max_new_tokens: new tokens at most, the end-of-sequence token included; >= 1.
      min_new_tokens: new tokens before an end-of-sequence token may be chosen; >= 0.
      temperature: divides the logits; 0 = greedy, whatever the sampling settings say; >= 1e-5
        otherwise.
      top_k: sample among the k most probable tokens (and those tied with the last of them);
        0 = all.
      top_p: sample among the most probable tokens that together have at least this
        probability; in (0, 1], 1 = all.
      min_p: sample among tokens at least this probable relative to the best; in [0, 1].
      repetition_penalty: divides positive and multiplies negative logits of the tokens that
        the prompt or the output has already; > 0, 1 = none.
      presence_penalty: subtracted from the logits of tokens that the output has already.
      frequency_penalty: the same for each time that the token occurs in the output.
      seed: of each row, an int in [0, 2**32). The sample of a row with a seed does not depend
        on the other rows nor on its place. None = the place of the row in the batch.
    """

    max_new_tokens: PerRow = 64
    min_new_tokens: PerRow = 0
    temperature: PerRow = 0.0
    top_k: PerRow = 0
    top_p: PerRow = 1.0
    min_p: PerRow = 0.0
    repetition_penalty: PerRow = 1.0
    presence_penalty: PerRow = 0.0
    frequency_penalty: PerRow = 0.0
    seed: PerRow | None = None

    def rows(self, count: int) -> Rows:
        """Checked arrays of ``count`` rows.

        Raises:
          ValueError: a value outside its range, or an array that has not ``count`` entries.
        """
        value = {f.name: self._read(f.name, count) for f in fields(self)}
        _check(value)
        seed = value["seed"]
        return Rows(
            temperature=value["temperature"].astype(np.float32),
            top_k=value["top_k"].astype(np.int32),
            tail=(1.0 - value["top_p"]).astype(np.float32),
            min_p=value["min_p"].astype(np.float32),
            repetition=value["repetition_penalty"].astype(np.float32),
            presence=value["presence_penalty"].astype(np.float32),
            frequency=value["frequency_penalty"].astype(np.float32),
            max_new=value["max_new_tokens"].astype(np.int32),
            min_new=value["min_new_tokens"].astype(np.int32),
            seed=np.arange(count, dtype=np.uint32) if seed is None else seed.astype(np.uint32),
        )

    def _read(self, name: str, count: int) -> Any:
        given = getattr(self, name)
        if given is None:
            if name == "seed":
                return None
            raise ValueError(f"{name} must be a number or one for each row, got None")
        array = np.asarray(given)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{name} must be a number or one for each row, got {given!r}")
        if name in _WHOLE and array.dtype.kind == "f" and not (array == np.floor(array)).all():
            raise ValueError(f"{name} must be a whole number, got {given!r}")
        if array.ndim > 1 or (array.ndim == 1 and len(array) != count):
            raise ValueError(
                f"{name} has shape {array.shape}, the batch {count} rows; give one number, or "
                "one for each row"
            )
        return np.broadcast_to(array.astype(np.float64), (count,))


_WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "seed")
# name -> (test, what must hold)
_RULES: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (lambda x: (x >= 1) & (x < 2**31), "at least 1"),
    "min_new_tokens": (lambda x: (x >= 0) & (x < 2**31), "0 or more"),
    "temperature": (
        lambda x: ((x == 0) | (x >= 1e-5)) & np.isfinite(x),
        "0 (greedy) or at least 1e-5",
    ),
    "top_k": (lambda x: (x >= 0) & (x < 2**31), "0 (all tokens) or above"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "in (0, 1]; 1 keeps all tokens"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "in [0, 1]; 0 keeps all tokens"),
    "repetition_penalty": (lambda x: (x > 0) & np.isfinite(x), "above 0; 1 is no penalty"),
    "presence_penalty": (np.isfinite, "finite"),
    "frequency_penalty": (np.isfinite, "finite"),
    "seed": (lambda x: (x >= 0) & (x < 2**32), "in [0, 2**32)"),
}


def _check(value: dict[str, Any]) -> None:
    for name, (holds, rule) in _RULES.items():
        array = value[name]
        if array is None:
            continue
        bad = np.flatnonzero(~holds(array))
        if len(bad):
            row = int(bad[0])
            where = "" if (array == array[0]).all() else f" in row {row}"
            raise ValueError(f"{name} must be {rule}, got {array[row]:g}{where}")
    if (value["min_new_tokens"] > value["max_new_tokens"]).any():
        row = int((value["min_new_tokens"] > value["max_new_tokens"]).argmax())
        raise ValueError(
            f"min_new_tokens is {value['min_new_tokens'][row]:g}, above max_new_tokens "
            f"{value['max_new_tokens'][row]:g} (row {row}); lower it"
        )
