"""What a job is, whoever runs it: the command, the machines, and how often it may start again."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from typing import Literal, get_args

from steppe.launch.pods import codes, slices

Target = Literal["slurm", "jobset", "tpu-vm", "skypilot", "xpk"]
TARGETS: tuple[str, ...] = get_args(Target)
COMMANDS = ("finetune", "distill")
PORT = 8476
YEAR = 8760
CACHE = "JAX_COMPILATION_CACHE_DIR"
AGAIN = (codes.LOST, codes.REQUEUE, codes.HUNG)
# Names of GPUs: SLURM's gres, SkyPilot's accelerators and device types have them alike.
_GPU = re.compile(r"([A-Za-z][\w.-]*):(\d+)")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_WORD = re.compile(r"[\w@%+=:,./-]*")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class JobSpec:
    """One job. Words in brackets name the targets that a setting is for; others refuse it.

    Attributes:
      command: words of ``steppe``: finetune or distill, a recipe, and settings. Its run folder
        must lie on storage that all nodes share.
      name: of the job; small letters, digits and dashes.
      nodes: machines; for a TPU slice they follow from it (0).
      processes: ranks a node [slurm]; the others start one.
      accelerator: of a node: ``h100:8``; a whole TPU slice: ``v5p-128``; empty = none.
      cpus, memory_gib: of a node; 0 = what the target gives.
      hours: longest time of one start [slurm]; a run that needs more is started again.
      restarts: how often the job may start again after preemption, a hang, or a lost node.
      grace: seconds between SIGTERM and the end, for the last checkpoint.
      program: what runs ``steppe`` on a node, as a shell would have it.
      setup: shell lines before it, such as ``source /shared/venv/bin/activate``.
      workdir: directory of the command on the nodes; empty = where the job starts.
      env: ``NAME=VALUE`` for the command.
      programs: folder that all nodes share, for what XLA has compiled: a start after the first
        finds its programs there. For accelerators.
      image: container image [jobset, xpk, skypilot].
      spot: machines that may be taken back at any time [tpu-vm, skypilot, jobset].
      partition, account, qos: [slurm].
      output: file of the job's log [slurm].
      namespace, queue, priority: of Kubernetes; queue and priority are Kueue's [jobset, xpk].
      volume: ``CLAIM:PATH``, shared storage [jobset].
      project, zone: of Google Cloud [tpu-vm, xpk, skypilot].
      runtime: image of the TPU VM; empty = the one that fits [tpu-vm].
      cluster: of xpk [xpk].
    """

    command: tuple[str, ...]
    name: str = "steppe"
    nodes: int = 0
    processes: int = 1
    accelerator: str = ""
    cpus: int = 0
    memory_gib: int = 0
    hours: float = 24.0
    restarts: int = 10
    grace: int = 120
    program: str = "steppe"
    setup: tuple[str, ...] = ()
    workdir: str = ""
    env: tuple[str, ...] = ()
    programs: str = ""
    image: str = ""
    spot: bool = False
    partition: str = ""
    account: str = ""
    qos: str = ""
    output: str = "%x-%j.log"
    namespace: str = "default"
    queue: str = ""
    priority: str = ""
    volume: str = ""
    project: str = ""
    zone: str = ""
    runtime: str = ""
    cluster: str = ""

    def __post_init__(self) -> None:
        if not self.command or self.command[0] not in COMMANDS:
            what = repr(self.command[0]) if self.command else "nothing"
            raise ValueError(f"command must begin with {' or '.join(COMMANDS)}, got {what}")
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name={self.name!r} must be up to 40 small letters, digits and dashes, a letter "
                "first: Kubernetes takes no other"
            )
        for field, least in (("processes", 1), ("nodes", 0), ("cpus", 0), ("memory_gib", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be >= {least}, got {getattr(self, field)}")
        if self.restarts < 0 or self.grace < 0:
            raise ValueError(
                f"restarts and grace must be >= 0, got {self.restarts} and {self.grace}"
            )
        if not 0 < self.hours <= YEAR:
            raise ValueError(f"hours must be > 0 and at most {YEAR} (a year), got {self.hours}")
        for field, most in (("cpus", 4096), ("memory_gib", 65536), ("nodes", 100_000)):
            if getattr(self, field) > most:
                raise ValueError(f"{field} must be at most {most}, got {getattr(self, field)}")
        if self.cpus and self.cpus % self.processes:
            raise ValueError(
                f"cpus={self.cpus} cannot be shared by processes={self.processes} equally; "
                "give a multiple"
            )
        if self.grace >= 3600 * self.hours:
            raise ValueError(
                f"grace={self.grace} s leaves nothing of hours={self.hours}: the job would be "
                "told to stop when it starts"
            )
        for setting in self.env:
            name, equals, _ = setting.partition("=")
            if not equals or not _VARIABLE.fullmatch(name):
                raise ValueError(f"env must hold NAME=VALUE, got {setting!r}")
        if self.programs and not self.accelerator:
            raise ValueError(
                "programs is for accelerators: on a CPU with several devices a program that was "
                "compiled before may start its collectives in another order on each, and hang"
            )
        if self.programs and any(e.startswith(f"{CACHE}=") for e in self.env):
            raise ValueError(f"programs and env {CACHE} say the same: give one of them")
        words = ("partition", "account", "qos", "output", "namespace", "queue", "priority")
        for field in (*words, "image", "project", "zone", "runtime", "cluster"):
            if not _WORD.fullmatch(getattr(self, field)):
                raise ValueError(f"{field}={getattr(self, field)!r} must be one plain word")
        if self.volume and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*:/[^\s:]*", self.volume):
            raise ValueError(f"volume={self.volume!r} must be CLAIM:/PATH")
        self._check_machines()

    def _check_machines(self) -> None:
        if self.slice is not None:
            if self.nodes not in (0, self.slice.hosts):
                raise ValueError(
                    f"nodes={self.nodes}, but {self.accelerator} is {self.slice.hosts} hosts of "
                    f"{self.slice.chips // self.slice.hosts} chips: leave nodes out"
                )
            if self.processes != 1:
                raise ValueError(f"processes={self.processes}: a TPU host runs one process")
            return
        if not self.accelerator:
            return
        _, count = self.gpus
        if not 1 <= count <= 16:
            raise ValueError(f"accelerator={self.accelerator!r}: a node has 1 to 16 GPUs")
        if count % self.processes:
            raise ValueError(
                f"processes={self.processes} cannot share the {count} GPUs of a node evenly"
            )

    @property
    def slice(self) -> slices.Slice | None:
        """The TPU slice; None for other machines."""
        return slices.parse(self.accelerator) if slices.is_slice(self.accelerator) else None

    @property
    def gpus(self) -> tuple[str, int]:
        """Kind and number of GPUs a node; ("", 0) without.

        Raises:
          ValueError: accelerator is neither of the form h100:8 nor a TPU slice.
        """
        if not self.accelerator or self.slice is not None:
            return "", 0
        found = _GPU.fullmatch(self.accelerator)
        if found is None:
            raise ValueError(
                f"accelerator={self.accelerator!r} must be GPUs of a node such as h100:8, or a "
                "TPU slice such as v5p-128"
            )
        return found[1], int(found[2])

    @property
    def machines(self) -> int:
        """Number of nodes."""
        return self.slice.hosts if self.slice is not None else max(self.nodes, 1)

    @property
    def devices(self) -> int | None:
        """Devices that jax will have; None on CPUs, where flags decide."""
        if self.slice is not None:
            return self.slice.chips
        count = self.gpus[1]
        return count * self.machines if count else None

    def line(self) -> str:
        """The command of a rank as one line for a shell."""
        return f"{self.program} {shlex.join(self.command)}"

    def preamble(self) -> list[str]:
        """Shell lines before it: the directory, what was asked for, the environment."""
        lines = [f"cd {shlex.quote(self.workdir)}"] if self.workdir else []
        lines += list(self.setup)
        lines += ["export STEPPE_REQUEUE=1"]
        cache = (f"{CACHE}={self.programs}",) if self.programs else ()
        for setting in (*cache, *self.env):
            name, _, value = setting.partition("=")
            lines.append(f"export {name}={shlex.quote(value)}")
        return lines


def check(spec: JobSpec, target: str) -> None:
    """
    Raises:
      ValueError: the target does not exist, needs a setting that is missing, or would ignore
        one that is given.
    """
    if target not in TARGETS:
        raise ValueError(f"to must be one of {', '.join(TARGETS)}, got {target!r}")
    needs = {
        "jobset": ("image",),
        "tpu-vm": ("zone",),
        "xpk": ("cluster", "image", "zone"),
    }.get(target, ())
    for field in needs:
        if not getattr(spec, field):
            raise ValueError(f"{target} needs --{field}")
    if target == "slurm" and spec.slice is not None:
        raise ValueError(f"slurm has no TPU slices, got accelerator={spec.accelerator!r}")
    if target == "tpu-vm" and spec.slice is None:
        raise ValueError(
            f"tpu-vm needs a TPU slice such as v5p-128, got accelerator={spec.accelerator!r}"
        )
    if target == "xpk" and not spec.accelerator:
        raise ValueError("xpk needs --accelerator, a TPU slice such as v5p-128 or GPUs: h100:8")
    if target != "slurm" and spec.processes != 1:
        raise ValueError(
            f"{target} starts one process a node, which drives all its devices; "
            f"got processes={spec.processes}"
        )
    of = {
        "partition": ("slurm",),
        "account": ("slurm",),
        "qos": ("slurm",),
        "queue": ("jobset",),
        "priority": ("jobset", "xpk"),
        "volume": ("jobset",),
        "image": ("jobset", "xpk", "skypilot"),
        "spot": ("tpu-vm", "skypilot", "jobset"),
        "project": ("tpu-vm", "xpk"),
        "zone": ("tpu-vm", "xpk", "skypilot"),
        "runtime": ("tpu-vm",),
        "cluster": ("xpk",),
        "cpus": ("slurm", "jobset", "skypilot"),
        "memory_gib": ("slurm", "jobset", "skypilot"),
    }
    plain = {f.name: f.default for f in dataclasses.fields(spec)}
    for field, targets in of.items():
        if getattr(spec, field) != plain[field] and target not in targets:
            raise ValueError(f"--{field} is for {', '.join(targets)}; {target} would ignore it")
