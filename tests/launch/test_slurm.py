"""A real SLURM on this machine: munge, slurmctld and two slurmd, started in a temporary folder.

Needs Debian's slurm-wlm and munge (``apt-get install slurm-wlm munge``); skipped without. Nothing
of the machine is changed: node names are loopback addresses, which jax can resolve, and every
file lies in the folder.
"""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from steppe.launch import cli
from steppe.launch.pods import slurm
from steppe.launch.pods.job import JobSpec

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
MISSING = [p for p in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(p, path=PATH)]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no SLURM here ({', '.join(MISSING)} missing): apt-get install slurm-wlm munge",
    ),
]
NODES = ("127.0.0.1", "127.0.0.2")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/ctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_for(what, seconds, condition, otherwise=pytest.fail):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.2)
    otherwise(f"{what} did not come within {seconds} s")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment that SLURM's commands need, and a way to call them."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "state").mkdir()
    values = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
    conf = root / "slurm.conf"
    conf.write_text(CONF.format(root=root, ports=free_ports(3), nodes=NODES, **values))
    key = root / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(conf)}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    for option in ("socket", "pid", "log", "seed"):
        name = {"socket": "socket", "pid": "pid-file", "log": "log-file", "seed": "seed-file"}
        file = root / ("munge.sock" if option == "socket" else f"munge.{option}")
        munge.append(f"--{name[option]}={file}")
    started = []

    def start(*command):
        with (root / f"{command[0]}.{len(started)}.out").open("w") as log:
            started.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            )

    def call(*command, check=True):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    try:
        start(*munge)
        # Daemons that a machine does not let start say nothing about what is tested here.
        wait_for("munge", 20, (root / "munge.sock").exists, pytest.skip)
        start("slurmctld", "-D", "-f", str(conf))
        for node in NODES:
            start("slurmd", "-D", "-f", str(conf), "-N", node)
        idle = lambda: call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2"  # noqa: E731
        wait_for("two idle nodes of SLURM", 60, idle, pytest.skip)
        yield SimpleNamespace(env=env, call=call, root=root)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def rows(run):
    """step -> loss of a run so far; steps that were done twice stand once."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if row["kind"] == "train":
                found[row["step"]] = row["loss"]
    return found


def ranks(run):
    """Process ids of the ranks of a run on this machine, by their index."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if f"--out={run}".encode() in words and words[1:2] == [b"-m"]:
                lines = (process / "environ").read_bytes().split(b"\0")
                env = dict(line.partition(b"=")[::2] for line in lines)
                found[int(env[b"SLURM_PROCID"])] = int(process.name)
    return found


def test_two_nodes_are_preempted_killed_and_end_as_if_nothing_had_happened(
    cluster, reviews, tmp_path
):
    steps = 30
    words = (
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
        "--save-every=4",
        f"--eval-every={steps}",
        f"--steps={steps}",
        "--no-baselines",
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main([*words, f"--out={whole}"]) == 0
    spec = JobSpec(
        (*words, f"--out={run}"),
        nodes=2,
        hours=1,
        grace=30,
        program=f"{sys.executable} -m steppe.launch.cli",
        workdir=str(tmp_path),
        env=("XLA_FLAGS=--xla_force_host_platform_device_count=2", "JAX_PLATFORMS=cpu"),
    )
    script = tmp_path / "job.sh"
    script.write_text(slurm.render(spec))
    waiting = subprocess.Popen(
        ["sbatch", "--wait", str(script)],
        env=cluster.env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = lambda: "".join(f.read_text() for f in tmp_path.glob("steppe-*.log"))  # noqa: E731
    try:
        wait_for("step 5", 300, lambda: len(rows(run)) >= 5 or waiting.poll() is not None)
        number = cluster.call("squeue", "-h", "-o", "%A").split()[0]
        cluster.call("scancel", "--signal=TERM", number)
        wait_for("the requeue", 300, lambda: "ended with 75: back into the queue" in log())
        saved = max(rows(run))
        wait_for("a resumed run", 300, lambda: max(rows(run)) >= saved + 5)
        os.kill(ranks(run)[1], signal.SIGKILL)
        wait_for("the other requeue", 300, lambda: log().count("back into the queue") == 2)
        said, _ = waiting.communicate(timeout=300)
        assert waiting.returncode == 0, said + log()
    except BaseException:
        print(log())
        raise
    finally:
        waiting.kill()
        waiting.communicate()
        cluster.call("scancel", "--user", getpass.getuser(), check=False)
    assert log().count("resumed at step") == 2
    assert "on mesh data=4" in " ".join(log().split())
    expected, found = rows(whole), rows(run)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(found) == steps
    ends = [json.loads((r / "results.json").read_text()) for r in (whole, run)]
    assert ends[1]["hardware"]["processes"] == 2
    scores = [end["metrics"]["test"] for end in ends]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)
    # The batch script, the requeues and the ranks leave nothing behind.
    assert ranks(run) == {}


def test_a_wrong_setting_does_not_go_back_into_the_queue(cluster, reviews, tmp_path):
    spec = JobSpec(
        (
            "finetune",
            f"--model={reviews.model}",
            "--data.source=file:none.csv",
            "--data.max-length=12",
        ),
        name="wrong",
        program=f"{sys.executable} -m steppe.launch.cli",
        hours=1,
        workdir=str(tmp_path),
    )
    script = tmp_path / "job.sh"
    script.write_text(slurm.render(spec))
    done = subprocess.run(
        ["sbatch", "--wait", str(script)], env=cluster.env, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2
    (log,) = tmp_path.glob("wrong-*.log")
    assert "none.csv" in log.read_text()
    assert "back into the queue" not in log.read_text()
