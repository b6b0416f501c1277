"""Recipes of ``steppe distill``; each runs in minutes on two cores once its teacher is there."""

from __future__ import annotations

from collections.abc import Callable

from steppe.launch import recipes as finetuning
from steppe.launch.config import DataConfig, OptimConfig
from steppe.launch.distill.settings import DistillConfig

_MOVIES = DataConfig(source="asset:vader/movies", max_length=64, buckets=(16, 32, 64))


def movies_l3() -> DistillConfig:
    """MiniLM-L6 fine-tuned on VADER movies (``steppe finetune vader-movies``) -> MiniLM-L3."""
    return DistillConfig(
        teacher="runs/vader-movies",
        student="asset:minilm-l3",
        out="runs/movies-l3",
        data=_MOVIES,
        optim=OptimConfig(learning_rate=1e-4),
        scheme="kd",
        temperature=2.0,
        epochs=3.0,
    )


def movies_cut() -> DistillConfig:
    """The same teacher -> three of its own six layers, evenly spaced."""
    return DistillConfig(
        teacher="runs/vader-movies",
        student="teacher:layers=3",
        out="runs/movies-cut",
        data=_MOVIES,
        optim=OptimConfig(learning_rate=1e-4),
        scheme="kd",
        temperature=2.0,
        epochs=3.0,
    )


def smollm2_cut() -> DistillConfig:
    """SmolLM2-135M -> four of its thirty layers (42.5 M parameters) on nlp-corpus sentences."""
    return DistillConfig(
        teacher="asset:smollm2",
        student="teacher:layers=4",
        out="runs/smollm2-cut",
        data=DataConfig(
            source="asset:nlp-corpus",
            task="lm",
            limit=4000,
            eval_limit=100,
            max_length=128,
            buckets=(32, 64, 128),
        ),
        optim=OptimConfig(learning_rate=5e-4),
        scheme="kd",
        weight=0.5,
        steps=100,
        batch_size=4,
        log_every=5,
        eval_every=50,
        samples=8,
        sample_tokens=32,
    )


def spider_cut() -> DistillConfig:
    """The run of ``steppe finetune smollm2-spider`` -> ten of its thirty layers, by KID.

    Queries of the test split are run on databases that the student has not seen.
    """
    return DistillConfig(
        teacher="runs/smollm2-spider",
        student="teacher:layers=10",
        out="runs/spider-cut",
        data=finetuning.smollm2_spider().data,
        optim=OptimConfig(learning_rate=5e-4),
        scheme="kid",
        steps=60,
        batch_size=2,
        log_every=5,
        samples=32,
        sample_tokens=48,
    )


RECIPES: dict[str, Callable[[], DistillConfig]] = {
    "movies-l3": movies_l3,
    "movies-cut": movies_cut,
    "smollm2-cut": smollm2_cut,
    "spider-cut": spider_cut,
}
