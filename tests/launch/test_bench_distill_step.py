"""The benchmark of distillation steps: PyTorch's losses, and every row against labels."""

import json

import pytest

from steppe.launch.bench import distill_step
from steppe.launch.bench.decoders import TINY

from .test_bench_sharpness import SHORT, printed


@pytest.mark.long
def test_rows_have_pytorchs_losses_and_are_measured(tmp_path):
    pytest.importorskip("torch")
    config = distill_step.DistillStepBench(
        shapes=TINY, student_layers=1, batch=2, length=12, prompt=4, token_chunk=5, threads=1,
        tolerance=1e-4, protocol=SHORT, out=tmp_path / "r.json",
    )  # fmt: skip
    result = distill_step.run(config, lambda _: None)
    rows = result["rows"]
    assert json.loads((tmp_path / "r.json").read_text())["rows"].keys() == rows.keys()
    assert list(rows) == [*distill_step.OURS, "torch, labels", "torch, kd"]
    assert rows["labels"]["to_labels"]["median"] == 1
    assert set(result["loss_difference"]) == {"labels", "kd"}
    # One loss by two programs.
    assert rows["kd, by tokens"]["last_loss"] == pytest.approx(rows["kd"]["last_loss"], rel=1e-5)
    assert rows["on-policy"]["drawn_per_s"] > 0
    shown = printed(distill_step.table(result))
    assert "on-policy" in shown
    assert "10.9" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch must be >= 1"),
        ({"prompt": 128}, "prompt must be below length"),
        ({"methods": ("sft",)}, "unknown method 'sft'; known: labels"),
        ({"length": 5000}, "at most shapes.positions"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        distill_step.DistillStepBench(**options)
