"""The end of a run: every split evaluated, baselines fitted, the model exported, all written."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from steppe.launch import machine, optimiser, outputs, overlays, scoring
from steppe.launch.pieces import Pieces
from steppe.launch.pods import rank
from steppe.launch.report import running
from steppe.models import pretrained, tree
from steppe.models.model import Model
from steppe.models.overlays import files
from steppe.models.overlays.overlay import BASE
from steppe.train import evaluate, mesh
from steppe.train.types import Params, TrainState

# (content of results.json so far, all parameters, evaluation of the test split): adds to the first.
More: TypeAlias = Callable[[dict[str, Any], Params, evaluate.EvalResult], None]
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


def finish(
    pieces: Pieces,
    state: TrainState,
    folder: Path,
    command: Sequence[str],
    timings: dict[str, float],
    earlier: Mapping[str, Any],
    more: More | None = None,
) -> dict[str, Any]:
    """Evaluates every split but the training one, fits the baselines, exports, writes.

    Args:
      timings: of what came before, seconds; completed here.
      earlier: what ``scoring.before`` found; empty for tasks without.
      more: what another command finds of the trained model, see ``More``.

    Returns:
      What is in results.json.
    """
    config, data = pieces.config, pieces.data
    begin = time.perf_counter()
    params = state.full()
    results = {
        split: scoring.score(pieces, params, split, write=split == "test")
        for split in ("valid", "test")
    }
    test = results["test"]
    if rank.lead():
        outputs.write_predictions(
            folder / "predictions.jsonl",
            outputs.predictions(test, data.splits["test"], config.data),
        )
    labels = data.task.label_names or None
    merge_difference = export(pieces, pieces.own(params), folder / "model", labels)
    timings["evaluate_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    baselines = _baselines(pieces) if config.baselines and rank.lead() else {}
    if earlier:
        baselines["before training"] = dict(earlier["metrics"]["test"])
    timings["baselines_s"] = time.perf_counter() - begin
    found: dict[str, Any] = {
        "task": {"kind": data.task.kind, "label_names": list(data.task.label_names)},
        "metrics": {split: result.metrics for split, result in results.items()},
        "baselines": baselines,
        "intervals": outputs.interval(test, data.task.kind),
        "command": shlex.join(command),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "data": {"source": data.source, "licence": data.licence, **data.counts()},
        "model": {
            "name": pieces.origin.name,
            "licence": pieces.origin.licence,
            "parameters": tree.count(pieces.own(params)),
            "trainable": tree.count(pieces.own(state.params)),
        },
        "optimiser": {
            "method": optimiser.describe(config),
            "gradients_a_step": optimiser.gradients(config),
        },
        "timings": timings,
        "shapes": sorted(pieces.batches.shapes),
    }
    if rank.lead():
        found["running"] = running.facts(folder)
    if earlier:
        found["before"] = earlier["metrics"]
    if test.generated is not None:
        found["samples"] = scoring.side_by_side(test, dict(earlier))
    packing = getattr(data.splits["train"], "packing", None)
    if packing is not None:
        found["data"]["packing"] = str(packing)
    if merge_difference is not None:
        found["model"]["largest_logit_difference_after_merge"] = merge_difference
    if more is not None:
        begin = time.perf_counter()
        more(found, params, test)
        timings["compare_s"] = time.perf_counter() - begin
    outputs.write_json(folder / "results.json", found)
    return found


def export(
    pieces: Pieces, params: Params, target: Path, labels: Sequence[str] | None
) -> float | None:
    """Writes the Hugging Face folder; an overlay is merged, in float32, and the largest logit
    difference that this makes on a batch of the test split is returned. One that cannot be merged,
    or is not to be, is written by itself, beside the address and the hash of its base."""
    difference = None
    apart = pieces.overlay is not None and (pieces.overlay.merge is None or not pieces.config.merge)
    if apart:
        _export_overlay(pieces, params, target, labels)
        return None
    if pieces.overlay is not None:
        batch = next(iter(pieces.evaluation("test")))
        inputs = {k: np.asarray(v) for k, v in batch.items() if k in _INPUTS}
        if pieces.data.task.kind == "seq2seq":
            inputs["labels"] = np.asarray(batch["labels"])
        merged = pieces.overlay.merged(pieces.loaded.model, params, inputs)
        params, difference = merged.params, merged.largest_difference
    own, tokenizer = pieces.origin.tokenizer, pieces.data.tokenizer
    save(target, pieces.loaded.model, params, pieces.plan, labels, own, tokenizer)
    return difference


def save(
    target: Path,
    model: Model,
    params: Params,
    plan: mesh.MeshPlan,
    labels: Sequence[str] | None,
    own: Path,
    tokenizer: Any,
) -> None:
    """Writes a Hugging Face folder with its tokenizer, on the first process; all must call it.

    Args:
      own: where the tokenizer came from: a folder, or a file of weights.
      tokenizer: None = the model reads no text.
    """
    params = on_host(params, plan)
    if not rank.lead():
        return
    folder = own if own.is_dir() and tokenizer is not None else None
    pretrained.save(target, model, params, labels=labels, tokenizer_dir=folder)
    if own.is_file() and tokenizer is not None:  # inside a file of weights
        tokenizer.save(target)


def on_host(params: Params, plan: mesh.MeshPlan) -> Params:
    """Whole arrays on the first process; those split over processes are gathered one by one.

    Every process must call it.
    """
    gather = jax.jit(lambda leaf: leaf, out_shardings=plan.replicated)

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        whole = leaf if leaf.is_fully_replicated else plan.settle(gather(leaf))
        return np.asarray(whole) if rank.lead() else leaf

    return jax.tree.map(one, params)


def _export_overlay(
    pieces: Pieces, params: Params, target: Path, labels: Sequence[str] | None
) -> None:
    live = files.belongs(params, pieces.model.trainable, pieces.loaded.fresh)
    # On every process: the leaves may be spread over them.
    top = overlays.top_hash(params[BASE], live.get(BASE, {}))
    live = on_host(live, pieces.plan)
    if not rank.lead():
        return
    own, given = pieces.origin.tokenizer, pieces.config.model
    words = pieces.data.tokenizer
    overlays.save(
        target,
        pieces.overlay,
        live,
        base=given if given.startswith("asset:") else str(Path(given).expanduser().resolve()),
        hashed=pieces.base_hash,
        model=pieces.loaded.model,
        labels=labels,
        tokenizer_dir=own if own.is_dir() and words is not None else None,
        top=top,
    )
    if own.is_file() and words is not None:  # inside a file of weights
        words.save(target)


def _baselines(pieces: Pieces) -> dict[str, dict[str, float]]:
    """What a result must be compared with: the majority class, and the frozen encoder."""
    if pieces.data.task.kind != "classification":
        return {}
    # Loaded again: the parameters that were fine-tuned have been given up.
    frozen = pretrained.load(pieces.origin.weights, head=None, plan=None)

    def feats(split: str) -> Any:
        return evaluate.features(frozen.model, frozen.params, pieces.evaluation(split))

    train, valid, test = feats("train"), feats("valid"), feats("test")
    count = pieces.data.task.num_labels
    fitted = evaluate.logistic_regression(
        (train.x, train.labels), (valid.x, valid.labels), num_labels=count
    )
    return {
        "majority class": {"accuracy": evaluate.majority(train.labels, test.labels).accuracy},
        "frozen features + logistic regression": {
            "accuracy": evaluate.accuracy(fitted.predict(test.x), test.labels)
        },
    }
