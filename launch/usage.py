"""What ``steppe --help`` shows: the commands, wrapped to the terminal."""

from __future__ import annotations

from steppe.launch import prose

COMMANDS = (
    ("tour", "all of it on real tasks: flat, merged, distilled, quantized, with a page"),
    ("finetune [RECIPE]", "fine-tune a pretrained model, evaluate, report, export"),
    ("distill [RECIPE]", "a student learns from a teacher, evaluate both, report, export"),
    ("quantize MODEL", "a model as integers by several methods, with what each costs"),
    (
        "compare [RECIPE]",
        "methods x seeds x sizes x sources: one table with a paired test",
    ),
    ("merge METHOD BASE MODEL ...", "several fine-tunes of one base as one model, with a table"),
    ("blackbox", "a prompt for a frozen model from forward passes alone (BBT, BBTv2)"),
    (
        "continual",
        "tasks one after the other: sequential LoRA, O-LoRA, replay",
    ),
    ("evaluate MODEL", "evaluate a run or an exported model on any data"),
    ("generate MODEL", "texts for one prompt or a file of them"),
    ("chat MODEL", "talk to a model"),
    ("assets", "list, fetch or check real models and data sets"),
    ("report RUN", "write the report of a run folder again"),
    (
        "plan MODEL|RECIPE --on v5p-128",
        "memory and time of a step on devices that are not here",
    ),
    ("sharpness RUN", "how sharp the loss is around a run's model, drawn and in numbers"),
    ("overlays list", "the parameter-efficient methods of finetune --overlay"),
    ("launch OPTIONS COMMAND ...", "finetune or distill as several processes of this host"),
    (
        "submit --to WHERE -- COMMAND ...",
        "the job for slurm, jobset, tpu-vm, skypilot or xpk",
    ),
    ("papers [NAME]", "the systems that steppe implements"),
    ("doctor", "what this machine has, what will not work on it, and the cure"),
    ("completion SHELL", "a script that completes commands and options in bash, zsh or fish"),
    ("bench NAME", "benchmarks: finetune, sharpness, merge, distill, generate, ..."),
    ("--version", "print the versions that matter"),
)
# Columns of the commands; a longer one has a line of its own.
LEFT = 22


def show() -> str:
    """The whole text."""
    lines = ["usage: steppe COMMAND [options]      (steppe COMMAND --help lists the options)", ""]
    for command, what in COMMANDS:
        first = f"  {command}".ljust(LEFT)
        if len(first) > LEFT:
            lines.append(first)
            first = " " * LEFT
        lines.append(prose.fill(what, first))
    return "\n".join(lines)
