"""``steppe continual`` on a tiny model: every task's end is a place to go on from, and the table is
that of its stages."""

import json
from pathlib import Path

import numpy as np
import pytest

from steppe.launch import cli, overlays
from steppe.launch.compare.journal import Lines
from steppe.launch.continual import material, table
from steppe.launch.continual.command import _Stream
from steppe.launch.continual.settings import ContinualConfig
from steppe.launch.report import streaming
from steppe.models.overlays import files
from steppe.train import continual

pytestmark = pytest.mark.slow


def words(world, out, *more):
    return [
        "continual", f"--model={world.model}", "--tasks", world.a, world.b, f"--out={out}",
        "--data.max-length=8", "--data.buckets=8", "--data.limit=48", "--batch-size=16",
        "--rank=2", "--epochs=2", "--optim.learning-rate=1e-2", "--log-every=2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(reviews, tmp_path_factory):
    """Two methods, stopped after the first task of the second one and gone on with."""
    out = tmp_path_factory.mktemp("continual") / "out"
    learn = _Stream.learn
    calls = []

    def stopped(self, count, finished):
        calls.append((self.method, count))

        def then(row):
            finished(row)
            if row["method"] == "o-lora" and len(calls) == 2:
                raise KeyboardInterrupt

        learn(self, count, then)

    patch = pytest.MonkeyPatch()
    patch.setattr(_Stream, "learn", stopped)
    arguments = words(reviews, out, "--method", "replay", "o-lora", "--memory=8")
    assert cli.main(arguments) == 130
    assert not (out / "o-lora" / "0" / "task-1").exists()
    assert cli.main([*arguments, "--resume"]) == 0
    patch.undo()
    assert calls == [("replay", 0), ("o-lora", 0), ("o-lora", 1)]
    return out


def test_the_table_is_that_of_its_stages(done):
    found = json.loads((done / "results.json").read_text())
    rows = Lines(done / "stages.jsonl").read
    assert [(r["method"], r["task"]) for r in rows] == [
        ("replay", "a"), ("replay", "b"), ("o-lora", "a"), ("o-lora", "b")
    ]  # fmt: skip
    assert found["done"] == found["of"] == 2
    for method, pair in zip(found["methods"], (rows[:2], rows[2:]), strict=True):
        matrix = continual.continual_matrix([row["accuracy"] for row in pair])
        for name in table.SCORES:
            expected = getattr(continual, name)(matrix)
            assert method["metrics"][name]["mean"] == pytest.approx(expected)
    assert all(row["compiles"] == 1 for row in rows)
    # The memory makes the second task of replay longer: 8 of 48 more examples.
    assert [row["steps"] for row in rows] == [6, 8, 6, 6]
    assert 0 < rows[3]["cosine"] <= 1
    text = (done / "table.md").read_text()
    assert "| method | seeds | a | b | average |" in text
    assert "### o-lora, seed 0" in text


def test_the_page_shows_what_is_left_and_is_written_again(done, capsys):
    page = (done / "report.html").read_text()
    rows = Lines(done / "stages.jsonl").read
    learnt, last = (100 * rows[n]["accuracy"][0] for n in (2, 3))
    assert f"o-lora, a: {learnt:.1f} when learnt, {last:.1f} at the end" in page
    assert f"after a, b: {rows[0]['accuracy'][1]:.1%}" in page
    assert f"largest cosine of {rows[3]['cosine']:.2f}" in page
    (done / "report.html").unlink()
    assert cli.main(["report", str(done)]) == 0
    assert (done / "report.html").read_text() == page
    assert "report.html" in capsys.readouterr().out


def test_fewer_methods_or_seeds_are_not_gone_on_with(done, reviews, capsys):
    arguments = words(reviews, done, "--resume", "--memory=8")
    for given, said in (
        (["--method", "replay"], "o-lora is not among those given now"),
        (["--method", "replay", "o-lora", "--seeds", "1"], "has seeds 0, and 0 is not among"),
    ):
        before = (done / "config.json").read_text()
        assert cli.main([*arguments, *given]) == 2
        assert said in capsys.readouterr().err
        assert (done / "config.json").read_text() == before


def test_a_page_without_a_complete_stream():
    found = table.summary(ContinualConfig(tasks=("file:a", "file:b")), {})
    page = streaming.render(found)
    assert "0 of" in page
    assert "What is left" not in page


def test_the_log_covers_every_step_once(done):
    for method, last in (("replay", 14), ("o-lora", 12)):
        lines = (done / method / "0" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == sorted(set(steps))
        assert steps[-1] == last
    assert "loss/orthogonality" in json.loads(lines[-1])


def test_the_overlay_of_the_last_task_is_kept(done):
    assert not (done / "o-lora" / "0" / "task-0").exists()
    saved = files.load(done / "o-lora" / "0" / "task-1")
    assert saved.name == "o-lora"
    assert np.asarray(saved.params["overlay"]["bank"]["active"]).tolist() == [1, 0]
    loaded = overlays.load(Path(done / "o-lora" / "0" / "task-1"))
    assert loaded.labels == ("a/neg", "a/pos", "b/neg", "b/pos")


def test_classes_of_one_head(reviews):
    own = ContinualConfig(tasks=(reviews.a, reviews.b))
    labels = [("neg", "pos"), ("pos", "other")]
    assert material._classes(own, ("a", "b"), labels) == (
        ("a/neg", "a/pos", "b/pos", "b/other"),
        (0, 0, 1, 1),
        [[0, 1], [2, 3]],
    )
    shared = ContinualConfig(tasks=(reviews.a, reviews.b), heads="shared")
    assert material._classes(shared, ("a", "b"), labels) == (
        ("neg", "pos", "other"),
        None,
        [[0, 1], [1, 2]],
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rank=9"], "tasks * rank must be <= 16"),
        (["--method", "ewc"], "ewc"),
        (["--optim.schedule=linear"], "optim.schedule must be constant"),
        (["--power=3"], "power must be 1 or 2"),
        (["--seeds", "-1"], "seed must be in"),
        (["--optim.learning-rate=nan"], "--optim.learning-rate must be > 0"),
        (["--alpha=nan"], "alpha must be >= 0"),
        (["--log-every=0"], "--log-every must be >= 1"),
        (["--data.task=lm"], "data.task must be classification or pair"),
        (["--memory=0"], "memory must be >= 1"),
    ],
)
def test_mistakes(more, said, reviews, tmp_path, capsys):
    assert cli.main(words(reviews, tmp_path / "out", *more)) == 2
    message = capsys.readouterr().err
    assert said in message.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_one_task_is_no_stream(reviews, tmp_path, capsys):
    arguments = ["continual", f"--model={reviews.model}", "--tasks", reviews.a]
    assert cli.main([*arguments, f"--out={tmp_path}"]) == 2
    assert "tasks must be two or more, got 1" in capsys.readouterr().err
