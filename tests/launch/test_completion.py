"""What the shell is told: words of the command line as it is, and scripts that shells accept."""

import os
import shutil
import subprocess
import sys

import pytest

from steppe.launch import cli, completion

COMMANDS = ("finetune", "merge", "assets")


@pytest.mark.parametrize(
    ("words", "some"),
    [
        ([""], ["finetune", "merge", "assets", "--help", "--version"]),
        (["m"], ["merge"]),
        (["finetune", "vader-mo"], ["vader-movies"]),
        (["finetune", "--sharpness", "fs"], ["fsam"]),
        (["finetune", "vader-movies", "--data.so"], ["--data.source"]),
        (["finetune", "--no-res"], ["--no-resume"]),
        (["quantize", "RUN", "--method", "rtn", "gp"], ["gptq"]),
        (["merge", "ti"], ["ties"]),
        (["assets", "fetch", "vader", "minilm-l3", "minilm-l6"], ["minilm-l6"]),
        (["papers", "fsa"], ["fsam"]),
        (["bench", "sharp"], ["sharpness"]),
        (["plan", "llama-7"], ["llama-70b", "llama-7b"]),
        (["plan", "llama-70b", "--on", "v5"], ["v5e", "v5p"]),
        (["finetune", "--overlay", "prefix", "lo"], ["lora", "loramoe"]),
        (["finetune", "--overlay", "lora:r"], ["lora:rank=", "lora:rank_stabilised="]),
        (["finetune", "--overlay", "ia3", "lpt:layer=2,ki"], ["lpt:layer=2,kind="]),
        (["finetune", "--overlay", "lora:rank=8,ran"], ["lora:rank=8,rank_stabilised="]),
        (["finetune", "--overlay", "none:r"], []),
        (["launch", "--loc"], ["--local-processes"]),
        (["launch", "--local-processes", "2", "--platform", ""], ["cpu", "gpu"]),
        (["launch", "--local-processes", "2", "--devices-per-process=4", "fi"], ["finetune"]),
        (["launch", "--grace", "5", "finetune", "vader-mo"], ["vader-movies"]),
        (["launch", "distill", "--sch"], ["--scheme"]),
        (["submit", "--to", "job"], ["jobset"]),
        (["submit", "--to", "slurm", "--acc"], ["--accelerator"]),
        (["submit", "--to", "slurm", "--", "di"], ["distill"]),
        (["submit", "--to", "slurm", "--", "finetune", "--sharpness", "fs"], ["fsam"]),
        (["finetune", "--sharpness=fs"], ["--sharpness=fsam"]),
        (["finetune", "--model", "asset:minilm-l3"], ["asset:minilm-l3"]),
        (["finetune", "--model=ass"], ["--model=asset:minilm-l6", "--model=asset:smollm2"]),
        (["finetune", "--data.source", "asset:vader/m"], ["asset:vader/movies"]),
        (["tour", "--tasks", "asset:sarcasm", "asset:vader/tw"], ["asset:vader/tweets"]),
        (["merge", "average", "asset:minilm-l6"], ["asset:minilm-l6"]),
        (["chat", "asset:smol"], ["asset:smollm2"]),
        (["finetune", "--model", ""], []),
        (["finetune", "--out", "ass"], []),
        (["finetune", "--model", "a"], []),
        (["assets", "fetch", "--acc"], ["--accept-licence"]),
        (["compare", "merging", "--ta"], ["--tasks"]),
        (["bench", "few-shot", "--sh"], ["--shots"]),
        (["evaluate", "runs/"], []),
        (["finetune", "--out", "runs/"], []),
        (["nothing", "x"], []),
    ],
)
def test_words(words, some):
    found = completion.candidates(words, COMMANDS)
    assert found == some or (len(words) > 1 and some and set(some) <= set(found))


def test_every_command_with_options_has_its_settings():
    for command in completion.OPTIONS:
        assert completion._options(command), command


def test_from_the_command_line(capsys):
    assert cli.main(["completion", "--words", "compl"]) == 0
    assert capsys.readouterr().out.split() == ["completion"]
    assert cli.main(["completion"]) == 2
    assert cli.main(["completion", "--help"]) == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_are_of_their_shell(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "steppe completion --words" in script
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("steppe chat asset:smol", ["smollm2"]),
        ("steppe finetune --sharpness=fs", ["fsam"]),
        ("steppe merge ti", ["ties"]),
        ("steppe finetune --overlay lora:rank=8,al", ["8,alpha="]),
    ],
)
@pytest.mark.parametrize("breaks", [":=", ""])
def test_bash_replaces_what_follows_its_own_ends_of_words(line, replies, breaks, tmp_path):
    if not breaks:  # a whole word is replaced
        word = line.split()[-1]
        kept = max(word.rfind(":"), word.rfind("=")) + 1
        replies = [word[:kept] + reply for reply in replies]
    program = tmp_path / "steppe"
    program.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m steppe.launch.cli "$@"\n', encoding="utf-8"
    )
    program.chmod(0o755)
    typed = f"COMP_WORDBREAKS=' {breaks}'; COMP_LINE='{line}'; COMP_POINT={len(line)}; _steppe; "
    script = completion.SCRIPTS["bash"] + typed + "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        text=True,
        capture_output=True,
    )
    assert done.stdout.split() == replies, done.stderr
