"""A run that is killed loses nothing; what saving and input cost is counted from the log."""

import io
import random

import pytest
from rich.console import Console

from steppe.launch.bench import chaos, chaos_run, cli, harness, overhead, shapes
from steppe.launch.bench.chaos import ChaosBench, Kill

STEPS, EVERY = 24, 4


@pytest.mark.long
def test_killed_three_times_on_other_devices_it_ends_with_the_same_losses(tmp_path):
    """SIGTERM and SIGKILL during a step, SIGKILL while a checkpoint is written."""
    chaos_run.train(chaos_run.Settings(str(tmp_path / "alone"), STEPS, EVERY, devices=1))
    kills = (
        Kill("step", "SIGTERM", 6, 0.001, devices=2),
        Kill("step", "SIGKILL", 5, 0.001, devices=2),
        Kill("save", "SIGKILL", 1, 0.0, devices=1),
    )
    found = chaos.disturbed(tmp_path / "run", STEPS, EVERY, kills, (1, 1))
    worst = chaos.difference(chaos.curve(tmp_path / "run"), chaos.curve(tmp_path / "alone"))
    assert worst < chaos.TOLERANCE
    assert [row["status"] for row in found["kills"]] == [75, -9, -9]
    first, second, third = found["kills"]
    assert first["reached"] == first["saved"] >= 6
    assert second["reached"] - second["saved"] <= 2 * EVERY
    assert found["starts"] == 4
    lost = second["reached"] - second["saved"] + third["reached"] - third["saved"]
    assert found["repeated_steps"] == lost
    assert 0 < found["goodput"] < 1


def test_the_kills_are_drawn_from_the_seed_and_cover_everything():
    config = ChaosBench()
    kills = chaos.draw(config, chaos.TOPOLOGIES, random.Random(0))
    assert kills == chaos.draw(config, chaos.TOPOLOGIES, random.Random(0))
    assert kills != chaos.draw(config, chaos.TOPOLOGIES, random.Random(1))
    assert len(kills) == 20
    pairs = {(kill.when, kill.signal) for kill in kills}
    assert len(pairs) == 6
    assert {(kill.processes, kill.devices) for kill in kills} == set(chaos.TOPOLOGIES)
    assert all(0 <= kill.rank < kill.processes and kill.ahead >= 1 for kill in kills)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"status": 0}, "start 1 ended with 0, not by its SIGKILL"),
        ({"reached": 10, "saved": 1}, "9 steps are lost with a save every 4"),
        ({"signal": "SIGTERM", "status": 75, "saved": 4}, "1 steps are lost although SIGTERM"),
    ],
)
def test_what_a_kill_may_not_do(row, says):
    fine = {"signal": "SIGKILL", "when": "step", "status": -9, "reached": 5, "saved": 5}
    chaos._check(fine, 1, 4)
    with pytest.raises(harness.Void, match=says):
        chaos._check({**fine, **row}, 1, 4)


def test_bad_settings():
    with pytest.raises(ValueError, match="save_every must be >= 1, got 0"):
        ChaosBench(save_every=0)
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        overhead.OverheadBench(every=0)
    with pytest.raises(ValueError, match=r"at most shapes\.positions = 512, got 1024"):
        overhead.OverheadBench(length=1024)
    assert {"chaos", "overhead"} <= set(cli.BENCHES)


def test_overheads_by_hand():
    saving = [{"step_time": 0.1, "input_wait": 0.0}, {"step_time": 0.1, "save_time": 0.3}]
    plain = [{"step_time": 0.1, "input_wait": 0.001}, {"step_time": 0.1, "input_wait": 0.003}]
    found = overhead.summary(100, saving, plain, {True: [20.6], False: [20.0]})
    assert found["blocked_share"] == pytest.approx(0.03)
    assert found["slowdown"]["median"] == pytest.approx(0.06)  # of one of two intervals
    assert found["input_wait_share"] == pytest.approx(0.02)


def test_overheads_of_a_tiny_model(tmp_path):
    config = overhead.OverheadBench(
        shapes=shapes.TINY, batch=8, length=16, examples=64, every=3, rounds=2,
        out=tmp_path / "overhead.json",
    )  # fmt: skip
    said = []
    found = overhead.run(config, said.append)
    assert len(found["blocked"]) == 2  # one in each stretch with a save
    assert max(found["blocked"]) < sum(found["seconds"]["saving"])
    assert found["blocked_share"] > 0
    assert 0 <= found["input_wait_share"] < 1
    assert found["checkpoint_bytes"] > 1000
    assert (tmp_path / "overhead.json").is_file()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(overhead.table(found))
    assert "waiting for input" in console.export_text()
