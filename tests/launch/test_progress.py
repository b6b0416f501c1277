"""The progress display: live on a terminal, plain lines elsewhere, silent on other processes."""

import io

import pytest
from rich.console import Console

from steppe.launch.progress import Progress

ROW = {"loss": 0.34567, "accuracy": 0.875, "grad_norm": 2.0, "tokens_per_s": 6412.3}


class Clock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=40), out


def terminal() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=120), out


def test_plain_lines_come_at_intervals_and_at_the_end():
    console, out = plain()
    clock = Clock()
    with Progress(100, console, interval=10.0, process_index=0, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.5
            progress.write(step, "train", ROW)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/100",
        "step 21/100",
        "step 41/100",
        "step 61/100",
        "step 81/100",
        "step 100/100",
    ]
    assert lines[1] == "step 21/100  loss 0.3457  accuracy 0.8750  6,412 tokens/s  0:40 left"
    assert "left" not in lines[-1]
    assert "\x1b" not in out.getvalue()


def test_the_estimate_leaves_the_compile_out():
    console, out = plain()
    clock = Clock()
    with Progress(1000, console, interval=0, process_index=0, clock=clock) as progress:
        progress.write(1, "train", ROW)
        for seconds, step in ((60.0, 2), (2.0, 12)):
            clock.now += seconds
            progress.write(step, "train", ROW)
    assert "left" not in out.getvalue().splitlines()[1]
    assert out.getvalue().splitlines()[2].endswith("3:18 left")


def test_evaluations_are_always_said():
    console, out = plain()
    with Progress(10, console, process_index=0) as progress:
        progress.write(5, "eval", {"split": "valid", "loss": 0.5, "f1": 0.75})
        progress.write(5, "eval", {"loss": 0.5, "pearson": -0.25})
    assert out.getvalue() == (
        "step 5 valid: loss 0.5000  f1 0.7500\nstep 5 evaluation: loss 0.5000  pearson -0.2500\n"
    )


def test_a_loss_that_is_not_finite_is_said():
    console, out = plain()
    with Progress(10, console, process_index=0) as progress:
        progress.write(1, "train", {"loss": float("nan"), "accuracy": None})
    assert out.getvalue() == "step 1/10  loss not finite\n"


def test_terminal_shows_a_live_line_and_leaves_the_cursor_visible():
    console, out = terminal()
    with Progress(200, console, process_index=0) as progress:
        progress.write(100, "train", ROW)
        progress.event("saved checkpoint [100]")
        progress.write(200, "train", ROW)
    text = out.getvalue()
    assert "200/200" in text
    assert "loss 0.3457  accuracy 0.8750  6,412 tokens/s" in text
    assert "saved checkpoint [100]" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert text.rindex("\x1b[?25h") > text.rindex("200/200")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_passes_and_ends_the_display(error):
    console, out = terminal()
    progress = Progress(10, console, process_index=0)

    def body():
        with progress:
            progress.write(3, "train", ROW)
            raise error("stop")

    with pytest.raises(error, match="stop"):
        body()
    assert out.getvalue().count("\x1b[?25h") == 1
    assert out.getvalue().endswith("\n\x1b[?25h")
    progress.close()
    assert out.getvalue().count("\x1b[?25h") == 1


def test_other_processes_say_nothing():
    console, out = terminal()
    with Progress(10, console, process_index=1) as progress:
        progress.write(1, "train", ROW)
        progress.write(1, "eval", ROW)
        progress.event("saved")
        progress.truncate(3)
    assert out.getvalue() == ""


def test_a_resumed_run_starts_where_it_was():
    console, out = terminal()
    with Progress(10, console, process_index=0) as progress:
        progress.truncate(7)
    assert "7/10" in out.getvalue()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"total_steps must be >= 1, got 0"):
        Progress(0, process_index=0)
    with pytest.raises(ValueError, match=r"interval must be >= 0 seconds, got -1"):
        Progress(1, interval=-1, process_index=0)
