"""Jobs for five schedulers: what is rendered is valid, quoted, and says what was asked for."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steppe.launch import cli
from steppe.launch.plan.settings import PlanConfig
from steppe.launch.pods import cloud, kubernetes, slices, slurm, submit
from steppe.launch.pods.job import TARGETS, JobSpec, check

# What a shell, YAML or both would like to take apart.
AWKWARD = (
    "plain",
    "two words",
    "it's",
    'say "x"',
    "$HOME and `id` \\n",
    "a\nb\n\n c",
    "",
    "*;&|<>#!~",
    "über: [1, 2] {x}",
    "yes",
    "%x",
)
COMMAND = ("finetune", "vader-movies", "--data.prefix", *AWKWARD)
MACHINES = {
    "slurm": {"accelerator": "h100:8", "nodes": 2, "partition": "gpu"},
    "jobset": {"accelerator": "v5p-128", "image": "r/i:1", "queue": "q"},
    "tpu-vm": {"accelerator": "v5e-16", "zone": "us-x"},
    "skypilot": {"accelerator": "h100:8", "nodes": 2},
    "xpk": {"accelerator": "v6e-16", "zone": "z", "cluster": "c", "image": "i"},
}


def spec(target="slurm", command=COMMAND, **more):
    return JobSpec(tuple(command), **{**MACHINES[target], **more})


@pytest.fixture
def tools(tmp_path):
    """Programs that write down what they are called with; and their environment."""
    folder = tmp_path / "tools"
    folder.mkdir()
    record = folder / "record.py"
    record.write_text(
        "import json, os, sys\n"
        f"with open({str(tmp_path / 'calls')!r}, 'a') as out:\n"
        "    seen = {k: os.environ.get(k) for k in ('A', 'B', 'STEPPE_REQUEUE', "
        "'STEPPE_PROCESS_INDEX', 'STEPPE_COORDINATOR', 'STEPPE_PROCESS_COUNT')}\n"
        "    words = [os.path.basename(sys.argv[1]), *sys.argv[2:]]\n"
        "    json.dump({'words': words, 'env': seen, 'cwd': os.getcwd()}, out)\n"
        "    out.write('\\n')\n"
    )

    def make(name, after=""):
        file = folder / name
        file.write_text(f'#!/bin/bash\n{sys.executable} -S {record} "$0" "$@"\n{after}\n')
        file.chmod(0o755)

    make("steppe")
    path = f"{folder}:{os.environ['PATH']}"

    def run(script, **env):
        (tmp_path / "script.sh").write_text(script)
        return subprocess.run(
            ["bash", str(tmp_path / "script.sh")],
            env={"PATH": path, **env},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls():
        file = tmp_path / "calls"
        return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []

    def reset():
        (tmp_path / "calls").unlink(missing_ok=True)

    return make, run, calls, reset, tmp_path


ENV = ("A=it's $HOME", "B=two\nlines")
SEEN = {"A": "it's $HOME", "B": "two\nlines", "STEPPE_REQUEUE": "1"}


def check_call(call, workdir):
    assert call["words"] == ["steppe", *COMMAND]
    assert {k: call["env"][k] for k in SEEN} == SEEN
    assert call["cwd"] == str(workdir)


def test_words_and_environment_survive_every_shell_on_the_way(tools):
    """Each script is run, with a stand-in for the tool, and the command sees what was written."""
    make, run, calls, reset, root = tools
    workdir = root / "a folder's $name"
    workdir.mkdir()
    more = {"workdir": str(workdir), "env": ENV}

    make("srun", 'shift; exec "$@"')
    done = run(slurm.render(spec("slurm", **more)))
    assert done.returncode == 0, done.stderr
    first, second = calls()
    assert first["words"][:2] == ["srun", "--kill-on-bad-exit=1"]
    check_call(second, workdir)

    reset()
    pod = kubernetes.manifest(spec("jobset", **more))
    read = yaml.safe_load(kubernetes.render(spec("jobset", **more)))
    assert read == pod
    (container,) = read["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["command"][:2] == ["/bin/bash", "-c"]
    assert run(container["command"][2]).returncode == 0
    check_call(*calls(), workdir)

    reset()
    task = yaml.safe_load(cloud.skypilot(spec("skypilot", **more)))
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    assert run(task["run"], SKYPILOT_NODE_RANK="1", **nodes).returncode == 0
    check_call(*calls(), workdir)
    assert calls()[0]["env"]["STEPPE_COORDINATOR"] == "10.0.0.1:8476"
    assert calls()[0]["env"]["STEPPE_PROCESS_COUNT"] == "2"
    assert calls()[0]["env"]["STEPPE_PROCESS_INDEX"] == "1"

    reset()
    # ssh hands its words to a shell on the other side.
    ssh = 'for word in "$@"; do case $word in --command=*) sh -c "${word#--command=}";; esac; done'
    make("gcloud", f'case "$*" in *describe*) echo ACTIVE ;; *) {ssh} ;; esac')
    assert run(cloud.tpu_vm(spec("tpu-vm", **more))).returncode == 0
    check_call(calls()[-1], workdir)

    reset()
    words = cloud.xpk(spec("xpk", **more))
    script = next(w.removeprefix("--command=") for w in words if w.startswith("--command="))
    assert run(script).returncode == 0
    check_call(*calls(), workdir)
    reset()
    make("xpk")
    assert run(submit.render(spec("xpk", **more), "xpk")).returncode == 0
    assert calls()[0]["words"] == words


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        (0, 0, False),
        (2, 0, False),
        (1, 0, False),
        (130, 0, False),
        (75, 0, True),
        (69, 3, True),
        (76, 0, True),
        (137, 0, True),
        (75, 10, False),
    ],
)
def test_slurm_puts_back_what_may_go_on_and_keeps_the_status(tools, status, restarts, requeued):
    make, run, calls, _, _ = tools
    make("srun", f"exit {status}")
    make("scontrol", "exit 1")  # the real one ends the script
    done = run(slurm.render(spec()), SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == status
    assert (["scontrol", "requeue", "7"] in [c["words"] for c in calls()]) == requeued


def test_compiled_programs_outlive_a_start(tools):
    make, run, _, _, root = tools
    make("srun", f"echo $JAX_COMPILATION_CACHE_DIR > {root}/seen")
    assert (
        run(slurm.render(spec(programs="/shared/what's compiled")), SLURM_JOB_ID="7").returncode
        == 0
    )
    assert (root / "seen").read_text() == "/shared/what's compiled\n"
    assert not any("CACHE" in line for line in spec().preamble())


def test_a_mistake_of_one_rank_is_the_status_of_the_job(tools):
    """srun tells that of the rank which it killed for it."""
    make, run, calls, _, root = tools
    make("srun", 'shift; "$@"; exit 143')
    make("steppe", "exit 2")
    done = run(slurm.render(spec()), SLURM_JOB_ID="7")
    assert done.returncode == 2
    assert not [c for c in calls() if c["words"][0] == "scontrol"]
    assert not list(root.glob(".steppe-*"))


def test_the_header_says_what_was_asked_for():
    text = slurm.render(
        spec(
            processes=4,
            cpus=96,
            memory_gib=500,
            hours=1.51,
            grace=90,
            account="a",
            qos="q",
            name="two-nodes",
        )
    )
    assert re.findall(r"^#SBATCH --(.*)$", text, re.M) == [
        "job-name=two-nodes",
        "nodes=2",
        "ntasks-per-node=4",
        "gpus-per-node=h100:8",
        "cpus-per-task=24",
        "mem=500G",
        "time=1:31:00",
        "signal=TERM@90",
        "partition=gpu",
        "account=a",
        "qos=q",
        "output=%x-%j.log",
        "open-mode=append",
        "requeue",
    ]
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=24 bash -c " in text
    assert ' "$ends" steppe finetune' in text


def test_tpu_vm_starts_again_where_that_may_help(tools):
    make, run, calls, _, root = tools
    count = root / "count"
    ssh = f"echo x >> {count}; [ $(wc -l < {count}) -ge 3 ] && exit 2; exit 75"
    make("sleep")
    make("gcloud", f'case "$*" in *describe*) echo ACTIVE ;; *ssh*) {ssh} ;; esac')
    assert run(cloud.tpu_vm(spec("tpu-vm"))).returncode == 2
    assert sum("ssh" in c["words"] for c in calls()) == 3
    assert not any("create" in c["words"] for c in calls())
    make("gcloud", 'case "$*" in *describe*) echo FAILED ;; esac')
    done = run(cloud.tpu_vm(spec("tpu-vm")))
    assert done.returncode == 1
    assert "not to be had" in done.stderr


# --- JobSet -------------------------------------------------------------------------------


def validate(value, schema, where="jobset"):
    """The part of OpenAPI that the fixture uses: type, properties, required, enum, items."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    assert isinstance(value, kinds[schema["type"]]), f"{where}: {value!r} is no {schema['type']}"
    assert not (schema["type"] == "integer" and isinstance(value, bool)), where
    if "enum" in schema:
        assert value in schema["enum"], f"{where}: {value!r}"
    if "pattern" in schema:
        assert re.fullmatch(schema["pattern"], value), f"{where}: {value!r}"
    if schema["type"] == "array":
        assert len(value) >= schema.get("minItems", 0), where
        for number, item in enumerate(value):
            validate(item, schema["items"], f"{where}[{number}]")
    if schema["type"] == "object":
        for name in schema.get("required", ()):
            assert name in value, f"{where} lacks {name}"
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        for name, inner in value.items():
            assert name in known or rest, f"{where} has no field {name}"
            validate(inner, known.get(name, rest), f"{where}.{name}")


SCHEMA = json.loads((Path(__file__).parent / "fixtures" / "jobset.json").read_text())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"accelerator": "h100:8", "nodes": 4, "cpus": 96, "memory_gib": 900},
        {"accelerator": "", "nodes": 3, "queue": "", "volume": "data:/shared", "spot": True},
    ],
)
def test_a_jobset_fits_the_schema(more):
    found = yaml.safe_load(kubernetes.render(spec("jobset", priority="low", **more)))
    validate(found, SCHEMA)
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    count = more.get("nodes", 16)
    assert job["parallelism"] == job["completions"] == count
    pod = job["template"]["spec"]
    env = {e["name"]: e for e in pod["containers"][0]["env"]}
    assert env["STEPPE_PROCESS_COUNT"]["value"] == str(count)
    assert env["STEPPE_COORDINATOR"]["value"] == "steppe-ranks-0-0.steppe:8476"
    labels = found["metadata"].get("labels", {})
    assert ("kueue.x-k8s.io/queue-name" in labels) == (more.get("queue") != "")


def test_the_schema_refuses_what_is_wrong():
    good = kubernetes.manifest(spec("jobset"))
    for damage in (
        lambda m: m["spec"].update(replicas=2),
        lambda m: m["spec"]["replicatedJobs"][0].pop("name"),
        lambda m: m["spec"]["failurePolicy"].update(maxRestarts="3"),
        lambda m: m.update(apiVersion="jobset.x-k8s.io/v1"),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Restart"),
    ):
        wrong = json.loads(json.dumps(good))
        validate(wrong, SCHEMA)
        damage(wrong)
        with pytest.raises(AssertionError):
            validate(wrong, SCHEMA)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kubectl_reads_the_pods(tmp_path):
    """Its own types know Jobs, so the one inside is handed to it; JobSets need a server."""
    job = kubernetes.manifest(spec("jobset"))["spec"]["replicatedJobs"][0]["template"]
    file = tmp_path / "job.json"
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    file.write_text(json.dumps(whole))
    done = subprocess.run(
        ["kubectl", "patch", "--local", "--type=merge", "-p", "{}", "-o", "json", "-f", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)["spec"]
    (container,) = read["template"]["spec"]["containers"]
    assert container == job["spec"]["template"]["spec"]["containers"][0]
    assert read["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]


# --- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "more", "says"),
    [
        ("slurm", {"accelerator": "h100"}, "must be GPUs of a node such as h100:8"),
        ("slurm", {"accelerator": "h100:64"}, "a node has 1 to 16 GPUs"),
        ("slurm", {"processes": 3}, "processes=3 cannot share the 8 GPUs"),
        ("slurm", {"accelerator": "v5p-128", "nodes": 0}, "slurm has no TPU slices"),
        ("slurm", {"hours": 0}, "hours must be > 0"),
        ("slurm", {"hours": 1e300}, "hours must be > 0 and at most 8760"),
        ("slurm", {"cpus": 4, "processes": 8}, "cpus=4 cannot be shared by processes=8"),
        ("slurm", {"memory_gib": 99999999}, "memory_gib must be at most"),
        ("slurm", {"grace": 7200, "hours": 2}, "leaves nothing of hours=2"),
        ("slurm", {"name": "My job"}, "small letters, digits and dashes"),
        ("slurm", {"env": ("1A=x",)}, "env must hold NAME=VALUE, got '1A=x'"),
        ("slurm", {"accelerator": "", "programs": "/s"}, "programs is for accelerators"),
        (
            "slurm",
            {"programs": "/s", "env": ("JAX_COMPILATION_CACHE_DIR=/t",)},
            "programs and env JAX_COMPILATION_CACHE_DIR say the same",
        ),
        ("slurm", {"partition": "a b"}, "partition='a b' must be one plain word"),
        ("slurm", {"image": "x"}, "--image is for jobset, xpk, skypilot; slurm would ignore it"),
        ("slurm", {"command": ("report",)}, "command must begin with finetune or distill"),
        ("jobset", {"image": ""}, "jobset needs --image"),
        ("jobset", {"nodes": 3}, "v5p-128 is 16 hosts of 4 chips"),
        ("jobset", {"accelerator": "v5p-100"}, "near ones: v5p-64, v5p-96, v5p-128"),
        ("jobset", {"accelerator": "v5e-12"}, "near ones: v5e-8, v5e-16, v5e-32"),
        ("jobset", {"volume": "x"}, "volume='x' must be CLAIM:/PATH"),
        ("jobset", {"processes": 2}, "a TPU host runs one process"),
        ("tpu-vm", {"accelerator": "h100:8"}, "tpu-vm needs a TPU slice"),
        ("skypilot", {"processes": 2}, "skypilot starts one process a node"),
        ("xpk", {"accelerator": ""}, "xpk needs --accelerator"),
        ("nomad", {}, "to must be one of slurm, jobset, tpu-vm, skypilot, xpk, got 'nomad'"),
    ],
)
def test_impossible_jobs_say_what_is_wrong(target, more, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        check(JobSpec(**{"command": COMMAND, **MACHINES.get(target, {}), **more}), target)


def test_sizes_of_slices():
    found = {n: slices.parse(n) for n in ("v5e-1", "v5e-8", "v5e-16", "v6e-256", "v4-32", "v5p-8")}
    chips = {name: (s.chips, s.hosts, s.topology) for name, s in found.items()}
    assert chips == {
        "v5e-1": (1, 1, "1x1"),
        "v5e-8": (8, 1, "2x4"),
        "v5e-16": (16, 4, "4x4"),
        "v6e-256": (256, 64, "16x16"),
        "v4-32": (16, 4, "2x2x4"),
        "v5p-8": (4, 1, "2x2x1"),
    }
    assert found["v5e-16"].name == slices.parse("v5litepod-16").name == "v5litepod-16"
    assert slices.parse("v5p-512").topology == "4x8x8"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"on": "v5p-126"}, "on='v5p-126': there is no such slice; near ones: .*v5p-128"),
        ({"on": "v6e-12"}, "near ones: v6e-8, v6e-16"),
        ({"on": "v5e-512"}, "the largest slice is v5e-256: give --slices for several"),
        ({"on": "v5e-36", "slices": 3}, "on='v5e-36', 12 in each of 3 slices: there is no"),
    ],
)
def test_only_slices_that_exist_are_planned(values, words):
    with pytest.raises(ValueError, match=words):
        PlanConfig(model="gpt2", **values)
    for text, count in (("v5e-512", 2), ("v5p-2", 1), ("v5p", 1), ("h100-24", 3), ("cpu-6", 1)):
        assert PlanConfig(model="gpt2", on=text, slices=count).place.devices


# --- the command --------------------------------------------------------------------------


def mistake(capsys, words):
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "\n" not in said.strip()
    return said


def test_submit_prints_and_applies_nothing(capsys, tmp_path, monkeypatch):
    words = ["submit", "--to", "slurm", "--nodes", "2", "--accelerator", "h100:4"]
    command = ["--", "finetune", "vader-movies", "--batch-size", "64"]
    file = tmp_path / "job.sh"
    assert cli.main([*words, "--file", str(file), *command]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=h100:4" in said
    assert "steppe finetune vader-movies --batch-size 64" in said
    assert file.read_text() == said
    lost = tmp_path / "not" / "there.sh"
    assert f"file={str(lost)!r} cannot be written (No such file or directory): give" in mistake(
        capsys, [*words, "--file", str(lost), *command]
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch, which is not installed here" in mistake(capsys, [*words, "--apply", *command])
    # Mistakes of the run itself do not wait in a queue.
    assert "batch_size=60 cannot be divided over 8" in mistake(
        capsys, [*words, "--", "finetune", "--batch-size", "60"]
    )
    assert "mesh='data=4' is 4 devices, but 2 nodes of h100:4 have 8" in mistake(
        capsys, [*words, "--", "finetune", "--mesh", "data=4"]
    )
    assert "unknown recipe 'vader-movie'" in mistake(
        capsys, [*words, "--", "finetune", "vader-movie"]
    )
    assert "write -- before finetune" in mistake(capsys, [*words, "finetune"])
    assert "no command" in mistake(capsys, words)


def test_apply_hands_the_file_to_the_tool(capsys, tools, monkeypatch):
    make, _, calls, _, root = tools
    monkeypatch.setenv("PATH", f"{root / 'tools'}:{os.environ['PATH']}")
    make("sbatch", f'cp "$1" {root}/seen; exit 3')
    words = ["submit", "--to", "slurm", "--apply", "--", "finetune", "vader-movies"]
    assert cli.main(words) == 3
    assert calls()[0]["words"][0] == "sbatch"
    assert (root / "seen").read_text() == slurm.render(JobSpec(("finetune", "vader-movies")))


def test_skypilot_reads_its_task(tmp_path):
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    file = tmp_path / "task.yaml"
    file.write_text(cloud.skypilot(spec("skypilot")))
    task = sky.Task.from_yaml(str(file))
    assert task.num_nodes == 2
    assert task.run == yaml.safe_load(file.read_text())["run"]


def test_every_target_has_machines_and_renders():
    assert set(MACHINES) == set(TARGETS)
    for target in TARGETS:
        assert "finetune vader-movies" in submit.render(spec(target), target)
