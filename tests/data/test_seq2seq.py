"""Sequence to sequence: both ends closed, few joint shapes, errors that name the row."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import processors

from steppe.data import batches, collate, tasks
from steppe.data.batches import Plan
from steppe.data.dataset import Dataset, Ragged
from steppe.data.errors import DataError
from steppe.data.text import Tokenizer
from steppe.data.tokenizer_files import Special

WORDS = ["</s>", "<unk>", "the", "cat", "dog", "sat", "on", "mat", "o", "gato", "to", "German:"]


def word_tokenizer(*, closes: bool, eos: int = 0) -> Tokenizer:
    """As of Marian (the end token is not appended) or, with `closes`, of T5 (it is)."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if closes:
        backend.post_processor = processors.TemplateProcessing(
            "$0 </s>", special_tokens=[("</s>", 0)]
        )
    return Tokenizer(
        backend,
        special=Special(pad=-1 if eos >= 0 else 1, cls=-1, sep=-1, mask=-1, unk=1),
        has_token_types=False,
        max_positions=64,
        stop_ids=(eos,) if eos >= 0 else (),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["marian", "t5"])
def translator(request):
    return word_tokenizer(closes=request.param)


def pairs(*values):
    return [{"id": f"p{n}", "source": s, "target": t} for n, (s, t) in enumerate(values)]


@pytest.fixture(scope="module")
def corpus():
    """50 pairs, targets shorter and longer than their sources."""
    words = WORDS[2:10]
    text = [
        (" ".join(words[(n + i) % 8] for i in range(n * 7 % 19 + 1)),
         " ".join(words[(n + i) % 8] for i in range(n * 5 % 23 + 1)))
        for n in range(50)
    ]  # fmt: skip
    return pairs(*text)


def test_source_and_target_end_with_the_end_token(translator):
    task = tasks.Seq2Seq(source_prefix="to German: ")
    assert (task.kind, task.num_labels, task.label_names) == ("seq2seq", 0, ())
    data = task.encode(pairs(("the cat", "o gato"), ("the", "o")), translator, 16)
    assert data[0]["input_ids"].tolist() == [10, 11, 2, 3, 0]
    assert data[0]["labels"].tolist() == [8, 9, 0]
    assert data.lengths.tolist() == [5, 4]
    assert data.target_lengths.tolist() == [3, 2]
    batch = collate.collate(data, np.asarray([1, 0, -1]), (8, 4))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "input_ids": ((3, 8), np.int32),
        "attention_mask": ((3, 8), np.int32),
        "labels": ((3, 4), np.int32),
        "label_mask": ((3, 4), np.float32),
        "example_index": ((3,), np.int32),
    }
    assert batch["attention_mask"].sum(axis=1).tolist() == [4, 5, 1]
    assert batch["labels"].tolist() == [[8, 0, 0, 0], [8, 9, 0, 0], [0, 0, 0, 0]]
    assert batch["label_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_long_texts_are_cut_before_their_end(translator):
    made = pairs(("the cat sat on the mat", "o gato"), ("the cat sat on", "o " * 9), ("the", "o"))
    data = tasks.Seq2Seq(max_target=5).encode(made, translator, 4)
    assert data[0]["input_ids"].tolist() == [2, 3, 4 + 1, 0]
    assert data[1]["labels"].tolist() == [8] * 4 + [0]
    assert (data.lengths.max(), data.target_lengths.max()) == (4, 5)
    assert data.cut == 2
    whole = tasks.Seq2Seq().encode(pairs(("the cat sat", "o")), translator, 4)
    assert (whole.cut, whole[0]["input_ids"].tolist()) == (0, [2, 3, 5, 0])


def test_targets_may_have_another_tokenizer(translator):
    other = word_tokenizer(closes=True)
    made = pairs(("the cat", "o gato"))
    data = tasks.Seq2Seq().encode(made, translator, 16, target_tokenizer=other)
    assert data[0]["labels"].tolist() == [8, 9, 0]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"source": "", "target": "o"}, r"row 1 \(id 'x'\): column 'source' holds no text; drop"),
        ({"source": "the", "target": " "}, r"row 1 \(id 'x'\): column 'target' holds no text"),
        ({"source": "the", "target": "</s>"}, r"column 'target' holds only special tokens"),
        ({"source": "the"}, r"row 1 \(id 'x'\) has no column 'target', .* with target=\.\.\."),
        ({"source": "the", "target": None}, r"row 1 \(id 'x'\): column 'target' is empty"),
    ],
)
def test_bad_rows(translator, record, message):
    with pytest.raises(DataError, match=message):
        tasks.Seq2Seq().encode([*pairs(("the", "o")), {"id": "x", **record}], translator, 8)


def test_bad_settings(translator):
    made = pairs(("the", "o"))
    with pytest.raises(DataError, match="max_length 65 is more than the 64 positions"):
        tasks.Seq2Seq().encode(made, translator, 65)
    with pytest.raises(DataError, match="max_length 65 is more than the 64 positions"):
        tasks.Seq2Seq(max_target=65).encode(made, translator, 8)
    with pytest.raises(DataError, match="has no end token"):
        tasks.Seq2Seq().encode(made, word_tokenizer(closes=False, eos=-1), 8)
    data = tasks.Seq2Seq().encode(made, translator, 8)
    for wrong in ([], [(8, 0)], [(8, 8), (16, 4)], [(8, 8), (8, 8)], [(8, 8, 8)], [16, 8]):
        with pytest.raises(DataError, match=r"or pairs \(source, target\) that increase in both"):
            collate.resolve_buckets(data, wrong)
    with pytest.raises(DataError, match=r"example 0 \(id 'p0'\) has 2 target tokens, the longest"):
        collate.resolve_buckets(data, [(8, 1)])
    with pytest.raises(DataError, match="has 2 source tokens, the longest bucket 1"):
        collate.resolve_buckets(data, [(1, 8)])


def made(sources, targets):
    count = len(sources)
    return Dataset(
        kind="seq2seq",
        input_ids=Ragged.pack([[n + 5] * length for n, length in enumerate(sources)], np.int32),
        labels=Ragged.pack([[n + 5] * length for n, length in enumerate(targets)], np.int32),
        ids=[f"e{n}" for n in range(count)],
        records=[{"id": f"e{n}"} for n in range(count)],
        record_index=np.arange(count),
        pad_id=0,
    )


LENGTHS = st.tuples(st.integers(1, 60), st.integers(1, 60))


@settings(max_examples=80, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 5))
def test_every_pair_once_an_epoch_in_few_shapes(lengths, size, count):
    sources, targets = np.asarray(lengths).T
    plan = Plan(made(sources, targets), size, count, seed=1)
    assert len(plan.buckets) <= count
    table, held = plan.epoch(2)
    assert held.shape == (plan.steps_per_epoch, 2)
    assert sorted(table[table >= 0].tolist()) == list(range(len(lengths)))
    assert len(plan.shapes) <= count
    assert {(size, *map(int, pair)) for pair in held} <= plan.shapes
    for column, sizes in enumerate((sources, targets)):
        need = np.where(table >= 0, sizes[table], 0).max(axis=1)
        assert (held[:, column] >= need).all()
    report = plan.report()
    assert report.tokens == sources.sum() + targets.sum()
    assert report.padded == size * held.sum()


def test_joint_buckets_save_padding():
    generator = np.random.default_rng(0)
    sources = generator.lognormal(2.5, 0.6, 2000).astype(int).clip(1, 120)
    targets = (sources * generator.normal(1.2, 0.1, 2000)).astype(int).clip(1, 128)
    data = made(sources, targets)

    def waste(buckets):
        report = Plan(data, 16, buckets, seed=0).report()
        return 1 - report.tokens / report.padded

    assert waste(8) < 0.26 < waste(4) < 0.38 < 0.80 < waste(1)
    assert "16x" in str(Plan(data, 16, 4, seed=0).report())


def test_given_buckets(translator, corpus):
    data = tasks.Seq2Seq().encode(corpus, translator, 32)
    assert collate.resolve_buckets(data, [16, 32]) == ((16, 16), (32, 32))
    plan = Plan(data, 4, [(8, 16), (16, 16), (24, 24)], seed=0)
    assert plan.shapes <= {(4, 8, 16), (4, 16, 16), (4, 24, 24)}
    with pytest.raises(DataError, match="one length an example, but buckets holds"):
        collate.resolve_buckets(
            tasks.CausalLM(packed=False, text="source").encode(corpus, translator, 32), [(8, 8)]
        )


@pytest.mark.parametrize("backend", ["numpy", "grain"])
def test_resume_and_processes(translator, corpus, backend):
    data = tasks.Seq2Seq().encode(corpus, translator, 32)
    straight = batches.train(data, 4, seed=3, buckets=3)
    for _ in range(straight.steps_per_epoch + 2):
        next(straight)
    parts = [
        batches.train(data, 4, seed=3, buckets=3, backend=backend, process_index=i, process_count=2)
        for i in range(2)
    ]
    for part in parts:
        part.set_state(straight.get_state())
    for _ in range(straight.steps_per_epoch):
        expected, rows = next(straight), [next(part) for part in parts]
        for name, array in expected.items():
            np.testing.assert_array_equal(array, np.concatenate([row[name] for row in rows]))


def test_other_targets_are_another_order(translator, corpus):
    state = batches.train(tasks.Seq2Seq().encode(corpus, translator, 32), 4, seed=3).get_state()
    swapped = [dict(r, target=r["target"].replace("cat", "dog")) for r in corpus]
    other = batches.train(tasks.Seq2Seq().encode(swapped, translator, 32), 4, seed=3)
    with pytest.raises(DataError, match="another content"):
        other.set_state(state)


def test_evaluation_is_one_pass(translator, corpus):
    held = batches.evaluate(tasks.Seq2Seq().encode(corpus, translator, 32), 8)
    index = np.concatenate([batch["example_index"] for batch in held])
    assert sorted(index[index >= 0].tolist()) == list(range(50))
