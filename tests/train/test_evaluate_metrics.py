"""Every metric against scikit-learn, scipy, seqeval or sacrebleu, and by hand at the edges."""

import math
import sys
import warnings

import numpy as np
import pytest
import sacrebleu
import scipy.stats
import seqeval.metrics
import seqeval.metrics.sequence_labeling
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from steppe.data.dataset import Dataset, Ragged
from steppe.train import evaluate
from steppe.train.evaluate.correlation import average_ranks
from steppe.train.evaluate.tagging import is_tagging_scheme

# No deadline: the first example of a run imports and compiles.
relaxed = settings(deadline=None, max_examples=150, derandomize=True)


def classes(size, low=1, high=40):
    cell = st.integers(0, size - 1)
    return st.lists(st.tuples(cell, cell), min_size=low, max_size=high).map(
        lambda rows: tuple(np.array(c) for c in zip(*rows))
    )


# --- classification ------------------------------------------------------------------------


@relaxed
@given(classes(4))
def test_multiclass_metrics_equal_scikit_learn(pair):
    z, y = pair
    assert evaluate.accuracy(z, y) == pytest.approx(sk.accuracy_score(y, z))
    np.testing.assert_array_equal(
        evaluate.confusion_matrix(z, y, 4), sk.confusion_matrix(y, z, labels=range(4))
    )
    for average in ("macro", "micro"):
        p, r, f, _ = sk.precision_recall_fscore_support(y, z, average=average, zero_division=0)
        np.testing.assert_allclose(evaluate.precision_recall_f1(z, y, average), (p, r, f))
    p, r, f, _ = sk.precision_recall_fscore_support(
        y, z, average="macro", labels=range(4), zero_division=0
    )
    np.testing.assert_allclose(evaluate.precision_recall_f1(z, y, "macro", num_labels=4), (p, r, f))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about a single class
        assert evaluate.mcc(z, y) == pytest.approx(sk.matthews_corrcoef(y, z), abs=1e-12)


@relaxed
@given(classes(2), st.sampled_from([0, 1]))
def test_binary_f1_equals_scikit_learn(pair, positive):
    z, y = pair
    expected = sk.precision_recall_fscore_support(
        y, z, labels=[positive], average="macro", zero_division=0
    )[:3]
    np.testing.assert_allclose(evaluate.precision_recall_f1(z, y, positive=positive), expected)
    assert evaluate.f1(z, y, positive=positive) == pytest.approx(expected[2])


def test_constant_predictions_have_defined_values():
    y = [0, 1, 1, 0]
    assert evaluate.mcc([1, 1, 1, 1], y) == 0.0
    assert evaluate.mcc([0, 1], [1, 1]) == 0.0
    assert evaluate.precision_recall_f1([0, 0, 0, 0], y) == (0.0, 0.0, 0.0)
    assert evaluate.mcc(y, y) == 1.0
    assert evaluate.mcc([1 - v for v in y], y) == -1.0
    assert evaluate.f1([0, 0], [0, 0]) == 0.0
    assert evaluate.accuracy(np.array([True, False]), [1, 0]) == 1.0


def test_mcc_of_many_examples_does_not_overflow():
    z = np.repeat([0, 1], 3_000_000)
    y = np.roll(z, 1000)
    expected = 1 - 4 * 1000 / 6_000_000
    assert evaluate.mcc(z, y) == pytest.approx(expected, rel=1e-9)


def test_bad_classes_are_named():
    with pytest.raises(ValueError, match="predictions must not be empty"):
        evaluate.accuracy([], [])
    with pytest.raises(ValueError, match="predictions has 2 rows but labels has 3"):
        evaluate.accuracy([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="labels must be >= 0 and < num_labels=2, got 5 at row 1"):
        evaluate.confusion_matrix([0, 1], [0, 5], 2)
    with pytest.raises(ValueError, match=r"labels must be >= 0, got -100 at row 0"):
        evaluate.mcc([0], [-100])
    with pytest.raises(ValueError, match="integer class numbers, got dtype float64"):
        evaluate.accuracy([0.5], [1])
    with pytest.raises(ValueError, match="average must be one of binary, macro, micro, got 'all'"):
        evaluate.f1([0], [0], "all")
    with pytest.raises(ValueError, match="needs classes 0 and 1, got 3 classes"):
        evaluate.f1([0, 2], [0, 1])
    with pytest.raises(ValueError, match="positive must be 0 or 1, got 2"):
        evaluate.f1([0, 1], [0, 1], positive=2)


# --- correlation ---------------------------------------------------------------------------

numbers = st.lists(
    st.tuples(st.integers(-6, 6), st.floats(-100, 100).map(lambda x: round(x, 1))),
    min_size=2,
    max_size=30,
).map(lambda rows: tuple(np.array(c, float) for c in zip(*rows)))


@relaxed
@given(numbers)
def test_correlations_equal_scipy(pair):
    x, y = pair
    np.testing.assert_array_equal(average_ranks(x), scipy.stats.rankdata(x))
    assert evaluate.mean_squared_error(x, y) == pytest.approx(sk.mean_squared_error(y, x))
    assert evaluate.mean_absolute_error(x, y) == pytest.approx(sk.mean_absolute_error(y, x))
    if np.ptp(x) == 0 or np.ptp(y) == 0:  # scipy: NaN and a warning
        assert evaluate.pearson(x, y) == evaluate.spearman(x, y) == 0.0
        return
    assert evaluate.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-9)
    assert evaluate.spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_pearson_survives_extreme_scales(scale):
    x = np.array([1.0, 2.0, 4.0])
    assert evaluate.pearson(x * scale, x) == pytest.approx(1.0)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        evaluate.pearson([1.0], [2.0])
    with pytest.raises(ValueError, match=r"predictions must be finite, got nan at \[1\]"):
        evaluate.spearman([1.0, math.nan], [2.0, 1.0])
    with pytest.raises(ValueError, match=r"must have 1 dimension\(s\), got shape \(2, 1\)"):
        evaluate.mean_squared_error([[1.0], [2.0]], [1.0, 2.0])


# --- answers -------------------------------------------------------------------------------

# Exact match and F1 as printed by the published evaluation script of SQuAD 2.0.
PUBLISHED = [
    ("The cat!", ["cat"], 1, 1),
    ("the U.S. state", ["US state", "America"], 1, 1),
    ("a state-of-the-art cat", ["stateoftheart"], 0, 2 / 3),
    ("cat cat sat", ["cat sat sat mat"], 0, 4 / 7),
    ("An  cat\tsat", ["cat sat on the mat", "sat"], 0, 2 / 3),
    ("theory", ["the ory"], 0, 0),
    ("l\u2019été", ["L'été"], 0, 0),
    ("A's", ["s"], 0, 0),
    ("the", [], 1, 1),
    ("", ["the"], 1, 1),
    ("cat", ["a", "the"], 0, 0),
    ("cat", [], 0, 0),
    ("", ["cat"], 0, 0),
    ("", ["the", "cat"], 0, 0),
]


@pytest.mark.parametrize(("prediction", "gold", "exact", "f1"), PUBLISHED)
def test_squad_equals_the_published_script(prediction, gold, exact, f1):
    assert evaluate.squad([prediction], [gold]) == (exact, pytest.approx(f1))


def test_squad_by_hand():
    assert evaluate.squad(["The Cat."], [["cat", "dog"]]) == (1.0, 1.0)
    exact, f1 = evaluate.squad(["black cat", ""], [["a cat"], []])
    assert (exact, f1) == (0.5, pytest.approx((2 / 3 + 1) / 2))
    with pytest.raises(ValueError, match=r"gold\[0\] must be a list of answers, got the text"):
        evaluate.squad(["a"], ["a"])
    with pytest.raises(ValueError, match="must not be empty"):
        evaluate.squad([], [])


def test_token_spans_by_hand():
    exact, f1 = evaluate.token_spans(
        [[1, 2], [3, 6], [0, 0], [5, 5]], [[1, 2], [5, 8], [4, 4], [5, 6]]
    )
    assert exact == 0.25
    assert f1 == pytest.approx((1 + 0.5 + 0 + 2 / 3) / 4)
    with pytest.raises(ValueError, match=r"\[N, 2\]"):
        evaluate.token_spans([1, 2], [1, 2])


def test_answer_scores_take_the_best_window_of_each_question():
    rows = [
        {"id": "q0", "context": "red cat sat", "answers": {"text": ["cat"], "answer_start": [4]}},
        {"id": "q1", "context": "no way", "answers": {"text": [], "answer_start": []}},
    ]
    # q0 is read in two windows; the first token of each window is no context.
    offsets = [[(0, 0), (0, 3), (4, 7)], [(0, 0), (4, 7), (8, 11)], [(0, 0), (0, 2), (3, 6)]]
    data = Dataset(
        kind="span",
        input_ids=Ragged.pack([[1, 2, 3]] * 3, np.int32),
        labels=np.array([[2, 2], [1, 1], [0, 0]], np.int32),
        ids=["q0", "q0", "q1"],
        records=rows,
        record_index=np.array([0, 0, 1]),
        pad_id=0,
        offsets=Ragged.pack(offsets, np.int32),
    )
    spans = [[1, 2], [1, 1], [0, 0]]
    assert evaluate.answer_scores(data, spans, [1.0, 2.0, 0.0]) == (1.0, 1.0)
    assert evaluate.answer_scores(data, spans, [3.0, 2.0, 0.0]) == (0.5, pytest.approx(5 / 6))
    assert evaluate.answer_scores(data, [[0, 0], [1, 1], [1, 1]], [1, 2, 0]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="dataset has 3 rows but spans has 2"):
        evaluate.answer_scores(data, spans[:2], [1.0, 2.0])


# --- entities ------------------------------------------------------------------------------

TAGS = ["O", "B-X", "I-X", "B-Y", "I-Y", "E-X", "S-Y", "E-Y", "S-X"]


def corpora(tags):
    sentence = st.lists(st.tuples(st.sampled_from(tags), st.sampled_from(tags)), max_size=10)
    return st.lists(sentence.filter(len), min_size=1, max_size=5).map(
        lambda rows: tuple([[pair[k] for pair in row] for row in rows] for k in (0, 1))
    )


@pytest.mark.parametrize("tags", [TAGS[:5], TAGS], ids=["IOB2", "IOBES"])
@relaxed
@given(data=st.data())
def test_entities_equal_seqeval_on_any_sequence(tags, data):
    z, y = data.draw(corpora(tags))
    for sentence in z + y:
        assert [
            tuple(e) for e in evaluate.entities(sentence)
        ] == seqeval.metrics.sequence_labeling.get_entities(sentence)
    scores = evaluate.entity_f1(z, y)
    averages = {"micro": scores[:3], "macro": scores.macro}
    if not scores.support:  # seqeval's macro average of nothing is NaN
        assert averages.pop("macro") == (0.0, 0.0, 0.0)
    for average, mine in averages.items():
        theirs = seqeval.metrics.sequence_labeling.precision_recall_fscore_support(
            y, z, average=average, zero_division=0
        )[:3]
        np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_entities_by_hand():
    tags = ["O", "I-PER", "I-PER", "B-PER", "I-LOC", "O", "S-ORG", "E-ORG", "B"]
    assert evaluate.entities(tags) == [
        ("PER", 1, 2), ("PER", 3, 3), ("LOC", 4, 4), ("ORG", 6, 6), ("ORG", 7, 7), ("_", 8, 8),
    ]  # fmt: skip
    scores = evaluate.entity_f1([["B-PER", "O"]], [["B-PER", "B-LOC"]])
    assert scores.support == {"LOC": 1, "PER": 1}
    assert scores.per_type["LOC"] == (0.0, 0.0, 0.0)
    assert (scores.precision, scores.recall) == (1.0, 0.5)


def test_no_entity_at_all_scores_zero():
    scores = evaluate.entity_f1([["O"]], [["O"]])
    assert scores[:4] == (0.0, 0.0, 0.0, (0.0, 0.0, 0.0))


def test_bad_tags_are_named():
    with pytest.raises(ValueError, match="tag 'PER' at position 1 is not O"):
        evaluate.entities(["O", "PER"])
    with pytest.raises(ValueError, match="sentence 0 has 2 labels but 1 predictions"):
        evaluate.entity_f1([["O"]], [["O", "O"]])
    assert is_tagging_scheme(["O", "B-X", "I-X"])
    assert not is_tagging_scheme(["NOUN", "VERB", "O"])
    assert not is_tagging_scheme(["O"])


# --- calibration ---------------------------------------------------------------------------


def distributions(n, c, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(c) * 0.5, n), rng.integers(0, c, n)


@pytest.mark.parametrize("c", [2, 5])
def test_brier_and_log_loss_equal_scikit_learn(c):
    p, y = distributions(200, c)
    expected = sk.brier_score_loss(y, p, scale_by_half=False, labels=range(c))
    assert evaluate.brier(p, y) == pytest.approx(expected)
    assert evaluate.log_loss(p, y) == pytest.approx(sk.log_loss(y, p, labels=range(c)))


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_reliability_curve_equals_scikit_learn(bins):
    rng = np.random.default_rng(1)
    p = np.round(rng.random(300), 2)  # some fall exactly on an edge
    right = rng.random(300) < p
    curve = evaluate.reliability_curve(p, right, bins)
    accuracy, confidence = calibration_curve(right, p, n_bins=bins)
    np.testing.assert_allclose(curve.accuracy, accuracy)
    np.testing.assert_allclose(curve.confidence, confidence)
    assert curve.count.sum() == 300
    assert (curve.low <= curve.confidence).all()
    assert (curve.confidence <= curve.high).all()


def test_calibration_error_is_the_weighted_gap():
    p, y = distributions(400, 3)
    confidence, right = p.max(1), p.argmax(1) == y
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert evaluate.expected_calibration_error(p, y, 10) == pytest.approx(expected)
    curve = evaluate.reliability_curve(confidence, right, 8, equal_mass=True)
    assert set(curve.count) == {50}


def test_calibration_extremes():
    sure = np.eye(2)[[0, 1, 1, 0]]
    assert evaluate.expected_calibration_error(sure, [0, 1, 1, 0]) == 0.0
    assert evaluate.expected_calibration_error(sure, [1, 0, 0, 1]) == 1.0
    assert evaluate.brier(sure, [1, 0, 0, 1]) == 2.0
    assert evaluate.log_loss(sure, [1, 0, 0, 1]) == math.inf
    curve = evaluate.reliability_curve([1.0, 1.0], [1, 0])
    assert curve.count.tolist() == [2]
    assert curve.high.tolist() == [1.0]
    tied = evaluate.reliability_curve([0.5] * 6, [1] * 6, 3, equal_mass=True)
    assert tied.count.tolist() == [6]


def test_bad_probabilities_are_named():
    with pytest.raises(ValueError, match="row 1 adds up to 3 .*apply a softmax"):
        evaluate.brier([[0.5, 0.5], [2.0, 1.0]], [0, 1])
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], got 1.5"):
        evaluate.reliability_curve([0.2, 1.5], [1, 0])
    with pytest.raises(ValueError, match="bins must be >= 1, got 0"):
        evaluate.reliability_curve([0.2], [1], 0)
    with pytest.raises(ValueError, match="< num_labels=2, got 2 at row 0"):
        evaluate.log_loss([[0.5, 0.5]], [2])


# --- generation ----------------------------------------------------------------------------


def test_perplexity():
    assert evaluate.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert evaluate.perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="tokens must be > 0, got 0"):
        evaluate.perplexity(0.0, 0)
    with pytest.raises(ValueError, match="nll must be a number"):
        evaluate.perplexity(math.nan, 3)


def test_bleu_and_chrf_are_those_of_sacrebleu():
    z = ["the cat sat on the mat", "hello there world", "no overlap at all here"]
    first = ["the cat sat on a mat", "hello world", "something else entirely, friend"]
    second = ["a cat sat on the mat", "hello there my world", "again another thing"]
    for mine, theirs in (
        (evaluate.bleu, sacrebleu.corpus_bleu),
        (evaluate.chrf, sacrebleu.corpus_chrf),
    ):
        assert mine(z, first) == pytest.approx(theirs(z, [first]).score)
        assert mine(z, list(zip(first, second))) == pytest.approx(theirs(z, [first, second]).score)
        ragged = [[first[0]], [first[1], second[1]], [first[2]]]
        expected = theirs(z, [first, [None, second[1], None]]).score
        assert mine(z, ragged) == pytest.approx(expected)
        assert mine(z, z) == pytest.approx(100)
    plus = evaluate.chrf(z, first, word_order=2)
    assert plus == pytest.approx(sacrebleu.corpus_chrf(z, [first], word_order=2).score)


def test_bad_texts_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"references\[1\] is empty"):
        evaluate.bleu(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="lists of texts, got one text"):
        evaluate.chrf("a", "b")
    with pytest.raises(ValueError, match="must not be empty"):
        evaluate.bleu([], [])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match="pip install sacrebleu"):
        evaluate.bleu(["a"], ["a"])


def test_accuracy_of_tokens_needs_no_table_of_the_vocabulary():
    # A table of all pairs would be 8 terabytes.
    assert evaluate.accuracy([10**6, 3, 5], [10**6, 4, 5]) == 2 / 3
