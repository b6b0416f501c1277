"""Loss spikes: the run goes back and leaves the batches out, however often it is stopped."""

import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.train import loop, step
from steppe.train.checkpoint import Checkpoints
from steppe.train.metrics import JsonLines, read
from steppe.train.spikes import Diverged, Spike, Spikes

PROGRAMS = Path(__file__).parent / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
TX = optax.adam(0.01)
STEPS, BAD = 18, 12


def scaled(params, batch, key):
    """The loss grows with the attention mask, which the network does not read."""
    out = toy.ce(params, batch, key)
    return out._replace(total=out.total * batch["attention_mask"].max())


@pytest.fixture(scope="module")
def train():
    return step.make(scaled, TX)


def fresh(tx=TX):
    return step.init(jax.random.key(0), toy.MODEL, tx)


def large(batch):
    return {**batch, "attention_mask": 10 * batch["attention_mask"]}


def broken(batch):
    return {**batch, "label_mask": np.full_like(batch["label_mask"], np.nan)}


class Without(toy.Batches):
    """The batches but some: what a run with rollbacks must have learnt from."""

    def __init__(self, *left_out):
        super().__init__()
        self.left_out = left_out

    def __next__(self):
        while self.index + 1 in self.left_out:
            self.index += 1
        return super().__next__()


def learnt(folder):
    rows = read(folder / "metrics.jsonl")
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in rows if r["kind"] == "train"}


def go(train, folder, source, *, steps=STEPS, saved=True, state=None, keep=1, resume=False):
    """One process: from the beginning, or from the newest checkpoint."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=keep) if saved else None
    writers = [JsonLines(folder / "metrics.jsonl")]
    state = fresh() if state is None else state
    if resume:
        state = loop.resume(state, source, checkpoints, writers)
    options = {"log_every": 1, "save_every": 4, "checkpoints": checkpoints, "writers": writers}
    return loop.run(train, state, source, steps=steps, **options)


@pytest.fixture(scope="module")
def expected(train, tmp_path_factory):
    """Without batches 9 to 12, which led from the checkpoint of step 8 to the spike."""
    folder = tmp_path_factory.mktemp("expected")
    go(train, folder, Without(9, 10, 11, BAD), saved=False)
    return learnt(folder)


@pytest.mark.parametrize("saved", [True, False], ids=["on disk", "in memory"])
@pytest.mark.parametrize("bad", [large, broken])
def test_it_goes_back_to_the_last_checkpoint_and_skips_what_led_there(
    train, tmp_path, expected, saved, bad
):
    source = Spikes(toy.Batches(act={BAD: bad}), factor=3.0)
    state = go(train, tmp_path, source, saved=saved)
    assert int(state.step) == STEPS
    assert learnt(tmp_path) == expected  # bitwise
    (row,) = [r for r in read(tmp_path / "metrics.jsonl") if r["kind"] == "rollback"]
    assert (row["step"], row["bad_step"], row["anchor"], row["skipped"]) == (9, BAD, 8, 4)
    assert ("loss_median" in row) == (bad is large)
    if saved:
        _, data = Checkpoints(tmp_path / "checkpoints").restore(fresh())
        assert data["index"] == STEPS + 4
        assert len(data["spikes"]["events"]) == 1


def stop(batch):
    os.kill(os.getpid(), signal.SIGTERM)
    return batch


def test_a_run_that_is_stopped_on_the_way_goes_back_to_the_same_state(train, tmp_path, expected):
    """Before the spike and behind it; the checkpoint of step 8 is kept although newer ones are."""
    act = {10: stop, BAD: large}
    with pytest.raises(loop.Preempted):
        go(train, tmp_path, Spikes(toy.Batches(act=act), factor=3.0))
    held = Checkpoints(tmp_path / "checkpoints")
    assert held.steps == [8, 10]
    act = {BAD: large, 14: stop}  # the second batch after the rollback
    with pytest.raises(loop.Preempted):
        go(train, tmp_path, Spikes(toy.Batches(act=act), factor=3.0), resume=True)
    assert held.steps == [8, 10]  # written anew
    assert max(learnt(tmp_path)) == 10
    assert held.restore(fresh())[1]["index"] == 14
    go(train, tmp_path, Spikes(toy.Batches(act={BAD: large}), factor=3.0), resume=True)
    assert learnt(tmp_path) == expected
    assert [r["kind"] for r in read(tmp_path / "metrics.jsonl")].count("rollback") == 1


def test_a_second_spike_behind_the_same_checkpoint_skips_its_batches_too(train, tmp_path):
    source = Spikes(toy.Batches(act={BAD: large, 15: large}), factor=3.0)
    go(train, tmp_path, source)
    go(train, tmp_path / "b", Without(*range(9, 16)), saved=False)
    assert learnt(tmp_path) == learnt(tmp_path / "b")
    rows = [r for r in read(tmp_path / "metrics.jsonl") if r["kind"] == "rollback"]
    assert [(r["step"], r["bad_step"], r["skipped"]) for r in rows] == [(9, 12, 4), (9, 11, 3)]


def test_rollbacks_are_bounded_and_the_cure_is_said(train, tmp_path):
    source = Spikes(toy.Batches(act=dict.fromkeys(range(BAD, 99), large)), factor=3.0, most=2)
    with pytest.raises(Diverged, match=r"loss is .* more than 3 times .* after 2 rollbacks") as e:
        go(train, tmp_path, source)
    assert "lower the learning rate" in str(e.value)
    held = Checkpoints(tmp_path / "checkpoints")
    assert held.latest == 8
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(held.restore(fresh())[0].params))


def test_an_update_that_overflows_is_taken_back_and_the_first_state_serves(tmp_path):
    # The count of updates, not the batch, makes it overflow: it does so again each time.
    tx = optax.sgd(lambda count: jnp.where(count == 3, jnp.inf, 0.1))
    source = Spikes(toy.Batches(), factor=3.0, most=1)
    with pytest.raises(Diverged, match="a parameter is not finite at step 4, after 1 rollbacks"):
        go(step.make(scaled, tx), tmp_path, source, state=fresh(tx))
    assert Checkpoints(tmp_path / "checkpoints").steps == [0]


class Nothing:
    def __next__(self):
        return {}

    def get_state(self):
        return {}

    def set_state(self, state):
        assert state == {}


def test_what_is_a_spike():
    watch = Spikes(Nothing(), factor=3.0, norm_factor=10.0, window=8)
    for number in range(1, 8):
        watch.add(number, 100.0 if number == 1 else 1.0, 1.0)  # too early to be called one
    watch.add(8, 2.9, 9.0)
    watch.add(9, 1.0, 1.0)
    with pytest.raises(Spike, match=r"loss is 3\.1, more than 3 times 1, the median of the last 8"):
        watch.add(10, 3.1, 1.0)
    with pytest.raises(Spike, match="grad_norm is 11, more than 10 times 1") as caught:
        watch.add(10, 1.0, 11.0)
    assert caught.value.values == {"bad_step": 10, "grad_norm": 11.0, "grad_norm_median": 1.0}
    with pytest.raises(Spike, match="loss is inf"):
        watch.add(10, float("inf"), 1.0)
    low = Spikes(Nothing(), factor=3.0)
    for number in range(20):
        low.add(number, 0.001, 0.5)
    low.add(20, 0.09, 500.0)  # nothing times any factor is nothing; norms were not asked for
    again = Spikes(Nothing(), factor=3.0)
    again.set_state(low.get_state())
    assert again.get_state() == low.get_state()


def test_after_a_rollback_over_more_than_the_window_the_median_is_that_of_the_anchor():
    """Else the steps behind it have no median, and their spikes would enter the next one."""
    watch = Spikes(Nothing(), factor=3.0, window=8)
    for number in range(1, 11):
        watch.add(number, 1.0, 1.0)
    watch.anchored(10)
    kept = watch.get_state()
    for number in range(11, 40):
        watch.add(number, 1.0, 1.0)
    with pytest.raises(Spike) as caught:
        watch.add(40, 50.0, 1.0)
    assert watch.back(caught.value) == 30
    watch.rewind(kept, 0)
    with pytest.raises(Spike, match="more than 3 times 1"):
        watch.add(11, 50.0, 1.0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"factor": 1.0}, "factor must be above 1 and finite, or 0 for off, got 1.0"),
        ({"norm_factor": -2.0}, "norm_factor must be above 1 and finite, or 0 for off, got -2.0"),
        ({"window": 3}, "window must be >= 8 steps, got 3"),
        ({"most": 0}, "most must be >= 1 rollbacks, got 0"),
    ],
)
def test_bad_settings(values, says):
    with pytest.raises(ValueError, match=says):
        Spikes(Nothing(), **values)
