"""Goodput by hand; what is written survives a kill; a trace holds the steps that were asked for."""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from steppe.train import goodput, loop, metrics, profiling, step, window

toy = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "programs" / "toy.py")))


def row(step, kind="train", **values):
    return {"step": step, "kind": kind, **values}


def test_goodput_by_hand():
    """Killed at step 14, resumed at 10 after 5 s; two rows of the log are gone with the kill."""
    starts = [
        row(0, "start", began=100.0, time=101.0),
        row(10, "start", began=130.0, time=131.0, reached=14, until=125.0),
        row(20, "end", time=150.0),
    ]
    rows = [
        row(5, step_time=1.0, input_wait=0.2, compile_time=3.0),
        row(10, step_time=1.0, input_wait=0.0, save_time=0.5),
        row(11, "rollback", skipped=3),
        row(12, "slow", step_time=4.0),
        row(20, step_time=0.5, input_wait=0.1, save_time=0.25, time=149.0),
    ]
    found = goodput.summary(starts, rows)
    useful = 5 * 0.8 + 5 * 1.0 + 10 * 0.4
    assert found["useful_s"] == pytest.approx(useful)
    assert found["wall_s"] == 50.0
    assert found["goodput"] == pytest.approx(useful / 50)
    assert found["input_wait_share"] == pytest.approx(2.0 / (useful + 2.0))
    assert (found["compile_s"], found["save_s"], found["down_s"]) == (3.0, 0.75, 5.0)
    counts = {n: found[n] for n in ("starts", "repeated_steps", "rollbacks", "skipped_batches")}
    assert counts == {"starts": 2, "repeated_steps": 4, "rollbacks": 1, "skipped_batches": 3}
    assert found["slow_steps"] == 1
    assert goodput.summary(starts, []) == goodput.summary([], rows) == {}


def test_the_record_outlives_its_process(tmp_path):
    now = [10.0]
    first = goodput.Record(tmp_path, clock=lambda: now[0])
    assert goodput.reached(tmp_path) is None
    first.begin(0, devices=8)
    for number in range(1, 8):
        now[0] += 1
        first.after(number)
    assert goodput.reached(tmp_path) == (7, 17.0)  # as a kill leaves it
    now[0] = 30.0
    second = goodput.Record(tmp_path, clock=lambda: now[0])
    second.begin(4, since=28.0)
    second.end()
    rows = metrics.read(tmp_path / goodput.STARTS)
    assert [r["kind"] for r in rows] == ["start", "start", "end"]
    assert rows[0]["devices"] == 8
    assert {k: rows[1][k] for k in ("step", "reached", "until", "began")} == {
        "step": 4, "reached": 7, "until": 17.0, "began": 28.0,
    }  # fmt: skip
    (tmp_path / goodput.REACHED).write_text("3")
    assert goodput.reached(tmp_path) is None


@pytest.fixture(scope="module")
def train():
    return step.make(toy.ce, optax.sgd(0.1))


class Rows:
    def __init__(self):
        self.rows = []

    def write(self, step, kind, values):
        self.rows.append({"step": step, "kind": kind, **values})

    def truncate(self, step):
        pass


def run(train, **options):
    state = step.init(jax.random.key(0), toy.MODEL, optax.sgd(0.1))
    return loop.run(train, state, toy.Batches(), log_every=1, **options)


def test_a_trace_holds_the_steps_that_were_asked_for(train, tmp_path, monkeypatch):
    said, rows = [], Rows()
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))

    class Seen:
        def before(self, step, state):
            said.append(step)

        def after(self, step):
            pass

    with profiling.Trace(3, 5, tmp_path) as trace:
        run(train, steps=6, writers=[rows], watchers=[trace, Seen()])
    assert said == [1, 2, "start", 3, 4, "stop", 5, 6]
    said.clear()
    with profiling.Trace(5, 9, tmp_path) as trace:  # the run ends before
        run(train, steps=5, watchers=[trace])
        trace.before(7, None)
    assert said == ["start", "stop"]
    behind = profiling.Trace(3, 5, tmp_path)
    behind.before(7, None)
    assert said == ["start", "stop"]
    with pytest.raises(ValueError, match="1 <= FIRST < END, got 4:4"):
        profiling.Trace(4, 4, tmp_path)


def test_a_real_trace_is_written(train, tmp_path):
    with profiling.Trace(2, 4, tmp_path) as trace:
        run(train, steps=5, watchers=[trace])
    written = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert any(f.name.endswith(".xplane.pb") and f.stat().st_size for f in written), written


def test_rows_have_utilisation_and_memory_where_they_are_known(train, monkeypatch):
    rows = Rows()
    seen = []

    def flops(batch):
        seen.append(np.shape(batch["input_ids"]))
        return 2e6

    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 7}]
    devices = [SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    monkeypatch.setattr(window.jax, "local_devices", lambda: devices)
    run(train, steps=3, writers=[rows], flops=flops, peak_flops=1e9)
    assert seen == [(toy.ROWS, toy.LENGTH)] * 3
    for found in rows.rows:
        assert found["flops_per_s"] == pytest.approx(2e6 / found["step_time"])
        assert found["mfu"] == pytest.approx(found["flops_per_s"] / 1e9)
        assert (found["memory"], found["memory_peak"]) == (7.0, 9.0)
        assert 0 <= found["device_wait"] <= found["step_time"] * 1.01
    monkeypatch.undo()
    assert os.environ.get("JAX_PLATFORMS") != "cpu" or window.memory() == {}
