"""A process that is one of several: it joins them, compares settings with them, and leaves.

Which of how many it is comes from ``STEPPE_COORDINATOR`` (host:port of process 0),
``STEPPE_PROCESS_COUNT`` and ``STEPPE_PROCESS_INDEX``; where these are not set, from what jax
itself detects: SLURM steps, TPU VMs and GKE, Open MPI, Kubernetes jobs. So the same ``steppe
finetune`` is a whole run by itself and a rank of any of them. With SLURM and the like,
``STEPPE_COORDINATOR`` alone replaces the address. ``STEPPE_LOCAL_DEVICES`` (0,1) names the GPUs
of this process, ``STEPPE_JOIN_TIMEOUT`` the seconds that it waits for the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steppe.launch.pods import codes

COORDINATOR, COUNT, INDEX = "STEPPE_COORDINATOR", "STEPPE_PROCESS_COUNT", "STEPPE_PROCESS_INDEX"
LOCAL, TIMEOUT = "STEPPE_LOCAL_DEVICES", "STEPPE_JOIN_TIMEOUT"
# Set by ``steppe launch``, which tells the user itself why a run ended: to the file where the first
# process leaves its own last words, so that they are not said twice.
LAUNCHED = "STEPPE_LAUNCHED"
# Set by it too: where the ranks were asked to compute.
PLATFORM = "STEPPE_PLATFORM"
# After this many seconds without a sign a process counts as dead.
HEARTBEAT = 60
# What jax's runtime and gloo say when another process is gone.
_LOST = re.compile(
    r"gloo|connection (reset|closed|refused)|socket closed|coordination ?service|heartbeat|"
    r"task.{0,40}(died|disconnected|unhealthy)|peer|UNAVAILABLE|NCCL.{0,60}(remote|abort)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Cluster:
    """Where this process stands.

    Attributes:
      address: host:port of process 0.
      count, index: number of processes, and which one this is.
      devices: numbers of the GPUs that are this process's; None = all that it sees.
    """

    address: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None


_joined: Cluster | None = None
# Key that tells the first process that this one has said what is wrong.
_last_word: str | None = None


def joined() -> Cluster | None:
    """What this process has joined; None where it is alone."""
    return _joined


def lead() -> bool:
    """Whether this is the process that prints and writes."""
    import jax

    # A process that is alone must not wake the accelerator up for this.
    return not jax.distributed.is_initialized() or bool(jax.process_index() == 0)


def console(**options: Any) -> Any:
    """A rich console to stderr that says nothing on other processes than the first."""
    from rich.console import Console

    return Console(**{"stderr": True, **options}, quiet=not lead())


def detect(environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """Reads the environment; None where this process is the only one.

    Raises:
      ValueError: the variables contradict each other, or a part of them is missing.
    """
    address = environ.get(COORDINATOR)
    if address is not None and not re.fullmatch(r"\S+:\d+", address):
        raise ValueError(f"{COORDINATOR} must be host:port of process 0, got {address!r}")
    given = [name for name in (COUNT, INDEX) if name in environ]
    if given:
        lacking = [name for name in (COORDINATOR, COUNT, INDEX) if name not in environ]
        if lacking:
            raise ValueError(f"{given[0]} is set but {' and '.join(lacking)} not: set all three")
        count, index = (_integer(environ, name) for name in (COUNT, INDEX))
        if count < 1 or not 0 <= index < count:
            raise ValueError(
                f"{INDEX} must be in [0, {COUNT}), got {index} of {count}: "
                "processes are numbered from 0"
            )
        assert address is not None
        return Cluster(address, count, index, _devices(environ)) if count > 1 else None
    # Not public, and the only way to learn the address before trying to connect to it.
    from jax._src import clusters

    with warnings.catch_warnings():  # a missing package of a cluster that nobody uses
        warnings.simplefilter("ignore")
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, None, None, _devices(environ), None, 30
        )
    address, counted, number, devices = found
    if address is None or counted is None or number is None or counted == 1:
        return None
    return Cluster(address, counted, number, None if devices is None else tuple(devices))


def join(environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """Joins the other processes, if there are any; to be called before jax knows its devices.

    Where they cannot be reached within ``STEPPE_JOIN_TIMEOUT`` seconds (300) the process ends
    with status 69 and a message that holds the address: jax would end it without one.

    Raises:
      ValueError: as :func:`detect`.
    """
    global _joined
    if _joined is not None:
        return _joined
    found = detect(environ)
    if found is None:
        return None
    limit = _integer(environ, TIMEOUT, 300)
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timer = threading.Timer(limit, _unreachable, (found, limit))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            found.address,
            found.count,
            found.index,
            local_device_ids=found.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=limit + 60,  # ours comes first
            heartbeat_timeout_seconds=HEARTBEAT,
            # The first process writes the report while the others wait at the end.
            shutdown_timeout_seconds=3600,
        )
    finally:
        timer.cancel()
    if environ.get(PLATFORM) == "gpu" and jax.default_backend() == "cpu":
        raise ValueError(
            "--platform gpu, but jax sees no GPU here (devices: "
            f"{', '.join(sorted({d.device_kind for d in jax.local_devices()}))}): install "
            "steppe[cuda13], or leave JAX_PLATFORMS unset"
        )
    _joined = found
    return found


def requeued(config: Any, environ: Mapping[str, str] = os.environ) -> Any:
    """The settings with ``resume`` where a job that may be started again finds its run begun.

    Rendered jobs set ``STEPPE_REQUEUE=1``, so that their command is the same every time.
    """
    import dataclasses

    begun = (Path(config.run) / "config.json").is_file()
    wanted = environ.get("STEPPE_REQUEUE") == "1" and begun and not config.resume
    return dataclasses.replace(config, resume=True) if wanted else config


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same everywhere: settings, versions, and this package's own source."""
    from steppe.launch import machine

    return {"config": dict(settings), "versions": machine.versions(), "code": sources()}


def sources() -> dict[str, str]:
    """File of this package -> short hash of its content."""
    root = Path(__file__).resolve().parents[2]
    rooms = ("models", "optim", "train", "data", "launch")
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        for room in rooms
        for file in sorted((root / room).rglob("*.py"))
    }


def agree(what: str, fields: Mapping[str, Any], *, timeout: float = 600.0) -> None:
    """Compares values with the first process by their hash; returns when all have been compared.

    Args:
      what: a name for it, used once.
      fields: JSON values.
      timeout: seconds to wait for a process.

    Raises:
      ValueError: they differ; says which rank and which field. Raised on the first rank and on
        those that differ.
      RuntimeError: a rank does not answer.
    """
    global _last_word
    if _joined is None:
        return
    from steppe.train.checkpoint import first_difference

    client = _client()
    text = json.dumps(fields, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    own = _joined.index
    client.key_value_set(f"steppe/{what}/fields/{own}", text)
    client.key_value_set(f"steppe/{what}/hash/{own}", digest)

    def read(kind: str, rank: int) -> str:
        try:
            return str(
                client.blocking_key_value_get(f"steppe/{what}/{kind}/{rank}", int(timeout * 1000))
            )
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise  # the connection is gone
            raise RuntimeError(
                f"rank {rank} has not said its {what} within {timeout:.0f} s: look at its output"
            ) from error

    others = range(1, _joined.count) if own == 0 else (0,)
    wrong = [rank for rank in others if read("hash", rank) != digest]
    if not wrong:
        return
    rank = wrong[0] if own == 0 else own
    theirs = json.loads(read("fields", rank) if own == 0 else text)
    first = json.loads(text if own == 0 else read("fields", 0))
    if own == 0:  # jax aborts the others when this process ends: let them speak first
        timeout = 10.0
        with contextlib.suppress(RuntimeError):
            for other in wrong:
                read("read", other)
    else:
        _last_word = f"steppe/{what}/read/{own}"
    field, here, there = first_difference(theirs, first) or (what, "?", "?")
    more = f" (and {len(wrong) - 1} more ranks differ)" if len(wrong) > 1 else ""
    raise ValueError(
        f"rank {rank} disagrees with rank 0 on {field}: {here!r}, on rank 0 {there!r}{more}; "
        f"{_cure(field)}"
    )


def lost(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    if _joined is None:
        return False
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) and bool(_LOST.search(str(error)))


def name() -> str:
    """``rank 1 of 2: `` for a message; empty where this process is alone."""
    return "" if _joined is None else f"rank {_joined.index} of {_joined.count}: "


def leave(status: int) -> None:
    """Takes leave of the others; returns where the run is complete, else ends this process.

    A plain exit would wait at a barrier for the others, which wait in turn for this process in
    the middle of a step. Runs that ended as planned do wait: the first process, which the
    others depend on, must not be gone before them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status not in (0, codes.REQUEUE):
        if _last_word is not None:
            with contextlib.suppress(RuntimeError):
                _client().key_value_set(_last_word, "said")
        os._exit(status)
    if status:  # saved already: nothing is lost by not waiting for long
        timer = threading.Timer(20.0, os._exit, (status,))
        timer.daemon = True
        timer.start()
    import jax

    try:
        jax.distributed.shutdown()
    except RuntimeError as error:
        print(f"steppe: {name()}at the end: {error}", file=sys.stderr, flush=True)
        status = status or codes.LOST
    if status:
        os._exit(status)


def _cure(field: str) -> str:
    if field.startswith("config"):
        return "start every rank with the same command"
    if field.startswith(("code", "versions")):
        return "install the same versions on every host"
    return "every rank must see the same data, model and devices"


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """GPUs of this process. jax gives each task of SLURM one, also where a node has one task."""
    given = environ.get(LOCAL)
    if given:
        if not re.fullmatch(r"\d+(,\d+)*", given):
            raise ValueError(f"{LOCAL} must be numbers such as 0,1, got {given!r}")
        return tuple(int(part) for part in given.split(","))
    tasks, nodes = environ.get("SLURM_NTASKS"), environ.get("SLURM_STEP_NUM_NODES")
    if tasks is not None and tasks == nodes:
        return tuple(range(_integer(environ, "SLURM_GPUS_ON_NODE", 1)))
    return None


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _unreachable(cluster: Cluster, limit: int) -> None:
    """Ends the process: jax's connect cannot be interrupted, and aborts without the address."""
    host, port = cluster.address.rsplit(":", 1)
    if cluster.index == 0:
        why = f"not all of the {cluster.count} processes have joined"
    else:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                why = f"it answers, but not all of the {cluster.count} processes have joined"
        except OSError as error:
            why = f"it cannot be reached ({error.strerror or error})"
    print(
        f"steppe: error: rank {cluster.index} of {cluster.count}: coordinator {cluster.address}: "
        f"{why} within {limit} s. Start all processes, let port {port} of process 0's host "
        f"through, or set {COORDINATOR} and {TIMEOUT}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(codes.LOST)
