"""The random subspace that a prompt is searched in, on the scale of what it is added to.

  prompt = A z + p_0,   A in R^{D x r} fixed,   D = n d
  uniform   A_ij ~ U(-1/sqrt(r), 1/sqrt(r))
  normal    A_ij ~ N(0, s_A^2),   s_A = alpha sigma_hat / (sqrt(r) sigma)

sigma is the step size that the search begins with: A z with z ~ N(0, sigma^2 I) has the standard
deviation alpha sigma_hat in every coordinate, whatever r and sigma are. sigma_hat is that of the
word embeddings for the first layer; for another layer that of its input on the training examples
with the prompt 0, clipped five times to three standard deviations around the mean, both computed
anew each time: a few dimensions of a transformer are many times the others.

Sun et al., EMNLP 2022, arXiv 2205.11200; uniform: Sun et al., ICML 2022, arXiv 2201.03514.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models.model import Model
from steppe.models.overlays.prompt import table_of
from steppe.train.types import Batch, Params

Kind = Literal["normal", "uniform"]


def random_projection(
    key: jax.Array, size: int, rank: int, std: float | jax.Array | None = None
) -> Float[Array, "D r"]:
    """A [D, r].

    Args:
      size: D, numbers of a prompt.
      rank: r, dimensions of the search.
      std: s_A of normal entries, see :func:`projection_std`; None = uniform entries.

    Raises:
      ValueError: rank below 1 or above size, std not positive.
    """
    check_rank(rank, size)
    if std is None:
        bound = 1 / math.sqrt(rank)
        return jax.random.uniform(key, (size, rank), minval=-bound, maxval=bound)
    if isinstance(std, (int, float)) and not 0 < std < math.inf:
        raise ValueError(f"std must be positive and finite, got {std}")
    return std * jax.random.normal(key, (size, rank))


def check_rank(rank: int, size: int) -> None:
    """
    Args:
      rank: r, dimensions of the search.
      size: D, numbers of a prompt.

    Raises:
      ValueError: rank below 1 or above size.
    """
    if not 1 <= rank <= size:
        raise ValueError(
            f"rank must be from 1 to the {size} numbers of the prompt, got "
            f"{rank}; lower it or take a longer prompt"
        )


def projection_std(
    sigma_hat: float | jax.Array, rank: int, sigma: float, alpha: float = 1.0
) -> float | jax.Array:
    """s_A, so that A z has the standard deviation alpha sigma_hat at the step size sigma.

    Raises:
      ValueError: rank below 1, sigma or alpha not positive.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    for name, value in (("sigma", sigma), ("alpha", alpha)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    return alpha * sigma_hat / (math.sqrt(rank) * sigma)


def clipped_std(x: jax.Array, rounds: int = 5, k: float = 3.0) -> jax.Array:
    """Standard deviation of ``x`` after ``rounds`` of clipping to mean +- k of them.

    Args:
      x: of any shape. The spread is over all entries, without Bessel's correction.
    """
    flat = jnp.asarray(x, jnp.float32).reshape(-1)
    for _ in range(rounds):
        mean, std = flat.mean(), flat.std()
        flat = jnp.clip(flat, mean - k * std, mean + k * std)
    return flat.std()


def scales(model: Model, params: Params, batch: Batch, *, deep: bool) -> Float[Array, " S"]:
    """sigma_hat of the layers that have a prompt: one, or with ``deep`` all L.

    Deep prompts cost one forward pass, of which all positions count, padding too, as in the
    published code.

    Args:
      model: with the prompt's place in it, see ``overlays.added_prompt``, and the prompt 0.
      batch: the training examples.

    Raises:
      ValueError: the model embeds no words.
    """
    table = table_of(params, "word")
    if table is None:
        raise ValueError("this model embeds no words: a prompt has no place in it")
    words = jnp.asarray(table, jnp.float32).std()[None]
    if not deep:
        return words
    # [L + 1, B, T, D]: the input of every layer, then the output of the last.
    hidden = model.apply(params, batch, all_hidden=True).hidden
    return jnp.concatenate([words, jax.vmap(clipped_std)(hidden[1:-1])])
