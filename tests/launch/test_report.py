"""The report: complete, self-contained, deterministic, and undeterred by damaged run folders."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from steppe.launch import report
from steppe.launch.report import curves, facts, folder, outcomes, svg

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & \'"\ud800\x00</svg></style>'
START = 1_763_700_000.0

WORDS = [
    "a sly and moving film that never begs for your tears",
    "the plot runs out of road long before the credits do",
    "it is not the worst comedy of the year, which is the best that can be said",
    "beautifully shot, badly told",
    "you will laugh, then wonder why",
    "an earnest bore with one good scene",
    "funny, in the way that a long flight is funny",
    "the cast deserves a better script and so do we",
    "slight, warm and over in eighty minutes, all of them welcome",
    "a thriller without a pulse",
]


def make_run(
    path: Path, *, kind: str = "classification", steps: int = 600, examples: int = 812
) -> Path:
    """A run as ``steppe finetune`` leaves it, with plausible numbers."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    names = {"classification": ["negative", "positive"], "token": ["O", "PER", "LOC", "ORG"]}
    names = names.get(kind, [])
    config = {
        "recipe": "vader-movies",
        "model": "asset:minilm-l6",
        "data": {"source": "asset:vader/movies", "max_length": 64, "batch_size": 32},
        "optimizer": {"name": "adamw", "learning_rate": 5e-5, "warmup": 0.1, "weight_decay": 0.01},
        "steps": steps,
        "mesh": {"data": 1},
        "seed": 0,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    with (path / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            done = step / steps
            loss = 0.16 + 0.54 * math.exp(-5 * done) + 0.09 * rng.standard_normal() * (1 - done / 2)
            row = {
                "step": step,
                "kind": "train",
                "time": START + 0.31 * step,
                "loss": max(loss, 0.01),
                "accuracy": float(rng.binomial(32, 0.95 - 0.42 * math.exp(-5 * done)) / 32),
                "grad_norm": float(2.5 * math.exp(0.35 * rng.standard_normal())),
                "learning_rate": 5e-5 * min(done / 0.1, (1 - done) / 0.9),
                "step_time": 0.30 + 0.02 * abs(rng.standard_normal()) + 0.9 * (step == 1),
                "tokens_per_s": 6400 + 260 * rng.standard_normal(),
                "input_wait": 0.004 + 0.002 * abs(rng.standard_normal()),
            }
            out.write(json.dumps(row) + "\n")
            if step % (steps // 8) == 0:
                row = {"step": step, "kind": "eval", "split": "valid", "time": row["time"]}
                row |= {"loss": 0.33 + 0.33 * math.exp(-6 * done) + 0.05 * done}
                row |= {"accuracy": 0.865 - 0.3 * math.exp(-6 * done), "f1": 0.84, "pearson": 0.8}
                out.write(json.dumps(row) + "\n")
    metric = {"classification": "accuracy", "regression": "pearson", "token": "f1"}[kind]
    results = {
        "task": {"kind": kind, "label_names": names},
        "metrics": {
            "valid": {metric: 0.871, "loss": 0.341, "ece": 0.041},
            "test": {metric: 0.863, "loss": 0.352, "ece": 0.046},
        },
        "baselines": {
            "majority class": {metric: 0.524},
            "frozen features + logistic": {metric: 0.791},
        },
        "intervals": {metric: [0.838, 0.885]},
        "command": "steppe finetune vader-movies --out runs/vader-movies --seed 0",
        "versions": {"python": "3.11.2", "jax": "0.10.2", "flax": "0.12.8", "steppe": "0.1.0"},
        "hardware": {"platform": "cpu", "devices": 1, "cores": 2, "memory": "16 GB"},
        "data": {
            "splits": {"train": 8204, "valid": 1012, "test": examples},
            "dropped": "neutral, 573",
            "licence": "MIT (vaderSentiment 3.3.2)",
        },
        "model": {"name": "MiniLM-L6", "parameters": 22_713_986, "trainable": 22_713_986},
        "timings": {"compile": 6.4, "train": 186.0, "evaluate": 5.2, "total": 214.7},
        "shapes": [[32, 16], [32, 32], [32, 64]],
    }
    (path / "results.json").write_text(json.dumps(results))
    with (path / "predictions.jsonl").open("w") as out:
        for i in range(examples):
            text = f"{WORDS[i % len(WORDS)]}, {WORDS[(i * 7 + 3) % len(WORDS)]}"
            out.write(json.dumps(_prediction(kind, i, text, names, rng)) + "\n")
    return path


def _prediction(kind, i, text, names, rng) -> dict:
    row = {"id": f"movies-{i:05d}", "text": text}
    if kind == "regression":
        label = float(rng.uniform(-4, 4))
        guess = 0.8 * label + float(rng.normal(0, 0.9))
        return row | {"label": label, "prediction": guess, "loss": (label - guess) ** 2}
    if kind == "token":
        tokens = text.split()
        label = [int(x) for x in rng.choice(4, len(tokens), p=[0.7, 0.1, 0.1, 0.1])]
        guess = [x if rng.random() < 0.9 else int(rng.integers(4)) for x in label]
        probs = [[0.97 if c == g else 0.01 for c in range(4)] for g in guess]
        loss = float(np.mean([-math.log(p[x]) for p, x in zip(probs, label)]))
        del row["text"]
        row |= {"tokens": tokens, "label": label, "prediction": guess}
        return row | {"probs": probs, "loss": loss}
    label = int(rng.random() < 0.52)
    p = float(1 / (1 + math.exp(-(4.2 * (label - 0.5) + 1.6 * rng.standard_normal()))))
    p = min(max(p, 0.002), 0.998)
    loss = -math.log(p if label else 1 - p)
    row |= {"label": label, "prediction": int(p > 0.5), "probs": [1 - p, p]}
    return row | {"loss": loss, "score": float(rng.uniform(-4, 4))}


class Page(HTMLParser):
    """Checks that tags nest and collects what a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page_of(run: Path) -> str:
    text = report.write(run).read_text("utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    names = {name for name, _ in page.attributes}
    assert not {n for n in names if n.startswith("on")} | names & {"src", "href", "srcset"}
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r'd="[^"]*(nan|inf)|="(nan|inf)', text)
    return text


@pytest.fixture(params=["classification", "regression", "token"])
def run(request, tmp_path):
    return make_run(tmp_path / "run", kind=request.param, steps=240, examples=120)


def test_every_section_is_there_and_nothing_is_loaded(run):
    text = page_of(run)
    assert "http://" not in text
    assert "https://" not in text
    for title in ("Learning", "Errors", "Examples it gets most wrong", "How it was made"):
        assert f"<h2>{title}</h2>" in text
    for content in (
        "steppe finetune vader-movies",
        "0.10.2",
        "MIT (vaderSentiment",
        "optimizer.learning_rate",
        "16 GB",
        "prefers-color-scheme: dark",
        'name="viewport"',
    ):
        assert content in text
    assert "not complete" not in text


def test_headline_shows_result_interval_and_baselines(tmp_path):
    text = page_of(make_run(tmp_path / "run"))
    for content in ("86.3%", "83.8% to 88.5%", "812 examples", "majority class", "52.4%", "79.1%"):
        assert content in text


def test_same_input_gives_the_same_bytes(run):
    first = report.write(run).read_bytes()
    assert report.write(run).read_bytes() == first


def test_five_thousand_steps_stay_small_and_keep_their_spike(tmp_path):
    run = make_run(tmp_path / "run", steps=5000, examples=4000)
    with (run / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 2501, "kind": "train", "loss": 57.0}) + "\n")
    assert report.write(run).stat().st_size < 400_000  # far below the bound of 2 MB
    raw = curves.series(folder.read(run).train, "loss")
    assert len(raw.steps) == 5000
    assert np.nanmax(curves.band(raw).high) == 57.0
    thinned = curves.thin(raw)
    assert len(thinned.steps) == curves.MAX_POINTS
    assert np.isclose(thinned.values.mean(), raw.values.mean(), rtol=1e-2)


def test_hostile_text_is_text(tmp_path):
    run = make_run(tmp_path / "run<b>", steps=40, examples=30)
    results = json.loads((run / "results.json").read_text())
    results["task"]["label_names"] = [HOSTILE, "positive"]
    results["command"] = results["model"]["name"] = HOSTILE
    results["metrics"]["test"][HOSTILE] = HOSTILE
    results["metrics"][HOSTILE] = results["baselines"][HOSTILE] = {"accuracy": 0.5}
    for key in ("versions", "hardware", "data", "timings"):
        results[key][HOSTILE] = HOSTILE if key != "timings" else 1.0
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}}))
    with (run / "metrics.jsonl").open("a") as out:
        out.write(json.dumps({"step": 7, "kind": "eval", "split": HOSTILE, "loss": 1.0}) + "\n")
    for kind, extra in (("a", {"text": HOSTILE}), ("a", {"tokens": [HOSTILE, HOSTILE]})):
        row = {"id": HOSTILE, "label": 0, "prediction": 1, "probs": [0.001, 0.999], "loss": 9.0}
        with (run / "predictions.jsonl").open(kind) as out:
            out.write(json.dumps(row | extra) + "\n")
    text = page_of(run)
    assert "alert(1)" in text
    assert "<script" not in text
    assert "onerror=alert(1)&gt;" in text
    assert text.count("</style>") == 1
    assert "\x00" not in text


def test_text_of_the_examples_is_ranked_by_loss_and_cut(tmp_path):
    rows = [
        {"id": str(i), "text": "x" * 5000, "label": 0, "prediction": i % 2, "loss": float(i)}
        for i in range(50)
    ]
    found = outcomes.worst(rows, ["no", "yes"], "classification")
    assert [case.id for case in found] == [str(i) for i in range(49, 9, -2)]
    assert len(found[0].text) == outcomes.TEXT_LIMIT
    assert (found[0].label, found[0].prediction) == ("no", "yes")


def test_loss_is_derived_where_it_is_not_written():
    rows = [
        {"label": 1, "prediction": 0, "probs": [0.75, 0.25]},
        {"label": "yes", "prediction": "no", "probs": [0.9, 0.1]},
    ]
    found = outcomes.worst(rows, ["no", "yes"], "classification")
    assert [case.loss for case in found] == pytest.approx([-math.log(0.1), -math.log(0.25)])
    (case,) = outcomes.worst([{"label": 2.0, "prediction": 0.5}], [], "regression")
    assert case.loss == 2.25


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "results.json", "predictions.jsonl"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "binary", "wrong type"])
def test_a_missing_or_damaged_file_is_said_and_the_rest_is_shown(tmp_path, name, damage):
    run = make_run(tmp_path / "run", steps=40, examples=30)
    content = {"empty": b"", "binary": b"\xff\xfe\x00{[", "wrong type": b"[1, 2]\n"}
    if damage == "missing":
        (run / name).unlink()
    else:
        (run / name).write_bytes(content[damage])
    text = page_of(run)
    assert "This report is not complete" in text
    assert name in text
    assert "<h2>How it was made</h2>" in text
    assert ("<h2>Learning</h2>" in text) == (name != "metrics.jsonl")
    assert ("Confusion matrix" in text) == (name != "predictions.jsonl")


def test_killed_run_shows_what_was_written_before_the_torn_line(tmp_path):
    run = make_run(tmp_path / "run", steps=80, examples=30)
    (run / "results.json").unlink()
    (run / "predictions.jsonl").unlink()
    whole = (run / "metrics.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:50]) + lines[50][:23])
    found = folder.read(run)
    assert len(found.train) + len(found.evals) == 50
    text = page_of(run)
    assert "torn line" in text
    assert "The 50 rows before it are shown" in text
    assert "last evaluation, at step 40" in text
    assert "results.json is missing" in text


def test_torn_inside_a_multibyte_character(tmp_path):
    (tmp_path / "predictions.jsonl").write_bytes('{"text": "caf\u00e9'.encode()[:-1])
    assert folder.read(tmp_path).predictions == []
    page_of(tmp_path)


def test_values_that_are_not_finite_are_gaps_and_are_said(tmp_path):
    run = make_run(tmp_path / "run", steps=40, examples=30)
    with (run / "metrics.jsonl").open("a") as out:
        for step, value in ((10, math.nan), (11, math.inf), (12, -math.inf), (13, 10**400)):
            row = {"step": step, "kind": "train", "loss": value, "grad_norm": value}
            out.write(json.dumps(row) + "\n")
        out.write('{"step": NaN, "kind": "train", "loss": 1}\n{"step": 14, "kind": "train"}\n')
        out.write('{"step": 40, "kind": "eval", "split": "valid", "accuracy": NaN}\n')
    results = json.loads((run / "results.json").read_text())
    results["metrics"]["test"] = {"accuracy": math.nan, "loss": math.inf}
    results["intervals"]["accuracy"] = [math.nan, 1]
    (run / "results.json").write_text(json.dumps(results))
    (run / "predictions.jsonl").write_text(
        '{"label": 1, "prediction": 0, "probs": [NaN, NaN], "loss": NaN, "text": "t"}\n'
        '{"label": 1, "prediction": 0, "probs": [1, 0], "loss": Infinity, "text": "u"}\n'
    )
    text = page_of(run)
    assert "The training loss is not finite in 4 rows, first at step 10." in text
    assert "not finite" in text
    assert "Confusion matrix" in text


def test_rows_of_a_resumed_run_are_not_shown_twice(tmp_path):
    rows = [{"step": s, "kind": "train", "loss": v} for s, v in ((1, 9.0), (2, 8.0), (1, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = folder.read(tmp_path)
    assert [(r["step"], r["loss"]) for r in found.train] == [(1, 1.0), (2, 8.0)]


def test_a_folder_without_a_run_is_an_error_and_nothing_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it holds none of config"):
        report.write(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.write(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_earlier_report(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=40, examples=30)
    first = report.write(run).read_bytes()
    before = sorted(p.name for p in run.iterdir())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("steppe.launch.report.page.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(run)
    assert (run / "report.html").read_bytes() == first
    assert sorted(p.name for p in run.iterdir()) == before


def test_confusion_counts_and_the_gathering_of_rare_classes():
    rows = [{"label": a, "prediction": b} for a, b in ((0, 0), (0, 1), (1, 1), (1, 1))]
    found = outcomes.classes(rows, ["no", "yes"])
    assert outcomes.confusion(found).counts.tolist() == [[1, 1], [0, 2]]
    rows = [{"label": i, "prediction": i} for i in range(40) for _ in range(40 - i)]
    rows.append({"label": 39, "prediction": 0})
    names, counts = outcomes.confusion(outcomes.classes(rows, []), limit=5)
    assert list(names) == ["0", "1", "2", "3", "36 others"]
    assert counts.sum() == len(rows)
    assert counts[4, 0] == 1


def test_rows_that_make_no_sense_are_left_out():
    rows = [
        {"label": None, "prediction": 1},
        {"label": 1.5, "prediction": 1},
        {"label": -100, "prediction": 1},
        {"label": [0, -100], "prediction": [0, 1], "probs": [[0.9, 0.1]]},
        {},
    ]
    found = outcomes.classes(rows, ["no", "yes"])
    assert found.true.tolist() == [0]
    assert found.confidence.tolist() == [0.9]
    assert outcomes.classes([{}], []) is None


def test_calibration_against_a_count_by_hand():
    probs = [[0.95, 0.05], [0.91, 0.09], [0.35, 0.65], [0.45, 0.55]]
    rows = [
        {"label": label, "prediction": int(p[1] > 0.5), "probs": p}
        for label, p in zip((0, 1, 1, 0), probs)
    ]
    rows.append({"label": 1, "prediction": 1, "probs": None})
    rows.append({"label": 1, "prediction": 1, "probs": 0.75})  # of the prediction
    found = outcomes.calibration(outcomes.classes(rows, ["no", "yes"]))
    # Fifteenths: 0.55 (wrong), 0.65 (right), 0.75 (right), 0.91, 0.95 (half right in 14/15).
    assert found.sizes.tolist() == [1, 1, 1, 1, 1]
    assert found.error == pytest.approx((0.55 + 0.35 + 0.25 + 0.91 + 0.05) / 5)


def test_calibration_error_is_the_evaluation_s(tmp_path):
    from steppe.train.evaluate.calibration import expected_calibration_error

    rows = folder.read(make_run(tmp_path / "run", steps=8)).predictions
    found = outcomes.calibration(outcomes.classes(rows, ["negative", "positive"]))
    expected = expected_calibration_error([r["probs"] for r in rows], [r["label"] for r in rows])
    assert found.error == pytest.approx(expected)


def test_smoothing_passes_over_gaps_and_is_unbiased_at_the_start():
    raw = curves.Series(np.arange(6.0), np.array([3.0, 3.0, np.nan, 3.0, 3.0, 3.0]))
    out = curves.smooth(raw, span=4).values
    assert np.isnan(out[2])
    np.testing.assert_allclose(np.delete(out, 2), 3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (2e-5, "2e-5"), (12_000, "12k"), (1.5e6, "1.5M"), (-3.0, "-3")],
)
def test_short_numbers(value, text):
    assert svg.short(value) == text


@pytest.mark.parametrize("values", [[0.0], [5.0], [1e-9, 1.0], [-1.0, 1.0], [], [1e199]])
def test_axes_have_ticks_within_their_range(values):
    axis = svg.fit(values, 0.0, 100.0)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12
    assert all(axis.low * (1 - 1e-9) - 1e-9 <= t <= axis.high * (1 + 1e-9) for t in ticks)
    assert axis(axis.low) == 0.0
    assert axis(axis.high) == 100.0
    assert axis.log == (values == [1e-9, 1.0])


def test_durations():
    assert [facts.duration(s) for s in (0.84, 59.4, 372, 11_100)] == [
        "0.8 s",
        "59 s",
        "6 min 12 s",
        "3 h 05 min",
    ]


def test_summary_for_the_terminal(tmp_path):
    from rich.console import Console

    run = make_run(tmp_path / "run", steps=40, examples=30)
    (run / "config.json").unlink()
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(report.summary(run))
    text = console.export_text()
    console.file.close()
    for content in ("test accuracy", "86.3%  (83.8% to 88.5%)", "majority class", "22.7 M"):
        assert content in text
    assert "config.json is missing" in text
