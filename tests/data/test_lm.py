"""Causal language modelling: documents, rows, and what counts as a target."""

import numpy as np
import pytest

from steppe.data import batches, tasks
from steppe.data.batches import Plan
from steppe.data.errors import DataError
from steppe.data.text import Tokenizer
from steppe.data.tokenizer_files import Special

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "dog", "sat", "ran", "on", "mat", "good", "bad"]


def word_tokenizer(words=(), *, eos=2, positions=64, template=None):
    """A tokenizer of words, with the ends of a language model and no padding token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([*WORDS, *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>", *(w for w in words if w.startswith("<|"))])
    return Tokenizer(
        backend,
        special=Special(pad=-1 if eos >= 0 else 0, cls=-1, sep=-1, mask=-1, unk=0),
        has_token_types=False,
        max_positions=positions,
        bos_id=1,
        stop_ids=(eos,) if eos >= 0 else (),
        chat_template=template,
    )


@pytest.fixture(scope="module")
def speaker():
    return word_tokenizer()


@pytest.fixture(scope="module")
def texts():
    """60 documents of 1 to 23 words."""
    words = WORDS[3:]
    return [
        {
            "id": f"d{n}",
            "text": " ".join(words[(n + i) % len(words)] for i in range(n * 7 % 23 + 1)),
        }
        for n in range(60)
    ]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        assert first[name].dtype == second[name].dtype


def test_unpacked_rows_are_documents_with_their_end(speaker, texts):
    task = tasks.CausalLM(packed=False)
    assert (task.kind, task.num_labels, task.label_names) == ("lm", 0, ())
    data = task.encode(texts, speaker, 32)
    assert len(data) == 60
    assert data.lengths.tolist() == [len(r["text"].split()) + 1 for r in texts]
    assert all(data.input_ids[row][-1] == 2 for row in range(60))
    assert (data.cut, data.dropped, data.packing) == (0, 0, None)
    assert data.record(7) is texts[7]
    held = batches.evaluate(data, 8, buckets=(8, 16, 24))
    assert held.shapes == {(8, 8), (8, 16), (8, 24)}
    for batch in held:
        assert set(batch) == {
            "input_ids",
            "attention_mask",
            "labels",
            "label_mask",
            "example_index",
        }
        real = batch["example_index"] >= 0
        assert np.array_equal(
            batch["labels"][real],
            np.where(batch["attention_mask"][real] > 0, batch["input_ids"][real], 0),
        )
        expected = batch["attention_mask"] * real[:, None]
        expected[:, 0] = 0
        assert np.array_equal(batch["label_mask"], expected)


@pytest.mark.parametrize("method", ["best_fit", "concat"])
def test_packed_rows_hold_the_same_targets(speaker, texts, method):
    data = tasks.CausalLM(method=method).encode(texts, speaker, 32)
    alone = tasks.CausalLM(method=method).unpacked().encode(texts, speaker, 32)
    plan = Plan(data, 4, (8, 16, 64), seed=0)  # the row length, whatever is asked for
    assert plan.shapes == {(4, 32)}
    rows = [next(batches.train(data, len(data), seed=0))]
    seen = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    assert seen["segment_ids"].dtype == seen["position_ids"].dtype == np.int32
    assert np.array_equal(seen["attention_mask"], (seen["segment_ids"] > 0).astype(np.int32))
    assert (seen["label_mask"][seen["position_ids"] == 0] == 0).all()
    targets = np.sort(seen["labels"][seen["label_mask"] > 0])
    wanted = np.concatenate([alone.input_ids[row][1:] for row in range(60)])
    if method == "best_fit":
        assert np.array_equal(targets, np.sort(wanted))
        documents = [d for row in range(len(data)) for d in data.packing.documents_of(row)]
        assert sorted(documents) == list(range(60))
    else:
        assert len(data) == -(-int(alone.lengths.sum()) // 32)
        assert len(targets) == len(wanted) - (len(data.packing.document) - 60)
    assert data.record_index.tolist() == [data.packing.documents_of(r)[0] for r in range(len(data))]
    assert data.ids == [f"d{row}" for row in data.record_index]
    report = plan.report()
    assert report.tokens == alone.lengths.sum()
    assert data.packing.padding == pytest.approx(1 - report.tokens / (len(data) * 32))
    assert str(data.packing).startswith(f"60 documents in {len(data)} rows of 32 tokens, ")


def test_a_padding_row_is_one_token_that_counts_nothing(speaker, texts):
    data = tasks.CausalLM().encode(texts[:3], speaker, 32)
    batch = next(batches.train(data, 8, seed=0))
    empty = batch["example_index"] < 0
    assert empty.sum() == 8 - len(data)
    assert (batch["segment_ids"][empty].sum(axis=1) == 1).all()
    assert (batch["attention_mask"][empty].sum(axis=1) == 1).all()
    assert batch["label_mask"][empty].sum() == batch["position_ids"][empty].sum() == 0


def test_long_documents(speaker, texts):
    lengths = np.asarray([len(r["text"].split()) + 1 for r in texts])
    split = tasks.CausalLM(packed=False, overlap=4).encode(texts, speaker, 8)
    assert split.cut == (lengths > 8).sum()
    counted = sum(split.label_mask[row].sum() for row in range(len(split)))
    assert counted == (lengths - 1).sum()  # every token but the first of a document, once
    owners = np.bincount(split.record_index, minlength=60)
    assert ((owners > 1) == (lengths > 8)).all()
    cut = tasks.CausalLM(overflow="cut").encode(texts, speaker, 8)
    assert (cut.cut, cut.dropped) == ((lengths > 8).sum(), 0)
    dropped = tasks.CausalLM(overflow="drop").encode(texts, speaker, 8)
    assert (dropped.cut, dropped.dropped) == (0, (lengths > 8).sum())
    assert f"{(lengths > 8).sum()} left out" in str(dropped.packing)


def test_an_end_in_the_text_is_not_doubled_and_may_be_another_token(speaker):
    made = [{"id": "1", "text": "the cat </s>"}, {"id": "2", "text": "the dog"}]
    data = tasks.CausalLM(packed=False).encode(made, speaker, 8)
    assert data.input_ids[0].tolist() == [3, 4, 2]
    other = tasks.CausalLM(packed=False, end="<s>").encode(made, speaker, 8)
    assert other.input_ids[1].tolist() == [3, 5, 1]
    with pytest.raises(DataError, match="end '<eot>' is not a token of the tokenizer"):
        tasks.CausalLM(end="<eot>").encode(made, speaker, 8)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": ""}, r"row 1 \(id 'b'\): column 'text' holds no text; drop the row or fill it"),
        ({"text": "  \n"}, r"row 1 \(id 'b'\): column 'text' holds no text"),
        ({"text": "<s> </s>"}, r"row 1 \(id 'b'\): column 'text' holds only special tokens; drop"),
        ({"body": "the"}, r"row 1 \(id 'b'\) has no column 'text', only id, body; .* text="),
        ({"text": 3}, r"row 1 \(id 'b'\): column 'text' must be text, got 3"),
    ],
)
def test_bad_documents_name_the_row(speaker, record, message):
    with pytest.raises(DataError, match=message):
        tasks.CausalLM().encode([{"id": "a", "text": "the cat"}, {"id": "b", **record}], speaker, 8)


def test_bad_settings(speaker, tokenizer, texts):
    with pytest.raises(DataError, match="max_length 65 is more than the 64 positions"):
        tasks.CausalLM().encode(texts, speaker, 65)
    with pytest.raises(DataError, match="has no end token.*name one as eos_token"):
        tasks.CausalLM().encode(texts, word_tokenizer(eos=-1), 32)
    with pytest.raises(DataError, match="the data set is empty"):
        tasks.CausalLM().encode([], speaker, 32)
    with pytest.raises(DataError, match="use method='best_fit'"):
        tasks.CausalLM(packed=False, method="concat")
    with pytest.raises(DataError, match="overflow must be 'split', 'cut' or 'drop', got 'wrap'"):
        tasks.CausalLM(overflow="wrap")


@pytest.mark.parametrize("backend", ["numpy", "grain"])
def test_resume_in_the_middle_of_an_epoch_and_over_processes(speaker, texts, backend):
    data = tasks.CausalLM().encode(texts, speaker, 32)
    straight = batches.train(data, 4, seed=3)
    steps = straight.steps_per_epoch
    assert steps > 3
    take(straight, steps + 2)
    state = straight.get_state()
    resumed = batches.train(data, 4, seed=3, backend=backend)
    resumed.set_state(state)
    halves = [
        batches.train(data, 4, seed=3, backend=backend, process_index=i, process_count=2)
        for i in range(2)
    ]
    for half in halves:
        half.set_state(state)
    for expected in take(straight, steps):
        same(expected, next(resumed))
        parts = [next(half) for half in halves]
        same(expected, {n: np.concatenate([part[n] for part in parts]) for n in expected})


def test_every_epoch_has_every_row_once_in_another_order(speaker, texts):
    data = tasks.CausalLM().encode(texts, speaker, 32)
    plan = Plan(data, 4, None, seed=0)
    orders = [plan.epoch(epoch)[0] for epoch in range(3)]
    for order in orders:
        assert sorted(order[order >= 0].tolist()) == list(range(len(data)))
    assert not np.array_equal(orders[0], orders[1])
    again = tasks.CausalLM().encode(texts, speaker, 32)
    assert np.array_equal(again.input_ids.flat, data.input_ids.flat)


def test_a_state_of_other_rows_is_refused(speaker, texts):
    data = tasks.CausalLM(overflow="cut").encode(texts, speaker, 32)
    state = batches.train(data, 4, seed=3).get_state()
    swapped = [dict(record, text=record["text"].replace("cat", "dog")) for record in texts]
    other = tasks.CausalLM(overflow="cut").encode(swapped, speaker, 32)
    with pytest.raises(DataError, match="another content"):
        batches.train(other, 4, seed=3).set_state(state)
    alone = batches.train(tasks.CausalLM().unpacked().encode(texts, speaker, 32), 4, seed=3)
    with pytest.raises(DataError, match="the saved data state has another"):
        alone.set_state(state)


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")  # ids 12, 13, 14


@pytest.fixture(scope="module")
def chatty():
    return word_tokenizer(ROLES, template=TEMPLATE)


def turns(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]


def chats(*conversations):
    return [{"id": f"c{n}", "messages": turns(*texts)} for n, texts in enumerate(conversations)]


def test_only_answers_count(chatty):
    made = chats(("the cat", "sat"), ("the dog", "ran on", "good", "bad"))
    task = tasks.Chat()
    assert (task.kind, task.num_labels) == ("lm", 0)
    data = task.unpacked().encode(made, chatty, 32)
    assert [data.input_ids[row].tolist() for row in range(2)] == [
        [13, 3, 4, 2, 14, 6, 2],
        [13, 3, 5, 2, 14, 7, 8, 2, 13, 10, 2, 14, 11, 2],
    ]
    assert [data.label_mask[row].tolist() for row in range(2)] == [
        [0, 0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1],
    ]
    packed = task.encode(made, chatty, 32)
    batch = next(batches.train(packed, 1, seed=0))
    assert batch["segment_ids"][0].tolist() == [1] * 7 + [2] * 14 + [0] * 11
    expected = [*data.label_mask[0], *data.label_mask[1], *[0] * 11]
    assert batch["label_mask"][0].tolist() == expected
    every = tasks.Chat(loss="all").unpacked().encode(made, chatty, 32)
    assert every.label_mask[0].tolist() == [0] + [1] * 6


def test_instructions_are_chats_of_two_turns(chatty):
    made = [{"id": "1", "instruction": "the cat", "output": "sat"}]
    task = tasks.Instruction("instruction", "output", packed=False)
    data = task.encode(made, chatty, 32)
    same_as = tasks.Chat(packed=False).encode(chats(("the cat", "sat")), chatty, 32)
    assert data.input_ids[0].tolist() == same_as.input_ids[0].tolist()
    assert data.label_mask[0].tolist() == same_as.label_mask[0].tolist()
    system = tasks.Instruction("instruction", "output", "good dog", packed=False)
    told = system.encode(made, chatty, 32).input_ids[0].tolist()
    assert told == [12, 10, 5, 2, *data.input_ids[0].tolist()]
    with pytest.raises(DataError, match=r"row 0 \(id '1'\): column 'output' must be text and not"):
        task.encode([{**made[0], "output": " "}], chatty, 32)
    with pytest.raises(DataError, match=r"row 0 \(id '1'\) has no column 'prompt'"):
        tasks.Instruction().encode(made, chatty, 32)


def test_chats_whose_answers_are_cut_off_are_left_out(chatty):
    made = chats(("the cat", "sat"), ("the " * 20, "sat"), ("the", "sat " * 20))
    data = tasks.Chat(packed=False).encode(made, chatty, 8)
    assert (len(data), data.dropped, data.cut) == (2, 1, 1)
    assert data.record_index.tolist() == [0, 2]
    assert data.ids == ["c0", "c2"]
    packed = tasks.Chat().encode(made, chatty, 8)
    assert sorted(d for r in range(len(packed)) for d in packed.packing.documents_of(r)) == [0, 2]
    assert (packed.packing.documents, packed.packing.dropped) == (3, 1)
    whole = tasks.Chat(packed=False, overflow="drop").encode(made, chatty, 8)
    assert (len(whole), whole.dropped, whole.cut) == (1, 2, 0)
    with pytest.raises(DataError, match="of 1 chats none has an answer within 8 tokens; raise"):
        tasks.Chat().encode(made[1:2], chatty, 8)


def test_long_chats_stand_alone_and_learn_their_prompt(chatty):
    made = chats(("the cat", "sat"), ("the " * 12, "sat"), ("the dog", "ran"))
    data = tasks.Chat(long_from=12).encode(made, chatty, 32)
    documents = [data.packing.documents_of(row).tolist() for row in range(len(data))]
    assert documents == [[0, 2], [1]]
    assert data.label_mask[0].sum() == 4
    assert data.label_mask[1].sum() == data.lengths[1] - 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, r"row 1 \(id 'x'\): column 'messages' is empty"),
        ("hello", r"row 1 \(id 'x'\): column 'messages': a chat must be a list of messages"),
        (turns("the"), r"row 1 \(id 'x'\): column 'messages': the chat has no message of the ass"),
        ([], r"row 1 \(id 'x'\): column 'messages': the chat has no messages"),
    ],
)
def test_bad_chats_name_the_row(chatty, messages, message):
    with pytest.raises(DataError, match=message):
        tasks.Chat().encode([*chats(("the", "cat")), {"id": "x", "messages": messages}], chatty, 32)


def test_bad_settings_of_chats(chatty, speaker):
    with pytest.raises(DataError, match="has no chat template; choose one"):
        tasks.Chat().encode(chats(("the", "cat")), speaker, 32)
    named = tasks.Chat(template=TEMPLATE, packed=False).encode(chats(("the", "cat")), chatty, 32)
    assert named.input_ids[0].tolist() == [13, 3, 2, 14, 4, 2]
    with pytest.raises(DataError, match="overflow must be 'cut' or 'drop' for chats, got 'split'"):
        tasks.Chat(overflow="split")
    with pytest.raises(DataError, match="loss must be 'answers' or 'all', got 'some'"):
        tasks.Chat(loss="some")
    with pytest.raises(DataError, match="long_from must be >= 2 tokens, got 1"):
        tasks.Instruction(long_from=1)
    with pytest.raises(DataError, match="the data set is empty"):
        tasks.Chat().encode([], chatty, 32)


def test_other_answers_are_another_order(chatty):
    made = chats(*[("the cat", "sat")] * 9)
    first = tasks.Chat().encode(made, chatty, 16)
    state = batches.train(first, 4, seed=0).get_state()
    other = batches.train(tasks.Chat(loss="all").encode(made, chatty, 16), 4, seed=0)
    with pytest.raises(DataError, match="another content"):
        other.set_state(state)  # the same tokens, but others are learnt


def test_default_tasks_by_the_columns_of_a_part(monkeypatch):
    from steppe.data.assets import readers

    def part(kind, labels, *columns):
        return readers.Part(lambda _: [], kind, labels, columns)

    parts = {
        "a/chat": part("lm", (), "messages"),
        "a/pairs": part("lm", (), "prompt", "answer"),
        "a/text": part("lm", (), "text"),
        "a/odd": part("lm", (), "body"),
        "a/mt": part("seq2seq", (), "source", "target"),
        "a/image": part("image", ("0", "1"), "image", "label"),
        "a/named": part("image", (), "image", "label"),
        "a/new": part("graph", (), "nodes"),
    }
    monkeypatch.setattr(readers, "PARTS", parts)
    found = [{"id": "1", "label": "x"}, {"id": "2", "label": "y"}]
    assert tasks.default("asset:a/chat", []) == tasks.Chat()
    assert tasks.default("asset:a/pairs", []) == tasks.Instruction()
    assert tasks.default("asset:a/text", []) == tasks.CausalLM()
    assert tasks.default("asset:a/mt", []) == tasks.Seq2Seq()
    assert tasks.default("asset:a/image", []) == tasks.ImageClassification(("0", "1"))
    assert tasks.default("asset:a/named", found) == tasks.ImageClassification(("x", "y"))
    with pytest.raises(DataError, match="columns body hold no messages, prompt and answer, or te"):
        tasks.default("asset:a/odd", [])
    with pytest.raises(DataError, match="of kind 'graph', which has no default task; name one"):
        tasks.default("asset:a/new", [])
