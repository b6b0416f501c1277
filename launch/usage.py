"""What ``steppe --help`` shows: the commands and the recipes, wrapped to the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from steppe.launch import prose

COMMANDS = (
    ("tour", "all of it on real tasks: flat, merged, distilled, quantized, with a page"),
    ("finetune [RECIPE]", "fine-tune a pretrained model, evaluate, report, export"),
    ("distill [RECIPE]", "a student learns from a teacher, evaluate both, report, export"),
    ("quantize MODEL", "a model as integers by several methods, with what each costs"),
    (
        "compare [RECIPE]",
        "sharpness methods or overlays x seeds x sizes x sources, or merging methods x seeds: one "
        "table with a paired test",
    ),
    ("merge METHOD BASE MODEL ...", "several fine-tunes of one base as one model, with a table"),
    ("blackbox", "a prompt for a frozen model from forward passes alone (BBT, BBTv2)"),
    (
        "continual",
        "several tasks one after the other: sequential LoRA, O-LoRA, replay, and what is left of "
        "each task",
    ),
    ("evaluate MODEL", "evaluate a run or an exported model on any data"),
    ("generate MODEL", "texts for one prompt or a file of them"),
    ("chat MODEL", "talk to a model"),
    ("assets", "list, fetch or check real models and data sets"),
    ("report RUN", "write the report of a run folder again"),
    (
        "plan MODEL|RECIPE --on v5p-128",
        "memory, collectives and time of a step on devices that are not here",
    ),
    ("sharpness RUN", "how sharp the loss is around a run's model, drawn and in numbers"),
    ("overlays list", "the parameter-efficient methods of finetune --overlay"),
    ("launch OPTIONS COMMAND ...", "finetune or distill as several processes of this host"),
    (
        "submit --to WHERE -- COMMAND ...",
        "the job for slurm, jobset, tpu-vm, skypilot or xpk; --apply hands it in",
    ),
    ("papers [NAME]", "the systems that steppe implements"),
    ("doctor", "what this machine has, what will not work on it, and the cure"),
    ("completion SHELL", "a script that completes commands and options in bash, zsh or fish"),
    ("bench NAME", "benchmarks: finetune, sharpness, merge, distill, generate, ..."),
    ("--version", "print the versions that matter"),
)
# Columns of the commands; a longer one has a line of its own.
LEFT = 22


def show(recipes: Mapping[str, Iterable[str]]) -> str:
    """The whole text.

    Args:
      recipes: names of the recipes, by command.
    """
    lines = ["usage: steppe COMMAND [options]      (steppe COMMAND --help lists the options)", ""]
    for command, what in COMMANDS:
        first = f"  {command}".ljust(LEFT)
        if len(first) > LEFT:
            lines.append(first)
            first = " " * LEFT
        lines.append(prose.fill(what, first))
    lines += ["", "recipes"]
    for command, names in recipes.items():
        lines.append(prose.fill(", ".join(names), f"  {command}".ljust(LEFT)))
    return "\n".join(lines)
