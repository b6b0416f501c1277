"""The benchmarks of sharpness-aware steps and of the top-k, on the smallest shapes."""

import json
import os

import pytest
from rich.console import Console

from steppe.launch.bench import harness, shapes, sharpness, topk
from steppe.launch.bench.sharpness_sides import TORCH, Steppe
from steppe.models import tree

pytestmark = pytest.mark.slow

SHORT = harness.Protocol(warmup=0, rounds=2, steps=1)


def printed(renderable) -> str:
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


def tiny(**options) -> sharpness.SharpnessBench:
    defaults = {"shapes": shapes.TINY, "batch": 4, "length": 16, "protocol": SHORT}
    return sharpness.SharpnessBench(**{**defaults, "learning_rate": 1e-3, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes.export(tmp_path_factory.mktemp("bench") / "m", shapes.TINY)


# Rows that differ in more than the transform; transforms have tests of their own.
KINDS = (
    "adamw",
    "fsam, refreshing",
    "esam",
    "looksam(5)",
    "sam, upper half",
    "sam, half the batch",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_method_takes_steps_in_one_program(name, folder):
    side = Steppe(method=name, rho=0.05, directory=str(folder), batch=4, length=16)
    losses = side.losses(3)
    assert side.compiles() == 1
    assert all(0 < loss < 5 for loss in losses)


@pytest.mark.long
@pytest.mark.parity
def test_sam_is_pytorchs_and_rows_hold_ratios(tmp_path):
    pytest.importorskip("torch")
    said: list[str] = []
    config = tiny(methods=("sam",), threads=1, loss_steps=5, out=tmp_path / "r.json")
    result = sharpness.run(config, said.append)
    assert said[0].startswith("load average")
    assert list(result["rows"]) == [*TORCH, "sam"]
    assert set(result["loss_difference"]) == {"adamw", "sam"}
    assert max(result["loss_difference"].values()) <= 1e-4
    row = result["rows"]["sam"]
    pairs = [a / b for a, b in zip(row["seconds"], row["base_seconds"], strict=True)]
    assert row["ratio"]["low"] == min(pairs)
    assert row["goal"] == 1.75
    assert result["rows"]["torch sam"]["against"] == "torch adamw"
    assert json.loads((tmp_path / "r.json").read_text()) == result
    text = printed(sharpness.table(result))
    for content in ("torch sam", "batch 4 x 16", "1.75", "agree with PyTorch's"):
        assert content in text


def test_the_default_shapes_have_a_million_parameters():
    assert tree.count(sharpness.MILLION.config().build().abstract()) == pytest.approx(1e6, rel=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ("sma",)}, "unknown method 'sma'; known: adamw, sam"),
        ({"methods": ("looksam(5)",)}, r"a multiple of 5 for looksam\(5\), got 1"),
        ({"rho": 0.0, "methods": ("sam",)}, "rho must be > 0, got 0.0"),
        ({"length": 64, "methods": ("sam",)}, "length must be at most shapes.positions = 32"),
        ({"batch": 0, "methods": ("sam",)}, "batch must be >= 1, got 0"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


@pytest.mark.slow
def test_topk_is_checked_and_measured(tmp_path):
    config = topk.TopKBench(10_000, threads=1, protocol=SHORT, out=tmp_path / "r.json")
    result = topk.run(config, lambda _: None)
    assert result["larger"] < result["k"] <= result["chosen"]
    assert set(result["programs"]) == set(topk.PROGRAMS)
    assert result["programs"]["sum"]["ratio"]["median"] == 1.0
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "to one reading pass" in printed(topk.table(result))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"entries": 10}, "entries must be >= 1000"), ({"keep_ratio": 1.0}, "keep_ratio must be in")],
)
def test_bad_topk_settings(options, words):
    with pytest.raises(ValueError, match=words):
        topk.TopKBench(**options)
