"""Checkpoints: exact, atomic, reshardable, and refused where they do not belong."""

import gc
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.train import checkpoint, loop, mesh, step
from steppe.train.checkpoint import CheckpointError, Checkpoints, SaveFailed
from steppe.train.types import TrainState

PROGRAMS = Path(__file__).parent / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
program = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "train.py"), run_name="program"))
TX = optax.adamw(1e-2)


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(bits(x) == bits(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def small(value=1.0, frozen=None):
    params = {"w": jnp.full((4, 3), float(value)), "b": jnp.full((3,), value, jnp.bfloat16)}
    return TrainState(
        jnp.int32(7),
        params,
        frozen or {},
        TX.init(params),
        {"ema": params, "none": jnp.zeros((0, 3)), "key": jax.random.key(9, impl="rbg")},
        jax.random.key(3),
    )


@pytest.fixture(scope="module")
def train():
    return step.make(toy.ce, TX)


def test_what_is_restored_is_bitwise_what_was_saved(tmp_path):
    state = small()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest is None
        assert not (tmp_path / "c").exists()
        assert checkpoints.save(state, {"index": 12, "epoch": 1}) == 7
        found, data = checkpoints.restore(small(0.0))
    assert same(found, state)
    assert data == {"index": 12, "epoch": 1}
    assert jax.random.key_impl(found.extra["key"]) == jax.random.key_impl(state.extra["key"])
    again, _ = Checkpoints(tmp_path / "c").restore(jax.eval_shape(lambda: small()))
    assert same(again, state)


def test_a_save_in_the_background_is_of_the_state_when_it_was_called(tmp_path, train):
    """The steps that follow reuse the memory of the state that is being written."""
    state = step.init(jax.random.key(0), toy.MODEL, TX)
    like = step.abstract(toy.MODEL, TX)
    # A copy through a program: a view of the buffers would keep them from being donated.
    expected = jax.tree.map(jnp.copy, state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    for number in range(5):
        state, _ = train(state, toy.batch(number))
    checkpoints.wait()
    found, _ = checkpoints.restore(like)
    assert same(found, expected)
    assert not same(found, state)


def test_only_the_newest_are_kept_and_a_step_is_written_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (1, 3, 20, 100):
        assert checkpoints.save(small(number).replace(step=jnp.int32(number))) == number
    checkpoints.wait()
    assert checkpoints.steps == [20, 100]
    assert checkpoints.latest == 100
    checkpoints.save(small(-1.0).replace(step=jnp.int32(100)), wait=True)
    found, _ = checkpoints.restore(small())
    assert float(found.params["w"][0, 0]) == 100
    found, _ = checkpoints.restore(small(), step=20)
    assert float(found.params["w"][0, 0]) == 20
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3 .*steps there: 20, 100"):
        checkpoints.restore(small(), step=3)
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_the_leavings_of_a_killed_run_are_not_checkpoints_and_go_at_the_next_save(tmp_path):
    Checkpoints(tmp_path).save(small(), wait=True)
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    (tmp_path / ".deleting-3").mkdir()
    (tmp_path / "11").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [7]
    assert (tmp_path / "9.orbax-checkpoint-tmp").exists()  # another process may be writing it
    checkpoints.save(small().replace(step=jnp.int32(8)), wait=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["11", "7", "8", "manifest.json"]


def test_a_checkpoint_of_another_config_is_refused_by_its_first_difference(tmp_path):
    config = {"config": {"model": {"size": 384, "heads": 12}, "seed": 1}, "base": "abc"}
    Checkpoints(tmp_path, manifest=config).save(small(), wait=True)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"format": 1, **config}
    Checkpoints(tmp_path, manifest=config)
    other = {"config": {"model": {"size": 256, "heads": 8}, "seed": 1}, "base": "abc"}
    with pytest.raises(
        CheckpointError, match=r"another run: config\.model\.size was 384, now it is 256"
    ):
        Checkpoints(tmp_path, manifest=other)
    with pytest.raises(CheckpointError, match=r"base was 'abc', now it is None"):
        Checkpoints(tmp_path, manifest={"config": config["config"]})
    (tmp_path / "manifest.json").write_text('{"format": ')
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoints(tmp_path, manifest=config)


def test_a_setting_that_came_after_a_checkpoint_had_its_default_then(tmp_path):
    old, new = {"config": {"seed": 0}}, {"config": {"seed": 0, "data": {"limit": 5}}}
    Checkpoints(tmp_path, manifest=old).save(small(), wait=True)
    Checkpoints(tmp_path, manifest=new, defaults=new)
    with pytest.raises(CheckpointError, match="config.data.limit was 7, now it is 5"):
        Checkpoints(tmp_path, manifest=new, defaults={"config": {"data": {"limit": 7}}})
    with pytest.raises(CheckpointError, match="config.seed was 0"):
        Checkpoints(tmp_path, manifest={"config": {"seed": 1}}, defaults={"config": {"seed": 1}})


def test_leaves_that_differ_are_named_with_both_shapes(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small(), wait=True)
    like = small()
    wide = like.replace(params={**like.params, "w": jnp.ones((4, 5))})
    with pytest.raises(
        CheckpointError,
        match=r"holds float32\[4,3\] at 'params/w', this run needs float32\[4,5\]",
    ):
        checkpoints.restore(wide)
    cast = like.replace(params={**like.params, "b": jnp.ones(3)})
    with pytest.raises(CheckpointError, match=r"holds bfloat16\[3\] at 'params/b'.*float32\[3\]"):
        checkpoints.restore(cast)
    more = like.replace(extra={**like.extra, "new": jnp.ones(2)})
    with pytest.raises(CheckpointError, match=r"holds nothing at 'extra/new'"):
        checkpoints.restore(more)
    other = like.replace(opt_state=optax.sgd(0.1, momentum=0.9).init(like.params))
    with pytest.raises(CheckpointError, match=r"'opt_state/0/trace/"):
        checkpoints.restore(other)


def test_frozen_parameters_are_not_written_but_another_base_is_refused(tmp_path):
    base = {"base": {"w": jnp.arange(2_000_00, dtype=jnp.float32)}}
    state = small(frozen=base)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, wait=True)
    written = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert written < 100_000
    found, _ = checkpoints.restore(small(0.0, frozen=base))
    assert found.frozen is base
    for changed in (
        base["base"]["w"].at[5].add(1),
        base["base"]["w"].at[jnp.array([3, 4])].set(jnp.array([4.0, 3.0])),  # the same sum
    ):
        with pytest.raises(CheckpointError, match="trained on other frozen parameters"):
            checkpoints.restore(small(frozen={"base": {"w": changed}}))
    with pytest.raises(ValueError, match="'base/w' is a shape; give the loaded array"):
        checkpoints.restore(small(frozen=jax.eval_shape(lambda: base)))


def test_a_fingerprint_is_of_the_values_not_of_the_mesh():
    params = toy.init(jax.random.key(0))
    first = checkpoint.fingerprint(params)
    plan = mesh.plan({"data": 4, "model": 2}, toy.RULES)
    assert checkpoint.fingerprint(plan.place(params)) == first
    assert checkpoint.fingerprint(jax.tree.map(np.asarray, params)) == first
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert checkpoint.fingerprint(half) != first
    renamed = {**params, "tail": params["head"]}
    del renamed["head"]
    assert checkpoint.fingerprint(renamed) != first
    mixed = {"a": np.array([True, False]), "b": np.arange(3, dtype=np.int8)}
    assert checkpoint.fingerprint(mixed) != checkpoint.fingerprint({**mixed, "a": ~mixed["a"]})


def test_a_damaged_checkpoint_is_an_error_and_the_one_before_still_opens(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        checkpoints.save(small(number).replace(step=jnp.int32(number)), wait=True)
    shutil.rmtree(tmp_path / "2" / "state")
    with pytest.raises(checkpoint.Damaged, match=r"2 is damaged and cannot be used"):
        checkpoints.restore(small(), step=2)
    with pytest.warns(UserWarning, match=r"2 is damaged .*; it is now 2.damaged"):
        found, _ = checkpoints.restore(small())
    assert float(found.params["w"][0, 0]) == 1
    # The step is written again, beside what was left of it.
    checkpoints.save(small(2).replace(step=jnp.int32(2)), wait=True)
    assert checkpoints.steps == [1, 2]
    assert float(checkpoints.restore(small())[0].params["w"][0, 0]) == 2
    assert (tmp_path / "2.damaged").is_dir()
    shutil.rmtree(tmp_path / "1" / "state")
    shutil.rmtree(tmp_path / "2" / "state")
    with (
        pytest.warns(UserWarning, match="2 is damaged"),
        pytest.raises(checkpoint.Damaged, match="1 is damaged"),
    ):
        checkpoints.restore(small())


# Orbax drops the tasks that were still reading when one has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_damage_to_a_file_goes_unseen(tmp_path):
    """A hundred files cut short or with one bit turned: an error, or what was written."""
    rng = random.Random(0)
    state = small(0.3)
    state = state.replace(params={**state.params, "b": jnp.arange(3, dtype=jnp.bfloat16)})
    data = {"given": 12, "seed": 3}
    Checkpoints(tmp_path / "whole").save(state, data, wait=True)
    file = tmp_path / "whole" / "7"
    held = {p: p.read_bytes() for p in sorted(file.rglob("*")) if p.is_file()}
    seen = 0
    for _ in range(100):
        place = rng.choice([p for p, content in held.items() if content])
        content = bytearray(held[place])
        at = rng.randrange(len(content))
        if rng.random() < 0.3:
            del content[at:]
        else:
            content[at] ^= 1 << rng.randrange(8)
        place.write_bytes(content)
        try:
            found, position = Checkpoints(tmp_path / "whole").restore(small(), step=7)
        except CheckpointError:
            seen += 1
        else:
            assert same(found, state)
            assert position == data
        place.write_bytes(held[place])
    assert seen > 30  # the others hit what nobody reads
    gc.collect()  # those tasks, while their complaints are ignored
    assert same(Checkpoints(tmp_path / "whole").restore(small())[0], state)


def test_metadata_that_were_changed_are_seen(tmp_path):
    Checkpoints(tmp_path).save(small(), {"given": 12345}, wait=True)
    changed = 0
    for place in (tmp_path / "7").rglob("*"):
        if place.is_file() and b"12345" in place.read_bytes():
            place.write_bytes(place.read_bytes().replace(b"12345", b"12346"))
            changed += 1
    assert changed
    with pytest.raises(checkpoint.Damaged, match="not those that were written"):
        Checkpoints(tmp_path).restore(small(), step=7)


@pytest.mark.parametrize("chain", [({"data": 8}, {"data": 4, "model": 2}, None)])
def test_a_run_goes_on_on_another_mesh(tmp_path, chain):
    """8 x 1 -> 4 x 2 -> one device, against a run that never stopped."""
    whole, batches = step.init(jax.random.key(0), toy.MODEL, TX), toy.Batches()
    whole = loop.run(step.make(toy.ce, TX), whole, batches, steps=9)
    expected = jax.tree.map(np.asarray, whole.params)

    for number, shape in enumerate(chain):
        plan = None if shape is None else mesh.plan(shape, toy.RULES)
        checkpoints = Checkpoints(tmp_path)
        batches = toy.Batches()
        if number == 0:
            state = step.init(jax.random.key(0), toy.MODEL, TX, plan)
        else:
            like = step.abstract(toy.MODEL, TX, plan)
            state = loop.resume(like, batches, checkpoints)
            assert int(state.step) == batches.index == 3 * number
            if plan is not None:
                where = jax.tree.map(lambda x: x.sharding, state)
                assert where == jax.tree.map(lambda x: x.sharding, like)
        train = step.make(toy.ce, TX, plan)
        state = loop.run(train, state, batches, steps=3 * (number + 1), checkpoints=checkpoints)
        assert train.compiles == 1
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, expected)
    assert max(jax.tree.leaves(gaps)) < 1e-6


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_can_go_on(tmp_path):
    """No file may grow beyond 64 bytes from step 10 on: the save of step 12 fails."""
    env = {**os.environ, "XLA_FLAGS": ""}
    run = subprocess.run(
        [sys.executable, PROGRAMS / "train.py", tmp_path, "20", "0", "64"],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode != 0
    said = [line for line in run.stderr.splitlines() if ".SaveFailed: " in line]
    assert len(said) == 1, run.stderr[-2000:]
    assert "checkpoint 12 could not be written" in said[0]
    assert "step 8 stands" in said[0]
    assert "ERROR:absl" not in run.stderr  # the error comes once, not from each thread of Orbax

    state, train = program.setup()
    checkpoints = Checkpoints(tmp_path / "checkpoints", manifest={"config": {"seed": 0}})
    assert checkpoints.steps == [4, 8]
    batches = toy.Batches()
    state = loop.resume(state, batches, checkpoints)
    state = loop.run(train, state, batches, steps=12, checkpoints=checkpoints)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["12", "8", "manifest.json"]


def test_a_failing_write_is_raised_by_the_next_call_and_says_what_stands(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small(), wait=True)
    orbax = checkpoint._orbax()

    class Fails:
        def result(self):
            raise ValueError("OUT_OF_RANGE: No space left on device")

    def start(path, *args, **kwargs):
        (tmp_path / f"{path.name}.orbax-checkpoint-tmp").mkdir()
        return Fails()

    monkeypatch.setattr(orbax, "save_checkpointables_async", start)
    checkpoints.save(small().replace(step=jnp.int32(8)))
    with pytest.raises(SaveFailed, match=r"checkpoint 8 .*step 7 stands.*No space left"):
        checkpoints.wait()
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    monkeypatch.undo()
    checkpoints.save(small(5.0).replace(step=jnp.int32(8)), wait=True)
    assert checkpoints.steps == [7, 8]
