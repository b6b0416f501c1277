"""The benchmark of a distillation's loss: programs that agree, their times and their memory."""

import json

import pytest

from steppe.launch.bench import distill, harness

from .test_bench_sharpness import SHORT, printed

pytestmark = pytest.mark.slow
SMALL = {"vocabulary": 3000, "tokens": 64, "width": 16, "teacher_width": 24, "threads": 1}


@pytest.mark.parametrize("peer", ["torch", "none"])
def test_programs_agree_and_are_measured(peer, tmp_path):
    if peer == "torch":
        pytest.importorskip("torch")
    config = distill.DistillBench(
        **SMALL, kind="reverse_kl", vocab_chunk=500, token_chunk=4, peer=peer, protocol=SHORT,
        out=tmp_path / "r.json",
    )  # fmt: skip
    result = distill.run(config, lambda _: None)
    assert json.loads((tmp_path / "r.json").read_text())["worst_difference"] < 1e-4
    programs = result["programs"]
    assert set(programs) == {*distill.OURS, *((distill.TORCH,) if peer == "torch" else ())}
    assert programs["dense"]["ratio"]["median"] == 1
    logits = 4 * 3000 * 64
    assert result["logits"] == logits
    # All logits of a model stand in the dense program, a sixth and a sixteenth in the others,
    # beside the gradient of the matrix.
    assert programs["dense"]["memory"] > logits
    assert programs["by tokens"]["memory"] < programs["dense"]["memory"]
    assert programs["by vocabulary"]["memory"] < programs["dense"]["memory"]
    shown = printed(distill.table(result))
    assert "by tokens" in shown
    assert "losses and gradients agree" in shown


def test_programs_that_differ_void_the_comparison():
    assert distill.agree({"dense": [1.0, 2.0], "other": [1.0, 2.0002]}, 1e-3) > 0
    with pytest.raises(harness.Void, match="other gives 2.1, dense 2; the comparison is void"):
        distill.agree({"dense": [1.0, 2.0], "other": [1.0, 2.1]}, 1e-3)
    with pytest.raises(harness.Void):
        distill.agree({"dense": [1.0], "other": [float("nan")]}, 1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": 0}, "vocabulary must be >= 1, got 0"),
        ({"kind": "kl"}, "kind must be one of"),
        ({"kind": "tvd"}, "peer='torch' has forward_kl and reverse_kl, not 'tvd'"),
        ({"peer": "numpy"}, "peer must be 'torch' or 'none'"),
    ],
)
def test_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        distill.DistillBench(**options)
