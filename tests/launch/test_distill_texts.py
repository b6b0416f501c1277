"""``steppe distill`` with decoders: whose texts are learnt from, and what the KL is made of."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.launch.config import DataConfig
from steppe.launch.distill import measure, schemes, settings, texts
from steppe.launch.distill.build import build, check_labels
from steppe.launch.distill.settings import DistillConfig
from steppe.launch.pieces import start
from steppe.train import distill
from steppe.train.distill.pairs import Pair

from .test_distill import losses, results, weights, written


def language(world, **more):
    """Resolved settings of a language model that learns, for one step."""
    data = DataConfig(source=world.chats, task="chat", max_length=24, buckets=(24,), eval_limit=8)
    given = {"teacher": str(world.llama), "student": "teacher:layers=1", "data": data}
    usual = {"steps": 2, "batch_size": 8, "samples": 0, "max_new_tokens": 4}
    if "scheme" in more and schemes.SCHEMES[more["scheme"]].policies[0] not in schemes.WRITING:
        usual.pop("max_new_tokens")
    if "policy" in more and more["policy"] in schemes.WRITING:
        usual["max_new_tokens"] = 4
    return schemes.resolved(DistillConfig(**{**given, **usual, **more}))


@pytest.fixture(scope="module")
def lm_run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "run"
    given = (f"--teacher={tiny.llama}", "--student=teacher:layers=1", "--scheme=atkd")
    more = ("--divergence=reverse_kl", "--policy=student", "--max-new-tokens=4")
    steps = ("--steps=4", "--save-every=2", "--microbatches=1")
    assert cli.main(written(tiny, out, *given, *more, *steps)) == 0
    return out


def test_a_decoder_shows_difficulty_agreement_and_texts(tiny, lm_run):
    found = results(lm_run)
    given = found["distillation"]
    assert len(given["difficulty"]["groups"]) == 10
    rising = [row["unc"] for row in given["difficulty"]["groups"]]
    assert rising == sorted(rising)
    assert given["difficulty"]["all"]["tokens"] == found["metrics"]["test"]["tokens"]
    assert given["agreement"]["items"] == found["metrics"]["test"]["tokens"]
    assert given["agreement"]["kl"] == given["difficulty"]["all"]["kl"]
    assert set(found["samples"][0]) == {"source", "reference", "before", "after", "teacher"}
    page = (lm_run / "report.html").read_text()
    for words in ("By difficulty of the token", "What it writes", "<th>teacher</th>"):
        assert words in page
    assert "ATKD, reverse_kl, on the student&#x27;s texts" in page
    assert not settings.read(lm_run).data.packed  # rows of several texts have no prompt


def test_texts_are_drawn_again_after_a_resume(tiny, lm_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(lm_run, copy)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "4")
    given = (f"--teacher={tiny.llama}", "--student=teacher:layers=1", "--scheme=atkd")
    more = ("--divergence=reverse_kl", "--policy=student", "--max-new-tokens=4")
    steps = ("--steps=4", "--save-every=2", "--microbatches=1", "--resume")
    assert cli.main(written(tiny, copy, *given, *more, *steps)) == 0
    assert losses(copy) == losses(lm_run)
    assert weights(copy / "model") == weights(lm_run / "model")


def test_the_parts_of_the_kl_are_those_of_the_logits(tiny):
    made = build(language(tiny, scheme="kd"))
    params = start(made.pieces).full()
    pair = Pair(made.student, distill.Teacher(made.teacher), True)
    whole = measure.tokens(pair, params, made.pieces.evaluation("test"))
    pieces = measure.tokens(pair, params, made.pieces.evaluation("test"), vocab_chunk=4)
    assert whole.kl == pytest.approx(pieces.kl, abs=1e-5)
    (batch,) = made.pieces.evaluation("test")
    z_s = made.student.apply(params["student"], batch).logits
    z_t = made.teacher.apply(params["teacher"], batch).logits
    kl = np.asarray(distill.token_divergence("forward_kl", z_s, z_t))[:, :-1]
    there = batch["label_mask"][:, 1:] > 0
    assert whole.kl == pytest.approx(kl[there], abs=1e-5)
    found = measure.difficulty(whole)
    half = (
        found["easy"]["tokens"] * found["easy"]["kl"]
        + found["hard"]["tokens"] * found["hard"]["kl"]
    )
    assert half / len(whole.kl) == pytest.approx(whole.kl.mean(), rel=1e-6)


STEPS = [
    {"scheme": "kd", "vocab_chunk": 4},
    {"scheme": "kd", "token_chunk": 4},
    {"scheme": "kd", "policy": "mix_request", "mix_with": "teacher", "share": 0.0},
    {"scheme": "kd", "policy": "imperfect", "weight": 1.0, "teacher_dtype": "bfloat16"},
    {"scheme": "dkd"},
    {"scheme": "seqkd"},
    {"scheme": "imitkd"},
    {"scheme": "gkd"},
    {"scheme": "minillm"},
    {"scheme": "atkd", "microbatches": 2, "mesh": "data=4,model=2"},
    {"scheme": "kid"},
    {"scheme": "dwt"},
]


@pytest.mark.parametrize("given", STEPS, ids=lambda g: "-".join(map(str, g.values())))
def test_every_scheme_takes_a_step(tiny, given):
    made = build(language(tiny, **given))
    state = start(made.pieces)
    old = jax.device_get(state.full())
    batch = next(made.pieces.batches)
    state, metrics = made.pieces.train(state, batch)
    loss, weight = (float(x) for x in metrics["loss"])
    assert np.isfinite(loss)
    assert weight > 0
    new = jax.device_get(state.full())
    same = jax.tree.map(lambda a, b: bool((a == b).all()), old, new)
    assert jax.tree.all(same["teacher"])
    assert not jax.tree.all(same["student"])


def test_replay_keeps_old_texts_and_its_threshold(tiny):
    made = build(language(tiny, scheme="distillm", capacity=16))
    batches = made.pieces.batches
    state = start(made.pieces)
    assert batches.threshold == (0.0, None)
    for loss in (1.0, 1.05, 1.2):  # the third is worse by more than 0.1
        made.pieces.heard({"loss": loss})
    assert batches.threshold == pytest.approx((0.1, 1.2))
    again = build(language(tiny, scheme="distillm", capacity=16)).pieces.batches
    next(batches)
    again.set_state(json.loads(json.dumps(batches.get_state())))
    assert again.threshold == pytest.approx((0.1, 1.2))
    assert (next(again)["input_ids"] == next(batches)["input_ids"]).all()
    # A threshold of 1 always takes the student's texts, and the buffer fills.
    batches.threshold = batches.threshold._replace(phi=1.0)
    for count in (8, 16):
        state, _ = made.pieces.train(state, next(batches))
        assert int(state.extra["replay"].size) == count
    assert made.pieces.train.compiles == 1


def test_a_replaying_run_resumes(tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = (f"--teacher={tiny.llama}", "--student=teacher:layers=1", "--scheme=distillm")
    more = ("--steps=2", "--save-every=1", "--eval-every=1", "--capacity=8", "--samples=0")
    assert cli.main(written(tiny, whole, *given, *more)) == 0
    shutil.copytree(whole, broken)
    (broken / "results.json").unlink()
    shutil.rmtree(broken / "checkpoints" / "2")
    assert cli.main(written(tiny, broken, *given, *more, "--resume")) == 0
    assert losses(broken) == losses(whole)


def test_labels_that_are_all_masked(tiny):
    """Nothing to learn from is a mistake, and no loss of 0."""
    from steppe.data.dataset import Ragged

    made = build(language(tiny, scheme="kd"))
    held = made.pieces.data.splits["train"]
    none = Ragged(np.zeros_like(held.label_mask.flat), held.label_mask.starts)
    data = dataclasses.replace(
        made.pieces.data, splits={"train": dataclasses.replace(held, label_mask=none)}
    )
    check_labels(made.pieces.data, made.pieces.config.data)
    with pytest.raises(ValueError, match="the training split: no label counts"):
        check_labels(data, made.pieces.config.data)


def test_prompts_of_plain_texts_and_of_rows_that_are_none():
    data = DataConfig(task="lm", max_length=8, packed=False)
    given = DistillConfig(
        teacher="x", data=data, scheme="gkd", prompt_tokens=3, student="teacher:layers=1"
    )
    ids = np.array([[5, 6, 7, 8, 9, 2], [5, 6, 0, 0, 0, 0], [0] * 6], np.int32)
    mask = (ids > 0).astype(np.float32)
    mask[:, 0] = 0
    batch = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int32), "labels": ids}
    made, real = texts.prompted({**batch, "label_mask": mask}, given, 0)
    assert made["input_ids"].shape == (3, 8)
    assert real.tolist() == [True, True, False]
    assert made["label_mask"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert made["label_mask"][1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    # A padding row stands for the first text, and is left out of the loss by ``real``.
    assert (made["input_ids"][2] == made["input_ids"][0]).all()
