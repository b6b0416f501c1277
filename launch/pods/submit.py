"""``steppe submit``: renders a job for a scheduler; hands it in only with ``--apply``."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steppe.launch.pods import cloud, codes, kubernetes, slurm
from steppe.launch.pods.job import COMMANDS, JobSpec, Target, check


@dataclass(frozen=True)
class SubmitConfig(JobSpec):
    """``steppe submit``: the job of a cluster for a command of ``steppe``, printed or handed in.

    What stands behind ``--`` is run: ``steppe submit --to slurm -- finetune vader-movies``. Words
    in brackets name the targets that an option is for; others refuse it.

    Attributes:
      to: who runs it.
      apply: hand the job in (sbatch, kubectl, bash, sky, xpk); without it the job is printed.
      file: also write what is printed there.
    """

    command: tuple[str, ...] = ("finetune",)
    to: Target = "slurm"
    apply: bool = False
    file: str = ""

    def spec(self, command: Sequence[str]) -> JobSpec:
        """The job of these settings with its command."""
        names = {f.name for f in dataclasses.fields(JobSpec)} - {"command"}
        return JobSpec(tuple(command), **{name: getattr(self, name) for name in names})


def main(args: Sequence[str]) -> int:
    """The command; returns 0, or the status of the tool that the job was handed to."""
    own, command = split(args)
    from steppe.launch import cli

    config = cli._parse(SubmitConfig, own, "submit", SubmitConfig())
    if not command:
        raise ValueError(
            "no command: steppe submit --to slurm [options] -- finetune RECIPE [settings]"
        )
    spec = config.spec(command)
    check(spec, config.to)
    check_command(spec)
    text = render(spec, config.to)
    if config.file:
        try:
            Path(config.file).write_text(text, "utf-8")
        except OSError as error:
            raise ValueError(
                f"file={config.file!r} cannot be written ({error.strerror}): give a file in a "
                "folder that exists and that you may write to"
            ) from error
    if not config.apply:
        sys.stdout.write(text)
        return 0
    return apply(spec, config.to, text)


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of the job, and the command behind ``--``.

    Raises:
      ValueError: a command without ``--`` before it: options of the two could be confused.
    """
    words = list(args)
    if "--" in words:
        place = words.index("--")
        return words[:place], words[place + 1 :]
    named = [word for word in words if word in COMMANDS]
    if named:
        raise ValueError(f"write -- before {named[0]}: steppe submit --to slurm -- {named[0]} ...")
    return words, []


def check_command(spec: JobSpec) -> None:
    """Reads the settings of the run as its ranks will, so that a mistake does not wait in a queue.

    Raises:
      ValueError: whatever is wrong with them; a batch or a mesh that does not fit the devices.
    """
    from steppe.launch import cli
    from steppe.launch.config import parse_mesh

    config = cli.settings(spec.command[0], list(spec.command[1:]))
    devices = spec.devices
    if devices is None:
        return
    axes = parse_mesh(config.mesh, devices)
    count = 1
    for size in axes.values():
        count *= size
    if count != devices:
        raise ValueError(
            f"mesh={config.mesh!r} is {count} devices, but {spec.machines} nodes of "
            f"{spec.accelerator} have {devices}"
        )
    if not config.mesh and config.batch_size % (devices * config.microbatches):
        raise ValueError(
            f"batch_size={config.batch_size} cannot be divided over {devices} devices x "
            f"microbatches={config.microbatches}: use a multiple of {devices * config.microbatches}"
        )


def render(spec: JobSpec, target: str) -> str:
    """The job for one target.

    Raises:
      ValueError: as ``job.check``.
    """
    check(spec, target)
    if target == "slurm":
        return slurm.render(spec)
    if target == "jobset":
        return kubernetes.render(spec)
    if target == "tpu-vm":
        return cloud.tpu_vm(spec)
    if target == "skypilot":
        return cloud.skypilot(spec)
    return shlex.join(cloud.xpk(spec)) + "\n"


# Target -> (program, its words around the file, suffix of the file, how to get it).
_TOOLS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "slurm": ("sbatch", (), ".sh", "log in to a node of the cluster"),
    "jobset": ("kubectl", ("create", "-f"), ".yaml", "install kubectl"),
    "tpu-vm": ("gcloud", (), ".sh", "install the Google Cloud SDK"),
    "skypilot": ("sky", ("jobs", "launch", "--yes"), ".yaml", "pip install skypilot"),
    "xpk": ("xpk", (), ".sh", "pip install xpk"),
}


def apply(spec: JobSpec, target: str, text: str) -> int:
    """Hands the job to its tool and returns the tool's status.

    Raises:
      ValueError: the tool is not installed.
    """
    program, words, suffix, cure = _TOOLS[target]
    if shutil.which(program) is None:
        raise ValueError(
            f"{target} needs {program}, which is not installed here: {cure}, or leave --apply "
            "out and take what is printed to where it is"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{spec.name}{suffix}"
        file.write_text(text, "utf-8")
        # The scripts of tpu-vm and xpk call the program themselves.
        start = ["bash"] if target in ("tpu-vm", "xpk") else [program, *words]
        status: Any = subprocess.run([*start, str(file)], check=False).returncode
    return int(status) if status in (0, *range(1, 256)) else codes.MISTAKE
