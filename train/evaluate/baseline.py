"""Honest baselines: the majority class, and logistic regression on frozen features.

  min_W,b  sum_i -log softmax(W s(x_i) + b)[y_i] + lambda / 2 * |W|^2

s standardises each feature by the mean and the deviation of the training rows; the bias is not
penalised. With two classes both have weights here, so lambda here is twice the 1 / C of
scikit-learn's one-vector form; with more classes it is its 1 / C. Full-batch L-BFGS (Liu and
Nocedal 1989) from zero: nothing is random.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.models.model import Model
from steppe.train.evaluate import checks
from steppe.train.evaluate.calibration import log_loss
from steppe.train.evaluate.gather import gather
from steppe.train.evaluate.predict import predictor
from steppe.train.evaluate.runner import softmax
from steppe.train.mesh import MeshPlan
from steppe.train.types import Batch, Params

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)


class Majority(NamedTuple):
    """The most frequent training class (the smallest of several), and its test accuracy."""

    label: int
    accuracy: float


@dataclass(frozen=True)
class Features:
    """Frozen features of a dataset, in its order.

    Attributes:
      x: [N, D] float32, mean of the final hidden states over the visible tokens.
      labels: [N], or None where the batches hold none.
      index: [N] position of each row in the dataset.
    """

    x: np.ndarray
    labels: np.ndarray | None
    index: np.ndarray


@dataclass(frozen=True)
class LogisticRegression:
    """A fitted classifier.

    Attributes:
      kernel: [D, C] and bias [C], on standardised features.
      center, scale: [D], of the standardisation.
      strength: lambda, as chosen.
      valid_accuracy: accuracy on the validation rows that chose it.
    """

    kernel: np.ndarray
    bias: np.ndarray
    center: np.ndarray
    scale: np.ndarray
    strength: float
    valid_accuracy: float

    def probs(self, x: Any) -> np.ndarray:
        """Class probabilities [N, C] of features [N, D].

        Raises:
          ValueError: another number of features, no rows, a value that is not finite.
        """
        x = checks.floats(x, "x", 2)
        if x.shape[1] != len(self.center):
            raise ValueError(f"x must have {len(self.center)} features, got {x.shape[1]}")
        return softmax((x - self.center) / self.scale @ self.kernel + self.bias)

    def predict(self, x: Any) -> np.ndarray:
        """The most probable class of each row, int64 [N]. Errors as :meth:`probs`."""
        return self.probs(x).argmax(1)


def majority(train_labels: Any, test_labels: Any) -> Majority:
    """The baseline that always answers the most frequent class of the training labels.

    Raises:
      ValueError: no labels, or labels that are not class numbers.
    """
    train = checks.classes(train_labels, "train_labels")
    test = checks.classes(test_labels, "test_labels")
    label = int(np.bincount(train).argmax())
    return Majority(label, float((test == label).mean()))


def features(
    model: Model,
    params: Params,
    batches: Iterable[Batch],
    *,
    compute_dtype: Any = None,
    plan: MeshPlan | None = None,
) -> Features:
    """Mean-pooled final hidden states of every example; no head is needed.

    Args:
      model, params, batches, compute_dtype, plan: as :func:`steppe.train.evaluate.run`.

    Raises:
      ValueError: no examples, or an example that comes twice.
    """
    predict = predictor(model, "features", compute_dtype=compute_dtype, plan=plan)
    rows = gather(predict, params, batches)
    labels = rows.columns.get("labels")
    return Features(
        np.stack(rows.outputs["features"]),
        None if labels is None else np.stack(labels),
        rows.index,
    )


def logistic_regression(
    train: tuple[Any, Any],
    valid: tuple[Any, Any],
    *,
    num_labels: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    max_iter: int = 300,
    tol: float = 1e-5,
) -> LogisticRegression:
    """Fits one classifier for each strength and keeps the best on the validation rows.

    Best is the highest accuracy, then the lowest log loss, then the larger strength.

    Args:
      train, valid: (features [N, D], classes [N]) each.
      num_labels: C; default the largest class seen, plus 1.
      strengths: the candidates for lambda, each > 0.
      max_iter: most L-BFGS steps for each.
      tol: stops when no entry of the gradient of the mean loss exceeds it.

    Raises:
      ValueError: no rows, lengths or widths that differ, a value that is not finite, a class
        outside [0, num_labels), no strength or one that is not > 0.
    """
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"strengths must be > 0 and at least one, got {tuple(strengths)}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be >= 1, got {max_iter}")
    x, y = checks.floats(train[0], "train features", 2), train[1]
    xv, yv = checks.floats(valid[0], "valid features", 2), valid[1]
    y = checks.classes(y, "train labels", num_labels)
    yv = checks.classes(yv, "valid labels", num_labels)
    for name, a, b in (("train", x, y), ("valid", xv, yv)):
        checks.same_length(**{f"{name} features": a, f"{name} labels": b})
    if x.shape[1] != xv.shape[1]:
        raise ValueError(f"train has {x.shape[1]} features but valid has {xv.shape[1]}")
    size = num_labels if num_labels is not None else int(max(y.max(), yv.max())) + 1
    center, scale = x.mean(0), x.std(0)
    # A feature that never varies says nothing: standardised it is 0, not noise / epsilon.
    scale = np.where(scale > 1e-7 * np.maximum(abs(center), 1e-30), scale, 1.0)
    standard = jnp.asarray((x - center) / scale, jnp.float32)
    target = jnp.asarray(y, jnp.int32)

    weights = {"kernel": jnp.zeros((x.shape[1], size)), "bias": jnp.zeros(size)}
    fitted: list[tuple[tuple[float, float, float], LogisticRegression]] = []
    # From strong to weak: each optimum is a good start for the next.
    for strength in sorted(strengths, reverse=True):
        weights = _fit(weights, standard, target, strength / len(y), max_iter, tol)
        kernel, bias = (np.asarray(weights[k], np.float64) for k in ("kernel", "bias"))
        model = LogisticRegression(kernel, bias, center, scale, float(strength), 0.0)
        probs = model.probs(xv)
        right = float((probs.argmax(1) == yv).mean())
        fitted.append(
            (
                (right, -log_loss(probs, yv), strength),
                LogisticRegression(kernel, bias, center, scale, float(strength), right),
            )
        )
    return max(fitted, key=lambda pair: pair[0])[1]


@functools.partial(jax.jit, static_argnames="max_iter")
def _fit(start: Any, x: jax.Array, y: jax.Array, decay: Any, max_iter: int, tol: Any) -> Any:
    def loss(w: Any) -> jax.Array:
        # Full float32 also where the default for matmuls is lower (accelerators).
        logits = jnp.dot(x, w["kernel"], precision="highest") + w["bias"]
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return nll + 0.5 * decay * (w["kernel"] ** 2).sum()

    tx = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: Any) -> Any:
        _, _, grad, step = carry
        largest = jnp.max(jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(grad)]))
        return (step < max_iter) & (largest > tol)

    def update(carry: Any) -> Any:
        w, state, _, step = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        w = optax.apply_updates(w, updates)
        return w, state, optax.tree.get(state, "grad"), step + 1

    first = jax.grad(loss)(start)
    return jax.lax.while_loop(unfinished, update, (start, tx.init(start), first, 0))[0]
