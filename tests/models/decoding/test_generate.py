"""The loop of generation: greedy against a loop in Python, rows, stops, streaming, programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import decoding
from steppe.models.decoding import Settings, processors
from steppe.models.sites import Site


@pytest.fixture(scope="module")
def run(toy):
    return decoding.make(toy[0])


@pytest.fixture(scope="module")
def batch(prompts_ids):
    return decoding.pad_prompts(prompts_ids)


def greedy(toy_steps, toy, prompt, count, eos=()):
    """(tokens, log probabilities) of one row, step by step."""
    logits, push = toy_steps(*toy, prompt)
    tokens, logps = [], []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logps.append(float(jax.nn.log_softmax(jnp.asarray(logits))[tokens[-1]]))
        if tokens[-1] in eos:
            break
        logits = push(tokens[-1])
    return tokens, logps


def words(ids):
    """A text in which tokens are one to three characters long."""
    return "".join("abcdefghij"[i % 10] * (1 + i % 3) for i in ids)


def test_greedy_is_the_plain_loop(toy, toy_steps, run, batch, prompts_ids):
    settings = Settings(max_new_tokens=[9, 12, 3, 1])
    out = run(toy[1], batch, settings, eos_id=[4, 7], pad_id=2)
    for i, (prompt, most) in enumerate(zip(prompts_ids, (9, 12, 3, 1))):
        tokens, logps = greedy(toy_steps, toy, prompt, most, (4, 7))
        n = int(out.lengths[i])
        assert out.tokens[i, :n].tolist() == tokens
        np.testing.assert_allclose(out.logprobs[i, :n], logps, atol=1e-5)
        assert (out.tokens[i, n:] == 2).all()
        assert (out.logprobs[i, n:] == 0).all()
        assert out.reasons[i] == ("eos" if tokens[-1] in (4, 7) else "length")
    assert out.tokens.shape[1] == out.lengths.max()
    assert out.texts is None


def test_one_program_for_all_settings_and_lengths(toy, batch, prompts_ids):
    run = decoding.make(toy[0], rows=decoding.rows_bucket)
    run(toy[1], batch, Settings(max_new_tokens=5))
    assert run.compiles == 2
    mixed = Settings(
        max_new_tokens=[1, 16, 7, 3],
        temperature=[0, 1, 0.5, 2],
        top_k=[0, 3, 0, 300],
        top_p=[1, 1, 0.5, 0.9],
        min_p=[0, 0.1, 0, 0],
        repetition_penalty=[1, 1.3, 1, 1],
        presence_penalty=[0, 0, 1, 0],
        seed=[1, 2, 3, 4],
    )
    run(toy[1], batch, mixed)
    shorter = decoding.pad_prompts([p[-2:] for p in prompts_ids], sizes=None)
    run(toy[1], shorter, Settings(max_new_tokens=2), key=jax.random.key(1))
    run(toy[1], batch, Settings(max_new_tokens=9), on_token=lambda *_: None, every=1)
    run(
        toy[1],
        decoding.pad_prompts(prompts_ids[:3] + prompts_ids[:1]),
        Settings(temperature=0.1, max_new_tokens=16),
        key=jax.random.key(0),
    )
    assert run.compiles == 2
    three = run(toy[1], decoding.pad_prompts(prompts_ids[:3]), Settings(max_new_tokens=4))
    assert run.compiles == 4  # another bucket of rows
    assert three.tokens.shape == (3, 4)
    five = run(toy[1], decoding.pad_prompts(prompts_ids + prompts_ids[:1]))
    six = run(toy[1], decoding.pad_prompts(prompts_ids + prompts_ids[:2]))
    np.testing.assert_array_equal(five.tokens, six.tokens[:5])
    assert run.compiles == 6


def test_repeated_calls_of_generate_share_their_programs(toy, batch):
    before = decoding.shared(toy[0]).compiles
    for penalty in (1.1, 1.2):
        decoding.generate(
            *toy, batch, Settings(max_new_tokens=3), processors=[processors.temperature(penalty)]
        )
    after = decoding.shared(toy[0]).compiles
    assert after - before <= 2
    decoding.generate(
        *toy, batch, Settings(max_new_tokens=8), processors=[processors.temperature(3.0)]
    )
    assert decoding.shared(toy[0]).compiles == after


def test_rows_do_not_depend_on_each_other(toy, run, batch, prompts_ids):
    settings = {
        "temperature": [0.0, 1.0, 0.7, 1.5],
        "top_p": [0.3, 0.9, 1.0, 1.0],
        "seed": [5, 6, 7, 8],
    }
    out = run(toy[1], batch, Settings(max_new_tokens=12, **settings))
    for i in range(4):
        alone = run(
            toy[1],
            decoding.pad_prompts(prompts_ids[i : i + 1]),
            Settings(max_new_tokens=12, **{k: v[i] for k, v in settings.items()}),
        )
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[i])
    order = [2, 0, 3, 1]
    turned = run(
        toy[1],
        decoding.pad_prompts([prompts_ids[i] for i in order]),
        Settings(max_new_tokens=12, **{k: [v[i] for i in order] for k, v in settings.items()}),
    )
    np.testing.assert_array_equal(turned.tokens, out.tokens[order])
    # A row at temperature 0 is greedy whatever truncation it asks for.
    plain = run(toy[1], batch, Settings(max_new_tokens=12))
    np.testing.assert_array_equal(plain.tokens[0], out.tokens[0])
    assert (plain.tokens[1:] != out.tokens[1:]).any(axis=1).all()


def test_keys_and_seeds(toy, run, batch):
    hot = Settings(max_new_tokens=8, temperature=2.0)
    one, same = (run(toy[1], batch, hot, key=jax.random.key(0)) for _ in range(2))
    other = run(toy[1], batch, hot, key=jax.random.key(1))
    np.testing.assert_array_equal(one.tokens, same.tokens)
    assert (one.tokens != other.tokens).any(axis=1).all()
    twins = run(
        toy[1],
        {k: np.repeat(v[:1], 4, 0) for k, v in batch.items()},
        Settings(max_new_tokens=8, temperature=2.0, seed=[3, 3, 4, 5]),
    )
    np.testing.assert_array_equal(twins.tokens[0], twins.tokens[1])
    assert (twins.tokens[0] != twins.tokens[2]).any()
    rbg = run(toy[1], batch, hot, key=jax.random.key(0, impl="rbg"))
    assert rbg.tokens.shape == one.tokens.shape
    run(toy[1], batch, hot, key=jax.random.PRNGKey(0))


@pytest.mark.parametrize("every", [1, 3, 50])
def test_streaming_gives_the_same_tokens(toy, run, batch, every):
    settings = Settings(max_new_tokens=[9, 12, 3, 1], temperature=[0, 1, 1, 1])
    whole = run(toy[1], batch, settings, key=jax.random.key(2), eos_id=4, pad_id=2)
    seen = []
    out = run(
        toy[1],
        batch,
        settings,
        key=jax.random.key(2),
        eos_id=4,
        pad_id=2,
        every=every,
        on_token=lambda step, tokens: seen.append((step, tokens)),
    )
    for left, right in zip(whole[:3], out[:3]):
        np.testing.assert_array_equal(left, right)
    assert [step for step, _ in seen] == list(range(int(out.lengths.max())))
    np.testing.assert_array_equal(np.stack([t for _, t in seen], 1), out.tokens)


@pytest.mark.parametrize("every", [1, 4, 50])
def test_stop_strings_cut_where_they_begin(toy, run, batch, every):
    settings = Settings(max_new_tokens=20)
    plain = run(toy[1], batch, settings, decode=words)
    text = plain.texts[1]
    assert text == words(plain.tokens[1].tolist())
    # The first one straddles tokens: it begins inside one and ends inside another.
    for begin, end in ((4, 9), (0, 1), (len(text) - 2, len(text))):
        stop = text[begin:end]
        seen = []
        out = run(
            toy[1],
            batch,
            settings,
            stop=(stop, "never there"),
            decode=words,
            pad_id=1,
            every=every,
            on_token=lambda step, tokens, seen=seen: seen.append(tokens),
        )
        for i in range(4):
            full = plain.texts[i]
            at = full.find(stop)
            if at < 0:
                assert out.reasons[i] == "length"
                np.testing.assert_array_equal(out.tokens[i], plain.tokens[i])
                assert out.texts[i] == full
                continue
            assert out.reasons[i] == "stop"
            assert out.texts[i] == full[:at]
            n = int(out.lengths[i])
            row = plain.tokens[i].tolist()
            assert stop in words(row[:n])
            assert stop not in words(row[: n - 1])
            assert out.tokens[i, :n].tolist() == row[:n]
            assert (out.tokens[i, n:] == 1).all()
            assert (out.logprobs[i, n:] == 0).all()
        np.testing.assert_array_equal(np.stack(seen, 1), out.tokens)


def test_text_leaves_the_end_token_out(toy, run, batch):
    plain = run(toy[1], batch, Settings(max_new_tokens=12))
    eos = int(plain.tokens[0, 5])
    out = run(toy[1], batch, Settings(max_new_tokens=12), eos_id=eos, decode=lambda ids: str(ids))
    first = plain.tokens[0].tolist().index(eos)
    assert out.texts[0] == str(plain.tokens[0, :first].tolist())
    assert out.reasons[0] == "eos"
    assert out.lengths[0] == first + 1
    held = Settings(max_new_tokens=12, min_new_tokens=[12, 0, 0, 0])
    out = run(toy[1], batch, held, eos_id=eos)
    assert out.lengths[0] == 12
    assert eos not in out.tokens[0, :11]


def test_sites_and_masks_go_to_the_model(toy, run, batch):
    """The same function with other numbers compiles nothing."""

    def shift(delta, x, base, context):
        return base(x) + delta

    def out(delta):
        sites = {"logits": Site(shift, delta)}
        return run(toy[1], batch, Settings(max_new_tokens=4), sites=sites).tokens

    push = np.zeros(29, np.float32)
    plain = run(toy[1], batch, Settings(max_new_tokens=4)).tokens
    np.testing.assert_array_equal(out(push), plain)
    before = run.compiles
    push[13] = 100
    assert (out(push) == 13).all()
    assert run.compiles == before


def test_prompts_of_any_padding_give_the_same(toy, prompts_ids):
    wide = decoding.pad_prompts(prompts_ids, 9, length=40)
    exact = decoding.make(toy[0], sizes=None)
    settings = Settings(max_new_tokens=6)
    one = exact(toy[1], wide, settings)
    two = decoding.generate(*toy, decoding.pad_prompts(prompts_ids, sizes=None), settings)
    np.testing.assert_array_equal(one.tokens, two.tokens)


def test_the_last_position_can_be_used(toy_build):
    model = toy_build(max_length=20)
    params = model.init(jax.random.key(0))
    prompt = {"input_ids": np.ones((2, 13), np.int32)}
    assert decoding.generate(model, params, prompt, Settings(max_new_tokens=7)).tokens.shape == (
        2,
        7,
    )
    with pytest.raises(
        ValueError, match="13 tokens and max_new_tokens = 8 need 21 positions, the model has 20"
    ):
        decoding.generate(model, params, prompt, Settings(max_new_tokens=8))


def bad(**changes):
    return changes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 .greedy. or .* got -1"),
        ({"temperature": [0, 0, -2, 0]}, "got -2 in row 2"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"min_p": 2}, "min_p must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": [3, 3]}, r"max_new_tokens has shape \(2,\), the batch 4 rows"),
        ({"min_new_tokens": 100}, "min_new_tokens is 100, above"),
        ({"seed": -1}, "seed must be"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_k": None}, "top_k must be a number"),
    ],
)
def test_bad_settings(toy, run, batch, settings, message):
    with pytest.raises(ValueError, match=message):
        run(toy[1], batch, Settings(**settings))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"input_ids": np.zeros((0, 4), int)}, {}, "the batch is empty"),
        ({"input_ids": np.zeros(4, int)}, {}, r"\[rows, tokens\]"),
        ({"input_ids": np.zeros((4, 16))}, {}, "whole numbers"),
        ({"attention_mask": np.ones((4, 3), int)}, {}, "must have the shape"),
        ({"attention_mask": np.eye(4, 16, 15, dtype=int)}, {}, "row 1 of input_ids holds no token"),
        (
            {"attention_mask": np.arange(16) < np.array([[5], [16], [16], [16]])},
            {},
            "row 0 .* decoding.pad_prompts",
        ),
        ({}, {"stop": ""}, "at least one character"),
        ({}, {"stop": ("a", ""), "decode": words}, "at least one character"),
        ({}, {"stop": "a"}, "give decode"),
        ({}, {"every": 0}, "every must be at least 1"),
        ({}, {"eos_id": -1}, "eos_id"),
    ],
)
def test_bad_batches(toy, run, batch, change, options, message):
    with pytest.raises(ValueError, match=message):
        run(toy[1], {**batch, **change}, Settings(), **options)
    with pytest.raises(ValueError, match="holds no input_ids"):
        run(toy[1], {"ids": 1})


def test_sampling_needs_randomness(toy, run, batch):
    with pytest.raises(ValueError, match="give key=jax.random.key"):
        run(toy[1], batch, Settings(temperature=1.0))


def test_a_row_without_a_choice_is_named(toy, run, batch):
    params = {**toy[1], "out": toy[1]["out"] * np.nan}
    with pytest.raises(FloatingPointError, match="row 0"):
        run(params, batch, Settings(max_new_tokens=2))


def test_bad_prompts():
    with pytest.raises(ValueError, match="prompts is empty"):
        decoding.pad_prompts([])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        decoding.pad_prompts([[1], []])
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens, length is 2"):
        decoding.pad_prompts([[1, 2, 3]], length=2)


def test_a_model_that_does_not_generate():
    class Silent:
        decode = None

    with pytest.raises(ValueError, match="does not generate"):
        decoding.generate(Silent(), {}, {"input_ids": np.ones((1, 1), int)})


def test_buckets():
    assert [decoding.bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 100)] == [
        16, 16, 24, 24, 32, 48, 64, 128,
    ]  # fmt: skip
    assert [decoding.rows_bucket(n) for n in (1, 2, 3, 4, 5, 7, 9)] == [1, 2, 3, 4, 6, 8, 12]


def test_a_stream_of_text_holds_back_what_is_not_certain():
    pieces = {1: "ab", 2: "S", 3: "TOP", 4: "c", 5: "Sx", 6: "STOPS"}

    def decode(ids):
        return "".join(pieces[i] for i in ids)

    stream = decoding.TextStream(decode, "STOP")
    assert [stream.push(1), stream.push(2), stream.push(4), stream.push(5)] == [
        "ab",
        "",
        "Sc",
        "Sx",
    ]
    assert [stream.push(2), stream.push(3), stream.push(1)] == ["", "", ""]
    assert stream.stopped
    assert stream.flush() == ""
    stream = decoding.TextStream(decode, ("STOPS", "zz"))
    assert [stream.push(1, 2), stream.push(3), stream.flush()] == ["ab", "", "STOP"]
    half = decoding.TextStream(lambda ids: bytes(ids).decode("utf-8", errors="replace"))
    assert [half.push(0xC3), half.push(0xA9)] == ["", "é"]
