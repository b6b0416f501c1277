"""What follows a run: rollbacks, a profile, goodput and the log of every process; and SIGTERM."""

import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from steppe.launch import cli, finetune, watch
from steppe.launch.report import running, sections
from steppe.launch.report.folder import RunFolder, read
from steppe.train import metrics


def words(reviews, out, *more):
    return [
        "finetune",
        f"--model={reviews.model}",
        f"--data.source={reviews.a}",
        "--data.max-length=12",
        "--data.buckets=12",
        "--data.limit=64",
        "--batch-size=16",
        "--steps=14",
        "--log-every=1",
        "--eval-every=14",
        "--save-every=4",
        "--no-baselines",
        f"--out={out}",
        *more,
    ]


def test_a_run_goes_back_is_profiled_and_says_how_it_ran(reviews, tmp_path, monkeypatch, capsys):
    """Batch 11 comes with a hundred times the label weights' loss: see ``spoilt``."""
    guarded = watch.guarded

    class Spoilt:
        def __init__(self, inner):
            self.inner, self.number = inner, 0
            self.get_state, self.set_state = inner.get_state, inner.set_state

        def __next__(self):
            batch = next(self.inner)
            if self.inner.get_state()["batch"] == 11:
                batch = {**batch, "label_mask": batch["label_mask"] * np.float32(np.nan)}
            return batch

    monkeypatch.setattr(watch, "guarded", lambda batches, c: guarded(Spoilt(batches), c))
    run = tmp_path / "run"
    options = ("--spike-factor=20", "--profile=3:5", "--optim.learning-rate=1e-3")
    assert cli.main(words(reviews, run, *options)) == 0
    assert "step 11 went wrong: back to step 8, 3 batches are skipped" in capsys.readouterr().err
    assert any((run / "profile").rglob("*.xplane.pb"))
    rows = metrics.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 15))
    assert all(
        "device_wait" in row and "flops_per_s" in row for row in rows if row["kind"] == "train"
    )
    found = json.loads((run / "results.json").read_text())["running"]
    assert (found["starts"], found["rollbacks"], found["skipped_batches"]) == (1, 1, 3)
    assert 0 < found["goodput"] < 1
    assert found["wall_s"] > found["useful_s"] > 0
    page = (run / "report.html").read_text()
    assert "How it ran" in page
    assert "step 11: not finite; back to step 8, 3 batches skipped" in page
    # The count of rollbacks is no part of what a run is, their factor is.
    assert {"spike_rollbacks", "profile"} <= set(finetune.FREE)
    assert cli.main([*words(reviews, run, *options, "--resume"), "--spike-factor=30"]) == 2
    assert "spike_factor was 20.0, now it is 30.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--spike-factor=0.5", "--spike-factor must be above 1 and finite, or 0 for off, got 0.5"),
        ("--spike-window=2", "--spike-window must be >= 8, got 2"),
        ("--spike-rollbacks=0", "--spike-rollbacks must be >= 1, got 0"),
        ("--profile=9:9", "profile must be FIRST:END such as 10:13"),
        ("--profile=0:2", "counted from 1, got '0:2'"),
        ("--profile=ten", "got 'ten'"),
    ],
)
def test_mistakes_are_named(option, says, capsys):
    for command in ("finetune", "distill"):
        assert cli.main([command, option]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["build", "finish"])
def test_sigterm_outside_the_training_asks_for_another_start(
    reviews, tmp_path, monkeypatch, capsys, moment
):
    def stop(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(finetune, moment, stop)
    run = tmp_path / "run"
    more = () if moment == "build" else ("--steps=1", "--eval-every=0", "--save-every=0")
    assert cli.main(words(reviews, run, *more)) == 75
    said = capsys.readouterr().err
    if moment == "build":
        assert "steppe: stopped by SIGTERM while nothing was to be saved" in said
        assert not run.exists()
    else:
        assert "is complete as far as it goes. Give the same command with --resume" in said
        assert (run / "checkpoints" / "1").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before


class Rows:
    def __init__(self):
        self.said = []

    def write(self, *row):
        self.said.append(row)

    def truncate(self, step):
        self.said.append(("truncate", step))


def test_a_process_that_is_not_the_first_writes_its_own_times(tmp_path):
    lines = Rows()
    log = watch.OwnTimes(lines)
    log.write(3, "train", {"loss": 1.0, "step_time": 0.1, "device_wait": 0.05, "mfu": 0.2})
    log.write(3, "eval", {"accuracy": 1.0})
    log.write(4, "slow", {"step_time": 9.0, "median": 0.1, "ratio": 90.0})
    log.truncate(2)
    assert lines.said == [
        (3, "train", {"step_time": 0.1, "device_wait": 0.05}),
        (4, "slow", {"step_time": 9.0, "median": 0.1, "ratio": 90.0}),
        ("truncate", 2),
    ]
    # A run that goes on with two processes cuts what a third one has left.
    for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.x.jsonl"):
        metrics.JsonLines(tmp_path / name).write(5, "train", {"step_time": 1.0})
    assert list(watch.others(tmp_path)) == [1, 2]
    watch.Log(tmp_path, 2).truncate(4)
    left = [metrics.read(file) for file in watch.others(tmp_path).values()]
    assert [len(rows) for rows in left] == [1, 0]


def test_the_slowest_process_is_the_one_whose_host_is_busiest():
    def rows(busy, count=5):
        return [
            {"step": n, "step_time": 0.1, "device_wait": 0.1 - busy, "input_wait": busy / 2}
            for n in range(1, count + 1)
        ]

    found = running.ranks({0: rows(0.01), 1: rows(0.04), 2: rows(0.02)})
    assert found["slowest"] == 1
    assert found["spread"] == pytest.approx(0.3)
    assert found["each"]["1"]["busy"] == pytest.approx(0.04)
    assert running.ranks({0: rows(0.01)}) == {}
    assert running.ranks({0: [], 1: [{"step": 1}]}) == {}


def test_a_killed_run_says_how_far_it_had_run(tmp_path):
    log = metrics.JsonLines(tmp_path / "metrics.jsonl", clock=lambda: 12.0)
    log.write(10, "train", {"loss": 1.0, "step_time": 0.5, "input_wait": 0.1, "mfu": 0.3})
    log.write(7, "slow", {"step_time": 9.0, "median": 0.5, "ratio": 18.0})
    starts = metrics.JsonLines(tmp_path / "starts.jsonl", clock=lambda: 2.0)
    starts.write(0, "start", {"began": 2.0})
    run = read(tmp_path)
    glance = dict(running.glance(run))
    assert glance == {"goodput": "40.0%", "input wait": "20.0%", "MFU": "30.0%"}
    text = running.section(run)
    assert "step 7 took 9.00 s, the median was 0.500 s" in text
    assert sections.result(run)
    assert running.section(RunFolder(tmp_path)) == ""


def test_flops_are_of_the_whole_batch_and_of_what_trains(monkeypatch):
    from steppe.launch import estimate

    asked = []
    monkeypatch.setattr(estimate, "model_flops", lambda m, s: asked.append((m, s)) or 300.0)
    config = SimpleNamespace(batch_size=64, sharpness="none")
    pieces = SimpleNamespace(
        config=config,
        overlay=None,
        loaded=SimpleNamespace(model="student"),
        data=SimpleNamespace(task=SimpleNamespace(kind="lm")),
        teacher=None,
    )
    batch = {"input_ids": np.zeros((16, 8)), "labels": np.zeros((16, 8))}  # a quarter is here
    count = watch.flops(pieces)
    assert count(batch) == count(batch) == 300.0
    assert asked == [("student", (64, 8))]
    pieces.overlay, pieces.teacher = "lora", "teacher"
    assert watch.flops(pieces)(batch) == pytest.approx(200.0 + 100.0)
    assert asked[1:] == [("student", (64, 8)), ("teacher", (64, 8))]
    assert watch.peak_flops() == 0.0  # a CPU has no datasheet here
