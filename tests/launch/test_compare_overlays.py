"""``steppe compare`` of overlays: arms by their names, the same first values for all seeds' models,
examples of each class, and the number of trained parameters in the table."""

import dataclasses

import jax
import numpy as np
import pytest

from steppe.launch.compare import command, table
from steppe.launch.compare.settings import CompareConfig, parse_arm
from steppe.launch.compare.trial import Trials
from steppe.launch.config import DataConfig, FinetuneConfig, OptimConfig
from steppe.launch.pieces import start

pytestmark = pytest.mark.slow


def small(world, out, **more):
    base = FinetuneConfig(
        model=world.model,
        data=DataConfig(source=world.a, max_length=8, buckets=(8,)),
        optim=OptimConfig(learning_rate=5e-3),
        batch_size=8,
        epochs=2.0,
        baselines=False,
    )
    settings = {
        "base": base,
        "out": str(out),
        "sources": (world.a,),
        "sizes": (8,),
        "per_class": True,
        "methods": ("adamw", "lora:rank=2,learning_rate=0.02", "bitfit"),
        "seeds": (0, 1),
    }
    return CompareConfig(**(settings | more))


def test_an_overlay_is_an_arm():
    base = FinetuneConfig()
    arm = parse_arm("prefix:length=5,learning_rate=1e-3,epochs=2", base)
    assert arm.name == "prefix:length=5,learning_rate=1e-3,epochs=2"
    assert arm.config.overlay == ("prefix:length=5",)
    assert (arm.config.optim.learning_rate, arm.config.epochs, arm.grid) == (1e-3, 2.0, ())
    flat = parse_arm("lora:rank=4,alpha=8,sharpness=fsam,rho=0.01/0.02", base)
    assert flat.config.overlay == ("lora:rank=4,alpha=8",)  # not GSAM's alpha
    assert (flat.config.sharpness, flat.config.alpha, flat.grid) == ("fsam", None, (0.01, 0.02))
    assert parse_arm("adamw:learning_rate=1e-4", base).config.optim.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ("lora:rank=x",)}, "overlay has rank='x' in 'lora:rank=x'"),
        ({"methods": ("lora:rank=-1",)}, "rank must be >= 0, got -1"),
        ({"methods": ("lora:rank=2,rank=4",)}, "methods has rank twice"),
        ({"methods": ("lora:size=2",)}, "SETTING=VALUE with one of rank, alpha, sites"),
        ({"methods": ("lora:rho=0.1",)}, "rho=0.1 is no setting of sharpness='none'"),
        ({"methods": ("lora:learning_rate=-1",)}, "learning_rate=-1 in .*; it must be >= 0"),
        ({"methods": ("lore",)}, "methods must be among adamw, sam, .*lora"),
        ({"base": FinetuneConfig(overlay=("lora",))}, "methods says which overlays run"),
        ({"per_class": True, "sizes": (0,)}, "per_class needs sizes > 0 and resample"),
        ({"per_class": True, "resample": False}, "per_class needs sizes > 0 and resample"),
    ],
)
def test_mistakes_are_one_sentence(given, said):
    with pytest.raises(ValueError, match=said):
        CompareConfig(**given)


def test_seeds_share_a_model_and_begin_as_finetune_does(reviews, tmp_path):
    config = small(reviews, tmp_path)
    trials, cell = Trials(config), config.cells()[0]
    lora = config.arms()[1]
    trials.build(cell, lora, 0)
    shared = trials.build(cell, lora, 1)
    alone = Trials(config).build(cell, lora, 1)
    assert shared.model is not alone.model
    for a, b in zip(
        jax.tree.leaves(start(shared).full()), jax.tree.leaves(start(alone).full()), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    labels = [int(label) for label in shared.data.splits["train"].labels]
    assert (labels.count(0), labels.count(1)) == (8, 8)
    with pytest.raises(ValueError, match="training examples of class '(pos|neg)' of .*take fewer"):
        Trials(dataclasses.replace(config, sizes=(80,))).open()
    with pytest.raises(ValueError, match="rank must be <= 16 at site"):
        Trials(dataclasses.replace(config, methods=("adamw", "lora:rank=99"))).open()


def test_the_table_says_what_was_trained(reviews, tmp_path):
    config = small(reviews, tmp_path / "out")
    found = command.run(config)
    full, lora, bitfit = found["cells"][0]["arms"]
    counts = [int(arm["metrics"]["trained"]["mean"]) for arm in (full, lora, bitfit)]
    assert counts[0] > counts[1] > 0
    assert counts[0] > counts[2] > 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "8 training examples a class" in text
    assert f"{counts[1]:,}" in text
    assert "lora:rank=2" in (tmp_path / "out" / "report.html").read_text()
    alike = {"arms": [{"metrics": {"trained": {"mean": 5}}}] * 2}
    assert "trained" not in table.columns(alike)
