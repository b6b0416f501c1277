"""A JobSet of one indexed Job: one pod a node, found by the name of the first (jobset.sigs.k8s.io).

Any pod's failure restarts all of them, up to ``restarts`` times; a status that says that the
settings are wrong fails the whole set at once. With ``queue`` Kueue decides when it starts.
"""

from __future__ import annotations

from typing import Any

from steppe.launch.pods import codes, rank, yaml_
from steppe.launch.pods.job import PORT, JobSpec

JOB = "ranks"


def manifest(spec: JobSpec) -> dict[str, Any]:
    """The JobSet."""
    labels = {}
    if spec.queue:
        labels["kueue.x-k8s.io/queue-name"] = spec.queue
    if spec.priority:
        labels["kueue.x-k8s.io/priority-class"] = spec.priority
    metadata: dict[str, Any] = {"name": spec.name, "namespace": spec.namespace}
    if labels:
        metadata["labels"] = labels
    job = {
        "parallelism": spec.machines,
        "completions": spec.machines,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # The reason of a Job that failed so is PodFailurePolicy, which the rule below reads.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "steppe",
                        "operator": "In",
                        "values": [1, codes.MISTAKE],
                    },
                }
            ]
        },
        "template": {"spec": _pod(spec)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": {
                "maxRestarts": spec.restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }


def render(spec: JobSpec) -> str:
    """The JobSet as YAML."""
    return yaml_.dump(manifest(spec))


def _pod(spec: JobSpec) -> dict[str, Any]:
    script = "\n".join(["set -e", *spec.preamble(), f"exec {spec.line()}"]) + "\n"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    container: dict[str, Any] = {
        "name": "steppe",
        "image": spec.image,
        "command": ["/bin/bash", "-c", script],
        "env": [
            # The first pod of the first (and only) job, by the name that JobSet gives it.
            {"name": rank.COORDINATOR, "value": f"{spec.name}-{JOB}-0-0.{spec.name}:{PORT}"},
            {"name": rank.COUNT, "value": str(spec.machines)},
            {"name": rank.INDEX, "valueFrom": {"fieldRef": {"fieldPath": index}}},
        ],
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    resources = _resources(spec)
    if resources:
        container["resources"] = {"limits": resources, "requests": dict(resources)}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.grace,
        "containers": [container],
        # Collectives between the GPUs of a node go through shared memory.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    selector = {}
    if spec.slice is not None:
        selector["cloud.google.com/gke-tpu-accelerator"] = spec.slice.node
        selector["cloud.google.com/gke-tpu-topology"] = spec.slice.topology
    if spec.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {
                "key": "cloud.google.com/gke-spot",
                "operator": "Equal",
                "value": "true",
                "effect": "NoSchedule",
            }
        ]
    if selector:
        pod["nodeSelector"] = selector
    if spec.volume:
        claim, _, path = spec.volume.partition(":")
        pod["volumes"].append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
        container["volumeMounts"].append({"name": "data", "mountPath": path})
    return pod


def _resources(spec: JobSpec) -> dict[str, str]:
    found = {}
    if spec.gpus[1]:
        found["nvidia.com/gpu"] = str(spec.gpus[1])
    if spec.slice is not None:
        found["google.com/tpu"] = str(spec.slice.chips // spec.slice.hosts)
    if spec.cpus:
        found["cpu"] = str(spec.cpus)
    if spec.memory_gib:
        found["memory"] = f"{spec.memory_gib}Gi"
    return found
