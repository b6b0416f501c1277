"""The benchmark of zero-shot quantization: steps to a step of distillation, passes to float."""

import json

import pytest

from steppe.launch.bench import quantize
from steppe.launch.bench.shapes import TINY

from .test_bench_sharpness import SHORT, printed

GAMES = ("SAM-SGA, K=1, gumbel of 1,024 words", "SAM-SGA, K=5")


@pytest.mark.long
def test_steps_and_passes_are_measured(tmp_path):
    config = quantize.QuantizeBench(
        shapes=TINY, games=GAMES, bits=("w4a8",), batch=2, length=8, threads=1,
        protocol=SHORT, out=tmp_path / "r.json",
    )  # fmt: skip
    result = quantize.run(config, lambda _: None)
    assert json.loads((tmp_path / "r.json").read_text())["steps"].keys() == result["steps"].keys()
    assert list(result["steps"]) == [quantize.KD, *GAMES]
    assert result["steps"][quantize.KD]["ratio"]["median"] == 1
    five = result["steps"]["SAM-SGA, K=5"]
    assert five["a_student_step"]["median"] == pytest.approx(five["ratio"]["median"] / 5)
    assert list(result["passes"]) == ["float", "w4a8, rounded", "w4a8, integer"]
    assert result["passes"]["w4a8, integer"]["difference"] < 1e-4
    shown = printed(quantize.table(result))
    assert "SAM-SGA, K=5" in shown
    assert "w4a8, integer" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch must be >= 1"),
        ({"games": ("SAM",)}, "unknown game 'SAM'; known: random inputs"),
        ({"bits": ()}, "at least one scheme"),
        ({"bits": ("w4a16",)}, "schemes of integers"),
        ({"length": 1000}, "at most shapes.positions"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        quantize.QuantizeBench(**options)
