"""Rotary position embeddings and the ways to stretch them to longer texts.

With d the (even) number of dimensions that turn, j = 0..d/2-1, position m and base b:

  theta_j = b^(-2j/d);    pair j of a query or key is turned by the angle m * theta_j

so that a score depends on the distance m - n alone (Su et al. 2021, arXiv 2104.09864).

  adjusted base frequency (ABF)   a larger b, positions untouched (Xiong et al. 2023, 2309.16039)
  linear                          position interpolation, m -> m / factor (Chen et al. 2023,
                                  2306.15595)
  llama3                          long waves interpolated, short ones not, a ramp between
                                  (Grattafiori et al. 2024, 2407.21783)
  yarn                            the same by number of turns, and scores sharpened (Peng et al.
                                  2023, 2309.00071)
  xPos                            query pair j times zeta_j^(m/s), key pair times zeta_j^(-n/s),
                                  zeta_j = (2j/d + gamma) / (1 + gamma) (Sun et al. 2022,
                                  2212.10554)

Angles are computed in float32 whatever the model's dtype: bf16 has no room for m past 256.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Layout = Literal["half", "interleaved"]
LAYOUTS = ("half", "interleaved")
SCALINGS = ("none", "linear", "llama3", "yarn")
GAMMA, SPREAD = 0.4, 512.0

C = TypeVar("C")


@dataclass(frozen=True)
class Rotary:
    """Settings of a rotary embedding.

    Attributes:
      base: b above; 500,000 instead of 10,000 is ABF.
      scaling: "none", "linear", "llama3" or "yarn".
      factor: by how much the scaling stretches the context.
      original: length in tokens that the model was first trained at (llama3, yarn).
      low, high: llama3: waves longer than original / low are interpolated in full, those shorter
        than original / high not at all.
      fast, slow: yarn: pairs that turn more often than ``fast`` times within ``original`` tokens
        are left alone, those that turn less often than ``slow`` times interpolated in full.
      sharpen: yarn: factor on queries and keys; None = 0.1 ln(factor) + 1.
      fraction: share of a head's dimensions that turn, the first ones.
      xpos: whether xPos's decay is applied.
      layout: a pair is (j, j + d/2), "half", as in Hugging Face's files, or (2j, 2j + 1),
        "interleaved"; the two differ by a permutation of the query and key matrices.
    """

    base: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    original: int = 8192
    low: float = 1.0
    high: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    sharpen: float | None = None
    fraction: float = 1.0
    xpos: bool = False
    layout: Layout = "half"

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(
                f"rotary scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.base <= 1 or self.factor <= 0 or not 0 < self.fraction <= 1:
            raise ValueError(
                "a rotary embedding needs base > 1, factor > 0 and 0 < fraction <= 1, got "
                f"{self.base}, {self.factor} and {self.fraction}"
            )
        if self.scaling == "llama3" and self.low >= self.high:
            raise ValueError(f"llama3 scaling needs low < high, got {self.low} and {self.high}")

    def freqs(self, head_dim: int) -> np.ndarray:
        """Angle of each pair per position after scaling, (d/2,) float32."""
        d = int(head_dim * self.fraction)
        theta = _freqs(d, self.base)
        if self.scaling == "linear":
            theta = theta / self.factor
        elif self.scaling == "llama3":
            turns = self.original * theta / (2 * math.pi)
            kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
            theta = theta * (kept + (1 - kept) / self.factor)
        elif self.scaling == "yarn":
            # Index of the pair that turns n times within the original length; rounded outwards.
            def pair(n: float) -> float:
                return d * math.log(self.original / (n * 2 * math.pi)) / (2 * math.log(self.base))

            first = max(math.floor(pair(self.fast)), 0)
            last = min(math.ceil(pair(self.slow)), d - 1)
            ramp = (np.arange(d // 2) - first) / max(last - first, 1e-3)
            kept = 1 - np.clip(ramp, 0, 1)
            theta = theta * (kept + (1 - kept) / self.factor)
        return theta.astype(np.float32)

    @property
    def gain(self) -> float:
        """What queries and keys are multiplied by."""
        if self.scaling != "yarn":
            return 1.0
        if self.sharpen is not None:
            return self.sharpen
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def turn(self, positions: jax.Array, head_dim: int, centre: int = 0) -> Turn:
        """What turns queries and keys at ``positions`` [B, T] or [T].

        ``centre`` is the position at which xPos has factor 1: only m - n matters for scores, and
        powers stay in range half as far again on either side of the middle of the context.
        """
        cos, sin = tables(positions, self.freqs(head_dim))
        cos, sin = cos * self.gain, sin * self.gain
        if not self.xpos:
            return Turn((cos, sin), (cos, sin))
        zeta = xpos_scale(jnp.asarray(positions) - centre, int(head_dim * self.fraction))
        zeta = zeta[..., None, :]
        return Turn((cos * zeta, sin * zeta), (cos / zeta, sin / zeta))


class Turn(NamedTuple):
    """Cosines and sines [.., T, 1, d/2] for queries and for keys; they differ under xPos."""

    queries: tuple[jax.Array, jax.Array]
    keys: tuple[jax.Array, jax.Array]


def _freqs(d: int, base: float) -> np.ndarray:
    if d < 2 or d % 2:
        raise ValueError(f"rotary embeddings turn pairs: d must be even and >= 2, got {d}")
    return base ** (-np.arange(0, d, 2, dtype=np.float64) / d)


def rope_freqs(d: int, base: float = 10_000.0) -> np.ndarray:
    """theta_j = base^(-2j/d), (d/2,) float32, in radians per position.

    Raises:
      ValueError: d is odd or below 2.
    """
    return _freqs(d, base).astype(np.float32)


def tables(
    positions: jax.Array, freqs: jax.Array | np.ndarray, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of ``scale * m * theta_j``, float32, with an axis of 1 for the heads.

    positions [.., T] -> two of [.., T, 1, d/2].
    """
    angles = jnp.asarray(positions, jnp.float32)[..., None] * scale
    angles = (angles * jnp.asarray(freqs, jnp.float32))[..., None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array], layout: str = "half") -> jax.Array:
    """Turns the pairs of x [B, T, H, Dh] by ``tables``; dimensions past d are left alone."""
    cos, sin = turn
    pairs = cos.shape[-1]
    y = x.astype(jnp.float32)
    if layout == "half":
        a, b = y[..., :pairs], y[..., pairs : 2 * pairs]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = y[..., 0 : 2 * pairs : 2], y[..., 1 : 2 * pairs : 2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
        out = out.reshape(*y.shape[:-1], 2 * pairs)
    if 2 * pairs < x.shape[-1]:
        out = jnp.concatenate([out, y[..., 2 * pairs :]], -1)
    return out.astype(x.dtype)


def apply_rotary(
    x: jax.Array,
    positions: jax.Array,
    freqs: jax.Array | np.ndarray,
    *,
    scale: float = 1.0,
    layout: Layout = "half",
) -> jax.Array:
    """Queries or keys with every pair turned by ``scale * position * freqs``.

    Args:
      x: [B, T, H, Dh].
      positions: [B, T] or [T].
      freqs: (d/2,) with d <= Dh, see :func:`rope_freqs`; the dimensions past d are left alone.
      scale: of the positions; 1/4 interpolates to four times the length.
      layout: "half" or "interleaved", see :class:`Rotary`.

    Raises:
      ValueError: more frequencies than pairs, or an unknown layout.
    """
    if 2 * len(freqs) > x.shape[-1]:
        raise ValueError(f"{len(freqs)} frequencies are more than the pairs of {x.shape[-1]} dims")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return rotate(x, tables(positions, freqs, scale), layout)


def xpos_scale(positions: jax.Array, d: int, gamma: float = GAMMA, s: float = SPREAD) -> jax.Array:
    """xPos's factor zeta_j^(m/s) on query pairs; keys are divided by it. [.., T] -> [.., T, d/2].

    Raises:
      ValueError: d is odd, or gamma or s is not positive.
    """
    if d % 2 or gamma <= 0 or s <= 0:
        raise ValueError(f"xPos needs an even d, gamma > 0 and s > 0, got {d}, {gamma}, {s}")
    zeta = (np.arange(0, d, 2) / d + gamma) / (1 + gamma)
    power = jnp.asarray(positions, jnp.float32)[..., None] / s
    return jnp.exp(power * jnp.asarray(np.log(zeta), jnp.float32))


def extend_context(config: C, *, max_len: int, base: float = 500_000.0) -> C:
    """The configuration for texts of ``max_len`` tokens by adjusted base frequency.

    Parameters stay as they are; the model needs further training at the new length, and reads
    short texts slightly worse until it had that.

    Args:
      config: of a decoder with rotary embeddings. Layers that look through a window keep their
        base where they have one of their own.
      max_len: new ``max_length``, at least the present one.
      base: new base.

    Raises:
      ValueError: no rotary embedding, positions that are scaled already, or a shorter length.
    """
    rotary: Rotary | None = getattr(config, "rotary", None)
    if rotary is None:
        raise ValueError("extend_context needs a model with rotary embeddings")
    if rotary.scaling != "none":
        raise ValueError(
            f"the positions are scaled already ({rotary.scaling}); change the base or scale the "
            "positions, not both"
        )
    present = config.max_length  # type: ignore[attr-defined]
    if max_len < present:
        raise ValueError(f"max_len must be at least the present {present}, got {max_len}")
    changed: Any = dataclasses.replace(
        config,  # type: ignore[type-var]
        positions=max_len,
        rotary=dataclasses.replace(rotary, base=base),
    )
    return changed
