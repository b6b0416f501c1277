"""Adapters: from a generator's output to what stands in place of a teacher's embeddings.

  "linear"      LayerNorm(h W + b) * s, W in R^{d_G x d_M}; s starts at the scale of the teacher's
                embeddings
  "soft_embed"  softmax(l / tau) E with l in R^V the logits and E the teacher's embedding table:
                inputs stay convex combinations of real tokens
  "gumbel"      the token of the largest l + Gumbel noise, straight through: its row of E
                forwards, the softmax of the noisy l / tau backwards
  None          h itself, where d_G = d_M

The last two choose among V words, and on a small teacher that costs more than the teacher. With
``candidates=S`` every text has S words of its own to choose from, drawn anew each time: one from
each of S stretches of the vocabulary, as nearly equal as can be, so that none comes twice and
frequent and rare ones (a vocabulary's order) come in equal parts. It is S/V of that work (a
language model's own logits are still made for all V), and a generator cannot say one word for
ever. To "gumbel" the table is a constant.

Zhu et al., EMNLP 2023 (arXiv 2310.13315): the adapter of the paper is not public, these are ours,
``candidates`` too. Jang et al., ICLR 2017 for the Gumbel form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.layout import rows as by_rows
from steppe.models.masks import uniform
from steppe.models.model import Batch, Model
from steppe.models.tree import Params
from steppe.models.vision import VisionConfig

Kind = Literal["linear", "soft_embed", "gumbel"]
# Those that choose words of the teacher's vocabulary.
WORDS = ("soft_embed", "gumbel")
KINDS = ("linear", *WORDS, None)
TABLE = "embed/word/table"
EPSILON = 1e-6


class Synthetic(NamedTuple):
    """Inputs of a model.

    Attributes:
      batch: what ``Model.apply`` takes as batch.
      embeds: [B, T, D] in place of the look-up, or None.
    """

    batch: Batch
    embeds: jax.Array | None


class Adapter(NamedTuple):
    """See the module.

    Attributes:
      init: ``(key) -> {"adapter": ...}``, or {} where nothing is learned.
      apply: ``(y, h [B, T, d_G], logits [B, T, V] or None, teacher's parameters, key)``.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, jax.Array, jax.Array | None, Params, jax.Array], Synthetic]


def adapter(
    teacher: Model,
    kind: Kind | None,
    width: int,
    *,
    rows: int,
    length: int,
    tau: float = 1.0,
    ends: tuple[int, int] | None = None,
    candidates: int = 0,
    own_logits: bool = False,
) -> Adapter:
    """The adapter ``kind`` of a generator of ``width`` for ``teacher``.

    Args:
      rows, length: B and T.
      tau: temperature of "soft_embed" and "gumbel".
      ends: ids that stand first and last in every text.
      candidates: of those two, words that a text chooses from, at least 2; 0 = all.
      own_logits: the generator has logits over the teacher's vocabulary itself.

    Raises:
      ValueError: an unknown kind, sizes that do not fit the teacher, tau <= 0, candidates that are
        neither 0 nor in 2..V, or of an adapter that does not choose words.
    """
    if kind not in KINDS:
        raise ValueError(f"adapter must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if not (isinstance(tau, int | float) and 0 < tau < math.inf):
        raise ValueError(f"tau must be a finite number > 0, got {tau!r}")
    fits(teacher, rows, length)
    target = teacher.config.width
    words = kind in WORDS
    if kind is None and width != target:
        raise ValueError(
            f"the generator is {width} wide and the teacher's embeddings {target}: choose an "
            "adapter ('linear' or 'soft_embed'), or make them equal"
        )
    if words or ends is not None:
        vocabulary(teacher)
    _candidates(candidates, words, teacher)

    def init(key: jax.Array) -> Params:
        if kind is None or own_logits:
            return {}
        if words:
            return {"adapter": {"kernel": normal_kernel(key, width, vocabulary(teacher))}}
        # What the gain is multiplied by is the teacher's own scale, so that 1 is in its domain.
        gain = {"scale": jnp.ones(target), "bias": jnp.zeros(target)}
        kernel = normal_kernel(key, width, target)
        return {"adapter": {"kernel": kernel, "bias": jnp.zeros(target), "norm": gain}}

    def apply(
        y: Params, h: jax.Array, logits: jax.Array | None, params: Params, key: jax.Array
    ) -> Synthetic:
        own = y.get("adapter", {})
        if words:
            vocab = tree.get(params, TABLE)
            z, table = _choices(h, own.get("kernel"), logits, vocab, candidates, key)
            embeds = _mixed(z / tau, table) if kind == "soft_embed" else _drawn(z, table, tau, key)
        elif kind == "linear":
            x = standard(h @ own["kernel"] + own["bias"])
            x = x * own["norm"]["scale"] + own["norm"]["bias"]
            embeds = x * _scale(params).astype(x.dtype)
        else:
            embeds = h
        if isinstance(teacher.config, VisionConfig):
            return Synthetic({}, embeds)
        if ends is not None:
            rows_of = tree.get(params, TABLE)
            for place, token in zip((0, -1), ends, strict=True):
                embeds = embeds.at[:, place].set(rows_of[token].astype(embeds.dtype))
        return Synthetic(ones(rows, length), embeds)

    return Adapter(init, apply)


# Words ---------------------------------------------------------------------------------------


def pools(key: jax.Array, rows: int, count: int, size: int) -> Array:
    """[rows, count] ids of 0..size-1, drawn from ``count`` <= ``size`` stretches, one from each.

    None is there twice in a row; each is with a probability of one over its stretch's length,
    which is size / count rounded down or up.
    """
    edges = np.arange(count + 1) * size // count
    return jax.random.randint(key, (rows, count), edges[:-1], edges[1:])


def _choices(
    h: jax.Array,
    kernel: jax.Array | None,
    logits: jax.Array | None,
    table: jax.Array,
    candidates: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, S], float32, and the rows [V, D] or [B, S, D] that they choose from.

    The logits are ``h @ kernel`` where they are not given.
    """
    ids = None
    if candidates:
        ids = by_rows(pools(jax.random.fold_in(key, 1), h.shape[0], candidates, table.shape[0]))
        table = table[ids]
    if logits is None:
        assert kernel is not None
        if ids is None:
            logits = h @ kernel
        else:
            logits = jnp.einsum("btd,dbs->bts", h, jnp.take(kernel, ids, axis=1))
    elif ids is not None:
        logits = jnp.take_along_axis(logits, ids[:, None], axis=-1)
    return logits.astype(jnp.float32), table


def _mixed(z: jax.Array, table: jax.Array) -> jax.Array:
    """softmax(z) E."""
    share = jax.nn.softmax(z, axis=-1).astype(table.dtype)
    return jnp.einsum("bts,sd->btd" if table.ndim == 2 else "bts,bsd->btd", share, table)


def _drawn(z: jax.Array, table: jax.Array, tau: float, key: jax.Array) -> jax.Array:
    """The row of the largest noisy logit; the gradient is that of the softmax, of z alone."""
    # A constant: else the gradient of a mixture would be made for rows that nobody trains.
    table = jax.lax.stop_gradient(table)
    noisy = z - jnp.log(-jnp.log(uniform(key, z.shape)))

    @jax.custom_jvp
    def straight(noisy: jax.Array) -> jax.Array:
        best = jnp.argmax(noisy, axis=-1)
        if table.ndim == 2:
            return table[best]
        return jnp.take_along_axis(table, best[..., None], axis=1)

    @straight.defjvp
    def along(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        # The mixture itself is not used, so that a compiled program does not make it.
        _, tangent = jax.jvp(lambda z: _mixed(z / tau, table), primals, tangents)
        return straight(*primals), tangent

    return straight(noisy)


# Checks and small things ---------------------------------------------------------------------


def fits(teacher: Model, rows: int, length: int) -> None:
    """Raises ValueError where a teacher cannot read ``rows`` texts of ``length``."""
    positive(rows, "rows")
    positive(length, "length")
    config = teacher.config
    if not isinstance(config, EncoderConfig | DecoderConfig | VisionConfig):
        raise ValueError(
            "a generator feeds encoders, decoders and vision models, got a teacher of "
            f"{type(config).__name__}"
        )
    if isinstance(config, VisionConfig):
        if math.isqrt(length) ** 2 != length:
            raise ValueError(f"length must be a square number of patches, got {length}")
    elif length > config.max_length:
        raise ValueError(f"length must be <= {config.max_length}, the positions, got {length}")


def vocabulary(teacher: Model) -> int:
    """V.

    Raises:
      ValueError: a teacher without a word table.
    """
    size = getattr(teacher.config, "vocab_size", None)
    if size is None or TABLE not in tree.paths(teacher.abstract()):
        raise ValueError(
            f"the teacher has no word table at {TABLE!r}: use adapter='linear' and no ends"
        )
    return int(size)


def _candidates(count: Any, words: bool, teacher: Model) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"candidates must be a whole number >= 0, got {count!r}")
    if count and not words:
        raise ValueError(
            "candidates must be 0 where the adapter chooses no words, as 'soft_embed' and "
            f"'gumbel' do, got {count}"
        )
    if count and not 2 <= count <= vocabulary(teacher):
        raise ValueError(
            f"candidates must be 0, or from 2 to the {vocabulary(teacher)} words of the model's "
            f"vocabulary, got {count}"
        )


def ones(rows: int, length: int) -> Batch:
    """A batch in which every position is visible."""
    return {"attention_mask": jnp.ones((rows, length), jnp.int32)}


def normal_kernel(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """[inputs, outputs], normal of variance 1 / inputs."""
    return jax.random.normal(key, (inputs, outputs)) / math.sqrt(inputs)


def standard(x: Float[Array, "*n"], axis: int | tuple[int, ...] = -1) -> Float[Array, "*n"]:
    """Mean 0 and variance 1 over ``axis``, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis, keepdims=True) + EPSILON)
    return wide.astype(x.dtype)


def rms(table: jax.Array) -> jax.Array:
    """Root mean square, a constant."""
    wide = jax.lax.stop_gradient(table.astype(jnp.float32))
    return jnp.sqrt(jnp.square(wide).mean()).astype(table.dtype)


def positive(value: Any, name: str) -> None:
    """Raises ValueError for what is no whole number >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def _scale(params: Params) -> jax.Array:
    """Of the teacher's word embeddings; 1 for one without a table."""
    flat = tree.flatten(params)
    return rms(flat[TABLE]) if TABLE in flat else jnp.float32(1)
