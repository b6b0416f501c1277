"""Whose texts: prompts, continuations in fixed shapes, coins, mixtures, the adaptive replay."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import decoding
from steppe.train import distill, mesh
from steppe.train.distill import policies, replay

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
GREEDY = decoding.Settings(max_new_tokens=64)
KEY = jax.random.key(0)


@functools.cache
def models():
    student = small.decoder()
    return student, small.start(student), small.teacher()


def check_form(new, batch):
    """Prompts kept, answers labelled and contiguous, rows padded; returns the answers."""
    answers = []
    _, prompts = policies.split_prompts(batch)
    room = small.LENGTH - max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        ids, mask = new["input_ids"][row], new["label_mask"][row]
        real = int(new["attention_mask"][row].sum())
        assert list(ids[: len(prompt)]) == prompt
        assert not mask[: len(prompt)].any()
        assert mask[len(prompt) : real].all()
        assert not mask[real:].any()
        assert not ids[real:].any()
        np.testing.assert_array_equal(new["labels"][row], ids)
        answer = list(ids[len(prompt) : real])
        assert small.EOS not in answer[:-1]
        assert answer[-1] == small.EOS or len(answer) == room
        answers.append(answer)
    assert new["input_ids"].shape == batch["input_ids"].shape
    return answers


def test_students_answers_are_those_that_the_model_generates():
    student, params, _ = models()
    batch = {**small.batch(), "example_index": np.arange(small.ROWS)}
    policy = policies.student(student, eos_id=small.EOS, settings=GREEDY)
    new = policy(params, batch, KEY)
    answers = check_form(new, batch)
    _, prompts = policies.split_prompts(batch)
    found = decoding.generate(
        student,
        params,
        decoding.pad_prompts(prompts),
        decoding.Settings(max_new_tokens=small.LENGTH - 2),
        eos_id=small.EOS,
    )
    for row, answer in enumerate(answers):
        assert answer == list(found.tokens[row, : found.lengths[row]])
    np.testing.assert_array_equal(new["example_index"], batch["example_index"])
    again = policy({"student": params, "teacher": {}}, batch, KEY)
    np.testing.assert_array_equal(again["input_ids"], new["input_ids"])


def test_a_sharded_student_writes_the_same_and_nothing_is_compiled_again(devices, monkeypatch):
    made = []
    monkeypatch.setattr(
        policies, "make", lambda model: made.append(decoding.make(model)) or made[0]
    )
    student, params, _ = models()
    plan = mesh.plan({"data": 2, "model": 2}, student.axes, devices=devices[:4])
    policy = policies.student(student, eos_id=small.EOS, settings=GREEDY)
    plain = policy(params, small.batch(), KEY)
    placed = plan.place(params)
    assert not placed["layers"]["ffn"]["out"]["kernel"].sharding.is_fully_replicated
    new = policy(placed, small.batch(), KEY)
    np.testing.assert_array_equal(new["input_ids"], plain["input_ids"])
    other = jax.tree.map(lambda x: x * 1.5, placed)  # as after a step of training
    before = made[0].compiles
    again = policy(other, small.batch(seed=3), KEY)
    assert again["label_mask"].any(1).all()
    assert made[0].compiles == before


def test_the_padding_rows_of_a_last_batch_are_no_texts():
    student, params, _ = models()
    batch = small.batch()
    batch["attention_mask"][-1, 1:] = 0
    batch["label_mask"][-1] = 0
    policy = policies.student(student, eos_id=small.EOS, settings=GREEDY)
    new = policy(params, batch, KEY)
    whole = policy(params, small.batch(), KEY)
    assert new["label_mask"][:-1].any(1).all()
    assert not new["label_mask"][-1].any()
    np.testing.assert_array_equal(new["input_ids"][:-1], whole["input_ids"][:-1])
    nothing = {**batch, "attention_mask": np.eye(1, small.LENGTH, dtype=np.int32)}
    nothing["attention_mask"] = np.repeat(nothing["attention_mask"], small.ROWS, 0)
    nothing["label_mask"] = np.zeros_like(batch["label_mask"])
    np.testing.assert_array_equal(policy(params, nothing, KEY)["input_ids"], batch["input_ids"])
    with pytest.raises(ValueError, match="row 0 has no labelled token"):
        policy(params, {**batch, "label_mask": nothing["label_mask"]}, KEY)


def test_prompts_of_different_lengths_and_paddings():
    student, params, _ = models()
    batch = small.batch()
    batch["label_mask"][1, 2:4] = 0  # a longer prompt
    left = {
        k: np.stack(
            [np.roll(r, small.LENGTH - n) for r, n in zip(v, batch["attention_mask"].sum(1))]
        )
        for k, v in batch.items()
    }
    policy = policies.student(student, eos_id=small.EOS, settings=GREEDY)
    new = policy(params, batch, KEY)
    check_form(new, batch)
    for name, value in policy(params, left, KEY).items():
        np.testing.assert_array_equal(value, new[name])


def test_the_teacher_answers_too_and_sampling_depends_on_the_key():
    _, params, teacher = models()
    batch = small.batch()
    theirs = policies.teacher(teacher, eos_id=small.EOS)
    one, same, other = (theirs(params, batch, k) for k in (KEY, KEY, jax.random.key(1)))
    check_form(one, batch)
    np.testing.assert_array_equal(one["input_ids"], same["input_ids"])
    assert (one["input_ids"] != other["input_ids"]).any()
    ours = policies.student(teacher.model, eos_id=small.EOS)(teacher.params, batch, KEY)
    np.testing.assert_array_equal(ours["input_ids"], one["input_ids"])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mixture_of_one_is_that_one(share):
    student, params, teacher = models()
    batch = small.batch()
    mixed = policies.mix_token(student, teacher, share=share, eos_id=small.EOS, settings=GREEDY)
    alone = (
        policies.teacher(teacher, eos_id=small.EOS, settings=GREEDY)
        if share
        else policies.student(student, eos_id=small.EOS, settings=GREEDY)
    )
    np.testing.assert_array_equal(
        mixed(params, batch, KEY)["input_ids"], alone(params, batch, KEY)["input_ids"]
    )


def test_mixed_tokens_have_the_average_of_both_distributions():
    student, params, teacher = models()
    batch = {k: np.repeat(v[:1], 2048, 0) for k, v in small.batch().items()}
    policy = policies.mix_token(student, teacher, share=0.5, eos_id=small.EOS)
    new = policy(params, batch, KEY)
    first = np.bincount(new["input_ids"][:, 2], minlength=small.VOCAB) / 2048
    prompt = {"input_ids": batch["input_ids"][:1, :2]}
    p, q = (
        np.asarray(jax.nn.softmax(m.apply(w, prompt).logits[0, -1]))
        for m, w in ((teacher.model, teacher.params), (student, params))
    )
    mean = (p + q) / 2
    assert np.abs(first - mean).sum() < 0.13
    assert min(np.abs(first - p).sum(), np.abs(first - q).sum()) > 0.2


def test_one_coin_a_batch():
    calls = []

    def mark(name):
        return lambda params, batch, key: calls.append(name) or {"name": name}

    policy = distill.policies.mix_request(mark("student"), mark("fixed"), share=0.3)
    for i in range(200):
        policy({}, {}, jax.random.key(i))
    assert 40 < calls.count("student") < 80
    assert len(calls) == 200
    assert policies.mix_request(mark("student"), share=0.0)({}, {"a": 1}, KEY) == {"a": 1}
    assert policies.gt()({}, {"a": 1}, KEY) == {"a": 1}


def test_a_student_that_is_its_teacher_has_no_loss_on_any_text():
    student, params, _ = models()
    twin = distill.Teacher(student, params)
    batch = small.batch()
    objective = distill.kd(student, twin, kind="jsd")
    for policy in (policies.gt(), policies.student(student, eos_id=small.EOS)):
        out = jax.jit(objective)(params, policy(params, batch, KEY), None)
        np.testing.assert_allclose(out.total, 0, atol=1e-5)


def test_new_batches_and_parameters_compile_nothing(monkeypatch):
    student, params, teacher = models()
    made = []

    def make(model):
        made.append(decoding.make(model))
        return made[-1]

    monkeypatch.setattr(policies, "make", make)
    ours = policies.student(student, eos_id=small.EOS)
    mixed = policies.mix_token(student, teacher, eos_id=small.EOS)
    for seed in range(3):
        now = jax.tree.map(lambda x, seed=seed: x * (1 + seed / 10), params)
        for policy in (ours, mixed):
            policy(now, small.batch(seed), jax.random.key(seed))
    assert [run.compiles for run in made] == [2, 2]  # one for prompts, one for the loop


def test_bad_prompts():
    student, params, teacher = models()
    policy = policies.student(student, eos_id=small.EOS)
    batch = small.batch()
    with pytest.raises(ValueError, match="has segment_ids: rows of several texts"):
        policy(params, {**batch, "segment_ids": batch["attention_mask"]}, KEY)
    with pytest.raises(ValueError, match="row 0 has no labelled token"):
        policy(params, {**batch, "label_mask": 0 * batch["label_mask"]}, KEY)
    with pytest.raises(ValueError, match="row 0 has no token before its first labelled one"):
        policy(params, {**batch, "label_mask": batch["attention_mask"]}, KEY)
    full = {k: v[1:2] for k, v in batch.items()}
    full["label_mask"] = np.zeros_like(full["label_mask"])
    full["label_mask"][:, -1] = 1
    cut = {k: v[:, :-1] for k, v in full.items()}
    cut["label_mask"][:, -1] = 1
    policy(params, cut, KEY)  # one token of room
    for call in (
        lambda: policies.mix_token(student, teacher, share=2, eos_id=None),
        lambda: policies.mix_request(policy, share=-1),
    ):
        with pytest.raises(ValueError, match=r"share must be a number in \[0, 1\]"):
            call()
    with pytest.raises(ValueError, match="this model does not generate"):
        policies.student(small.encoder(), eos_id=None)


# Replay --------------------------------------------------------------------------------------


def test_the_threshold_moves_by_a_sequence_of_losses():
    state, seen = replay.Threshold(), []
    for loss in (2.0, 1.5, 2.05, 2.1, 2.2, 2.25, 2.31):
        state = replay.adapt(state, loss)
        seen.append(round(state.phi, 3))
    # 2.0 is the first; 2.1 and 2.2 exceed the last one that counted by 0.1
    assert seen == [0.0, 0.0, 0.0, 0.1, 0.2, 0.2, 0.3]
    for loss in range(3, 20):
        state = replay.adapt(state, float(loss))
    assert state.phi == 1.0
    with pytest.raises(ValueError, match="loss must be a finite number, got nan"):
        replay.adapt(state, float("nan"))


def test_what_is_decided():
    def at(r, step, **how):
        return replay.decide(r, 0.4, step, 10, **{"full": True, **how})

    assert at(0.5, 0) == "data"
    assert at(0.3, 0) == "generate"
    assert at(0.3, 5) == "replay"  # 0.4 * 0.5 < 0.3
    assert at(0.3, 5, full=False) == "generate"
    assert at(0.1, 5) == "generate"
    assert replay.decide(0.0, 0.0, 0, 10, full=True) == "data"
    with pytest.raises(ValueError, match=r"step must lie in 0\.\.total"):
        at(0.1, 11)


def test_the_buffer_keeps_the_newest_rows():
    rows = {"x": np.arange(3)[:, None], "y": np.float32(np.arange(3)), "scalar": np.float32(1)}
    held = replay.buffer(rows, 5)
    assert set(held.rows) == {"x", "y"}
    others = replay.push._cache_size()  # of whatever ran in this process before
    for i in range(3):
        held = replay.push(held, {k: v + 10 * i for k, v in rows.items()})
    assert int(held.size) == 5
    assert sorted(np.array(held.rows["y"]).tolist()) == [11, 12, 20, 21, 22]
    assert replay.push._cache_size() <= others + 1
    drawn = replay.draw(held, KEY, 64)
    assert set(np.array(drawn["y"]).tolist()) == {11, 12, 20, 21, 22}
    np.testing.assert_array_equal(drawn["x"][:, 0], drawn["y"])
    with pytest.raises(ValueError, match="capacity must be at least the 3 rows"):
        replay.buffer(rows, 2)


def test_adaptive_steps():
    batch = {"x": np.zeros((2, 1), np.float32)}

    def generate(params, batch, key):
        return {"x": batch["x"] + 1}

    held, choices = replay.buffer(batch, 4), []
    for i in range(60):
        new, held, choice = replay.adaptive(
            generate, held, replay.Threshold(0.5), {}, batch, jax.random.key(i), step=i, total=60
        )
        choices.append(choice)
        assert float(jnp.asarray(new["x"]).max()) == (0 if choice == "data" else 1)
    assert {"data", "generate", "replay"} == set(choices)
    assert choices.index("generate") < choices.index("replay")
    assert 15 < choices.count("data") < 45


@pytest.mark.parametrize("who", ["student", "teacher", "mix_token"])
def test_nobody_writes_the_padding_of_a_vocabulary(who):
    """Where the two are padded differently, no token is written that one of them lacks."""
    wide, narrow = small.decoder(vocab=small.VOCAB + 8), small.decoder(vocab=small.VOCAB + 2)
    params, other = small.start(wide, 3), small.start(narrow, 4)
    for own in (params, other):  # both would rather write padding
        kernel = own["head"]["out"]["kernel"]
        own["head"]["out"]["kernel"] = kernel.at[:, small.VOCAB :].multiply(50.0)
    taught = distill.Teacher(narrow, other)
    how = {"eos_id": small.EOS, "vocab": small.VOCAB}
    policy = {
        "student": lambda: policies.student(wide, **how),
        "teacher": lambda: policies.teacher(taught, **how),
        "mix_token": lambda: policies.mix_token(wide, taught, **how),
    }[who]()
    batch = small.batch()
    new = policy(params, batch, KEY)
    check_form(new, batch)
    assert new["input_ids"].max() < small.VOCAB
    objective = distill.kd(wide, taught, vocab=small.VOCAB)
    assert np.isfinite(objective(params, new, None).total)
