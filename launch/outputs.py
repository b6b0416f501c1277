"""What a run leaves behind: results, predictions, the exported model. Written atomically."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from steppe.launch.pods import rank
from steppe.train import evaluate

# Metric shown first, by task kind.
HEADLINE = {
    "classification": "accuracy",
    "regression": "pearson",
    "token": "f1",
    "span": "f1",
    "mlm": "perplexity",
    "lm": "perplexity",
    "seq2seq": "chrf",
}


def write_text(file: Path, text: str) -> Path:
    """Writes a file by one rename: a kill or a full disk leaves the old one whole.

    Of several processes the first one writes.
    """
    if not rank.lead():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return file


def write_json(file: Path, value: Any) -> Path:
    """Writes a JSON file; NaN and infinities become null, which JSON can hold."""
    return write_text(file, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def read_json(file: Path) -> Any:
    """What :func:`write_json` wrote.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error})") from error


def write_predictions(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes one JSON object a line."""
    lines = (json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    return write_text(file, "".join(lines))


def predictions(result: evaluate.EvalResult, dataset: Any, config: Any) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl, worst first.

    Args:
      result: of an evaluation of ``dataset``.
      config: the data settings; they say which column is the text.
    """
    losses = np.nan_to_num(result.losses, nan=-1.0)
    written = {}
    if result.generated is not None:
        written = dict(zip(result.generated.rows, result.generated.predictions, strict=False))
    rows = []
    for place in np.argsort(-losses, kind="stable"):
        record = dataset.record(int(result.index[place]))
        row: dict[str, Any] = {"id": record["id"], "loss": float(result.losses[place])}
        if result.kind in ("lm", "seq2seq"):
            row.update(_language(result, int(place), record, config))
            said = written.get(int(result.index[place]))
            if said is not None:
                row["prediction"] = said
        else:
            row.update(_outcome(result, int(place), record, config))
        rows.append(row)
    return rows


def interval(result: evaluate.EvalResult, kind: str) -> dict[str, tuple[float, float]]:
    """Bootstrap interval (95%, over examples, seed 0) of the metric that stands first."""
    if kind != "classification":
        return {}
    known = result.labelled
    found = evaluate.bootstrap(
        evaluate.accuracy, np.asarray(result.predictions)[known], np.asarray(result.labels)[known]
    )
    return {"accuracy": (found.low, found.high)}


def _outcome(
    result: evaluate.EvalResult, place: int, record: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    names = result.label_names
    if result.kind == "classification":
        return {
            "text": _text(record, config),
            "label": names[int(result.labels[place])],
            "prediction": names[int(result.predictions[place])],
            "probs": [float(p) for p in result.probs[place]],
        }
    if result.kind == "regression":
        return {
            "text": _text(record, config),
            "label": float(result.labels[place]),
            "prediction": float(result.predictions[place]),
        }
    if result.kind == "token":
        pairs = zip(result.labels[place], result.predictions[place], strict=True)
        tagged = [(names[int(y)], names[int(z)]) for y, z in pairs]
        words = record[config.text][: len(tagged)]
        return {"tokens": [[w, y, z] for w, (y, z) in zip(words, tagged, strict=True)]}
    return {
        "text": _text(record, config),
        "label": np.asarray(result.labels[place]).tolist(),
        "prediction": np.asarray(result.predictions[place]).tolist(),
    }


def _language(
    result: evaluate.EvalResult, place: int, record: Mapping[str, Any], config: Any
) -> dict[str, Any]:
    """Text, right answer where there is one, and the number of tokens that the loss is over."""
    row: dict[str, Any] = {"tokens_scored": len(result.labels[place])}
    if result.kind == "seq2seq":
        return row | {"text": str(record[config.input]), "label": str(record[config.target])}
    turns = record.get(config.messages)
    if config.task == "lm":
        row["text"] = str(record.get(config.text, ""))
    elif isinstance(turns, (list, tuple)) and turns and isinstance(turns[-1], Mapping):
        said = [str(turn.get("content", "")) for turn in turns if isinstance(turn, Mapping)]
        row |= {"text": "\n".join(said[:-1]), "label": said[-1]}
    else:
        row |= {"text": str(record[config.prompt]), "label": str(record[config.answer])}
    return row


def _text(record: Mapping[str, Any], config: Any) -> str:
    text = str(record.get(config.text, ""))
    second = record.get(config.pair)
    return f"{text} | {second}" if isinstance(second, str) else text


def plain(value: Any) -> Any:
    """What JSON can hold: lists for tuples, text for keys, null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
