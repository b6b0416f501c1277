"""From a batch to what evaluation needs of each row, in one compiled function a model and kind.

======================  =====================================================================
kind                    what the function returns, row by row
======================  =====================================================================
``classification``      ``logits`` [B, C]
``regression``          ``value`` [B]
``token``, ``mlm``,     ``label`` [B, T] best class, ``confidence`` [B, T] its probability,
``seq2seq``             ``nll`` [B, T] of the batch's labels, in nats
``lm``                  the same, column t being about token t as predicted from those before;
                        column 0 is 0
``span``                ``span`` [B, 2] best first and last token, ``score`` [B] sum of their
                        logits, ``confidence`` [B] product of their probabilities, ``nll`` [B]
                        mean over the two ends, in nats
======================  =====================================================================

Large logits never leave the device. Whatever the compute dtype, these are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.models.model import Model, ModelOut
from steppe.train.mesh import MeshPlan, put
from steppe.train.objectives.basic import negative_log_likelihood, span_logits
from steppe.train.types import Batch, Params

Outputs = dict[str, Any]
# Integers that describe rows to the caller, not to the network.
_NOT_INPUTS = ("example_index",)


class Predict(Protocol):
    """What :func:`steppe.train.evaluate.run` calls on every batch."""

    def __call__(self, params: Params, batch: Batch) -> Outputs: ...


class Predictor:
    """A compiled ``(params, batch) -> outputs``, kept between evaluations.

    Attributes:
      compiles: how often it has been compiled: once for each shape of batch.
    """

    def __init__(
        self,
        fn: Callable[[Params, Batch], Outputs],
        *,
        compute_dtype: Any = None,
        plan: MeshPlan | None = None,
    ) -> None:
        """
        Args:
          fn: pure and traceable; every output has the rows of the batch in front.
          compute_dtype: the parameters are cast to it inside; None leaves them as they are.
          plan: splits the rows over the mesh; None leaves the placement to the parameters.
        """
        self.compiles = 0
        self._plan = plan

        def traced(params: Params, batch: Batch) -> Outputs:
            self.compiles += 1
            return fn(params if compute_dtype is None else tree.cast(params, compute_dtype), batch)

        # Replicated outputs can be read by every process of a pod.
        self._call = (
            jax.jit(traced) if plan is None else jax.jit(traced, out_shardings=plan.replicated)
        )

    def __call__(self, params: Params, batch: Batch) -> Outputs:
        """Starts the computation and returns without waiting for it.

        Columns of a batch that are not numbers are left out. With several processes each
        passes the same, whole batch.

        Raises:
          ValueError: the rows cannot be divided over the mesh.
        """
        inputs = {}
        for name, value in batch.items():
            if name in _NOT_INPUTS:
                continue
            array = value if isinstance(value, jax.Array) else np.asarray(value)
            if array.dtype.kind in "biuf" or jnp.issubdtype(array.dtype, jnp.floating):
                inputs[name] = array if self._plan is None else self._place(name, array)
        return self._call(params, inputs)

    def _place(self, name: str, array: Any) -> jax.Array:
        plan = self._plan
        assert plan is not None
        if array.ndim and array.shape[0] % plan.data_size:
            raise ValueError(
                f"batch[{name!r}] has {array.shape[0]} rows, not divisible by the "
                f"{plan.data_size} parts of mesh axes {plan.data_axes}; evaluate with a "
                f"batch_size that is a multiple of {plan.data_size}"
            )
        sharding = plan.rows() if array.ndim else plan.replicated
        return put(array, sharding)


def predictor(
    model: Model,
    kind: str,
    *,
    compute_dtype: Any = None,
    plan: MeshPlan | None = None,
    max_answer: int = 30,
) -> Predictor:
    """The compiled function of a model; the same one again for the same arguments.

    Args:
      model: network whose head is of that kind.
      kind: a task kind, or ``"features"`` (see :func:`pool`).
      compute_dtype, plan: see :class:`Predictor`.
      max_answer: longest span that is considered, in tokens.

    Raises:
      ValueError: an unknown kind, or max_answer below 1.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    if max_answer < 1:
        raise ValueError(f"max_answer must be >= 1, got {max_answer}")
    dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
    apply: Any = model.apply  # a function or a bound method: hashed by identity
    return _predictor(apply, kind, dtype, plan, max_answer)


# Bounded: a model with frozen parameters in its closure would otherwise stay for ever.
@functools.lru_cache(maxsize=16)
def _predictor(
    apply: Callable[..., ModelOut], kind: str, dtype: Any, plan: MeshPlan | None, max_answer: int
) -> Predictor:
    def fn(params: Params, batch: Batch) -> Outputs:
        out = apply(params, batch)
        if kind == "features":
            return {"features": pool(out.hidden, batch)}
        if out.logits is None:
            raise ValueError(
                "the model has no head, so it returns no logits; load it with head=..."
            )
        logits = out.logits.astype(jnp.float32)
        if kind == "span":
            return best_span(logits, batch, max_answer)
        return _KINDS[kind](logits, batch)

    return Predictor(fn, compute_dtype=dtype, plan=plan)


def pool(hidden: jax.Array, batch: Batch) -> jax.Array:
    """Mean over the visible tokens of the final hidden states, in float32.

    Args:
      hidden: [B, T, D], or all layers [L + 1, B, T, D], of which the last is taken. Rows that
        an overlay put in front of the tokens do not count.
      batch: ``attention_mask`` [B, T] says which tokens are visible; without it all are.

    Returns:
      [B, D]; zeros for a row without a visible token.
    """
    last = (hidden[-1] if hidden.ndim == 4 else hidden).astype(jnp.float32)
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return last.mean(1)
    seen = (mask != 0).astype(jnp.float32)
    last = last[:, last.shape[1] - seen.shape[1] :]
    total = jnp.einsum("btd,bt->bd", last, seen)
    return total / jnp.maximum(seen.sum(1), 1.0)[:, None]


def best_span(logits: jax.Array, batch: Batch, max_answer: int) -> Outputs:
    """The span with the largest start + end logit, of at most ``max_answer`` tokens.

    Args:
      logits: [B, T, 2]. Tokens outside ``attention_mask`` cannot be chosen.
    """
    logits = span_logits(logits, batch)
    start, end = logits[..., 0], logits[..., 1]
    length = start.shape[1]
    width = min(max_answer, length)
    # [B, T, width]: the end logits of the next `width` tokens, minus infinity past the last.
    reach = jnp.arange(length)[:, None] + jnp.arange(width)
    after = jnp.pad(end, ((0, 0), (0, width - 1)), constant_values=-jnp.inf)
    score = (start[..., None] + after[:, reach]).reshape(start.shape[0], -1)
    best = jnp.argmax(score, axis=1)
    first = best // width
    span = jnp.stack([first, first + best % width], axis=1)
    by_end = jnp.swapaxes(logits, 1, 2)
    out = {
        "span": span,
        "score": score.max(axis=1),
        "confidence": jnp.exp(-negative_log_likelihood(by_end, span).sum(1)),
    }
    if "labels" in batch:
        out["nll"] = 0.5 * negative_log_likelihood(by_end, batch["labels"]).sum(1)
    return out


def _tokens(logits: jax.Array, batch: Batch) -> Outputs:
    label = jnp.argmax(logits, axis=-1)
    out = {"label": label, "confidence": jnp.exp(-negative_log_likelihood(logits, label))}
    if "labels" in batch:
        out["nll"] = negative_log_likelihood(logits, batch["labels"])
    return out


def _next_tokens(logits: jax.Array, batch: Batch) -> Outputs:
    """Scores at t the label at t + 1, and moves what comes out (not the logits) by one."""
    labels = batch.get("labels")
    moved = {} if labels is None else {"labels": jnp.roll(labels, -1, axis=1)}
    out = _tokens(logits, moved)
    return {name: jnp.roll(x, 1, axis=1).at[:, 0].set(0) for name, x in out.items()}


_KINDS: dict[str, Any] = {
    "classification": lambda logits, _: {"logits": logits},
    "regression": lambda logits, _: {
        "value": logits[:, 0] if logits.ndim == 2 and logits.shape[1] == 1 else logits
    },
    "token": _tokens,
    "span": None,
    "mlm": _tokens,
    "lm": _next_tokens,
    "seq2seq": _tokens,
    "features": None,
}
