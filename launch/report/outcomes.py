"""What a run predicted: confusion counts, calibration, and the examples it gets most wrong.

Rows come from predictions.jsonl and are believed in nothing: a label may be an index or a
name, probabilities may be missing, and rows that make no sense are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from steppe.launch.report.folder import Row, number, sequence

TEXT_LIMIT = 600


class Classes(NamedTuple):
    """Classified items (examples, or the labelled tokens of all examples).

    Attributes:
      names: of the classes.
      true, predicted: [N] indices into ``names``.
      confidence: [N] probability of the predicted class; NaN where it is not known.
    """

    names: Sequence[str]
    true: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


class Confusion(NamedTuple):
    """``counts[i, j]``: items of class i that were predicted as j."""

    names: Sequence[str]
    counts: np.ndarray


class Calibration(NamedTuple):
    """The bins of confidence that hold items; all [bins].

    Attributes:
      low, high: edges.
      accuracy, confidence: means of each bin.
      sizes: items in each bin.
      error: expected calibration error, the mean of |accuracy - confidence| over items.
    """

    low: np.ndarray
    high: np.ndarray
    accuracy: np.ndarray
    confidence: np.ndarray
    sizes: np.ndarray
    error: float


class Example(NamedTuple):
    """One evaluated example.

    Attributes:
      id, text: what it is; the text is cut at ``TEXT_LIMIT`` characters.
      label, prediction: as text.
      confidence: probability of the prediction, or NaN.
      loss: in the unit of the row (nats; squared error), or NaN.
      tokens: (token, label, prediction) of a token task, else empty.
    """

    id: str
    text: str
    label: str
    prediction: str
    confidence: float
    loss: float
    tokens: Sequence[tuple[str, str, str]] = ()


def classes(rows: Sequence[Row], label_names: Sequence[str]) -> Classes | None:
    """The classified items of all rows; None when there are none."""
    names = [str(name) for name in label_names]
    index = {name: i for i, name in enumerate(names)}
    items: list[tuple[int, int, float]] = []

    def resolve(value: Any) -> int | None:
        if isinstance(value, str):
            if value not in index:
                index[value] = len(names)
                names.append(value)
            return index[value]
        place = number(value)
        if not math.isfinite(place) or place != int(place) or not 0 <= place < 10_000:
            return None
        while len(names) <= place:
            index.setdefault(str(len(names)), len(names))
            names.append(str(len(names)))
        return int(place)

    for row in rows:
        for label, prediction, probs in _items(row):
            true, predicted = resolve(label), resolve(prediction)
            if true is not None and predicted is not None:
                items.append((true, predicted, _confidence(probs)))
    if not items:
        return None
    return Classes(names, *(np.asarray(column) for column in zip(*items, strict=True)))


def confusion(found: Classes, limit: int = 12) -> Confusion:
    """Counts of (true, predicted); beyond ``limit`` classes the rarest are gathered in one."""
    size = len(found.names)
    counts = np.zeros((size, size), np.int64)
    np.add.at(counts, (found.true, found.predicted), 1)
    present = np.flatnonzero(counts.sum(0) + counts.sum(1)).tolist()
    if size <= limit:
        return Confusion(found.names, counts)
    if len(present) > limit:
        support = counts.sum(0) + counts.sum(1)
        order = sorted(present, key=lambda i: (-support[i], i))
        kept, rest = sorted(order[: limit - 1]), sorted(order[limit - 1 :])
    else:
        kept, rest = present, []
    groups = [[i] for i in kept] + ([rest] if rest else [])
    merged = np.asarray([[counts[np.ix_(a, b)].sum() for b in groups] for a in groups])
    names = [found.names[i] for i in kept] + ([f"{len(rest)} others"] if rest else [])
    return Confusion(names, merged)


def calibration(found: Classes) -> Calibration | None:
    """Accuracy against confidence, in the bins of the evaluation; None without probabilities."""
    from steppe.train.evaluate.calibration import reliability_curve

    known = np.isfinite(found.confidence)
    if not known.any():
        return None
    curve = reliability_curve(
        found.confidence[known].clip(0.0, 1.0), (found.true == found.predicted)[known]
    )
    gap = np.abs(curve.accuracy - curve.confidence)
    error = float(curve.count @ gap / curve.count.sum())
    return Calibration(curve.low, curve.high, curve.accuracy, curve.confidence, curve.count, error)


def points(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """(label, prediction) of a regression, both [N], finite pairs only."""
    pairs = [(number(row.get("label")), number(row.get("prediction"))) for row in rows]
    data = np.asarray(pairs, np.float64).reshape(-1, 2)
    data = data[np.isfinite(data).all(1)]
    return data[:, 0], data[:, 1]


def worst(
    rows: Sequence[Row], label_names: Sequence[str], kind: str, limit: int = 20
) -> list[Example]:
    """The examples with the largest loss, of those that are wrong (all of a regression, and of a
    language model, where no text is wrong).

    A row without a loss is ranked by -log p(label), or by its squared error.
    """
    ranked = []
    label_names = label_names if kind in ("classification", "token") else ()
    for place, row in enumerate(rows):
        wrong = kind in ("regression", "lm", "seq2seq") or _as_name(
            row.get("label"), label_names
        ) != _as_name(row.get("prediction"), label_names)
        loss = _loss(row, label_names, kind)
        if kind == "classification" and number(row.get("label")) < 0:
            continue  # not labelled
        if wrong and ("label" in row or math.isfinite(loss)):
            ranked.append((-loss if not math.isnan(loss) else math.inf, place, row, loss))
    ranked.sort(key=lambda item: item[:2])
    return [_example(row, label_names, loss) for _, _, row, loss in ranked[:limit]]


def _items(row: Row) -> list[tuple[Any, Any, Any]]:
    """(label, prediction, probabilities) of the row: one, or one a labelled token."""
    label, prediction, probs = row.get("label"), row.get("prediction"), row.get("probs")
    if not isinstance(label, list) or not isinstance(prediction, list):
        return [(label, prediction, probs)]
    each = sequence(probs)
    padded = [*each, *[None] * (len(label) - len(each))]
    return list(zip(label, prediction, padded, strict=False))


def _confidence(probs: Any) -> float:
    """Of a distribution its largest entry; a single number is the prediction's probability."""
    if isinstance(probs, list):
        values = [number(p) for p in probs]
        finite = [v for v in values if math.isfinite(v)]
        return max(finite) if len(finite) == len(values) and values else math.nan
    return number(probs)


def _loss(row: Row, names: Sequence[str], kind: str) -> float:
    if "loss" in row:
        return number(row["loss"])
    label, probs = row.get("label"), row.get("probs")
    if kind == "regression":
        return (number(label) - number(row.get("prediction"))) ** 2
    if isinstance(label, str) and label in names:
        label = list(names).index(label)
    if isinstance(label, int) and isinstance(probs, list) and 0 <= label < len(probs):
        p = number(probs[label])
        return -math.log(p) if p > 0 else math.inf if p == 0 else math.nan
    return math.nan


def _example(row: Row, names: Sequence[str], loss: float) -> Example:
    tokens: list[tuple[str, str, str]] = []
    pieces = row.get("tokens")
    label, prediction = row.get("label"), row.get("prediction")
    if isinstance(pieces, list):
        lists = [sequence(label), sequence(prediction)]
        for i, token in enumerate(pieces[:120]):
            given = [_as_name(x[i], names) if i < len(x) else "" for x in lists]
            tokens.append((str(token), *given))  # type: ignore[arg-type]
    text = str(row.get("text", "" if tokens else "(no text in predictions.jsonl)"))
    return Example(
        id=str(row.get("id", "")),
        text=text if len(text) <= TEXT_LIMIT else text[: TEXT_LIMIT - 1].rstrip() + "…",
        label=_as_name(label, names),
        prediction=_as_name(prediction, names),
        confidence=_confidence(row.get("probs")),
        loss=loss,
        tokens=tokens,
    )


def _as_name(value: Any, names: Sequence[str]) -> str:
    """A label as text: the name of an index, a number, a span, or the string itself."""
    if isinstance(value, list):
        return ", ".join(_as_name(v, names) for v in value[:200])
    if isinstance(value, int) and not isinstance(value, bool):
        return str(names[value]) if 0 <= value < len(names) else str(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def task(results: Mapping[str, Any], rows: Sequence[Row]) -> tuple[str, list[str]]:
    """(kind, label names) of a run; the kind is guessed from the rows when it is not written."""
    written = results.get("task")
    given = written if isinstance(written, Mapping) else {}
    names = [str(name) for name in sequence(given.get("label_names"))]
    if isinstance(given.get("kind"), str):
        kind = given["kind"]
        return ("classification" if kind == "pair" else kind), names
    sample = next((row["label"] for row in rows if "label" in row), None)
    if isinstance(sample, list):
        return "token", names
    return ("regression" if isinstance(sample, float) else "classification"), names
