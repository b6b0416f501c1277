"""The watchdog for hangs, and the log of slow steps."""

import subprocess
import sys
import time

import pytest

from steppe.launch.pods import codes
from steppe.train import steptime, watchdog


def test_a_hang_ends_the_process_with_its_own_status_and_the_stacks():
    code = (
        "import time\n"
        "from steppe.train import watchdog\n"
        "def stuck(): time.sleep(60)\n"
        "with watchdog.watching(0.3) as beat:\n"
        "    beat('step 7')\n"
        "    stuck()\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == watchdog.HUNG == codes.HUNG
    assert "step 7 has not ended after 0.005 minutes" in done.stderr
    assert "in stuck" in done.stderr
    assert time.monotonic() - begin < 50


def test_a_run_that_goes_on_is_left_alone(tmp_path):
    ended = []
    with (
        (tmp_path / "log").open("w") as log,
        watchdog.watching(0.5, stream=log, end=ended.append) as beat,
    ):
        for number in range(8):
            time.sleep(0.1)
            beat(f"step {number}")
    time.sleep(0.6)
    assert ended == []
    with watchdog.watching(0.0, end=ended.append) as beat:
        beat("nothing watches")
    with (
        (tmp_path / "log").open("w") as log,
        watchdog.watching(0.05, stream=log, end=ended.append),
    ):
        time.sleep(0.5)
    assert ended == [76]


def test_the_time_must_make_sense():
    for bad in (-1.0, float("inf"), float("nan")):
        with (
            pytest.raises(ValueError, match="must be >= 0 seconds and finite"),
            watchdog.watching(bad),
        ):
            pass


def test_slow_steps_are_told_from_their_own_kind():
    slow = steptime.Outliers()
    short, long = (8, 16), (8, 128)
    for _ in range(20):
        assert slow.add(short, 0.2) is None
        assert slow.add(long, 1.0) is None
    assert slow.add(long, 1.2) is None
    assert slow.add(short, 0.65) is None  # more than 3 times, but not by 0.5 s
    assert slow.add(short, 1.0) == {"step_time": 1.0, "median": 0.2, "ratio": 5.0}
    found = [slow.add(long, 9.0) for _ in range(60)]
    assert found[0] == {"step_time": 9.0, "median": 1.0, "ratio": 9.0}
    assert found[-1] is None  # that is how it is now


def test_the_first_steps_are_not_judged():
    slow = steptime.Outliers()
    times = [5.0, *[0.1] * (steptime.ENOUGH - 2), 30.0]
    assert [slow.add((), t) for t in times] == [None] * steptime.ENOUGH
