"""The report: complete, self-contained, deterministic, and undeterred by damaged run folders."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from steppe.launch import report
from steppe.launch.report import curves, facts, folder, outcomes, svg

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & \'"\ud800\x00</svg></style>'
START = 1_763_700_000.0

WORDS = (
    "a sly and moving film that never begs for your tears;the plot runs out of road long before "
    "the credits do;it is not the worst comedy of the year, which is the best that can be said;"
    "beautifully shot, badly told;you will laugh, then wonder why;an earnest bore with one good "
    "scene;funny, in the way that a long flight is funny;the cast deserves a better script and so "
    "do we;slight, warm and over in eighty minutes, all of them welcome;a thriller without a pulse"
).split(";")


def make_run(
    path: Path, *, kind: str = "classification", steps: int = 600, examples: int = 812
) -> Path:
    """A run as ``steppe finetune`` leaves it, with plausible numbers."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    names = {"classification": ["negative", "positive"], "token": ["O", "PER", "LOC", "ORG"]}
    names = names.get(kind, [])
    config = {
        "recipe": "vader-movies",
        "model": "asset:minilm-l6",
        "data": {"source": "asset:vader/movies", "max_length": 64, "batch_size": 32},
        "optimizer": {"name": "adamw", "learning_rate": 5e-5, "warmup": 0.1, "weight_decay": 0.01},
        "steps": steps,
        "mesh": {"data": 1},
        "seed": 0,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    with (path / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            done = step / steps
            loss = 0.16 + 0.54 * math.exp(-5 * done) + 0.09 * rng.standard_normal() * (1 - done / 2)
            row = {
                "step": step,
                "kind": "train",
                "time": START + 0.31 * step,
                "loss": max(loss, 0.01),
                "accuracy": float(rng.binomial(32, 0.95 - 0.42 * math.exp(-5 * done)) / 32),
                "grad_norm": float(2.5 * math.exp(0.35 * rng.standard_normal())),
                "learning_rate": 5e-5 * min(done / 0.1, (1 - done) / 0.9),
                "step_time": 0.30 + 0.02 * abs(rng.standard_normal()) + 0.9 * (step == 1),
                "tokens_per_s": 6400 + 260 * rng.standard_normal(),
                "input_wait": 0.004 + 0.002 * abs(rng.standard_normal()),
            }
            out.write(json.dumps(row) + "\n")
            if step % (steps // 8) == 0:
                row = {"step": step, "kind": "eval", "split": "valid", "time": row["time"]}
                row |= {"loss": 0.33 + 0.33 * math.exp(-6 * done) + 0.05 * done}
                row |= {"accuracy": 0.865 - 0.3 * math.exp(-6 * done), "f1": 0.84, "pearson": 0.8}
                out.write(json.dumps(row) + "\n")
    metric = {"classification": "accuracy", "regression": "pearson", "token": "f1"}[kind]
    results = {
        "task": {"kind": kind, "label_names": names},
        "metrics": {
            "valid": {metric: 0.871, "loss": 0.341, "ece": 0.041},
            "test": {metric: 0.863, "loss": 0.352, "ece": 0.046},
        },
        "baselines": {"majority class": {metric: 0.524}, "frozen features + logistic": {metric: 0.791}},
        "intervals": {metric: [0.838, 0.885]},
        "command": "steppe finetune vader-movies --out runs/vader-movies --seed 0",
        "versions": {"python": "3.11.2", "jax": "0.10.2", "flax": "0.12.8", "steppe": "0.1.0"},
        "hardware": {"platform": "cpu", "devices": 1, "cores": 2, "memory": "16 GB"},
        "data": {
            "splits": {"train": 8204, "valid": 1012, "test": examples},
            "dropped": "neutral, 573",
            "licence": "MIT (vaderSentiment 3.3.2)",
        },
        "model": {"name": "MiniLM-L6", "parameters": 22_713_986, "trainable": 22_713_986},
        "timings": {"compile": 6.4, "train": 186.0, "evaluate": 5.2, "total": 214.7},
        "shapes": [[32, 16], [32, 32], [32, 64]],
    }
    (path / "results.json").write_text(json.dumps(results))
    with (path / "predictions.jsonl").open("w") as out:
        for i in range(examples):
            text = f"{WORDS[i % len(WORDS)]}, {WORDS[(i * 7 + 3) % len(WORDS)]}"
            out.write(json.dumps(_prediction(kind, i, text, names, rng)) + "\n")
    return path


def _prediction(kind, i, text, names, rng) -> dict:
    row = {"id": f"movies-{i:05d}", "text": text}
    if kind == "regression":
        label = float(rng.uniform(-4, 4))
        guess = 0.8 * label + float(rng.normal(0, 0.9))
        return row | {"label": label, "prediction": guess, "loss": (label - guess) ** 2}
    if kind == "token":
        tokens = text.split()
        label = [int(x) for x in rng.choice(4, len(tokens), p=[0.7, 0.1, 0.1, 0.1])]
        guess = [x if rng.random() < 0.9 else int(rng.integers(4)) for x in label]
        probs = [[0.97 if c == g else 0.01 for c in range(4)] for g in guess]
        loss = float(np.mean([-math.log(p[x]) for p, x in zip(probs, label)]))
        del row["text"]
        row |= {"tokens": tokens, "label": label, "prediction": guess}
        return row | {"probs": probs, "loss": loss}
    label = int(rng.random() < 0.52)
    p = float(1 / (1 + math.exp(-(4.2 * (label - 0.5) + 1.6 * rng.standard_normal()))))
    p = min(max(p, 0.002), 0.998)
    loss = -math.log(p if label else 1 - p)
    row |= {"label": label, "prediction": int(p > 0.5), "probs": [1 - p, p]}
    return row | {"loss": loss, "score": float(rng.uniform(-4, 4))}
