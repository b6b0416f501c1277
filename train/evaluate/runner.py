"""Evaluation of a model on a dataset: predictions of every example, and the task's metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steppe.models.model import Model
from steppe.train.evaluate import answers, calibration, classification, correlation, tagging
from steppe.train.evaluate.gather import Rows, gather
from steppe.train.evaluate.language import Generated, text_metrics, token_metrics
from steppe.train.evaluate.predict import Predict, predictor
from steppe.train.mesh import MeshPlan
from steppe.train.types import Batch, Params


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found. N examples, in the order of the dataset.

    Attributes:
      kind: the task's kind.
      metrics: name -> value, over the labelled examples; see :func:`run`.
      predictions: classification int64 [N]; regression float64 [N]; span int64 [N, 2];
        token, mlm, lm and seq2seq: N int64 arrays, the labelled tokens of each example
        (without labels, those of ``label_mask``, else of ``attention_mask``).
      labels: of the same form; negative (regression: -1) where there is none.
      probs: classification float64 [N, C]; span [N] probability of the span; of token kinds N
        arrays, probability of the predicted class; regression None.
      losses: float64 [N]: nats (classification; of token kinds the mean over the labelled
        tokens; span: mean over the two ends), or squared error. NaN where there is no label.
      index: int64 [N], position of each example in the dataset.
      labelled: bool [N], examples with a label; the others count in no metric.
      label_names: names of the classes, where the task has them.
      scores: span: float64 [N], start + end logit, comparable over the windows of one
        question (see :func:`steppe.train.evaluate.answer_scores`); otherwise None.
      generated: the texts that ``generate`` gave, or None.
    """

    kind: str
    metrics: dict[str, float]
    predictions: Any
    labels: Any
    probs: Any
    losses: np.ndarray
    index: np.ndarray
    labelled: np.ndarray
    label_names: tuple[str, ...] = ()
    scores: np.ndarray | None = None
    generated: Generated | None = None

    @property
    def correct(self) -> np.ndarray:
        """Whether each example is right, all of its labelled tokens for token tasks; bool [N].

        Raises:
          ValueError: a regression, where nothing is right or wrong.
        """
        if self.kind == "regression":
            raise ValueError("kind='regression' has no right or wrong predictions; use losses")
        if isinstance(self.predictions, list):
            return np.array([(p == y).all() for p, y in zip(self.predictions, self.labels)], bool)
        equal = self.predictions == self.labels
        return equal if equal.ndim == 1 else equal.all(1)


def run(
    model: Model | None,
    params: Params,
    batches: Iterable[Batch],
    task: Any,
    *,
    compute_dtype: Any = None,
    predict: Predict | None = None,
    plan: MeshPlan | None = None,
    token_bytes: np.ndarray | None = None,
    generate: Callable[[Params], Generated] | None = None,
) -> EvalResult:
    """Predicts every example once and scores the predictions.

    The compiled function is kept: a second evaluation of the same model on the same shapes of
    batches compiles nothing. Padding rows are dropped; the result does not depend on the
    batch size, the buckets, or the devices.

    metrics (all have ``examples``, the number of labelled ones, and ``loss``):
      classification: accuracy, f1_macro, mcc, ece, brier; with 2 classes precision, recall,
        f1 of class 1.
      regression: mse, mae, and from 2 examples on pearson, spearman.
      token: accuracy; label names of the form O, B-X, I-X: entity precision, recall, f1;
        other names: f1_macro.
      span: exact, f1, both over token positions of each window; ``answer_scores`` gives those
        of the texts, a question at a time.
      mlm, lm, seq2seq: accuracy, perplexity, tokens, and with ``token_bytes`` bits_per_byte;
        every labelled token given those before it. With ``generate`` also chrf, bleu, exact
        and generated, the number of texts.
    Without a single label ``examples`` is 0 and stands alone.

    Args:
      model: network with a head of the task's kind; not used when ``predict`` is given.
      params: its full tree, wherever it is placed.
      batches: one pass over the dataset.
      task: a task of ``steppe.data.tasks``, or just its kind.
      compute_dtype: such as ``"bfloat16"``; logits are in float32 all the same.
      predict: own ``(params, batch) -> outputs``, as the table in ``predict.py`` says.
      plan: splits the rows of every batch over a mesh.
      token_bytes: bytes of each token id, see :func:`steppe.train.evaluate.token_bytes`.
      generate: ``params -> Generated``: texts that the model writes without help, as those of
        ``steppe.models.decoding.generate``; usually of a part of the dataset.

    Raises:
      ValueError: an unknown kind, no model and no predict, no examples, an example that comes
        twice, a label outside the classes, an output that is NaN.
    """
    kind = task if isinstance(task, str) else task.kind
    names = tuple(getattr(task, "label_names", None) or ())
    if kind not in _SUMMARIES:
        raise ValueError(f"kind must be one of {', '.join(_SUMMARIES)}, got {kind!r}")
    if predict is None:
        if model is None:
            raise ValueError("model must be given when predict is None, got None")
        predict = predictor(model, kind, compute_dtype=compute_dtype, plan=plan)
    rows = gather(predict, params, batches)
    if kind in LANGUAGE:
        found = _token(kind, rows, names, token_bytes)
    else:
        found = _SUMMARIES[kind](kind, rows, names)
    if generate is None:
        return found
    written = generate(params)
    metrics = found.metrics | text_metrics(written)
    return dataclasses.replace(found, metrics=metrics, generated=written)


def _classification(kind: str, rows: Rows, names: tuple[str, ...]) -> EvalResult:
    logits = _stack(rows, "logits")
    probs = softmax(logits)
    predictions = logits.argmax(1)
    labels, labelled = _labels(rows, np.int64)
    losses = np.full(len(labels), np.nan)
    metrics: dict[str, float] = {"examples": float(labelled.sum())}
    if labelled.any():
        y, z, p = labels[labelled], predictions[labelled], probs[labelled]
        count = probs.shape[1]
        classification.confusion_matrix(z, y, count)  # a label outside the classes raises here
        losses[labelled] = log_sum_exp(logits[labelled]) - logits[labelled][np.arange(len(y)), y]
        metrics |= {
            "loss": float(losses[labelled].mean()),
            "accuracy": classification.accuracy(z, y),
            "f1_macro": classification.f1(z, y, "macro"),
            "mcc": classification.mcc(z, y),
            "ece": calibration.expected_calibration_error(p, y),
            "brier": calibration.brier(p, y),
        }
        if count == 2:
            metrics |= classification.precision_recall_f1(z, y)._asdict()
    return EvalResult(
        kind, metrics, predictions, labels, probs, losses, rows.index, labelled, names
    )


def _regression(kind: str, rows: Rows, names: tuple[str, ...]) -> EvalResult:
    predictions = _stack(rows, "value")
    labels, labelled = _labels(rows, np.float64)
    losses = np.where(labelled, (predictions - labels) ** 2, np.nan)
    metrics: dict[str, float] = {"examples": float(labelled.sum())}
    if labelled.any():
        z, y = predictions[labelled], labels[labelled]
        mse = correlation.mean_squared_error(z, y)
        metrics |= {"loss": mse, "mse": mse, "mae": correlation.mean_absolute_error(z, y)}
        if len(y) > 1:
            metrics |= {
                "pearson": correlation.pearson(z, y),
                "spearman": correlation.spearman(z, y),
            }
    return EvalResult(kind, metrics, predictions, labels, None, losses, rows.index, labelled, names)


def _token(
    kind: str, rows: Rows, names: tuple[str, ...], token_bytes: np.ndarray | None = None
) -> EvalResult:
    predicted = _output(rows, "label")
    columns = rows.columns
    labels = columns.get("labels", [np.full(len(p), -1) for p in predicted])
    masks = columns.get("label_mask", columns.get("attention_mask", [p >= 0 for p in predicted]))
    keep = [m > 0 for m in masks]
    if kind == "lm":  # nothing precedes the first token of a row
        keep = [k & (np.arange(len(k)) > 0) for k in keep]
    if "labels" in columns:
        keep = [k & (y >= 0) for k, y in zip(keep, labels)]

    def cut(values: Sequence[np.ndarray], dtype: Any) -> list[np.ndarray]:
        return [v[k].astype(dtype) for v, k in zip(values, keep)]

    predictions, truth = cut(predicted, np.int64), cut(labels, np.int64)
    probs = cut(_output(rows, "confidence"), np.float64)
    labelled = np.array(["labels" in columns and len(y) > 0 for y in truth])
    nll = cut(_output(rows, "nll") if labelled.any() else labels, np.float64)
    losses = np.array([n.mean() if known else np.nan for n, known in zip(nll, labelled)])
    metrics: dict[str, float] = {"examples": float(labelled.sum())}
    if labelled.any():
        z, y, n = np.concatenate(predictions), np.concatenate(truth), np.concatenate(nll)
        _no_nan(losses[labelled], rows.index[labelled], "loss")
        metrics |= {"loss": float(n.mean()), "accuracy": classification.accuracy(z, y)}
        if kind in LANGUAGE:
            metrics |= token_metrics(n, z, y, token_bytes)
        elif tagging.is_tagging_scheme(names):
            table = np.array(names, object)
            scores = tagging.entity_f1([table[p] for p in predictions], [table[t] for t in truth])
            metrics |= {"precision": scores.precision, "recall": scores.recall, "f1": scores.f1}
        else:
            metrics |= {"f1_macro": classification.f1(z, y, "macro")}
    return EvalResult(kind, metrics, predictions, truth, probs, losses, rows.index, labelled, names)


def _span(kind: str, rows: Rows, names: tuple[str, ...]) -> EvalResult:
    predictions = np.stack(_output(rows, "span")).astype(np.int64)
    probs, scores = _stack(rows, "confidence"), _stack(rows, "score")
    labels, labelled = _labels(rows, np.int64, (2,))
    losses = np.full(len(labels), np.nan)
    metrics: dict[str, float] = {"examples": float(labelled.sum())}
    if labelled.any():
        losses[labelled] = np.asarray(_output(rows, "nll"), np.float64)[labelled]
        _no_nan(losses[labelled], rows.index[labelled], "loss")
        found = answers.token_spans(predictions[labelled], labels[labelled])
        metrics |= {"loss": float(losses[labelled].mean()), **found._asdict()}
    return EvalResult(
        kind, metrics, predictions, labels, probs, losses, rows.index, labelled, names, scores
    )


_SUMMARIES = {
    "classification": _classification,
    "regression": _regression,
    "token": _token,
    "span": _span,
    "mlm": _token,
    "lm": _token,
    "seq2seq": _token,
}
LANGUAGE = ("mlm", "lm", "seq2seq")  # their classes are the tokens of a vocabulary


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, in float64."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    """log sum exp along the last axis, in float64."""
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1))


def _output(rows: Rows, name: str) -> list[np.ndarray]:
    if name not in rows.outputs:
        raise ValueError(f"predict must return {name!r}, got {sorted(rows.outputs)}")
    return rows.outputs[name]


def _stack(rows: Rows, name: str) -> np.ndarray:
    """An output that has one shape for all rows, as float64 [N, ...]."""
    values = np.stack(_output(rows, name)).astype(np.float64)
    _no_nan(values.reshape(len(values), -1).sum(1), rows.index, name)
    return values


def _no_nan(values: np.ndarray, index: np.ndarray, name: str) -> None:
    bad = np.isnan(values)
    if bad.any():
        raise ValueError(
            f"{name} of example {index[np.argmax(bad)]} is not a number; "
            "the parameters have diverged, or the label is outside the classes"
        )


def _labels(rows: Rows, dtype: Any, shape: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N, *shape], and which examples have one."""
    size = len(rows.index)
    if "labels" not in rows.columns:
        return np.full((size, *shape), -1, dtype), np.zeros(size, bool)
    labels = np.stack(rows.columns["labels"]).astype(dtype)
    labelled = np.ones(size, bool)
    if "label_mask" in rows.columns:
        labelled = np.asarray(rows.columns["label_mask"]) > 0
    if np.issubdtype(labels.dtype, np.integer):
        labelled = labelled & (labels >= 0).reshape(size, -1).all(1)
    return labels, labelled
