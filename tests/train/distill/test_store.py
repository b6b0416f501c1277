"""Stores of teachers: what is read is what was predicted, and nothing else is read."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from steppe.models.model import Model, ModelOut
from steppe.models.pretrained import Loaded
from steppe.train.distill import offline, store, topk
from steppe.train.distill.pairs import targets
from steppe.train.distill.store import Example, Identity, Store, StoreError, Writer

V, K = 40, 6
WHO = Identity("teacher-a", "tokenizer-a", "data-a")


def bigram() -> Model:
    def apply(params, batch, *, rng=None, train=False, **_):
        return ModelOut(params["table"][batch["input_ids"]], None)

    return Model(config=None, init=lambda key: {}, apply=apply, axes=())


@pytest.fixture(scope="module")
def teacher():
    table = 3 * np.random.default_rng(0).normal(size=(V, V)).astype(np.float32)
    return Loaded(bigram(), {"table": jnp.asarray(table)}, None)


def batches(size=3, width=8, rows=10, order=None):
    """Ten rows of 3 to 7 tokens, the first of them unlabelled, the last batch padded."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, V, 3 + i % 5).astype(np.int32) for i in range(rows)]
    order = list(range(rows)) if order is None else order
    for at in range(0, rows, size):
        batch = {
            "input_ids": np.zeros((size, width), np.int32),
            "label_mask": np.zeros((size, width), np.float32),
            "example_index": np.full(size, -1, np.int32),
        }
        for place, row in enumerate(order[at : at + size]):
            n = len(texts[row])
            batch["input_ids"][place, :n] = texts[row]
            batch["label_mask"][place, 1:n] = 1
            batch["example_index"][place] = row
        batch["labels"] = batch["input_ids"]
        yield batch


def write(folder, teacher, **options):
    how = {"tokenizer": "t", "dataset": "d", "k": K, "dtype": "float32", "shard_tokens": 12}
    return offline.write(folder, teacher, batches(), **{**how, **options})


def example(seed, n=4, k=K):
    rng = np.random.default_rng(seed)
    logits = 4 * rng.normal(size=(n, V))
    found = topk.top_k(jnp.asarray(logits, jnp.float32), k)
    return Example(rng.integers(0, V, n).astype(np.int32), *(np.asarray(x) for x in found))


# What is kept ----------------------------------------------------------------------------------


def bound(log_p, dtype):
    """The largest error that the module promises."""
    if dtype == "float32":
        return np.zeros_like(log_p)
    if dtype == "float16":
        return np.abs(log_p) / 2**11 + 1e-7
    spread = log_p.max(-1, keepdims=True) - log_p.min(-1, keepdims=True)
    return np.broadcast_to(spread / 508 * (1 + 1e-4) + 1e-5, log_p.shape)


@pytest.mark.parametrize("dtype", store.DTYPES)
def test_the_largest_error_is_as_promised(dtype):
    log_p = np.sort(log_softmax(6 * np.random.default_rng(0).normal(size=(500, V)), -1))[:, ::-1]
    log_p = log_p[:, :16].astype(np.float32)
    log_p[0] = log_p[0, 0]  # all alike
    log_p[1, 5:] = -np.inf
    stored, error = store.encode(log_p, dtype)
    back = store.decode(stored)
    np.testing.assert_array_equal(np.isinf(back), np.isinf(log_p))
    some = np.isfinite(log_p).all(-1)
    assert (np.abs(back[some] - log_p[some]) <= bound(log_p[some], dtype)).all()
    finite = np.isfinite(log_p)
    assert error == pytest.approx(np.abs(back[finite] - log_p[finite]).max(), abs=1e-9)
    assert error < {"float32": 1e-9, "float16": 0.02, "int8": 0.06}[dtype]
    if dtype == "int8":
        assert stored["log_p"].nbytes * 4 == log_p.nbytes
        np.testing.assert_array_equal(back[0], log_p[0])


@pytest.mark.parametrize("dtype", store.DTYPES)
def test_what_is_read_is_what_the_teacher_says(teacher, tmp_path, dtype):
    at = write(tmp_path / "s", teacher, dtype=dtype)
    held = Store(at)
    assert len(held) == 10
    assert len(held.manifest["shards"]) > 2
    log_p = log_softmax(np.asarray(teacher.params["table"], np.float64), -1)
    slack = {"float32": 1e-5, "float16": 0.02, "int8": 0.06}[dtype]
    tokens = 0
    for batch in batches():
        for place, row in enumerate(batch["example_index"]):
            if row < 0:
                continue
            found = held.example(row)
            text = batch["input_ids"][place, : len(found.labels) + 1]
            np.testing.assert_array_equal(found.labels, text[1:])
            wanted = log_p[text[:-1]]  # the logits before each label
            np.testing.assert_array_equal(found.ids, np.argsort(-wanted, -1)[:, :K])
            top = np.take_along_axis(wanted, found.ids.astype(np.int64), -1)
            np.testing.assert_allclose(found.log_p, top, atol=2 * slack)
            rest = np.log(1 - np.exp(top).sum(-1))
            np.testing.assert_allclose(found.log_rest, rest, atol=2 * slack)
            every = np.concatenate([found.log_p, found.log_rest[:, None]], 1)
            np.testing.assert_allclose(logsumexp(every, axis=1), 0, atol=1e-6)
            tokens += len(found.labels)
    assert held.manifest["tokens"] == tokens
    assert held.manifest["max_error"] <= slack


def test_all_of_a_vocabulary_and_masked_logits(tmp_path):
    """k = V leaves no remainder; tokens that cannot occur stay impossible, in int8 too."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)), jnp.float32)
    logits = logits.at[:, 7:].set(-jnp.inf)
    found = Example(np.arange(3, dtype=np.int32), *map(np.asarray, topk.top_k(logits, V)))
    for dtype in store.DTYPES:
        with Writer(tmp_path / dtype, WHO, k=V, vocab_size=V, dtype=dtype) as writer:
            writer.add(5, found)
        back = Store(tmp_path / dtype).example(5)
        assert np.isneginf(back.log_rest).all()
        assert np.isneginf(back.log_p[:, 7:]).all()
        np.testing.assert_allclose(back.log_p[:, :7], found.log_p[:, :7], atol=0.02)


def test_columns_stand_where_the_students_logits_do(teacher, tmp_path):
    held = Store(write(tmp_path / "s", teacher))
    log_p = log_softmax(np.asarray(teacher.params["table"], np.float64), -1)
    order = np.random.default_rng(2).permutation(10).tolist()
    for batch in batches(4, 11, order=order):  # shuffled, other widths and sizes
        found = offline.columns(held, batch)
        labelled = np.roll(batch["label_mask"], -1, axis=1)
        np.testing.assert_array_equal(found["teacher_mask"], labelled)
        on = labelled > 0
        wanted = np.sort(log_p[batch["input_ids"]], -1)[..., ::-1][..., :K]
        np.testing.assert_allclose(found["teacher_log_p"][on], wanted[on], atol=1e-5)
        assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_distillation_from_a_store_is_that_from_the_teacher(teacher, tmp_path, kind):
    held = Store(write(tmp_path / "s", teacher, temperature=2.0))
    student = bigram()
    params = {"table": jnp.asarray(np.random.default_rng(5).normal(size=(V, V)), jnp.float32)}
    objective = offline.stored_kd(student, held, kind=kind)
    batch = next(batches())
    full = {**batch, **offline.columns(held, batch)}

    def direct(params):
        z_s = params["table"][batch["input_ids"]]
        z_t = teacher.params["table"][batch["input_ids"]]
        value = topk.topk_divergence(kind, z_s, z_t, k=K, temperature=2.0)
        return (value * np.roll(batch["label_mask"], -1, axis=1)).sum()

    out = objective(params, full, None)
    assert float(out.weight) == batch["label_mask"].sum()
    np.testing.assert_allclose(out.total, direct(params), rtol=1e-5)
    grads = [
        jax.grad(lambda p: objective(p, full, None).total)(params)["table"],
        jax.grad(direct)(params)["table"],
    ]
    np.testing.assert_allclose(*grads, atol=1e-5)
    np.testing.assert_allclose(
        objective(teacher.params, full, None).total, 0, atol=1e-4
    )  # the teacher is its own best student
    with pytest.raises(ValueError, match="the batch lacks teacher_ids"):
        objective(params, batch, None)
    with pytest.raises(ValueError, match="kind must be one of"):
        offline.stored_kd(student, held, kind="no")


def test_reading_maps_the_files(teacher, tmp_path):
    held = Store(write(tmp_path / "s", teacher))
    held.check()
    assert isinstance(held._shard(0).read("log_p"), np.memmap)


# Interrupted and damaged -----------------------------------------------------------------------


def test_a_killed_writer_goes_on_after_the_last_shard(tmp_path):
    """A process that ends without a word in the middle of a shard, and another after it."""
    code = f"""
import os, numpy as np
from steppe.train.distill.store import *
w = Writer({str(tmp_path / "s")!r}, Identity(*{tuple(WHO)!r}), k=2, vocab_size=9, shard_tokens=6)
for row in range(int(os.environ["FROM"]), 10):
    if row in w: continue
    n = 2
    w.add(row, Example(np.full(n, row, np.int32), np.zeros((n, 2), np.int32) + [0, 1],
        np.log(np.full((n, 2), .25, np.float32)), np.log(np.full(n, .5, np.float32))))
    if row == 7 and os.environ["FROM"] == "0":
        open({str(tmp_path / "s" / ".shard-00009.safetensors")!r}, "w").write("half")
        os._exit(9)
w.finish()
"""

    run = [sys.executable, "-c", code]
    env = {**os.environ, "FROM": "0"}
    assert subprocess.run(run, env=env, check=False).returncode == 9
    with pytest.raises(StoreError, match=r"unfinished \(6 examples\); run its writer again"):
        Store(tmp_path / "s")
    assert sorted(Store(tmp_path / "s", partial=True)._index()) == list(range(6))
    before = (tmp_path / "s" / "shard-00000.safetensors").stat().st_mtime_ns
    subprocess.run(run, env={**env, "FROM": "1"}, check=True)
    held = Store(tmp_path / "s")
    assert [held.example(row).labels[0] for row in range(10)] == list(range(10))
    assert (tmp_path / "s" / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert not list((tmp_path / "s").glob(".*"))


def test_rows_that_are_there_are_not_computed_again(teacher, tmp_path):
    seen = []

    def half():
        for batch in batches():
            if 6 in batch["example_index"]:
                raise KeyboardInterrupt
            yield batch

    how = {"tokenizer": "t", "dataset": "d", "k": K, "shard_tokens": 12}
    with pytest.raises(KeyboardInterrupt):
        offline.write(tmp_path / "s", teacher, half(), **how)
    there = len(Store(tmp_path / "s", partial=True))
    assert 0 < there <= 6
    at = offline.write(
        tmp_path / "s", teacher, batches(), **how, progress=lambda *a: seen.append(a)
    )
    assert seen[-1] == (10, Store(at).manifest["tokens"])
    assert sorted(Store(at)._index()) == list(range(10))
    with pytest.raises(StoreError, match="holds a complete store of 10 examples"):
        offline.write(tmp_path / "s", teacher, batches(), **how)


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_shard_is_named_and_replaced(teacher, tmp_path, damage):
    at = write(tmp_path / "s", teacher)
    wanted = {row: Store(at).example(row) for row in range(10)}
    file = at / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[-3] ^= 4
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-10])
    else:
        file.unlink()
    what = {"bit": "is damaged: SHA-256", "cut": "is damaged: .* bytes", "gone": "is missing"}
    with pytest.raises(StoreError, match=rf"shard-00001\.safetensors {what[damage]}") as error:
        Store(at).check()
    assert "\n" not in str(error.value)
    with pytest.raises(StoreError, match="shard-00001"):
        Store(at).example(5)
    if damage == "bit":  # of no harm to the other shards
        np.testing.assert_array_equal(Store(at).example(9).log_p, wanted[9].log_p)
    write(tmp_path / "s", teacher)
    for row, whole in wanted.items():
        for a, b in zip(whole, Store(at).example(row), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_store_of_something_else_is_refused(teacher, tmp_path):
    at = write(tmp_path / "s", teacher)
    right = offline.teacher_hash(teacher.model, teacher.params)
    Store(at, teacher=right, tokenizer="t", dataset="d")
    other = {"table": teacher.params["table"].at[0, 0].add(1e-3)}
    wrong = offline.teacher_hash(teacher.model, other)
    for name, value, mine in (("teacher", wrong, right), ("tokenizer", "x", "t"),
                              ("dataset", "y", "d")):  # fmt: skip
        with pytest.raises(StoreError, match=f"another {name}: '{mine}', here it is '{value}'"):
            Store(at, **{name: value})
    with pytest.raises(StoreError, match=f"another teacher: '{right}', here it is '{wrong}'"):
        write(at, Loaded(teacher.model, other, None))
    with pytest.raises(StoreError, match="another k: 6, here it is 5"):
        write(at, teacher, k=5)
    bfloat = {"table": teacher.params["table"].astype(jnp.bfloat16)}
    assert offline.teacher_hash(teacher.model, bfloat) != right


def test_other_data_are_refused(teacher, tmp_path):
    held = Store(write(tmp_path / "s", teacher))
    batch = next(batches())
    batch["labels"] = batch["input_ids"] = (batch["input_ids"] + 1) % V
    with pytest.raises(StoreError, match="row 0 has 2 labelled tokens that are not the 2"):
        offline.columns(held, batch)
    batch["example_index"][0] = 77
    with pytest.raises(StoreError, match="row 77 is not in the store"):
        offline.columns(held, batch)


def test_other_prompts_before_the_same_labels_are_refused(teacher, tmp_path):
    """Under an attention mask, whatever the padding is; and in stores that know no prompts."""

    def seen(batch, width, pad):
        more = {}
        for name in ("input_ids", "label_mask"):
            fill = pad if name == "input_ids" else 0
            more[name] = np.full((3, width), fill, batch[name].dtype)
            more[name][:, :8] = batch[name]
        there = np.zeros((3, width), np.int32)
        there[:, :8] = (np.cumsum(batch["label_mask"][:, ::-1], 1)[:, ::-1] > 0) | (
            np.arange(8) == 0
        )
        more["input_ids"] = np.where(there > 0, more["input_ids"], pad)
        return {**batch, **more, "labels": more["input_ids"], "attention_mask": there}

    first = next(batches())
    held = Store(
        offline.write(tmp_path / "s", teacher, [seen(first, 8, 0)], tokenizer="", dataset="", k=2)
    )
    offline.columns(held, seen(first, 11, 7))
    other = seen(first, 11, 7)
    other["input_ids"] = other["input_ids"].copy()
    other["input_ids"][1, 0] = (other["input_ids"][1, 0] + 1) % V
    with pytest.raises(StoreError, match=r"row 1 .* behind another prompt, or cut elsewhere"):
        offline.columns(held, other)
    with Writer(tmp_path / "old", WHO, k=2, vocab_size=V, shift=True) as writer:
        for row in range(3):
            writer.add(row, held.example(row)._replace(read=0))
    offline.columns(Store(tmp_path / "old"), other)  # nobody knows


def test_negative_labels_count_as_masked(teacher, tmp_path):
    batch = next(batches())
    labels = batch["labels"].copy()
    labels[2, 2] = -100
    batch["labels"] = labels
    held = Store(offline.write(tmp_path / "s", teacher, [batch], tokenizer="", dataset="", k=2))
    _, mask = targets(batch, True)
    np.testing.assert_array_equal(offline.columns(held, batch)["teacher_mask"], mask)
    # At the place of an ignored label any other may stand.
    other = {**batch, "label_mask": batch["label_mask"].copy()}
    other["label_mask"][2, 2] = 0
    np.testing.assert_array_equal(offline.columns(held, other)["teacher_mask"], mask)


def test_hashes_of_vocabularies():
    import tokenizers

    class Held:
        def __init__(self, table):
            self.backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, "a"))

    one = offline.tokenizer_hash(Held({"a": 0, "b": 1}))
    assert one == offline.tokenizer_hash(Held({"b": 1, "a": 0}))
    assert one != offline.tokenizer_hash(Held({"a": 1, "b": 0}))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: Writer(p, WHO, k=0, vocab_size=V), ValueError, r"k must lie in 1\.\.40"),
        (lambda p: Writer(p, WHO, k=41, vocab_size=V), ValueError, r"k must lie in 1\.\.40"),
        (lambda p: Writer(p, WHO, k=1, vocab_size=V, dtype="int4"), ValueError, "dtype must be"),
        (lambda p: Writer(p, WHO, k=1, vocab_size=V, shard_tokens=0), ValueError, "shard_tokens"),
        (lambda p: Writer(p, WHO, k=1, vocab_size=V).finish(), ValueError, "would be empty"),
        (lambda p: Store(p), FileNotFoundError, "holds no manifest.json"),
        (lambda p: store.encode(np.full((1, 2), np.nan), "int8"), ValueError, "NaN logits"),
        (lambda p: store.encode(np.full((1, 2), 1.0), "int8"), ValueError, "log probabilities"),
    ],
)
def test_bad_arguments(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path / "s")


def test_bad_examples_and_manifests(tmp_path):
    writer = Writer(tmp_path / "s", WHO, k=K, vocab_size=V)
    writer.add(3, example(0))
    with pytest.raises(ValueError, match="row 3 is in the store already"):
        writer.add(3, example(0))
    with pytest.raises(ValueError, match=r"must have ids and log_p \[4, 6\]"):
        writer.add(4, example(0, k=5))
    with pytest.raises(ValueError, match="batches must not be empty"):
        offline.write(tmp_path / "t", Loaded(bigram(), {"table": jnp.ones((V, V))}, None), [],
                      tokenizer="", dataset="", k=2)  # fmt: skip
    file = writer.finish() / "manifest.json"
    good = json.loads(file.read_text())
    for text, message in (
        ("{", "is damaged"),
        (json.dumps({**good, "format": 9}), "has the format 9, this version reads 1"),
        (json.dumps({**good, "shards": [{"file": "../x"}]}), "outside its folder"),
        (json.dumps({**good, "k": "six"}), "manifest.json is damaged: it holds 'six' for 'k'"),
        (json.dumps([1]), "manifest.json is damaged: it lacks 'format'; write the store again"),
        *(
            (json.dumps({n: v for n, v in good.items() if n != key}), f"it lacks '{key}'; write")
            for key in store.KEYS
        ),
        *(
            (
                json.dumps({**good, "shards": [{n: v for n, v in shard.items() if n != key}]}),
                rf"manifest\.json is damaged: it lacks 'shards\[0\]\.{key}'; write the store again",
            )
            for shard in good["shards"]
            for key in ("file", *store.SHARD_KEYS)
        ),
    ):
        file.write_text(text)
        with pytest.raises(StoreError, match=message):
            Store(tmp_path / "s")


def test_a_full_disk_leaves_the_finished_shards(teacher, tmp_path, monkeypatch):
    calls = []
    real = store._save

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(store, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "s", teacher)
    monkeypatch.undo()
    there = len(Store(tmp_path / "s", partial=True))
    assert there > 0
    assert len(Store(write(tmp_path / "s", teacher))) == 10
