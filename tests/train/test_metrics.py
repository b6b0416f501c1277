"""Streaming means and the writers: exact sums, append-safe files, truncation on resume."""

import json
import math
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from steppe.train import metrics


def test_mean_adds_sums_and_weights_not_means():
    running = metrics.Mean()
    running.add({"loss": (jnp.float32(6.0), jnp.float32(2.0)), "acc": (1.0, 2.0)})
    running.add({"loss": (jnp.float32(1.0), jnp.float32(8.0))})
    assert running.result() == {"loss": 0.7, "acc": 0.5}


def test_mean_equals_the_mean_over_everything_however_split():
    rng = np.random.default_rng(0)
    values = rng.normal(size=1000)
    for pieces in (1, 7, 1000):
        running = metrics.Mean()
        for part in np.array_split(values, pieces):
            running.add({"x": (part.sum(), len(part))})
        np.testing.assert_allclose(running.result()["x"], values.mean(), rtol=1e-12)


def test_mean_keeps_float64_over_many_steps():
    running = metrics.Mean()
    for _ in range(20_000):
        running.add({"x": (np.float32(0.1), np.float32(1))})
    np.testing.assert_allclose(running.result()["x"], np.float32(0.1), rtol=1e-12)


def test_weight_zero_has_no_mean():
    running = metrics.Mean()
    running.add({"x": (0.0, 0.0), "y": (2.0, 1.0)})
    assert running.reset() == {"y": 2.0}
    assert running.result() == {}
    assert metrics.mean(0.0, 0.0) is None


def test_mean_keeps_nan_visible():
    running = metrics.Mean()
    running.add({"x": (float("nan"), 1.0)})
    assert math.isnan(running.result()["x"])


def test_mean_rejects_what_is_no_pair():
    with pytest.raises(ValueError, match=r"metric 'x' must be a pair \(sum, weight\)"):
        metrics.Mean().add({"x": 3.0})
    with pytest.raises(ValueError, match=r"weight of metric 'x' must be >= 0, got -1"):
        metrics.Mean().add({"x": (3.0, -1.0)})


def test_fetch_gives_floats():
    pair = metrics.fetch({"a": (jnp.float32(1.5), jnp.int32(3))})["a"]
    assert pair == (1.5, 3.0)
    assert all(type(x) is float for x in pair)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = metrics.JsonLines(path, clock=lambda: 12.25)
    assert not path.parent.exists()
    writer.write(1, "train", {"loss": jnp.float32(0.5)})
    writer.write(2, "eval", {"accuracy": 1, "bad": float("inf"), "worse": float("nan")})
    writer.close()
    assert lines(path) == [
        {"step": 1, "kind": "train", "time": 12.25, "loss": 0.5},
        {"step": 2, "kind": "eval", "time": 12.25, "accuracy": 1.0, "bad": None, "worse": None},
    ]
    assert metrics.read(path) == lines(path)


def test_a_second_writer_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    metrics.JsonLines(path).write(1, "train", {})
    metrics.JsonLines(path).write(2, "train", {})
    assert [row["step"] for row in metrics.read(path)] == [1, 2]


def test_truncate_drops_later_rows_and_writing_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = metrics.JsonLines(path)
    for step in range(1, 8):
        writer.write(step, "eval" if step % 3 == 0 else "train", {"x": step})
    before = lines(path)
    writer.truncate(4)
    assert lines(path) == before[:4]
    writer.write(5, "train", {"x": -5})
    assert [row["x"] for row in lines(path)] == [1, 2, 3, 4, -5]
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_truncate_of_a_missing_file_creates_nothing(tmp_path):
    metrics.JsonLines(tmp_path / "m.jsonl").truncate(3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_torn_last_row_is_removed(tmp_path, cut):
    path = tmp_path / "m.jsonl"
    writer = metrics.JsonLines(path)
    writer.write(1, "train", {"x": 1})
    writer.write(2, "train", {"x": 2})
    whole = path.read_bytes()
    torn = whole[: -cut - 1]
    path.write_bytes(torn)
    assert [row["step"] for row in metrics.read(path)] == [1]
    writer.write(2, "train", {"x": 3})
    assert [row["x"] for row in lines(path)] == [1, 3]
    path.write_bytes(torn)
    writer.truncate(9)
    assert [row["x"] for row in lines(path)] == [1]


def test_a_whole_row_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = metrics.JsonLines(path)
    writer.write(1, "train", {"x": 1})
    path.write_bytes(path.read_bytes()[:-1])
    writer.write(2, "train", {"x": 2})
    assert [row["x"] for row in lines(path)] == [1, 2]


def test_a_failed_truncate_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    writer = metrics.JsonLines(path)
    for step in (1, 2):
        writer.write(step, "train", {})
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer.truncate(1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_a_foreign_row_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a metrics row: 'hello'"):
        metrics.JsonLines(path).truncate(1)
    assert "hello" in path.read_text()


def test_bad_values_write_nothing(tmp_path):
    writer = metrics.JsonLines(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="may not be called 'time'"):
        writer.write(1, "train", {"time": 1.0})
    with pytest.raises(ValueError, match="metric 'x' must be a number, got 'high'"):
        writer.write(1, "train", {"x": "high"})
    assert os.listdir(tmp_path) == []


def test_tensorboard_is_lazy_and_purges_on_resume(tmp_path, monkeypatch):
    made = []

    class Summary:
        def __init__(self, folder, **kwargs):
            made.append((folder, kwargs))
            self.scalars, self.closed = [], False
            made.append(self)

        def add_scalar(self, *args):
            self.scalars.append(args)

        def close(self):
            self.closed = True

    fake = type(sys)("tensorboardX")
    fake.SummaryWriter = Summary
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    writer = metrics.TensorBoard(tmp_path)
    assert made == []
    writer.write(3, "train", {"loss": jnp.float32(0.5)})
    assert made[0] == (str(tmp_path), {})
    assert made[1].scalars == [("train/loss", 0.5, 3)]
    writer.truncate(2)
    assert made[1].closed
    writer.write(3, "train", {"loss": 1.0})
    assert made[2] == (str(tmp_path), {"purge_step": 3})


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = metrics.TensorBoard(tmp_path / "tb")
    writer.write(1, "train", {"loss": 0.5})
    writer.close()
    (events,) = (tmp_path / "tb").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_tensorboard_without_the_package_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'steppe\[tensorboard\]'"):
        metrics.TensorBoard(tmp_path)
