"""What is handed out, opened again as its user would open it; sizes, FLOPs and latency."""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from steppe.data import batches as batches_
from steppe.launch import estimate, setup
from steppe.launch.bench import harness
from steppe.launch.tour import small
from steppe.launch.tour.graph import Done, Result
from steppe.launch.tour.world import MODEL, World, size
from steppe.models import fake_quant, packed, pretrained, quantized, tree
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train.evaluate.runner import softmax
from steppe.train.merge import joined

HUB, PACKED = "student", "packed"
# Rows of the forward passes that are timed: one text, as a user waits for it, and many.
ROWS = (1, 16)
ROUNDS, TURNS = 7, 3
TEXTS = 3
# A batch of one task's texts -> [B, classes of all tasks].
Logits: TypeAlias = Callable[[Mapping[str, np.ndarray]], np.ndarray]
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def export(world: World, student: Done, rounded: Done, folder: Path) -> Result:
    """Writes both folders and opens them again.

    Returns:
      For each folder ``bytes``, and ``difference`` and ``same`` of what is opened to the model in
      memory (see :func:`compared`; of the packed one as its quantization found them);
      ``integers``, the same of the packed model when it multiplies integers to when it
      multiplies rounded floats; ``transformers``, the same of the folder when transformers
      opens it, where PyTorch is installed; and ``texts``, what it answers.
    """
    what, params = small.read(student.folder / MODEL)
    small.write(world, folder / HUB, what, params)
    shutil.copytree(rounded.folder / MODEL, folder / PACKED)
    back = pretrained.load(folder / HUB)
    here = _logits((what.config.build(), params))
    there = _logits((back.model, back.params))
    found: Result = {HUB: _differences(world, here, there, what)}
    found[PACKED] = {name: rounded.result[name] for name in ("difference", "same")}
    held = packed.load(folder / PACKED)
    whole = packed.load(folder / PACKED, integers=True)
    pairs = (held.model, held.params), (whole.model, whole.params)
    found["integers"] = compared(world, *pairs, what)
    if importlib.util.find_spec("torch") is not None:
        theirs = _by_transformers(folder / HUB)
        found["transformers"] = _differences(world, here, theirs, what)
    for name in (HUB, PACKED):
        found[name]["bytes"] = size(folder / name)
    found["rounded"] = rounded.name
    found["texts"] = _texts(world, joined.read(held.model, held.labels), held)
    return found


def _inputs(world: World, name: str) -> tuple[str, list[str], dict[str, np.ndarray]]:
    """(task, texts, one batch of a task's test texts)."""
    task = world.tasks[name]
    data = task.splits["test"]
    rows = min(task.rows, len(data))
    batch = next(iter(batches_.evaluate(data, rows, buckets=setup.buckets(task.data))))
    records = [data.record(int(i)) for i in batch["example_index"]]
    texts = [str(record[task.data.text]) for record in records]
    return name, texts, {k: np.asarray(v) for k, v in batch.items() if k in INPUTS}


def compared(
    world: World, here: tuple[Model, Params], there: tuple[Model, Params], what: joined.Joined
) -> dict[str, float]:
    """Two models on a batch of every task's test texts.

    Returns:
      ``difference``, the largest of any logit; ``same``, the share of texts that get the same
      class of their own task.
    """
    return _differences(world, _logits(here), _logits(there), what)


def _differences(
    world: World, here: Logits, there: Logits, what: joined.Joined
) -> dict[str, float]:
    same, largest = [], 0.0
    for name in world.tasks:
        _, _, batch = _inputs(world, name)
        a, b = here(batch), there(batch)
        at = what.columns(name)
        same.append((a[:, at].argmax(1) == b[:, at].argmax(1)).mean())
        largest = max(largest, float(np.abs(a - b).max()))
    return {"difference": largest, "same": float(np.mean(same))}


def _logits(pair: tuple[Model, Params]) -> Logits:
    apply = jax.jit(lambda params, batch: pair[0].apply(params, batch).logits)
    return lambda batch: np.asarray(apply(pair[1], batch))


def _by_transformers(folder: Path) -> Logits:
    """The logits of a folder as transformers opens it, which needs PyTorch."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def logits(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            held = {name: torch.from_numpy(value.astype(np.int64)) for name, value in batch.items()}
            return np.asarray(model(**held).logits.float().numpy())

    return logits


def _texts(world: World, what: joined.Joined, held: packed.Loaded) -> list[dict[str, Any]]:
    """The first test texts of every task, with what every task's columns say of them."""
    apply = jax.jit(lambda params, batch: held.model.apply(params, batch).logits)
    rows = []
    for name in world.tasks:
        _, texts, batch = _inputs(world, name)
        logits = np.asarray(apply(held.params, batch), np.float64)
        for row in range(min(TEXTS, len(texts))):
            said = {}
            for task, names in what.classes.items():
                probs = softmax(logits[row, what.columns(task)])
                said[task] = [names[int(probs.argmax())], float(probs.max())]
            rows.append({"task": name, "text": texts[row], "said": said})
    return rows


# What it costs -------------------------------------------------------------------------------


def costs(world: World, run: Done, student: Done, rounded: Mapping[str, Done]) -> Result:
    """Forward passes of one text: FLOPs, bit operations, and times in turns in one process.

    Args:
      run: any fine-tuning; merged models are as large and as fast.
      rounded: scheme -> a model of it; the integers that it multiplies are timed too.

    Returns:
      name -> ``flops``, ``bit_operations`` (multiply-adds of layers times the bits of both
      factors, the energy's proxy; attention in float32), ``ms`` by number of rows.
    """
    config = world.config
    length = config.data.max_length
    tuned = pretrained.load(run.folder / "run" / MODEL)
    what, params = small.read(student.folder / MODEL)
    models: dict[str, tuple[Model, Params]] = {
        "full": (tuned.model, tuned.params),
        "student": (what.config.build(), params),
    }
    found: Result = {
        name: {"flops": flops(model, length), "bit_operations": bit_operations(model, length)}
        for name, (model, _) in models.items()
    }
    for bits, done in rounded.items():
        held = packed.load(done.folder / MODEL, integers=True)
        models[bits] = (held.model, held.params)
        scheme = quantized.parse(bits)
        base = models["student"][0]
        found[bits] = {
            "flops": flops(base, length),
            "bit_operations": bit_operations(base, length, scheme.w_bits, scheme.a_bits),
        }
    for name in found:
        found[name]["ms"] = {}
    for rows in ROWS:
        world.tell(f"latency, {rows} rows", 0, 1)
        for name, ms in _times(models, rows, length).items():
            found[name]["ms"][str(rows)] = ms
    found["rows"], found["length"] = list(ROWS), length
    return found


def _times(
    models: Mapping[str, tuple[Model, Params]], rows: int, length: int
) -> dict[str, dict[str, float]]:
    """Milliseconds a text, median and range of the rounds."""
    batch = {
        "input_ids": jnp.full((rows, length), 5, jnp.int32),
        "attention_mask": jnp.ones((rows, length), jnp.int32),
    }
    turns = {}
    for name, (model, params) in models.items():
        fn = jax.jit(lambda p, b, model=model: model.apply(p, b).logits)
        turns[name] = harness.timed(functools.partial(fn, params, batch), jax.block_until_ready)
    times = harness.interleave(turns, harness.Protocol(1, ROUNDS, TURNS))
    found = {}
    for name, values in times.items():
        spread = harness.spread([1e3 * value / rows for value in values])
        found[name] = spread._asdict()
    return found


def flops(model: Model, length: int) -> float:
    """Of a forward pass of one text of ``length`` tokens; heads and embeddings left out."""
    return estimate.model_flops(model, (1, length)) / 3.0


def bit_operations(
    model: Model, length: int, w_bits: int = fake_quant.BYPASS, a_bits: int = fake_quant.BYPASS
) -> float:
    """Multiply-adds of a forward pass of one text, each times the bits of its two factors.

    The kernels of the layers have ``w_bits`` and their inputs ``a_bits``; scores and weighted
    sums of the attention are in float32.
    """
    kernels = sum(
        math.prod(leaf.shape)
        for path, leaf in tree.flatten(model.abstract()).items()
        if path.startswith("layers/") and path.endswith("/kernel")
    )
    dense = float(length * kernels)
    attention = flops(model, length) / 2.0 - dense
    return dense * w_bits * a_bits + attention * fake_quant.BYPASS**2
