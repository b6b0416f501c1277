"""What the shell is told: words of the command line as it is, and scripts that shells accept."""

import shutil
import subprocess

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
        (["launch", "--loc"], ["--local-processes"]),
        (["launch", "--local-processes", "2", "--platform", ""], ["cpu", "gpu"]),
        (["launch", "--local-processes", "2", "--devices-per-process=4", "fi"], ["finetune"]),
        (["launch", "--grace", "5", "finetune", "vader-mo"], ["vader-movies"]),
        (["launch", "distill", "--sch"], ["--scheme"]),
        (["submit", "--to", "job"], ["jobset"]),
        (["submit", "--to", "slurm", "--acc"], ["--accelerator"]),
        (["submit", "--to", "slurm", "--", "di"], ["distill"]),
        (["submit", "--to", "slurm", "--", "finetune", "--sharpness", "fs"], ["fsam"]),
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
