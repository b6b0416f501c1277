"""``steppe distill`` with decoders: whose texts are learnt from, and what the KL is made of."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.launch.config import DataConfig
from steppe.launch.distill import measure, objectives, schemes, settings, texts
from steppe.launch.distill.build import build, check_labels
from steppe.launch.distill.settings import DistillConfig
from steppe.launch.pieces import start
from steppe.models import pretrained
from steppe.models.heads import HeadConfig
from steppe.train import distill
from steppe.train.distill.pairs import Pair

from .conftest import save, write_tokenizer
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
    assert given["exposure"]["texts"] == 3
    assert given["exposure"]["length"] >= 1
    assert np.isfinite(given["exposure"]["ex_acc_err"])
    for words in ("(ExAccErr)", "By difficulty of the token", "What it writes", "<th>teacher</th>"):
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
    # Instead of what the student would write, the data's texts by one column off.
    batch, kl, there = {k: v[:8] for k, v in batch.items()}, kl[:8], there[:8]
    other = {**batch, "input_ids": np.roll(batch["input_ids"], 1, axis=1)}
    bias = measure.exposure(pair, params, batch, lambda p, b, k: other)
    z_s = made.student.apply(params["student"], other).logits
    z_t = made.teacher.apply(params["teacher"], other).logits
    worse = np.asarray(distill.token_divergence("forward_kl", z_s, z_t))[:, :-1]
    assert there.sum(1).min() == there.sum(1).max() == bias["length"]
    assert bias["texts"] == len(there)
    assert bias["per_step"] == pytest.approx(kl[there].mean(), rel=1e-2)
    assert bias["regret"] == pytest.approx(worse[there].mean() * bias["length"], rel=1e-2)
    excess = 100 * (worse[there].mean() / kl[there].mean() - 1)
    assert bias["ex_acc_err"] == pytest.approx(excess, abs=2)
    same = {"student": params["teacher"], "teacher": params["teacher"]}
    twins = Pair(made.teacher, distill.Teacher(made.teacher), True)
    assert measure.exposure(twins, same, batch, lambda p, b, k: other) is None
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
    {"scheme": "fdistill", "divergence": "jsd"},
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


def test_a_vocabulary_that_is_padded_otherwise(tiny, tmp_path):
    """Nobody writes what the other does not know; the loss is over what both have."""
    config = dataclasses.replace(pretrained.load_config(tiny.llama), layers=1)
    head = HeadConfig("lm", 1, drop=0.0)
    folder = save(tmp_path / "s", dataclasses.replace(config, vocab_size=21, head=head), 1)
    write_tokenizer(folder)
    made = build(language(tiny, scheme="minillm", student=str(folder), max_new_tokens=8))
    assert made.both.vocab == 16
    _, batch = made.pieces.train._prepare(start(made.pieces), next(made.pieces.batches))
    drawn = np.asarray(batch["label_mask"]) > 0
    assert batch["input_ids"][drawn].max() < 16
    assert np.isfinite(batch["minillm_advantage"]).all()


def test_the_median_of_filled_texts_is_that_of_all_micro_batches(tiny):
    """They are filled before the step, which then splits every part at the median of the whole."""
    given = language(tiny, scheme="atkd", policy="imperfect", batch_size=16, microbatches=2)
    made = build(given)
    state, batch = start(made.pieces), next(made.pieces.batches)
    _, filled = made.pieces.train._prepare(state, batch)
    changed = filled["input_ids"] != batch["input_ids"]
    assert changed.any()
    assert not (changed & ~filled["imperfect_mask"]).any()
    z = made.teacher.apply(jax.device_get(state.full()["teacher"]), filled).logits[:, :-1]
    unc = distill.kd_decompose(z, z, filled["labels"][:, 1:]).unc
    ordered = np.sort(np.asarray(unc)[filled["label_mask"][:, 1:] > 0])
    wanted = ordered[(len(ordered) - 1) // 2]
    assert float(filled["atkd_threshold"]) == pytest.approx(wanted, rel=1e-6)
    assert objectives.filled_before(given)  # and not again inside
    assert not objectives.filled_before(dataclasses.replace(given, microbatches=1))


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


def test_a_store_takes_the_place_of_the_teacher(tiny, tmp_path):
    """The loss is that of the teacher's top k, but for the store's rounding; it is written once."""
    folder = str(tmp_path / "store")
    made = build(language(tiny, scheme="kd", top_k=4, store=folder))
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()}
    state, batch = start(made.pieces), next(made.pieces.batches)
    params = jax.device_get(state.full())
    _, metrics = made.pieces.train(state, batch)
    z_s, z_t = (
        model.apply(params[name], batch).logits[:, :-1]
        for name, model in (("student", made.student), ("teacher", made.teacher))
    )
    labels, mask = batch["labels"][:, 1:], batch["label_mask"][:, 1:]
    kd = distill.topk_divergence("forward_kl", z_s, z_t, k=4)
    log_q = np.asarray(jax.nn.log_softmax(z_s))
    ce = -np.take_along_axis(log_q, labels[..., None], -1)[..., 0]
    wanted = float(0.5 * ((kd + ce) * mask).sum() / mask.sum())
    assert float(metrics["loss"][0]) / float(metrics["loss"][1]) == pytest.approx(wanted, rel=1e-3)
    build(language(tiny, scheme="kd", top_k=4, store=folder, steps=3))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "store").iterdir()} == files
    (shard,) = (tmp_path / "store").glob("*.safetensors")
    whole = shard.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-5], None):  # mended before the run
        shard.unlink() if damaged is None else shard.write_bytes(damaged)
        build(language(tiny, scheme="kd", top_k=4, store=folder))
        assert shard.read_bytes() == whole
    with pytest.raises(ValueError, match=r"store='.*' is a file: name the folder of a store"):
        build(language(tiny, scheme="kd", top_k=4, store=str(shard)))
    with pytest.raises(ValueError, match=r"top_k=3 is not that of store=.*, 4: give top_k 4, or"):
        build(language(tiny, scheme="kd", top_k=3, store=folder))
    with pytest.raises(ValueError, match="was made with another teacher"):
        build(language(tiny, scheme="kd", top_k=4, store=folder, teacher_dtype="bfloat16"))
    with pytest.raises(ValueError, match="store=.* belongs to scheme kd with policy gt"):
        language(tiny, scheme="kd", store=folder)
    build(language(tiny, scheme="kd", top_k=4, store=str(tmp_path / "none"), dry_run=True))
    assert not (tmp_path / "none").exists()
