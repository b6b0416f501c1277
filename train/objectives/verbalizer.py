"""Classes as words: the cross entropy of a class's word where the text has its mask.

  -log softmax(z_m)[v_y]      z_m the logits at the mask token, v_y the word of class y

Over the full vocabulary, as is usual in prompt-based training, or over the words alone, as answers
are read: argmax_y z_m[v_y].
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from steppe.models.model import Model
from steppe.train.objectives.basic import _cross_entropy, _logits, _mask
from steppe.train.types import Batch, LossOut, Objective, Params


def verbalizer_ce(
    model: Model, words: Sequence[int], mask_id: int, *, full: bool = True
) -> Objective:
    """Cross entropy of each example, in nats; weight = number of labelled examples.

    The batch holds ``input_ids`` [B, T] with one mask token a row (the first one counts),
    ``labels`` and ``label_mask`` [B]; the model returns logits [B, T, V]. A row without a mask
    token has weight 0. aux: ``accuracy`` among the words.

    Args:
      model: network with an mlm head. Rows that an overlay puts in front are none of its logits.
      words: token of each class.
      mask_id: the mask token.
      full: over the full vocabulary; False = over the words.

    Raises:
      ValueError: fewer than two words, or one twice; logits that are not those of the texts.
    """
    if len(words) < 2 or len(set(words)) != len(words):
        raise ValueError(f"words must name at least two tokens, each once, got {tuple(words)}")
    tokens = jnp.asarray(words)

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        logits, found = answer_logits(_logits(model, params, batch, key), batch, mask_id)
        labels = jnp.asarray(batch["labels"])
        mask = _mask(batch, labels) * found
        among = _cross_entropy(logits[:, tokens], labels, mask)
        if not full:
            return among
        # A label that is too large is no token at all, so that it is not read as another class.
        wanted = jnp.take(tokens, jnp.maximum(labels, 0), mode="fill", fill_value=logits.shape[-1])
        whole = _cross_entropy(logits, wanted, mask)
        return whole._replace(aux=among.aux)

    return objective


def answer_logits(logits: jax.Array, batch: Batch, mask_id: int) -> tuple[jax.Array, jax.Array]:
    """(logits [B, V] at the first mask token of every row, whether there is one [B]).

    Raises:
      ValueError: logits that are not [B, T, V].
    """
    masked = jnp.asarray(batch["input_ids"]) == mask_id
    if logits.ndim != 3 or logits.shape[:2] != masked.shape:
        raise ValueError(
            f"logits of shape {logits.shape} are not those of texts of shape {masked.shape}; use "
            "an mlm head"
        )
    at = jnp.argmax(masked, axis=1)[:, None, None]
    return jnp.take_along_axis(logits, at, axis=1)[:, 0], masked.any(1)
