"""Generators of inputs for a teacher: from noise to what stands in place of its embeddings.

  body       h = G_y(z), [B, T, d_G]: a learned network on noise, or a language model that reads
             noise; its output representations, never sampled tokens, so that gradients flow
  adapter    from h to the teacher's embeddings: "linear", "soft_embed", "gumbel" or None, see
             ``adapters``

A vision teacher is fed with patch embeddings (the adapter "linear"), or with whole images by
:func:`pixels` and :func:`leaves`. The teacher adds its positions itself; the attention mask is all
ones.

A generator is two functions: ``init(key) -> y`` and ``apply(y, teacher's parameters, key) ->
Synthetic``. Everything random comes from the key.

Zhu et al., EMNLP 2023 (arXiv 2310.13315): which network the paper's noise goes through first is
not public; these are ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models import tree
from steppe.models.layout import rows as by_rows
from steppe.models.model import Batch, Model, ModelOut, Rules
from steppe.models.tree import Params
from steppe.models.vision import VisionConfig
from steppe.train.quantize import adapters
from steppe.train.quantize.adapters import TABLE, Kind, Synthetic, normal_kernel, positive
from steppe.train.quantize.scenes import check_layers, dead_leaves

__all__ = [
    "Generator",
    "Synthetic",
    "batches",
    "decoder",
    "feeding",
    "information",
    "leaves",
    "noise",
    "pixels",
    "random_tokens",
]


@dataclass(frozen=True)
class Generator:
    """See the module.

    Attributes:
      init: ``(key) -> y``, float32; empty for one that has nothing to learn.
      apply: ``(y, teacher's parameters, key) -> Synthetic``.
      axes: sharding rules of y.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[[Params, Params, jax.Array], Synthetic]
    axes: Rules = ((r".*", ()),)


def noise(
    teacher: Model,
    *,
    rows: int,
    length: int,
    adapter: Kind | None = "soft_embed",
    width: int = 128,
    noise_width: int = 32,
    hidden: int = 256,
    tau: float = 1.0,
    ends: tuple[int, int] | None = None,
    candidates: int = 0,
) -> Generator:
    """A learned noise-to-embedding network.

      h_t = W_2 gelu(W_z z + W_n n_t + p_t + b_1) + b_2,   z, n_t ~ N(0, 1), p_t learned

    Args:
      teacher: the model whose inputs are made.
      rows, length: B and T of what is made; T patches (a square) of a vision teacher.
      adapter: see ``adapters``; None needs width = d_M.
      width: d_G.
      noise_width, hidden: of z and n_t, and of the hidden layer.
      tau: temperature of "soft_embed" and "gumbel".
      ends: ids of the tokens that begin and end every text of the teacher ([CLS], [SEP]), which
        then stand there.
      candidates: words that a text may choose from, drawn anew each time, of "soft_embed" and
        "gumbel"; 0 = the whole vocabulary.

    Raises:
      ValueError: a size below 1, tau <= 0, an unknown adapter, one that the teacher cannot take,
        a width that does not fit without one, or candidates that do not.
    """
    for name, value in (("width", width), ("noise_width", noise_width), ("hidden", hidden)):
        positive(value, name)
    adapt = adapters.adapter(
        teacher,
        adapter,
        width,
        rows=rows,
        length=length,
        tau=tau,
        ends=ends,
        candidates=candidates,
    )

    def init(key: jax.Array) -> Params:
        a, b, c, d, e = jax.random.split(key, 5)
        return {
            "body": {
                "global": normal_kernel(a, noise_width, hidden),
                "token": normal_kernel(b, noise_width, hidden),
                "position": jax.random.normal(c, (length, hidden)),
                "hidden": {"bias": jnp.zeros(hidden)},
                "out": {"kernel": normal_kernel(d, hidden, width), "bias": jnp.zeros(width)},
            },
            **adapt.init(e),
        }

    def apply(y: Params, params: Params, key: jax.Array) -> Synthetic:
        a, b, c = jax.random.split(key, 3)
        body = y["body"]
        dtype = body["global"].dtype
        z = by_rows(jax.random.normal(a, (rows, 1, noise_width), dtype))
        n = by_rows(jax.random.normal(b, (rows, length, noise_width), dtype))
        x = z @ body["global"] + n @ body["token"] + body["position"] + body["hidden"]["bias"]
        h = jax.nn.gelu(x) @ body["out"]["kernel"] + body["out"]["bias"]
        return adapt.apply(y, h, None, params, c)

    return Generator(init, apply)


def decoder(
    teacher: Model,
    lm: Model,
    *,
    rows: int,
    length: int,
    adapter: Kind | None = "linear",
    reads: Literal["tokens", "normal"] = "tokens",
    tau: float = 1.0,
    ends: tuple[int, int] | None = None,
    candidates: int = 0,
) -> Generator:
    """An autoregressive language model that reads noise; h are its last hidden states.

    What it reads does not depend on what it says: h_t sees the noise up to t, in one pass.

    Args:
      teacher, rows, length, adapter, tau, ends, candidates: see :func:`noise`. "soft_embed" and
        "gumbel" take the logits of ``lm``, whose vocabulary must be the teacher's.
      lm: a decoder; y holds its parameters below ``body``: replace those of ``init`` by
        pretrained ones.
      reads: "tokens" = the embeddings of ids drawn at random, which a pretrained model knows, or
        "normal" = normal noise of the same scale.

    Raises:
      ValueError: as :func:`noise`; a vocabulary that differs; rows that are too long for ``lm``.
    """
    if reads not in ("tokens", "normal"):
        raise ValueError(f"reads must be 'tokens' or 'normal', got {reads!r}")
    if length > lm.config.max_length:
        raise ValueError(f"length must be <= {lm.config.max_length}, lm's positions, got {length}")
    soft = adapter in adapters.WORDS
    if soft and (lm.config.head is None or lm.config.vocab_size != adapters.vocabulary(teacher)):
        raise ValueError(
            f"adapter {adapter!r} needs an lm with a language-model head over the teacher's "
            f"{adapters.vocabulary(teacher)} tokens, got {lm.config.vocab_size}: use "
            "adapter='linear'"
        )
    adapt = adapters.adapter(
        teacher,
        adapter,
        lm.config.width,
        rows=rows,
        length=length,
        tau=tau,
        ends=ends,
        candidates=candidates,
        own_logits=soft,
    )

    def init(key: jax.Array) -> Params:
        a, b = jax.random.split(key)
        return {"body": lm.init(a), **adapt.init(b)}

    def apply(y: Params, params: Params, key: jax.Array) -> Synthetic:
        a, b = jax.random.split(key)
        table = y["body"]["embed"]["word"]["table"]
        if reads == "tokens":
            read = table[jax.random.randint(a, (rows, length), 0, len(table))]
        else:
            read = jax.random.normal(a, (rows, length, table.shape[1]), table.dtype) * adapters.rms(
                table
            )
        out = lm.apply(y["body"], {}, embeds=by_rows(read))
        return adapt.apply(y, out.hidden, out.logits if soft else None, params, b)

    axes = tuple((rf"body/(?:{pattern})", dims) for pattern, dims in lm.axes)
    return Generator(init, apply, (*axes, (r".*", ())))


def random_tokens(
    teacher: Model, *, rows: int, length: int, ends: tuple[int, int] | None = None, first: int = 0
) -> Generator:
    """Tokens drawn at random from ``first`` on: nothing to learn, the baseline of a game.

    Raises:
      ValueError: a teacher without tokens, sizes that do not fit.
    """
    vocabulary = adapters.vocabulary(teacher)
    adapters.fits(teacher, rows, length)
    if not 0 <= first < vocabulary:
        raise ValueError(f"first must lie in 0..{vocabulary - 1}, got {first}")

    def apply(y: Params, params: Params, key: jax.Array) -> Synthetic:
        ids = by_rows(jax.random.randint(key, (rows, length), first, vocabulary))
        if ends is not None:
            ids = ids.at[:, 0].set(ends[0]).at[:, -1].set(ends[1])
        table = tree.get(params, TABLE)
        return Synthetic(adapters.ones(rows, length), table[ids])

    return Generator(lambda key: {}, apply)


def pixels(
    teacher: Model,
    *,
    rows: int,
    size: int | None = None,
    noise_width: int = 64,
    hidden: int = 256,
    scenes: bool = False,
) -> Generator:
    """Images for a vision teacher from a network of two layers on normal noise.

    Every image has mean 0 and variance 1, as normalised ones have on average.

    Args:
      teacher, rows: B images for it.
      size: side in pixels; None = the teacher's.
      noise_width, hidden: of the noise, and of the hidden layer.
      scenes: what the network says is added to dead leaves (see ``scenes``) drawn anew each time,
        less than a tenth of their contrast at first: the game begins among inputs that the
        teacher tells apart.

    Raises:
      ValueError: a teacher that sees no images, or a size that is no multiple of its patch.
    """
    for name, value in (("noise_width", noise_width), ("hidden", hidden)):
        positive(value, name)
    shape = _images(teacher, rows, size)

    def init(key: jax.Array) -> Params:
        a, b = jax.random.split(key)
        out = math.prod(shape[1:])
        last = normal_kernel(b, hidden, out)
        return {
            "in": {"kernel": normal_kernel(a, noise_width, hidden), "bias": jnp.zeros(hidden)},
            "out": {"kernel": 0.1 * last if scenes else last, "bias": jnp.zeros(out)},
        }

    def apply(y: Params, params: Params, key: jax.Array) -> Synthetic:
        dtype = y["in"]["kernel"].dtype
        z = by_rows(jax.random.normal(key, (rows, noise_width), dtype))
        x = jax.nn.gelu(z @ y["in"]["kernel"] + y["in"]["bias"])
        x = x @ y["out"]["kernel"] + y["out"]["bias"]
        if scenes:
            drawn = dead_leaves(jax.random.fold_in(key, 1), shape)
            x = x + drawn.reshape(rows, -1).astype(dtype)
        return Synthetic({"pixel_values": adapters.standard(x).reshape(shape)}, None)

    return Generator(init, apply)


def leaves(teacher: Model, *, rows: int, size: int | None = None, layers: int = 2) -> Generator:
    """Dead leaves (see ``scenes``): nothing to learn, the baseline of a game on images.

    Raises:
      ValueError: as :func:`pixels`; layers < 0.
    """
    shape = _images(teacher, rows, size)
    check_layers(layers)

    def apply(y: Params, params: Params, key: jax.Array) -> Synthetic:
        return Synthetic({"pixel_values": dead_leaves(key, shape, layers)}, None)

    return Generator(lambda key: {}, apply)


def _images(teacher: Model, rows: int, size: int | None) -> tuple[int, int, int, int]:
    """(B, H, W, C) of what a vision teacher sees."""
    config = teacher.config
    if not isinstance(config, VisionConfig):
        raise ValueError(f"images need a vision teacher, got {type(config).__name__}")
    positive(rows, "rows")
    side = config.image_size if size is None else size
    if side < 1 or side % config.patch:
        raise ValueError(f"size must be a multiple of the patch {config.patch}, got {side}")
    if side < 2:
        raise ValueError("size must be >= 2: an image of one pixel has no variance")
    return rows, side, side, config.channels


def information(logits: Float[Array, "N C"]) -> Float[Array, ""]:
    """Nats that a classifier's answers tell of its inputs: H(mean p) - mean H(p), from 0 to log C.

    Near 0 it answers all of them alike. A student that learns from such inputs learns one answer,
    and the distance D between the two, which chooses the champion, says nothing of others.
    """
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    mean = jax.nn.logsumexp(logp, 0) - jnp.log(logits.shape[0])
    return (jnp.exp(logp) * logp).sum(-1).mean() - (jnp.exp(mean) * mean).sum()


def feeding(model: Model) -> Model:
    """``model`` reading batches that hold ``embeds``: what a generator makes, as a data set.

    A batch of :func:`batches` then goes where batches go: calibration, Gram matrices.
    """

    def apply(params: Params, batch: Batch, **options: Any) -> ModelOut:
        rest = {name: value for name, value in batch.items() if name != "embeds"}
        return model.apply(params, rest, embeds=batch.get("embeds"), **options)

    return dataclasses.replace(model, apply=apply)


def batches(
    generator: Generator, y: Params, params: Params, key: jax.Array, count: int
) -> list[dict[str, Any]]:
    """``count`` batches for :func:`feeding`; ``params`` are the teacher's.

    Raises:
      ValueError: count < 1.
    """
    positive(count, "count")

    @jax.jit
    def make(y: Params, params: Params, key: jax.Array) -> dict[str, Any]:
        batch, embeds = generator.apply(y, params, key)
        return dict(batch) if embeds is None else {**batch, "embeds": embeds}

    return [make(y, params, k) for k in jax.random.split(key, count)]
