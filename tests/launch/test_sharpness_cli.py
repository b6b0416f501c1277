"""``steppe sharpness`` as a user meets it: a tiny run, its numbers and its page."""

import json
import random
import shutil

import jax
import pytest

from steppe.launch import cli, config, outputs, sharpness
from steppe.launch.report import sharpness as page
from steppe.launch.report import surfaces
from steppe.models import pretrained
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig

WORDS = ["good", "fine", "bad", "poor", "film", "plot", "was"]
QUICK = [
    "--examples=10",
    "--batch-size=4",
    "--rho",
    "0.05",
    "0.2",
    "--steps=2",
    "--iterations=4",
    "--eigenvalues=2",
    "--probes=2",
    "--points=3",
    "--grid=3",
]


def make_run(folder, data, *, seed=0, head="classification", classes=2):
    """A run folder with an exported model, as a short fine-tuning leaves it."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = EncoderConfig(
        "bert", len(vocab), 8, 1, 2, 8, 12, types=2, pooler=head != "token", remat="none",
        head=HeadConfig(head, classes),
    ).build()  # fmt: skip
    params = jax.tree.map(
        lambda x: 8.0 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(seed))
    )
    labels = ("neg", "pos") if head == "classification" and classes == 2 else None
    pretrained.save(folder / "model", model, params, labels=labels)
    (folder / "model" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (folder / "model" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    settings = config.DataConfig(source=f"file:{data}", max_length=8, buckets=())
    outputs.write_json(folder / "config.json", config.to_dict(config.FinetuneConfig(data=settings)))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(0)
    rows = []
    for number in range(60):
        label = rng.choice(["pos", "neg"])
        said = rng.choice(WORDS[:2] if label == "pos" else WORDS[2:4])
        text = f"{rng.choice(WORDS[4:6])} was {said}" + " film" * (number % 4)
        rows.append({"id": f"r{number}", "text": text, "label": label})
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / name, data, seed=i) for i, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def measured(runs):
    before = set(runs[0].iterdir())
    assert cli.main(["sharpness", str(runs[0]), "--against", str(runs[1]), *QUICK]) == 0
    written = {file.name for file in set(runs[0].iterdir()) - before}
    assert written == {"sharpness.json", "sharpness.html"}
    return json.loads((runs[0] / "sharpness.json").read_text())


def test_the_numbers_of_both_models(measured, runs):
    assert [m["run"] for m in measured["models"]] == [str(run) for run in runs]
    assert measured["data"]["examples"] == 10
    for found in measured["models"]:
        curve, plane = found["curve"], found["surface"]
        # The middle of every surface is the model itself.
        assert curve["losses"][1] == pytest.approx(found["loss"], rel=1e-5)
        assert plane["losses"][1][1] == pytest.approx(found["loss"], rel=1e-5)
        # Both go along the same first direction.
        assert [row[1] for row in plane["losses"]] == pytest.approx(curve["losses"], rel=1e-5)
        gaps = [b["gap"] for b in found["balls"]]
        assert 0 < gaps[0] < gaps[1]
        assert all(b["gap"] >= b["one_step"] for b in found["balls"])
        # To first order the loss rises by rho times the norm of the gradient.
        assert gaps[0] == pytest.approx(0.05 * found["gradient_norm"], rel=0.5)
        assert found["eigenvalues"] == sorted(found["eigenvalues"], reverse=True)
    assert measured["models"][0]["loss"] != measured["models"][1]["loss"]


def test_the_page_needs_nothing_else_and_follows_from_the_numbers(measured, runs):
    text = (runs[0] / "sharpness.html").read_text()
    assert text == page.render(page.finite(measured))
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    assert "nan" not in text.lower().replace("finance", "")
    for words in ("The surface", "The spectrum", "one", "two", "Largest rise"):
        assert words in text


def test_a_loss_of_infinity_is_drawn(measured):
    worse = json.loads(json.dumps(measured))
    plane = worse["models"][1]["surface"]["losses"]
    plane[0][0] = plane[0][1] = None
    worse["models"][1]["curve"]["losses"][0] = None
    worse["models"][1]["balls"][1] = {"rho": 0.2, "gap": None, "worst": None, "one_step": None}
    text = page.render(page.finite(worse))
    assert "not finite" in text
    assert "nan" not in text.lower()


def test_a_plane_without_relief_and_a_whole_palette():
    import numpy as np

    assert surfaces.levels([np.ones((3, 3))])
    drawn = surfaces.plane("flat", [-1, 0, 1], np.ones((3, 3)), surfaces.levels([np.ones((3, 3))]))
    assert drawn.startswith("<svg")
    assert len(set(surfaces.STYLES)) == sharpness.MOST


def said(capsys, *args):
    assert cli.main(["sharpness", *map(str, args)]) == 2
    out = capsys.readouterr()
    assert out.err.count("\n") == 1
    return out.err


def test_mistakes_are_told_in_one_line(runs, data, tmp_path, capsys):
    run = runs[0]
    assert "no run is named" in said(capsys)
    assert "does not exist" in said(capsys, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is a file" in said(capsys, tmp_path / "file")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "runs.jsonl").touch()
    assert "is a comparison" in said(capsys, tmp_path / "half")
    (tmp_path / "empty").mkdir()
    assert "not a run folder" in said(capsys, tmp_path / "empty")
    for option, words in (
        (["--rho", "-1"], "rho must be a finite number >= 0, got -1"),
        (["--rho", "nan"], "rho must be a finite number >= 0, got nan"),
        (["--examples", "0"], "examples must be >= 1, got 0"),
        (["--grid", "1"], "grid must be 0 (no plane) or >= 2, got 1"),
        (["--points", "1"], "points must be >= 2, got 1"),
        (["--span", "0"], "span must be a finite number > 0, got 0"),
        (["--eigenvalues", "9", "--iterations", "8"], "eigenvalues=9 cannot be more"),
        (["--split", "dev"], "invalid choice 'dev'"),
        (["--against", *["x"] * 6], "against takes at most 5 runs, got 6"),
        (["--against", tmp_path / "nowhere"], "does not exist"),
    ):
        assert words in said(capsys, run, *option)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run / "config.json", unfinished)
    assert "holds no exported model: the run has not ended" in said(capsys, unfinished)
    three = make_run(tmp_path / "three", data, classes=3)
    assert "knows 3 classes" in said(capsys, run, "--against", three)
    tokens = make_run(tmp_path / "tokens", data, head="token")
    assert "has a token head, which has no loss on a classification task" in said(capsys, tokens)
    assert not (tokens / "sharpness.json").exists()
