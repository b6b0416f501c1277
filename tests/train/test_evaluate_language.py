"""Evaluation of language models and of multiple choice: sums over tokens, whatever the batches."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from steppe.models.model import Model, ModelOut
from steppe.train import evaluate, objectives

VOCAB = 7


def bigram() -> Model:
    """Logits that depend on the last token alone, so that any packing must agree."""

    def apply(params, batch, *, rng=None, train=False, **_):
        tokens = batch["input_ids"] if "decoder" not in params else batch["decoder_input_ids"]
        return ModelOut(params["table"][tokens], None)

    return Model(config=None, init=lambda key: {}, apply=apply, axes=())


@pytest.fixture(scope="module")
def model():
    return bigram()


@pytest.fixture(scope="module")
def params():
    table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    return {"table": jnp.asarray(table)}


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in (5, 3, 8, 2, 6)]


def rows_of(documents, size, width):
    """One document a row, right padded; the labels are the inputs."""
    for at in range(0, len(documents), size):
        batch = {
            "input_ids": np.zeros((size, width), np.int32),
            "attention_mask": np.zeros((size, width), np.int32),
            "label_mask": np.zeros((size, width), np.float32),
            "example_index": np.full(size, -1, np.int32),
        }
        for row, tokens in enumerate(documents[at : at + size]):
            batch["input_ids"][row, : len(tokens)] = tokens
            batch["attention_mask"][row, : len(tokens)] = 1
            batch["label_mask"][row, 1 : len(tokens)] = 1
            batch["example_index"][row] = at + row
        batch["labels"] = batch["input_ids"]
        yield batch


def packed(documents, width):
    """Documents end to end in one row each of ``width`` tokens, as far as they fit."""
    rows, row = [], []
    for tokens in documents:
        if sum(map(len, row)) + len(tokens) > width:
            rows.append(row)
            row = []
        row.append(tokens)
    rows.append(row)
    batch = {
        "input_ids": np.zeros((len(rows), width), np.int32),
        "segment_ids": np.zeros((len(rows), width), np.int32),
        "label_mask": np.zeros((len(rows), width), np.float32),
        "example_index": np.arange(len(rows), dtype=np.int32),
    }
    for r, row in enumerate(rows):
        at = 0
        for number, tokens in enumerate(row):
            part = slice(at, at + len(tokens))
            batch["input_ids"][r, part], batch["segment_ids"][r, part] = tokens, number + 1
            batch["label_mask"][r, at + 1 : part.stop] = 1
            at = part.stop
    batch["labels"] = batch["input_ids"]
    return [batch]


def reference(params, documents):
    logp = log_softmax(np.asarray(params["table"], np.float64), axis=-1)
    return [np.array([-logp[a, b] for a, b in itertools.pairwise(d)]) for d in documents]


def test_a_causal_model_is_scored_by_the_token_before(model, params, documents):
    nll = reference(params, documents)
    found = evaluate.run(model, params, rows_of(documents, 2, 8), "lm")
    tokens = np.concatenate(nll)
    assert set(found.metrics) == {"examples", "loss", "accuracy", "perplexity", "tokens"}
    assert found.metrics["tokens"] == len(tokens) == 19
    assert found.metrics["loss"] == pytest.approx(tokens.mean(), abs=1e-6)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(tokens.mean()), rel=1e-5)
    np.testing.assert_allclose(found.losses, [n.mean() for n in nll], atol=1e-6)
    best = np.asarray(params["table"]).argmax(-1)
    for document, label, prediction in zip(documents, found.labels, found.predictions):
        np.testing.assert_array_equal(label, document[1:])
        np.testing.assert_array_equal(prediction, best[document[:-1]])


@pytest.mark.parametrize("width", [8, 13, 24])
def test_packing_and_padding_change_no_sum(model, params, documents, width):
    plain = evaluate.run(model, params, rows_of(documents, 5, 11), "lm").metrics
    dense = evaluate.run(model, params, packed(documents, width), "lm").metrics
    for name in ("loss", "accuracy", "perplexity", "tokens"):
        assert dense[name] == pytest.approx(plain[name], abs=1e-6)


def test_the_evaluation_is_the_objective(model, params, documents):
    batch = next(rows_of(documents, 5, 8))
    out = objectives.for_task(model, "lm")(params, batch, None)
    found = evaluate.run(model, params, [batch], "lm").metrics
    assert float(out.total / out.weight) == pytest.approx(found["loss"], abs=1e-6)
    assert float(out.weight) == found["tokens"]


def test_the_first_token_of_a_row_never_counts(model, params, documents):
    batch = next(rows_of(documents, 5, 8))
    batch["label_mask"][:, 0] = 1.0
    assert evaluate.run(model, params, [batch], "lm").metrics["tokens"] == 19
    assert float(objectives.for_task(model, "lm")(params, batch, None).weight) == 19


def test_seq2seq_scores_column_for_column(params):
    """Teacher forcing: the logits of column u are about label u."""
    model = bigram()
    given = {**params, "decoder": jnp.zeros(())}
    rng = np.random.default_rng(3)
    labels = rng.integers(0, VOCAB, (3, 5)).astype(np.int32)
    shifted = np.concatenate([np.zeros((3, 1), np.int32), labels[:, :-1]], 1)
    mask = (np.arange(5) < np.array([[5], [2], [4]])).astype(np.float32)
    batch = {
        "input_ids": np.ones((3, 9), np.int32),
        "decoder_input_ids": shifted,
        "labels": labels,
        "label_mask": mask,
    }
    found = evaluate.run(model, given, [batch], "seq2seq")
    logp = log_softmax(np.asarray(params["table"], np.float64), axis=-1)
    nll = -logp[shifted, labels]
    assert found.metrics["loss"] == pytest.approx((nll * mask).sum() / mask.sum(), abs=1e-6)
    assert found.metrics["tokens"] == 11
    out = objectives.for_task(model, "seq2seq")(given, batch, None)
    assert float(out.total / out.weight) == pytest.approx(found.metrics["loss"], abs=1e-6)


def test_bits_per_byte(model, params, documents):
    sizes = np.arange(VOCAB)  # token 0 is special: no bytes
    found = evaluate.run(model, params, rows_of(documents, 5, 8), "lm", token_bytes=sizes).metrics
    total = sum(n.sum() for n in reference(params, documents))
    size = sum(sizes[d[1:]].sum() for d in documents)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-6)
    with pytest.raises(ValueError, match="token_bytes must have an entry"):
        evaluate.run(model, params, rows_of(documents, 5, 8), "lm", token_bytes=sizes[:3])


def test_generated_texts_are_scored(model, params, documents):
    written = evaluate.Generated(["a cat sat", " yes "], ["a cat sat", "no"], ["x", "y"])
    found = evaluate.run(
        model, params, rows_of(documents, 5, 8), "lm", generate=lambda given: written
    )
    assert found.generated is written
    assert found.metrics["exact"] == 0.5
    assert found.metrics["generated"] == 2
    assert 0 < found.metrics["chrf"] < 100
    assert "loss" in found.metrics
    with pytest.raises(ValueError, match="at least one text"):
        evaluate.text_metrics(evaluate.Generated([], []))
    with pytest.raises(ValueError, match="2 rows but references has 1"):
        evaluate.text_metrics(evaluate.Generated(["a", "b"], ["a"]))


def tokenizer_of(model):
    import tokenizers

    class Held:
        backend = tokenizers.Tokenizer(model)

        @property
        def vocab_size(self):
            return self.backend.get_vocab_size(with_added_tokens=True)

    return Held()


def test_bytes_of_byte_level_tokens():
    import tokenizers

    held = tokenizer_of(tokenizers.models.BPE({"a": 0, "Ġa": 1, "Ã©": 2, "Ã": 3}, []))
    held.backend.decoder = tokenizers.decoders.ByteLevel()
    held.backend.add_special_tokens(["<end>"])
    np.testing.assert_array_equal(evaluate.token_bytes(held), [1, 2, 2, 1, 0])


def test_bytes_of_sentencepiece_tokens():
    import tokenizers

    held = tokenizer_of(tokenizers.models.BPE({"▁a": 0, "<0x0A>": 1, "é": 2, "▁": 3}, []))
    np.testing.assert_array_equal(evaluate.token_bytes(held), [2, 1, 2, 1])


def test_option_accuracy():
    scores = [[-4.0, -3.0, -9.0], [-1.0, -5.0], [-6.0, -2.0]]
    found = evaluate.option_accuracy(scores, [0, 0, 0], [[8, 3, 9], [2, 2], [6, 1]])
    np.testing.assert_array_equal(found.chosen, [1, 0, 1])
    np.testing.assert_array_equal(found.chosen_norm, [0, 0, 0])
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.accuracy_norm == 1.0
    plain = evaluate.option_accuracy(scores, [0, 0, 0])
    assert plain.accuracy == plain.accuracy_norm == found.accuracy


@pytest.mark.parametrize(
    ("scores", "answers", "lengths", "message"),
    [
        ([], [], None, "must not be empty"),
        ([[-1.0]], [0], None, "at least two options"),
        ([[-1.0, math.nan]], [0], None, r"scores\[0\] is not a number"),
        ([[-1.0, -2.0]], [2], None, r"answers\[0\] is 2, but there are 2 options"),
        ([[-1.0, -2.0]], [0], [[1, 0]], r"lengths\[0\] must be one number > 0"),
        ([[-1.0, -2.0]], [0, 1], None, "scores has 1 rows but answers has 2"),
    ],
)
def test_bad_options(scores, answers, lengths, message):
    with pytest.raises(ValueError, match=message):
        evaluate.option_accuracy(scores, answers, lengths)
