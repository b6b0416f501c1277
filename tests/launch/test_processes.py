"""Several processes on this host are one run: equal to one process, and they fall together."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steppe.launch import cli
from steppe.launch.pods import local

STEPS = 24
PROGRAM = Path(__file__).parent / "programs" / "failing.py"


def words(reviews, out, *more):
    return [
        "finetune",
        f"--model={reviews.model}",
        f"--data.source={reviews.a}",
        "--data.max-length=12",
        "--data.buckets=12",
        "--data.limit=64",
        "--batch-size=16",
        "--optim.learning-rate=1e-3",
        "--drop=0",
        "--log-every=1",
        f"--eval-every={STEPS}",
        f"--steps={STEPS}",
        "--save-every=2",
        "--no-baselines",
        f"--out={out}",
        *more,
    ]


def rows(run, kind="train"):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in found if row["kind"] == kind}


def launch(*command):
    """``steppe launch`` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "steppe.launch.cli", "launch", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
    )


@pytest.mark.long
def test_two_processes_equal_one_also_over_a_stop_and_another_mesh(reviews, tmp_path):
    """Four devices each. Stopped by SIGTERM, it goes on with its parameters split over the two
    processes, which both read all rows then."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(words(reviews, whole)) == 0
    options = ("--local-processes", "2", "--devices-per-process=4")
    first = launch(*options, *words(reviews, run))
    deadline = time.monotonic() + 400
    while len(rows(run)) < 6 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert said.count("Give the same command with --resume to go on") == 1, said
    done = max(rows(run))
    assert 6 <= done < STEPS
    # The newest checkpoint is damaged: both processes take the one before.
    held = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert held[-1] == done
    file = max((run / "checkpoints" / str(done)).rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    stopped, done = done, held[-2]
    second = launch(*options, *words(reviews, run, "--resume", "--mesh=model=2,data=4"))
    said, _ = second.communicate(timeout=500)
    assert second.returncode == 0, said
    assert f"resumed at step {done} of {STEPS}" in said
    assert f"checkpoints/{stopped} is damaged" in said
    assert said.count("report: ") == 1
    assert rows(run) == pytest.approx(rows(whole), abs=1e-5)
    assert rows(run, "eval") == pytest.approx(rows(whole, "eval"), abs=1e-5)
    found, expected = (json.loads((r / "results.json").read_text()) for r in (run, whole))
    assert found["hardware"]["processes"] == 2
    # Every process has its own log, of both starts, and they stand beside each other.
    own = [json.loads(line) for line in (run / "metrics.1.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in own if row["kind"] == "train"]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert {"step_time", "input_wait", "device_wait"} <= set(own[0])
    assert "loss" not in own[0]
    running = found["running"]
    assert (running["starts"], running["repeated_steps"]) == (2, stopped - done)
    assert set(running["ranks"]["each"]) == {"0", "1"}
    assert "Processes" in (run / "report.html").read_text()
    assert found["metrics"]["test"] == pytest.approx(expected["metrics"]["test"], abs=1e-5)
    out = tmp_path / "again.json"
    assert cli.main(["evaluate", str(run), f"--out={out}"]) == 0
    again = json.loads(out.read_text())["metrics"]
    assert again == pytest.approx(found["metrics"]["test"], abs=1e-5)


@pytest.mark.long
def test_a_failed_rank_ends_the_others_and_its_own_words_come_first(
    reviews, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("FAILED_AT", str(tmp_path / "when"))
    options = local.Options(processes=2, devices=1)
    status = local.run([sys.executable, str(PROGRAM), *words(reviews, tmp_path / "run")], options)
    took = time.time() - float((tmp_path / "when").read_text())
    said = capfd.readouterr().err
    assert status == 2
    assert took < 15
    errors = [x for x in said.splitlines() if x.startswith(("steppe:", "[rank", "Traceback"))]
    assert errors[0] == "steppe: rank 1 of 2 failed first (status 2)", said
    assert errors[1] == "[rank 1] steppe: error: rank 1 of 2: this host has a broken disk"
    assert len(errors) == 2, said


def test_one_mistake_is_one_line(capfd):
    """Both processes make it, and the launcher has nothing to add."""
    command = [sys.executable, "-m", "steppe.launch.cli", "finetune", "--batch-size=0"]
    assert local.run(command, local.Options(processes=2)) == 2
    said = capfd.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("steppe: error: --batch-size must be >= 1, got 0; ")
    assert said.out == ""


@pytest.mark.long
def test_ranks_with_other_settings_or_code_are_found_at_the_start(reviews, tmp_path):
    port = local.free_port()
    out = tmp_path / "run"
    base = local.environment(local.Options(processes=2), 0, port)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "steppe.launch.cli", *words(reviews, out, f"--seed={index}")],
            stderr=subprocess.PIPE,
            text=True,
            env={**base, "STEPPE_PROCESS_INDEX": str(index)},
        )
        for index in range(2)
    ]
    for index, process in enumerate(started):
        _, said = process.communicate(timeout=200)
        assert process.returncode == 2
        assert (
            f"rank {index} of 2: rank 1 disagrees with rank 0 on config.seed: 1, on rank 0 0; "
            "start every rank with the same command" in said
        )
    assert not out.exists()


def test_a_coordinator_that_does_not_answer_is_named(reviews, tmp_path):
    port = local.free_port()
    env = local.environment(local.Options(processes=2), 1, port)
    done = subprocess.run(
        [sys.executable, "-m", "steppe.launch.cli", *words(reviews, tmp_path / "run")],
        env={**env, "STEPPE_JOIN_TIMEOUT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 69
    pattern = rf"rank 1 of 2: coordinator 127\.0\.0\.1:{port}: it cannot be reached .* within 1 s"
    assert re.search(pattern, done.stderr), done.stderr
