"""The loop: exact resume after any kill, no bad checkpoint, rows that cost nothing."""

import itertools
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.launch.pods import stop
from steppe.train import loop, step
from steppe.train.checkpoint import Checkpoints, SaveFailed
from steppe.train.loop import Interrupted, NonFiniteLoss
from steppe.train.metrics import JsonLines, read

PROGRAMS = Path(__file__).parent / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
program = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "train.py"), run_name="program"))
TX = optax.sgd(0.1)


class Rows:
    """A writer that remembers."""

    def __init__(self):
        self.rows = []

    def write(self, step, kind, values):
        self.rows.append({"step": step, "kind": kind, **values})

    def truncate(self, step):
        self.rows = [row for row in self.rows if row["step"] <= step]

    def of(self, kind):
        return [row for row in self.rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def train():
    return step.make(toy.ce, TX)


def fresh():
    return step.init(jax.random.key(0), toy.MODEL, TX)


def exact(rows):
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"}


def test_killed_at_a_random_step_and_resumed_it_repeats_the_uninterrupted_run(tmp_path):
    steps = 24
    state, train = program.setup()
    rows = Rows()
    loop.run(train, state, toy.Batches(), steps=steps, log_every=1, writers=[rows])
    expected = exact(rows.rows)
    assert len(expected) == steps

    file = tmp_path / "metrics.jsonl"
    moment = random.SystemRandom().randint(6, steps - 4)
    victim = subprocess.Popen([sys.executable, PROGRAMS / "train.py", tmp_path, "1000", "0.03"])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and victim.poll() is None:
        if file.exists() and len(read(file)) >= moment:
            break
        time.sleep(0.005)
    assert victim.poll() is None, "the run ended by itself"
    victim.send_signal(signal.SIGKILL)
    victim.wait()

    state, train = program.setup()
    checkpoints = Checkpoints(tmp_path / "checkpoints", manifest={"config": {"seed": 0}})
    writer, batches = JsonLines(file), toy.Batches()
    state = loop.resume(state, batches, checkpoints, [writer])
    assert 4 <= int(state.step) == batches.index
    assert read(file)[-1]["step"] == int(state.step)
    loop.run(
        train,
        state,
        batches,
        steps=max(steps, int(state.step)),
        checkpoints=checkpoints,
        log_every=1,
        writers=[writer],
    )
    found = exact(read(file))
    assert list(found) == list(range(1, len(found) + 1))
    assert {s: found[s] for s in expected} == expected  # bitwise, through JSON


def test_rows_are_means_over_windows_weighted_by_tokens(train):
    rows = Rows()
    state = loop.run(
        train,
        fresh(),
        toy.Batches(),
        steps=7,
        log_every=3,
        writers=[rows],
        schedule=lambda s: 0.5 * s,
    )
    assert int(state.step) == 7
    assert [row["step"] for row in rows.rows] == [3, 6, 7]
    assert [row["learning_rate"] for row in rows.rows] == [1.0, 2.5, 3.0]

    state, sums = fresh(), np.zeros(2)
    batches = toy.Batches()
    for _ in range(3):
        state, metrics = train(state, next(batches))
        sums += [float(x) for x in metrics["loss"]]
    assert rows.rows[0]["loss"] == sums[0] / sums[1]
    for row in rows.rows:
        assert row["step_time"] > 0
        assert row["input_wait"] >= 0
        tokens = toy.batch()["attention_mask"].sum()
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_time"])


def test_rows_of_a_resumed_run_cover_the_same_windows(tmp_path, train):
    def go(state, batches, rows, steps, checkpoints):
        return loop.run(
            train,
            state,
            batches,
            steps=steps,
            log_every=4,
            save_every=6,
            writers=[rows],
            checkpoints=checkpoints,
        )

    whole, parts = Rows(), Rows()
    go(fresh(), toy.Batches(), whole, 14, Checkpoints(tmp_path / "a"))
    checkpoints = Checkpoints(tmp_path / "b")
    go(fresh(), toy.Batches(), parts, 6, checkpoints)
    batches = toy.Batches()
    state = loop.resume(fresh(), batches, checkpoints, [parts])
    go(state, batches, parts, 14, checkpoints)
    assert [row["step"] for row in whole.rows] == [4, 6, 8, 12, 14]
    assert exact(whole.rows) == exact(parts.rows)


def test_metrics_are_read_one_step_late(train):
    order = []

    class Spy:
        compiles = 0

        def __call__(self, state, batch):
            order.append(f"step {len([x for x in order if 'step' in x]) + 1}")
            return train(state, batch)

    class Log(Rows):
        def write(self, step, kind, values):
            order.append(f"row {step}")

    loop.run(Spy(), fresh(), toy.Batches(), steps=3, log_every=1, writers=[Log()])
    assert order == ["step 1", "step 2", "row 1", "step 3", "row 2", "row 3"]


def test_a_slow_source_shows_in_input_wait_and_a_compile_apart():
    rows = Rows()
    train = step.make(toy.ce, TX)
    loop.run(train, fresh(), toy.Batches(delay=0.05), steps=6, log_every=2, writers=[rows])
    first, second, _ = rows.rows
    assert first["compile_time"] > 0
    assert "compile_time" not in second
    assert 0.05 <= second["input_wait"] <= second["step_time"]


def test_evaluation_and_saving_happen_when_asked_and_at_the_end(tmp_path, train):
    rows, scored = Rows(), []

    def score(state):
        scored.append(int(state.step))
        return {"accuracy": 0.5}

    checkpoints = Checkpoints(tmp_path, keep=9)
    loop.run(
        train,
        fresh(),
        toy.Batches(),
        steps=5,
        checkpoints=checkpoints,
        save_every=2,
        evaluate=score,
        eval_every=3,
        log_every=2,
        writers=[rows],
    )
    assert scored == [3, 5]
    assert checkpoints.steps == [2, 4, 5]
    assert [(r["step"], r["kind"]) for r in rows.rows] == [
        (2, "train"),
        (3, "eval"),
        (4, "train"),
        (5, "train"),
        (5, "eval"),
    ]
    batches = toy.Batches()
    assert int(loop.resume(fresh(), batches, checkpoints).step) == batches.index == 5


def broken(batch):
    return {**batch, "label_mask": np.full_like(batch["label_mask"], np.nan)}


@pytest.mark.parametrize("bad", [4, 5, 6])
def test_a_non_finite_loss_stops_before_a_bad_state_is_saved(tmp_path, train, bad):
    """Wherever it falls relative to the saves of steps 2, 4 and 6."""
    checkpoints = Checkpoints(tmp_path)
    rows = Rows()
    kept = (bad - 1) // 2 * 2
    with pytest.raises(NonFiniteLoss, match=rf"nan at step {bad}; .*step {kept} is kept"):
        loop.run(
            train,
            fresh(),
            toy.Batches(act={bad: broken}),
            steps=20,
            checkpoints=checkpoints,
            save_every=2,
            log_every=1,
            writers=[rows],
        )
    assert checkpoints.latest == kept
    assert max(row["step"] for row in rows.rows) == bad - 1
    state, data = checkpoints.restore(fresh())
    assert data == {"index": kept}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_an_update_that_overflows_is_not_saved_either(tmp_path):
    tx = optax.sgd(lambda count: jnp.where(count == 3, jnp.inf, 0.1))
    train = step.make(toy.ce, tx)
    checkpoints = Checkpoints(tmp_path)
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    with pytest.raises(NonFiniteLoss, match=r"parameter is not finite at step 4; .*step 2 is kept"):
        loop.run(train, state, toy.Batches(), steps=9, checkpoints=checkpoints, save_every=2)
    assert checkpoints.steps == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_the_last_whole_step_and_says_how_to_go_on(tmp_path, train, number):
    def stop(batch):
        os.kill(os.getpid(), number)
        return batch

    before = signal.getsignal(number)
    checkpoints = Checkpoints(tmp_path)
    rows = Rows()
    with pytest.raises(Interrupted, match=r"step 5 of 20; it is saved in .*--resume") as caught:
        loop.run(
            train,
            fresh(),
            toy.Batches(act={5: stop}),
            steps=20,
            checkpoints=checkpoints,
            writers=[rows],
        )
    # Whoever reads the exit status: preempted jobs are to be started again.
    assert caught.value.status == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert str(tmp_path) in str(caught.value)
    assert signal.getsignal(number) is before
    assert checkpoints.steps == [5]
    assert [row["step"] for row in rows.rows] == [5]
    batches = toy.Batches()
    state = loop.resume(fresh(), batches, checkpoints)
    state = loop.run(train, state, batches, steps=8)
    whole = loop.run(train, fresh(), toy.Batches(), steps=8)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_sigterm_whose_exception_was_lost_stops_the_run_at_its_first_step(
    tmp_path, train, monkeypatch
):
    """What a signal raises within a callback goes no further: it came, and nobody stopped."""
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    class Restoring:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    before = signal.getsignal(signal.SIGTERM)
    checkpoints = Checkpoints(tmp_path)
    with stop.requeued():
        Restoring()
        assert isinstance(lost[0].exc_value, stop.Stopped)
        with pytest.raises(loop.Preempted, match="step 1 of 20; it is saved"):
            loop.run(train, fresh(), toy.Batches(), steps=20, checkpoints=checkpoints)
        with pytest.raises(stop.Stopped):  # elsewhere it ends what goes on
            stop.Handler()(signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.steps == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_during_the_last_step_ends_what_follows(tmp_path, train, number):
    """The run is complete and saved; a command of many runs must not begin the next one."""

    class Asked(Exception):
        pass

    def handler(number, frame):
        raise Asked

    def act(batch):
        os.kill(os.getpid(), number)
        time.sleep(0)
        return batch

    before = signal.signal(number, handler)
    checkpoints, rows = Checkpoints(tmp_path), Rows()
    try:
        with pytest.raises(Asked):
            loop.run(
                train,
                fresh(),
                toy.Batches(act={5: act}),
                steps=5,
                checkpoints=checkpoints,
                writers=[rows],
            )
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert checkpoints.steps == [5]
    assert [row["step"] for row in rows.rows] == [5]


def test_several_processes_ask_with_the_turns_of_the_process(train, monkeypatch):
    """The service says yes to 1 alone where SIGTERM came before the first turn, as in a restore."""
    from jax.experimental import multihost_utils

    asked = []
    monkeypatch.setattr(loop, "_TURNS", itertools.count(1))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda n: asked.append(n) or n == 4
    )
    resumed = fresh().replace(step=jnp.int32(53))
    state = loop.run(train, resumed, toy.Batches(), steps=57)
    assert asked == [1, 2, 3]  # not at the last step: it is complete
    with pytest.raises(loop.Preempted, match="at step 58 of 99"):
        loop.run(train, state, toy.Batches(), steps=99)


def test_a_second_ctrl_c_stops_at_once(train):
    def twice(batch):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        return batch

    # A job in the background of a shell is started with SIGINT ignored: say what we start from.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            loop.run(train, fresh(), toy.Batches(act={2: twice}), steps=20)
        assert not isinstance(caught.value, Interrupted)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_checkpoints_an_interrupt_says_that_nothing_is_saved(train):
    def stop(batch):
        os.kill(os.getpid(), signal.SIGINT)
        return batch

    with pytest.raises(Interrupted, match="nothing is saved"):
        loop.run(train, fresh(), toy.Batches(act={2: stop}), steps=20)


def test_it_runs_outside_the_main_thread(train):
    out = []
    worker = threading.Thread(
        target=lambda: out.append(loop.run(train, fresh(), toy.Batches(), steps=2))
    )
    worker.start()
    worker.join()
    assert int(out[0].step) == 2


def test_a_failed_save_does_not_hide_the_error_that_ended_the_loop(train):
    class Full:
        latest = None
        directory = "there"

        def save(self, state, data, wait=False):
            return 0

        def wait(self):
            raise SaveFailed("no space")

    with pytest.raises(NonFiniteLoss) as caught:
        loop.run(
            train,
            fresh(),
            toy.Batches(act={3: broken}),
            steps=9,
            checkpoints=Full(),
            save_every=2,
        )
    assert "(no space)" in str(caught.value)
    with pytest.raises(SaveFailed, match="no space"):
        loop.run(train, fresh(), toy.Batches(), steps=3, checkpoints=Full(), save_every=2)


def test_bad_input_is_named(train):
    state = fresh().replace(step=jnp.int32(5))
    with pytest.raises(ValueError, match="at step 5 already, beyond steps=3"):
        loop.run(train, state, toy.Batches(), steps=3)
    with pytest.raises(ValueError, match="log_every must be >= 1, got 0"):
        loop.run(train, fresh(), toy.Batches(), steps=3, log_every=0)
    with pytest.raises(ValueError, match="got -1 and 0"):
        loop.run(train, fresh(), toy.Batches(), steps=3, save_every=-1)

    class Two(toy.Batches):
        def __next__(self):
            if self.index == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match="ended before step 3 of 9: give an endless source"):
        loop.run(train, fresh(), Two(), steps=9)
    assert math.isfinite(float(fresh().params["head"]["kernel"].sum()))
