"""Benchmarks of language models: sizes, equality of tokens, and one tiny run of each."""

import dataclasses
import io
import json

import pytest

from steppe.launch.bench import decoders, generate, harness, lm_step, mfu
from steppe.launch.bench.decoders import GPT2, SMOLLM2, TINY
from steppe.models import tree

QUICK = harness.Protocol(warmup=0, rounds=1, steps=1)


def printed(renderable):
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=120).print(renderable)
    return stream.getvalue()


@pytest.mark.parametrize(("shapes", "millions"), [(SMOLLM2, 134.5), (GPT2, 124.4)])
def test_sizes_are_those_of_the_models(shapes, millions):
    abstract = shapes.config().build().abstract()
    assert tree.count(abstract) / 1e6 == pytest.approx(millions, abs=0.1)
    matrices = sum(
        leaf.size for path, leaf in tree.flatten(abstract).items() if path.endswith("/kernel")
    )
    assert shapes.matrices() == matrices + shapes.width * shapes.vocab_size
    length = 1024
    flops = mfu.flops_per_token(shapes, length)
    attention = 12 * shapes.layers * shapes.width * length
    assert flops == 6 * shapes.matrices() + attention


def test_mfu_takes_a_decoder_and_checks_its_length():
    assert mfu.MfuBench(model="gpt2", length=1024).size is GPT2
    with pytest.raises(ValueError, match="at most positions of gpt2 = 1024"):
        mfu.MfuBench(model="gpt2", length=1025)


def test_batches_are_full_and_repeatable():
    first, again = (decoders.batches(2, 3, 8, 97, seed=1) for _ in range(2))
    assert first[0]["attention_mask"].all()
    assert (first[1]["input_ids"] == again[1]["input_ids"]).all()
    assert first[0]["input_ids"].min() >= 5


def test_other_tokens_make_the_comparison_void():
    assert generate.same_tokens([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]) == 3
    assert generate.same_tokens([[1, 2, 3]], [[1, 2, 9]], least=2) == 2
    with pytest.raises(harness.Void, match="row 1 differs at its new token 0 of 2"):
        generate.same_tokens([[1, 2], [3, 4]], [[1, 2], [0, 4]])


@pytest.mark.slow
def test_a_tiny_generation(tmp_path):
    out = tmp_path / "g.json"
    config = generate.GenerateBench(
        peer="none", shapes=TINY, batches=(2,), prompt=8, more=6, protocol=QUICK, out=out
    )
    result = generate.run(config, lambda line: None)
    side = result["rows"]["2"]["sides"]["steppe"]
    assert side["tokens_per_s"] > 0
    assert side["recompiled"] == 0
    assert json.loads(out.read_text())["bench"] == "generate"
    assert "compile 0 programs" in printed(generate.table(result))


@pytest.mark.slow
def test_a_tiny_training_step(tmp_path):
    config = lm_step.LmStepBench(
        peer="none", shapes=TINY, batch=2, length=16, loss_steps=2, protocol=QUICK
    )
    result = lm_step.run(config, lambda line: None)
    side = result["sides"]["steppe"]
    assert side["programs"] == 1
    assert side["losses"][0] == pytest.approx(4.57, abs=0.3)  # log 97
    assert "batch 2 x 16" in printed(lm_step.table(result))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (generate.GenerateBench, {"batches": ()}, "batches must be"),
        (generate.GenerateBench, {"more": 0}, "more must be >= 1"),
        (generate.GenerateBench, {"shapes": TINY, "prompt": 60, "more": 5}, "at most"),
        (lm_step.LmStepBench, {"length": 1}, "length must be >= 2"),
        (lm_step.LmStepBench, {"shapes": TINY, "length": 65}, "at most"),
    ],
)
def test_bad_settings(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
    assert dataclasses.is_dataclass(kind)
