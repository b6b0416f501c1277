"""The losses that every method starts from: cross entropies and squared error, as sums.

  cross entropy   sum_i m_i * -log softmax(z_i)[y_i]          nats
  smoothed        (1 - e) * the above + e * mean_c -log softmax(z_i)[c]
  squared error   sum_i m_i * (z_i - y_i)^2                   units of the label, squared

m is ``label_mask``, z the logits in float32 whatever the compute dtype. Every objective returns
``LossOut(total, weight, aux)`` with weight = sum_i m_i, so that any split of the batch adds up
to the same loss. Where an integer label is negative (-100 in the ecosystem's batches), m is 0;
a batch without ``label_mask`` therefore works as it does elsewhere. A label that is too large
makes the loss NaN, which stops the loop, rather than train on another class.

A key of None means evaluation: ``train=False``, no dropout. Label smoothing: Szegedy et al.
2016 (arXiv 1512.00567).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.model import Model
from steppe.train.types import Batch, LossOut, Objective, Params


def token_ce(model: Model, *, shift: bool = False, label_smoothing: float = 0.0) -> Objective:
    """Cross entropy of each token, in nats; weight = number of labelled tokens.

    The batch holds ``labels`` and ``label_mask`` [B, T]; the model returns logits [B, T, C].

    Args:
      model: network with a token or a language-model head.
      shift: True for a causal language model whose labels are its inputs: the logits at t are
        scored against the label at t + 1, and the mask of that label counts.
      label_smoothing: e above, in [0, 1).

    Raises:
      ValueError: label_smoothing outside [0, 1); logits that do not fit the labels.
    """
    _check_smoothing(label_smoothing)

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        logits = _logits(model, params, batch, key)
        labels = batch["labels"]
        mask = _mask(batch, labels)
        if shift:
            # The labels move, not the logits: a slice of [B, T, V] would be a copy of it.
            labels = jnp.roll(labels, -1, axis=1)
            mask = jnp.roll(mask, -1, axis=1).at[:, -1].set(0.0)
        return _cross_entropy(logits, labels, mask, label_smoothing)

    return objective


def classification_ce(model: Model, label_smoothing: float = 0.0) -> Objective:
    """Cross entropy of each example, in nats; weight = number of labelled examples.

    The batch holds ``labels`` and ``label_mask`` [B]; the model returns logits [B, C].

    Raises:
      ValueError: label_smoothing outside [0, 1); logits that do not fit the labels.
    """
    _check_smoothing(label_smoothing)

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        logits, labels = _logits(model, params, batch, key), batch["labels"]
        return _cross_entropy(logits, labels, _mask(batch, labels), label_smoothing)

    return objective


def mse(model: Model) -> Objective:
    """Squared error of each example; weight = number of labelled examples.

    The batch holds ``labels`` (float) and ``label_mask`` [B]; the model returns [B] or [B, 1].
    aux: ``mae``, the absolute error.

    Raises:
      ValueError: predictions that do not fit the labels.
    """

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        value = _logits(model, params, batch, key)
        labels = jnp.asarray(batch["labels"], jnp.float32)
        if value.ndim == labels.ndim + 1 and value.shape[-1] == 1:
            value = value[..., 0]
        if value.shape != labels.shape:
            raise ValueError(
                f"predictions of shape {value.shape} do not fit labels of shape {labels.shape}; "
                "use a regression head"
            )
        mask = _mask(batch, batch["labels"])
        error = jnp.where(mask > 0, value - labels, 0.0)
        weight = mask.sum()
        mae = (jax.lax.stop_gradient(jnp.abs(error) * mask).sum(), weight)
        squares = error**2 * mask
        return LossOut(squares.sum(), weight, {"mae": mae}, _by_row(squares, mask))

    return objective


def span_ce(model: Model) -> Objective:
    """Mean of the cross entropies of the first and the last token; weight = labelled examples.

    The batch holds ``labels`` [B, 2] (start, end token) and ``label_mask`` [B]; the model
    returns [B, T, 2]. Tokens outside a two-dimensional ``attention_mask`` cannot be chosen, so
    the loss does not depend on the padding. A label on such a token gives an infinite loss.
    aux: ``exact``, both ends right.

    Raises:
      ValueError: logits that do not fit the labels.
    """

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        logits, labels = _logits(model, params, batch, key), batch["labels"]
        if logits.ndim != 3 or logits.shape[-1] != 2 or labels.shape != (logits.shape[0], 2):
            raise ValueError(
                f"logits of shape {logits.shape} and labels of shape {labels.shape} are not "
                "[B, T, 2] and [B, 2]; use a span head"
            )
        logits = jnp.swapaxes(span_logits(logits, batch), 1, 2)
        mask = _mask(batch, labels, joint=True)
        weight = mask.sum()
        nll = 0.5 * _counted(negative_log_likelihood(logits, labels).sum(-1), mask)
        exact = (jnp.argmax(logits, -1) == labels).all(-1)
        aux = {"exact": (_counted(exact, mask).sum(), weight)}
        return LossOut(nll.sum(), weight, aux, _by_row(nll, mask))

    return objective


def span_logits(logits: jax.Array, batch: Batch) -> jax.Array:
    """Span logits [B, T, 2] with minus infinity on tokens outside ``attention_mask`` [B, T]."""
    visible = batch.get("attention_mask")
    if visible is None or visible.ndim != 2:
        return logits
    visible = visible != 0
    # A padding row sees nothing; leaving it whole keeps its (masked) loss a number.
    visible = visible | ~visible.any(1, keepdims=True)
    return jnp.where(visible[..., None], logits, -jnp.inf)


def mlm_ce(model: Model, *, max_masked: int | None = None) -> Objective:
    """Cross entropy of the masked tokens, in nats; weight = number of masked tokens.

    The batch holds ``labels`` and ``label_mask`` [B, T], non-zero on the tokens to predict.

    Args:
      model: network with an mlm head.
      max_masked: the vocabulary logits are computed for this many positions a row (for 15%
        masking of 512 tokens: 80) in place of all T. None = all T. Of a row with more masked
        tokens the first ``max_masked`` count; aux ``left_out`` says what share was left out.

    Raises:
      ValueError: max_masked below 1, or given for a model that has no ``parts``.
    """
    if max_masked is None:
        return token_ce(model)
    if max_masked < 1:
        raise ValueError(f"max_masked must be >= 1, got {max_masked}")
    parts = model.parts
    if parts is None:
        raise ValueError(
            f"max_masked={max_masked} needs a model with parts (embed, layers, head); "
            "this model has none, use max_masked=None"
        )

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        labels = batch["labels"]
        mask = _mask(batch, labels)
        keep = min(max_masked, labels.shape[1])
        # A stable sort of "not masked" puts the masked positions first, in reading order.
        index = jnp.argsort(mask <= 0, axis=1, stable=True)[:, :keep]
        labels = jnp.take_along_axis(labels, index, axis=1)
        kept = jnp.take_along_axis(mask, index, axis=1)

        mode = {"rng": key, "train": key is not None}
        inputs = parts.embed(params, batch, **mode)
        hidden = parts.layers(params, inputs, **mode)[:, inputs.prompt :]
        hidden = jnp.take_along_axis(hidden, index[..., None], axis=1)
        logits = parts.head(params, hidden, inputs._replace(prompt=0), **mode)
        out = _cross_entropy(_require(logits), labels, kept)
        every = (mask > 0).sum().astype(jnp.float32)
        left = every - (kept > 0).sum().astype(jnp.float32)
        return out._replace(aux={**out.aux, "left_out": (left, every)})

    return objective


def weighted(parts: Mapping[str, tuple[Objective, float]]) -> Objective:
    """The sum of objectives, each times its coefficient: ``sum_k c_k * total_k / weight_k``.

    Components keep their own weights (tokens here, examples there), each is normalised over
    the global batch. All see the same key: two components that run the same network on the
    same batch draw the same dropout, and the compiler runs that forward pass once.
    aux: ``name/loss``, the component before its coefficient, and ``name/...`` of its own.

    Args:
      parts: ``{name: (objective, coefficient)}``; an objective may itself be ``weighted``, its
        components are then called ``name/inner``. A negative coefficient ascends.

    Raises:
      ValueError: no component; a coefficient that is not a finite number.
    """
    if not parts:
        raise ValueError("weighted needs at least one {name: (objective, coefficient)}, got {}")
    for name, (_, coefficient) in parts.items():
        if not math.isfinite(coefficient):
            raise ValueError(f"the coefficient of {name!r} must be finite, got {coefficient}")

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        totals: dict[str, Any] = {}
        weights: dict[str, Any] = {}
        aux: dict[str, tuple[Any, Any]] = {}
        rows: tuple[dict[str, Any], dict[str, Any]] | None = ({}, {})
        for name, (component, coefficient) in parts.items():
            out = component(params, batch, key)  # type: ignore[arg-type]
            nested = isinstance(out.total, Mapping)
            inner_totals = out.total if nested else {"": out.total}
            inner_weights = out.weight if nested else {"": out.weight}
            for inner, total in inner_totals.items():
                path = f"{name}/{inner}" if inner else name
                totals[path] = coefficient * total
                weights[path] = inner_weights[inner]
                if rows is not None and out.rows is not None:
                    own = out.rows if nested else tuple({"": part} for part in out.rows)
                    rows[0][path] = coefficient * own[0][inner]
                    rows[1][path] = own[1][inner]
            rows = None if out.rows is None else rows
            if not nested:
                aux[f"{name}/loss"] = (jax.lax.stop_gradient(out.total), out.weight)
            aux.update({f"{name}/{metric}": pair for metric, pair in out.aux.items()})
        return LossOut(totals, weights, aux, rows)

    return objective


def _causal_ce(model: Model, **options: Any) -> Objective:
    return token_ce(model, shift=True, **options)


_FOR_TASK: dict[str, Callable[..., Objective]] = {
    "classification": classification_ce,
    "regression": mse,
    "token": token_ce,
    "span": span_ce,
    "mlm": mlm_ce,
    "lm": _causal_ce,
    "seq2seq": token_ce,
}


def for_task(model: Model, kind: str, **options: Any) -> Objective:
    """The usual objective of a task.

    Args:
      model: network whose head is of that kind.
      kind: ``task.kind``: classification, regression, token, span, mlm, lm (labels are the
        inputs, see ``shift`` of :func:`token_ce`) or seq2seq.
      **options: passed on, such as ``label_smoothing=0.1``.

    Raises:
      ValueError: an unknown kind; the message lists the known ones.
    """
    if kind not in _FOR_TASK:
        raise ValueError(f"kind must be one of {', '.join(_FOR_TASK)}, got {kind!r}")
    return _FOR_TASK[kind](model, **options)


def _check_smoothing(value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {value}")


def _require(logits: jax.Array | None) -> jax.Array:
    if logits is None:
        raise ValueError("the model has no head, so it returns no logits; load it with head=...")
    return logits.astype(jnp.float32)


def _logits(model: Model, params: Params, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Logits of the model in float32; dropout if there is a key."""
    return _require(model.apply(params, batch, rng=key, train=key is not None).logits)


def _mask(batch: Batch, labels: jax.Array, *, joint: bool = False) -> jax.Array:
    """``label_mask`` in float32, with 0 where an integer label is negative.

    joint: the last axis of the labels is one answer (a span's start and end), masked as one.
    """
    given = batch.get("label_mask")
    labels = jnp.asarray(labels)
    known = _float(labels >= 0)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        known = jnp.ones(labels.shape, jnp.float32)
    if joint:
        known = known.min(-1)
    return known if given is None else known * _float(given)


def _float(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def negative_log_likelihood(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """``-log softmax(logits)[labels]`` in nats: logits [..., C], labels [...] -> [...].

    A negative label is read as class 0, for the caller to mask; a label >= C gives NaN.
    """
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _counted(values: jax.Array, mask: jax.Array) -> jax.Array:
    """values * mask, where a value that is not counted may be NaN or infinite."""
    return jnp.where(mask > 0, values * mask, 0.0)


def _by_row(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over all axes but the first: ``LossOut.rows`` of what is counted already."""
    axes = tuple(range(1, values.ndim))
    return jax.lax.stop_gradient(values.sum(axes)), mask.sum(axes)


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, mask: jax.Array, smoothing: float = 0.0
) -> LossOut:
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {logits.shape} do not fit labels of shape {labels.shape}; "
            "the head and the task must be of the same kind"
        )
    nll = negative_log_likelihood(logits, labels)
    if smoothing:
        # Written with the mean of the logits: no second [.., C] array of log-probabilities.
        uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
        nll = (1 - smoothing) * nll + smoothing * uniform
    nll = _counted(nll, mask)
    weight = mask.sum()
    correct = _counted(jnp.argmax(logits, axis=-1) == labels, mask).sum()
    return LossOut(nll.sum(), weight, {"accuracy": (correct, weight)}, _by_row(nll, mask))
