"""How a run scores a split, and what it is compared with: the same model before its training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from steppe.data.text import Tokenizer
from steppe.launch import execution, kinds, outputs, samples
from steppe.launch.config import DataConfig
from steppe.launch.pieces import Pieces
from steppe.train import evaluate
from steppe.train.types import Params

# Beside the run's other files: a resumed run no longer has the model that it began with.
BEFORE = "before.json"
TEXT_LIMIT = 2000


def score(pieces: Pieces, params: Params, split: str, *, write: bool = False) -> Any:
    """The evaluation of a split, an ``EvalResult``.

    Args:
      write: also let the model write texts for a sample of the split.
    """
    config, data = pieces.config, pieces.data
    return run(
        pieces.model,
        params,
        pieces.evaluation(split),
        data.task,
        data.splits[split],
        data.tokenizer,
        config.data,
        count=config.samples if write else 0,
        tokens=config.sample_tokens,
        plan=pieces.plan,
    )


def run(
    model: Any,
    params: Params,
    batches: Any,
    task: Any,
    dataset: Any,
    tokenizer: Tokenizer | None,
    data: DataConfig,
    *,
    count: int = 0,
    tokens: int = 64,
    plan: Any = None,
) -> evaluate.EvalResult:
    """An evaluation with what the kind of task has beside the metrics of ``evaluate.run``.

    Args:
      dataset: that of ``batches``.
      count: examples for which texts are written; those of tasks of one right text are
        scored.
      tokens: most tokens of such a text.
    """
    sizes = chosen = generate = None
    if tokenizer is not None and task.kind in kinds.WRITTEN:
        sizes = evaluate.token_bytes(tokenizer)
        limit = model.config.max_length
        chosen = samples.choose(dataset, tokenizer, data, count=count, tokens=tokens, limit=limit)

    def write(params: Params) -> evaluate.Generated:
        assert chosen is not None
        assert tokenizer is not None
        return samples.write(model, tokenizer, params, chosen, tokens)

    if chosen is not None and chosen.scored:
        generate = write
    found = evaluate.run(
        model, params, batches, task, plan=plan, token_bytes=sizes, generate=generate
    )
    if chosen is None:
        return found
    if chosen.scored:
        more = execution.metrics(found.generated, dataset, data)
        return dataclasses.replace(found, metrics={**found.metrics, **more})
    return dataclasses.replace(found, generated=write(params))


def before(pieces: Pieces, params: Params, folder: Path) -> dict[str, Any]:
    """Scores the untrained model on the validation and test splits, and keeps it on disk.

    Returns:
      ``{"metrics": {"valid": ..., "test": ...}, "written": texts of the sample}``.
    """
    valid, test = (score(pieces, params, split, write=split == "test") for split in _SPLITS)
    texts = [] if test.generated is None else list(test.generated.predictions)
    found = {"metrics": {"valid": valid.metrics, "test": test.metrics}, "written": texts}
    outputs.write_json(folder / BEFORE, found)
    return found


_SPLITS = ("valid", "test")


def read_before(folder: Path) -> dict[str, Any]:
    """What :func:`before` has left in a run folder; empty when it is not there or damaged."""
    try:
        found = json.loads((folder / BEFORE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def side_by_side(result: Any, earlier: dict[str, Any]) -> list[dict[str, str]]:
    """Source, reference, and the texts before and after the training, one row an example."""
    after = result.generated
    if after is None:
        return []
    old = [str(text) for text in earlier.get("written", [])]
    old += [""] * (len(after.predictions) - len(old))
    columns = (after.sources, after.references, old, after.predictions)
    names = ("source", "reference", "before", "after")
    return [
        {name: text[:TEXT_LIMIT] for name, text in zip(names, row, strict=True)}
        for row in zip(*columns, strict=False)
    ]
