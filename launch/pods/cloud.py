"""TPU VMs by gcloud, SkyPilot tasks, and xpk workloads."""

from __future__ import annotations

import shlex
from typing import Any

from steppe.launch.pods import codes, rank, yaml_
from steppe.launch.pods.job import AGAIN, PORT, JobSpec


def tpu_vm(spec: JobSpec) -> str:
    """A script for the machine that one sits at: asks for the slice, waits for it, and runs the
    command on all its hosts by ssh, again where that may help. It does not delete the slice."""
    assert spec.slice is not None
    where = [f"--zone={spec.zone}"] + ([f"--project={spec.project}"] if spec.project else [])
    create = [
        *("gcloud", "compute", "tpus", "queued-resources", "create", spec.name),
        f"--node-id={spec.name}",
        *where,
        f"--accelerator-type={spec.slice.name}",
        f"--runtime-version={spec.runtime or spec.slice.runtime}",
        *(["--spot"] if spec.spot else []),
    ]
    # jax finds coordinator and rank by the metadata of the TPU VM.
    remote = "\n".join(["set -e", *spec.preamble(), f"exec {spec.line()}"])
    queued = shlex.join(["gcloud", "compute", "tpus", "queued-resources"])
    place = shlex.join([spec.name, *where])
    ssh = shlex.join(
        [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", spec.name, *where),
            "--worker=all",
            f"--command=bash -c {shlex.quote(remote)}",
        ]
    )
    ask = f"{queued} describe {place} --format='value(state.state)'"
    lines = [
        "#!/bin/bash",
        "set -u",
        f"{queued} describe {place} >/dev/null 2>&1 || {shlex.join(create)} || exit 1",
        f'until [ "$({ask})" = ACTIVE ]; do',
        f'  case "$({ask})" in',
        f'    FAILED|SUSPENDED) echo "queued resource {spec.name} is not to be had" >&2; exit 1 ;;',
        "  esac",
        "  sleep 30",
        "done",
        "starts=0",
        "while :; do",
        f"  {ssh}",
        "  status=$?",
        f"  case $status in {'|'.join(map(str, (*AGAIN, *codes.KILLED)))}|255) ;; *) break ;; esac",
        f'  if [ "$starts" -ge {spec.restarts} ]; then break; fi',
        "  starts=$((starts + 1))",
        '  echo "steppe: the ranks ended with $status: start $starts again" >&2',
        "  sleep 10",
        "done",
        f'echo "the slice is still there: {queued} delete {place} --force" >&2',
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def skypilot(spec: JobSpec) -> str:
    """A task for ``sky jobs launch``, which starts it again elsewhere when machines are taken."""
    kind, gpus = spec.gpus
    resources: dict[str, Any] = {}
    if spec.slice is not None:
        resources["accelerators"] = f"tpu-{spec.slice.name}"
    elif gpus:
        resources["accelerators"] = f"{kind.upper()}:{gpus}"
    if spec.cpus:
        resources["cpus"] = f"{spec.cpus}+"
    if spec.memory_gib:
        resources["memory"] = f"{spec.memory_gib}+"
    if spec.zone:
        resources["zone"] = spec.zone
    if spec.image:
        resources["image_id"] = f"docker:{spec.image}"
    if spec.spot:
        resources["use_spot"] = True
    resources["job_recovery"] = {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [*AGAIN, *codes.KILLED],
    }
    run = ["set -e"]
    if spec.slice is None:  # on TPU VMs jax asks the machine itself
        run += [
            f'export {rank.COORDINATOR}="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{PORT}"',
            f'export {rank.COUNT}="$SKYPILOT_NUM_NODES"',
            f'export {rank.INDEX}="$SKYPILOT_NODE_RANK"',
        ]
    run += [*spec.preamble(), spec.line()]
    task = {
        "name": spec.name,
        "num_nodes": 1 if spec.slice is not None else spec.machines,
        "resources": resources,
        "run": "\n".join(run) + "\n",
    }
    return yaml_.dump(task)


def xpk(spec: JobSpec) -> list[str]:
    """The words of ``xpk workload create``; jax finds the ranks by what GKE sets."""
    if spec.slice is not None:
        machines = [f"--tpu-type={spec.slice.name}", "--num-slices=1"]
    else:
        kind, gpus = spec.gpus
        machines = [f"--device-type={kind}-{gpus}", f"--num-nodes={spec.machines}"]
    return [
        *("xpk", "workload", "create"),
        f"--workload={spec.name}",
        f"--cluster={spec.cluster}",
        *machines,
        f"--docker-image={spec.image}",
        f"--zone={spec.zone}",
        *([f"--project={spec.project}"] if spec.project else []),
        *([f"--priority={spec.priority}"] if spec.priority else []),
        f"--max-restarts={spec.restarts}",
        f"--restart-on-exit-codes={','.join(map(str, (*AGAIN, *codes.KILLED)))}",
        f"--command={chr(10).join(['set -e', *spec.preamble(), spec.line()])}",
    ]
