"""``steppe bench scaling`` on a tiny encoder: processes that train together, what is refused."""

import io
import json
import os

import pytest

from steppe.launch.bench import harness, scaling
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.shapes import TINY

SMALL = {"shapes": TINY, "batch": 2, "length": 6, "protocol": Protocol(1, 2, 1)}


@pytest.mark.long
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a core for each of two processes")
def test_it_measures_processes_that_see_the_loss_of_all_rows(tmp_path):
    out = tmp_path / "result.json"
    result = scaling.run(scaling.ScalingBench(**SMALL, out=out), lambda line: None)
    assert result["first_loss_difference"] < 1e-5
    for name in scaling.SIDES:
        assert len(result["sides"][name]["seconds"]) == 2
    one, both = (result["sides"][name]["seconds"] for name in ("one", "together"))
    assert result["efficiency"]["together"] == harness.ratio(one, both)._asdict()
    assert json.loads(out.read_text())["bench"] == "scaling"
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(scaling.table(result))
    assert "2 together" in console.export_text()


class Said:
    """A process that answers what it was given."""

    def __init__(self, loss):
        self._loss = loss

    def call(self, method, *args):
        assert method == "losses"
        return [self._loss]


def test_a_loss_of_other_rows_is_not_measured():
    apart = [Said(0.5), Said(0.7)]
    assert scaling._first_loss(apart, [Said(0.6), Said(0.6)], 1e-5) < 1e-9
    with pytest.raises(harness.Void, match="the losses differ"):
        scaling._first_loss(apart, [Said(0.6), Said(0.5)], 1e-5)


def test_a_turn_takes_as_long_as_its_slowest_process():
    class Slow(Said):
        def call(self, method, *args):
            assert (method, args) == ("turn", (3,))
            return self._loss

    assert scaling._turn([Slow(0.2), Slow(0.9)])(3) == 0.9


def test_settings_out_of_range(monkeypatch):
    with pytest.raises(ValueError, match="processes must be >= 2, got 1"):
        scaling.ScalingBench(processes=1)
    with pytest.raises(ValueError, match=r"length must be at most shapes.positions = 512, got 513"):
        scaling.ScalingBench(length=513)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    with pytest.raises(ValueError, match="processes must be at most the 1 cores, got 2"):
        scaling.run(scaling.ScalingBench(**SMALL), lambda line: None)
