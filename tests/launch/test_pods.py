"""Ranks and the launcher without processes: what they read, compare, and whom they blame."""

import dataclasses
import json
import re
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from steppe.launch import cli, pieces
from steppe.launch.config import FinetuneConfig
from steppe.launch.pods import codes, local, rank, stop
from steppe.launch.pods.local import Ended, Options
from steppe.launch.report import running
from steppe.train import mesh

EXPLICIT = {
    "STEPPE_COORDINATOR": "host:1",
    "STEPPE_PROCESS_COUNT": "4",
    "STEPPE_PROCESS_INDEX": "3",
}
STEP = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}


@pytest.fixture
def environ(monkeypatch):
    """Sets the variables that jax reads itself."""

    def make(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return values

    return make


def test_explicit_variables_come_first(environ):
    assert rank.detect(EXPLICIT) == rank.Cluster("host:1", 4, 3)
    assert rank.detect({**EXPLICIT, "STEPPE_LOCAL_DEVICES": "2,3"}).devices == (2, 3)
    assert rank.detect({**EXPLICIT, **environ(STEP)}).count == 4
    assert rank.detect({**EXPLICIT, "STEPPE_PROCESS_COUNT": "1", "STEPPE_PROCESS_INDEX": "0"}) is (
        None
    )


def test_slurm_is_found_by_jax(environ):
    found = rank.detect(environ(STEP))
    assert found == rank.Cluster("n3:61445", 2, 1, (0,))
    # One task a node has all of the node's GPUs; one of several has its own.
    assert rank.detect({**STEP, "SLURM_GPUS_ON_NODE": "4"}).devices == (0, 1, 2, 3)
    environ({"SLURM_NTASKS": "8", "SLURM_LOCALID": "3"})
    assert rank.detect({**STEP, "SLURM_NTASKS": "8"}).devices == (3,)
    assert rank.detect({**STEP, "STEPPE_COORDINATOR": "ib0:7"}).address == "ib0:7"


def test_alone_is_alone(environ):
    assert rank.detect({}) is None
    assert rank.join({}) is None
    assert rank.joined() is None
    assert rank.lead()
    assert rank.name() == ""
    assert not rank.lost(jax.errors.JaxRuntimeError("Gloo: connection closed"))
    rank.agree("nothing", {"a": 1})
    environ({**STEP, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert rank.detect({**STEP, "SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"STEPPE_COORDINATOR": "host"}, "must be host:port of process 0, got 'host'"),
        ({"STEPPE_PROCESS_INDEX": "4"}, "must be in [0, STEPPE_PROCESS_COUNT), got 4 of 4"),
        ({"STEPPE_PROCESS_COUNT": "x"}, "STEPPE_PROCESS_COUNT must be a whole number, got 'x'"),
        ({"STEPPE_LOCAL_DEVICES": "a"}, "must be numbers such as 0,1, got 'a'"),
    ],
)
def test_wrong_variables_are_named(more, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        rank.detect({**EXPLICIT, **more})
    with pytest.raises(ValueError, match="STEPPE_COORDINATOR not: set all three"):
        rank.detect({k: v for k, v in EXPLICIT.items() if k != "STEPPE_COORDINATOR"})


class Store:
    """The key-value store of the coordinator."""

    def __init__(self):
        self.values, self.asked = {}, []

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        self.asked.append(key)
        if key not in self.values:
            raise RuntimeError("DEADLINE_EXCEEDED: no such key")
        return self.values[key]


def compare(monkeypatch, order, *fields):
    """What each rank raises, in the order in which they come (the last sees all of them)."""
    store, said = Store(), {}
    monkeypatch.setattr(rank, "_client", lambda: store)
    monkeypatch.setattr(rank, "_last_word", None)
    for turn in range(2):
        for index in order:
            monkeypatch.setattr(rank, "_joined", rank.Cluster("h:1", len(fields), index))
            try:
                rank.agree("settings", fields[index], timeout=0.1)
                said[index] = ""
            except (ValueError, RuntimeError) as error:
                said[index] = str(error) if turn else ""
    # The first process waits for the last word of those that differ, before it ends.
    for index, text in said.items():
        assert (f"steppe/settings/read/{index}" in store.asked) == (index > 0 and bool(text))
    return said


def test_ranks_that_differ_are_named_with_the_field(monkeypatch):
    same = {"config": {"optim": {"rate": 1.0}, "seed": 0}, "code": {"a.py": "1"}}
    other = {**same, "config": {"optim": {"rate": 2.0}, "seed": 0}}
    assert set(compare(monkeypatch, (0, 1, 2), same, same, same).values()) == {""}
    said = compare(monkeypatch, (0, 1, 2), same, same, other)
    assert said[1] == ""
    expected = (
        "rank 2 disagrees with rank 0 on config.optim.rate: 2.0, on rank 0 1.0; "
        "start every rank with the same command"
    )
    assert said[0] == said[2] == expected
    said = compare(monkeypatch, (1, 0), same, {**same, "code": {"a.py": "2"}})
    assert said[0].startswith("rank 1 disagrees with rank 0 on code.a.py: '2', on rank 0 '1'")
    assert "install the same versions" in said[0]


def test_a_rank_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(rank, "_client", Store)
    monkeypatch.setattr(rank, "_joined", rank.Cluster("h:1", 2, 0))
    with pytest.raises(RuntimeError, match="rank 1 has not said its settings within 0 s"):
        rank.agree("settings", {}, timeout=0.1)


def test_what_is_compared_names_every_file_of_the_package():
    found = rank.identity({"seed": 1})
    assert found["config"] == {"seed": 1}
    assert found["versions"]["jax"] == jax.__version__
    assert {"launch/pods/rank.py", "train/loop.py", "models/tree.py"} <= set(found["code"])
    assert all(re.fullmatch("[0-9a-f]{8}", value) for value in found["code"].values())
    json.dumps(found)


def test_errors_of_a_lost_peer_are_told_from_ones_own(monkeypatch):
    monkeypatch.setattr(rank, "_joined", rank.Cluster("h:1", 2, 0))
    assert rank.name() == "rank 0 of 2: "
    for text in ("Gloo AllReduce: Connection closed by peer [127.0.0.1]", "UNAVAILABLE: task 1"):
        assert rank.lost(jax.errors.JaxRuntimeError(text))
    assert not rank.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert not rank.lost(ValueError("connection closed"))


def test_a_requeued_job_resumes_what_it_began(tmp_path):
    config = FinetuneConfig(out=str(tmp_path))
    job = {"STEPPE_REQUEUE": "1"}
    assert not rank.requeued(config, job).resume
    (tmp_path / "config.json").write_text("{}")
    assert rank.requeued(config, job).resume
    assert not rank.requeued(config, {}).resume
    resumed = dataclasses.replace(config, resume=True)
    assert rank.requeued(resumed, job) == resumed


def test_rows_of_a_process_are_those_of_its_devices(devices, monkeypatch):
    """The devices of a process are chosen by hand here: half of them, as a pod would lay them."""

    def rows(plan, own):
        sharding = SimpleNamespace(
            addressable_devices_indices_map=lambda shape: {
                d: index for d, index in plan.rows().devices_indices_map(shape).items() if d in own
            }
        )
        fake = SimpleNamespace(rows=lambda: sharding)
        return pieces.rows_here(fake, 16).tolist()

    flat = mesh.plan({"data": 8})
    assert rows(flat, devices[4:]) == list(range(8, 16))
    assert rows(flat, devices[::2]) == [0, 1, 4, 5, 8, 9, 12, 13]
    rules = ((".*", ("model",)),)
    inner = mesh.plan({"data": 4, "model": 2}, rules)
    assert rows(inner, devices[:4]) == list(range(8))
    outer = mesh.plan({"model": 2, "data": 4}, rules)
    assert rows(outer, devices[:4]) == rows(outer, devices[4:]) == list(range(16))
    assert np.array_equal(pieces.rows_here(flat, 16), np.arange(16))


# --- the launcher -------------------------------------------------------------------------


def test_options_stand_before_the_command():
    options, words = local.parse(
        ["--local-processes", "3", "--devices-per-process=4", "finetune", "--steps", "3"]
    )
    assert options == Options(processes=3, devices=4)
    assert words == ["finetune", "--steps", "3"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--local-processes", "0", "finetune"], "--local-processes must be >= 1, got 0"),
        (["--local-processes=x", "finetune"], "--local-processes must be a number, got 'x'"),
        (["--procs", "2", "finetune"], "has no option '--procs'"),
        (["--grace"], "--grace needs a value"),
        (["--platform", "tpu", "finetune"], "--platform must be cpu or gpu, got 'tpu'"),
        (["report", "x"], "runs finetune or distill, got 'report'"),
        (["--local-processes", "2"], "runs finetune or distill, got nothing"),
    ],
)
def test_launch_mistakes(words, says, capsys):
    assert cli.main(["launch", *words]) == 2
    assert says in capsys.readouterr().err


def test_help_may_follow_options(capsys):
    assert cli.main(["launch", "--local-processes", "2", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: steppe launch")
    assert max(map(len, said.splitlines())) <= 80


def test_the_environment_of_a_rank():
    base = {"XLA_FLAGS": "--a --xla_force_host_platform_device_count=8", "X": "1"}
    found = local.environment(Options(devices=4), 1, 77, base)
    assert found["XLA_FLAGS"].split() == ["--a", "--xla_force_host_platform_device_count=4"]
    assert found["X"] == "1"
    assert rank.detect(found) == rank.Cluster("127.0.0.1:77", 2, 1)
    found = local.environment(Options(devices=2, platform="gpu"), 1, 77, {})
    assert rank.detect(found).devices == (2, 3)
    assert "JAX_PLATFORMS" not in found
    assert found[rank.PLATFORM] == "gpu"


def test_whatever_ends_a_command_after_a_sigterm_is_no_mistake():
    """Raised within an import, the exception of the signal comes out as another one."""

    def load():
        try:
            signal.raise_signal(signal.SIGTERM)
        except stop.Stopped as lost:
            raise ImportError("cannot load a library") from lost

    with pytest.raises(stop.Stopped) as caught, stop.requeued():
        load()
    assert caught.value.status == 75
    with pytest.raises(ImportError, match="a library"), stop.requeued():
        raise ImportError("cannot load a library")


def test_processes_are_compared_at_the_steps_that_all_have():
    """The first 20 steps of rank 0 were a run of one process."""

    def row(step, busy):
        return {"step": step, "step_time": 1.0, "device_wait": 1.0 - busy}

    logs = {0: [row(n, 0.1) for n in range(20)] + [row(n, 0.6) for n in (20, 21)]}
    found = running.ranks({**logs, 1: [row(20, 0.5), row(21, 0.5)]})
    assert found["slowest"] == 0
    assert found["each"]["0"]["busy"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("ended", "blamed"),
    [
        ([(0, 0), (1, 0)], None),
        ([(0, 69), (1, 2)], 1),  # rank 0 ended first, for want of rank 1
        ([(0, -signal.SIGABRT), (1, -signal.SIGKILL)], 1),
        ([(1, 2), (0, 2)], 1),  # the same mistake on both: the first one
        ([(0, 75), (1, 75)], 0),
        ([(0, 75), (1, 1)], 1),
        ([(0, 75), (1, -signal.SIGABRT)], 0),
        ([(0, 69)], 0),
        ([(1, 76), (0, 69)], 1),
    ],
)
def test_the_rank_that_failed_by_itself_is_blamed(ended, blamed):
    found = local.blame([Ended(r, status, float(n)) for n, (r, status) in enumerate(ended)])
    assert (None if found is None else found.rank) == blamed


def test_which_ends_are_started_again():
    assert [s for s in range(256) if codes.again(s) and s < 129] == [69, 75, 76]
    assert codes.again(137)
    assert codes.again(-9)
    assert not codes.again(130)
