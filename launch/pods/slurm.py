"""An sbatch script: one srun step, whose ranks jax finds by SLURM's own variables.

SIGTERM reaches the ranks ``grace`` seconds before the time is over or the job is preempted;
they save and end with 75, and the script puts the job back into the queue. The same goes for
ranks that were killed, that lost another, or that the watchdog ended; any other failure, such as
a wrong setting, ends the job with its own status. srun kills the other ranks when one fails and
tells the highest status alone, that of the killed: so every rank that fails leaves its own in a
file beside the log.
"""

from __future__ import annotations

import math
import shlex

from steppe.launch.pods import codes
from steppe.launch.pods.job import AGAIN, JobSpec


def render(spec: JobSpec) -> str:
    """The script."""
    kind, gpus = spec.gpus
    minutes = math.ceil(60 * spec.hours)
    options = {
        "job-name": spec.name,
        "nodes": spec.machines,
        "ntasks-per-node": spec.processes,
        "gpus-per-node": f"{kind}:{gpus}" if gpus else "",
        "cpus-per-task": max(1, spec.cpus // spec.processes) if spec.cpus else "",
        "mem": f"{spec.memory_gib}G" if spec.memory_gib else "",
        "time": f"{minutes // 60}:{minutes % 60:02d}:00",
        "signal": f"TERM@{spec.grace}" if spec.grace else "",
        "partition": spec.partition,
        "account": spec.account,
        "qos": spec.qos,
        "output": spec.output,
        "open-mode": "append",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={value}" for name, value in options.items() if value != ""]
    lines += ["#SBATCH --requeue", "", "set -e", *spec.preamble(), "set +e", ""]
    # srun does not take this from sbatch.
    cpus = f"--cpus-per-task={options['cpus-per-task']} " if spec.cpus else ""
    statuses = "|".join(map(str, AGAIN))
    # A shell between: it waits for its rank to save on SIGTERM, which "trap :" does not pass on.
    rank = 'trap : TERM; "$@"; s=$?; [ $s -eq 0 ] || echo $s >> "$0"; exit $s'
    lines += ["ends=$PWD/.steppe-${SLURM_JOB_ID:-0}.${SLURM_RESTART_COUNT:-0}", 'rm -f "$ends"']
    lines += [
        "# srun would kill the ranks on a SIGTERM of its own: they are to save first.",
        "trap 'scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
        f'srun --kill-on-bad-exit=1 {cpus}bash -c {shlex.quote(rank)} "$ends" {spec.line()} &',
        "step=$!",
        'wait "$step"; status=$?',
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done',
        "",
        f"again() {{ case $1 in {statuses}) true ;; {codes.INTERRUPTED}) false ;; "
        '*) [ "$1" -gt 128 ] ;; esac; }',
        'for own in $(cat "$ends" 2>/dev/null); do again "$own" || status=$own; done',
        'rm -f "$ends"',
        'if again "$status"; then again=1; else again=0; fi',
        f'if [ "$again" -eq 1 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {spec.restarts} ]; then',
        '  echo "steppe: the ranks ended with $status: back into the queue"',
        '  scontrol requeue "$SLURM_JOB_ID" && sleep 60  # this script ends here',
        "fi",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"
