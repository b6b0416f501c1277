"""How far a run is: a live line on a terminal, a plain line now and then in a log file.

A :class:`Progress` is one of the loop's writers: the loop tells it the numbers of a step and
it shows them. Processes other than the first show nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Numbers of a row that are not metrics of the model.
_NOT_METRICS = (
    "loss",
    "grad_norm",
    "learning_rate",
    "step_time",
    "tokens_per_s",
    "input_wait",
    "device_wait",
    "flops_per_s",
    "mfu",
    "memory",
    "memory_peak",
    "compile_time",
    "eval_time",
    "save_time",
)
_PREFERRED = ("accuracy", "f1", "entity_f1", "pearson", "perplexity", "exact")


class Progress:
    """Shows step, loss, metric, tokens per second and the time that is left.

    Use it as a context manager around the loop; it leaves the terminal in order however the
    block ends, and never swallows an exception.
    """

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        *,
        interval: float = 10.0,
        process_index: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
          total_steps: number of the last step.
          console: where to show it; stderr when None. What is not a terminal gets plain lines.
          interval: least seconds between two plain lines.
          process_index: of this process; asked of jax when None. Only 0 shows anything.
          clock: seconds from any origin.

        Raises:
          ValueError: total_steps < 1 or interval < 0.
        """
        if total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {total_steps}")
        if interval < 0:
            raise ValueError(f"interval must be >= 0 seconds, got {interval}")
        if process_index is None:
            import jax

            process_index = jax.process_index()
        self.total_steps = total_steps
        self.console: Console | None = None
        if process_index == 0:
            from rich.console import Console

            self.console = console if console is not None else Console(stderr=True)
        self._interval = interval
        self._clock = clock
        self._live: Any = None
        self._task: Any = None
        self._step = 0
        self._per_step = math.nan  # seconds, moving average
        self._seen: tuple[float, int] | None = None  # time and step of the row before
        self._rows = 0
        self._logged = -math.inf

    def __enter__(self) -> Progress:
        if self.console is not None and self.console.is_terminal and self._live is None:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live

            self._live = Live(
                BarColumn(24, complete_style="green", finished_style="green"),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._live.add_task("", total=self.total_steps, status="compiling")
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Shows the numbers of one step; kind is ``"train"``, ``"eval"``, ``"slow"`` or
        ``"rollback"``."""
        if self.console is None:
            return
        if kind == "slow":
            took, usual = values["step_time"], values["median"]
            self.say(f"step {step:,} took {took:.2f} s, the median is {usual:.3f} s")
            return
        if kind == "rollback":
            self.say(
                f"step {values['bad_step']:,} went wrong: back to step {values['anchor']:,}, "
                f"{values['skipped']:,} batches are skipped (rollback {values['rollback']})"
            )
            return
        if kind != "train":
            self.say(f"step {step:,} {_split(values)}: {_numbers(values)}")
            return
        now = self._clock()
        self._estimate(now, step)
        self._step = step
        status = self._status(values)
        if self._live is not None:
            self._live.update(self._task, completed=step, status=status)
        elif now - self._logged >= self._interval or step >= self.total_steps:
            self._logged = now
            self.say(f"step {step:,}/{self.total_steps:,}  {status}")

    def event(self, text: str) -> None:
        """Shows a sentence about the run (saved, resumed, stopped) above the live line."""
        self.say(text)

    def say(self, text: str) -> None:
        """Prints one plain line; nothing on other processes."""
        if self.console is not None:
            # soft_wrap: a log file has no width, a line there must stay a line.
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def truncate(self, step: int) -> None:
        """The run goes on from ``step``."""
        self._step, self._seen, self._rows, self._per_step = step, None, 0, math.nan
        if self._live is not None:
            self._live.update(self._task, completed=step, status="compiling")

    def close(self) -> None:
        """Ends the display and leaves its last state; may be called twice."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def _estimate(self, now: float, step: int) -> None:
        """Seconds a step, from the times between rows; the first rows compile and are left out."""
        self._rows += 1
        if self._seen is not None and step > self._seen[1] and self._rows > 2:
            latest = (now - self._seen[0]) / (step - self._seen[1])
            old = self._per_step
            self._per_step = latest if math.isnan(old) else 0.9 * old + 0.1 * latest
        self._seen = (now, step)

    def _status(self, values: Mapping[str, Any]) -> str:
        parts = [_numbers(values)]
        speed, share = values.get("tokens_per_s"), values.get("mfu")
        if _finite(speed):
            parts.append(f"{speed:,.0f} tokens/s")
        if _finite(share):
            parts.append(f"MFU {share:.1%}")
        left = self._per_step * (self.total_steps - self._step)
        if math.isfinite(left) and self._step < self.total_steps:
            parts.append(f"{_duration(left)} left")
        return "  ".join(part for part in parts if part)


def _numbers(values: Mapping[str, Any]) -> str:
    """The loss and the main metric."""
    names = [name for name in values if name not in _NOT_METRICS and _finite(values[name])]
    main = [name for name in _PREFERRED if name in names] or names
    parts = [f"loss {values['loss']:.4f}"] if _finite(values.get("loss")) else []
    if "loss" in values and not parts:
        parts = ["loss not finite"]
    parts += [f"{name} {values[name]:.4f}" for name in main[:1]]
    return "  ".join(parts)


def _split(values: Mapping[str, Any]) -> str:
    return str(values.get("split", "evaluation"))


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _duration(seconds: float) -> str:
    whole = max(round(seconds), 0)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Line:
    """A live line about one piece of work after the other; plain lines where there is no terminal.

    Use it as a context manager around the work.
    """

    def __init__(self, first: str = "", *, name: str = "", every: float = 0.0) -> None:
        """
        Args:
          first: what is shown before anything was told.
          name: put before everything that is told.
          every: plain lines only when another kind of work begins (its first word), and after so
            many seconds; 0 = whenever the text changes.
        """
        from rich.console import Console

        self._console = Console(stderr=True)
        self._first, self._name, self._every = first, name, every
        self._live: Any = None
        self._task: Any = None
        self._said, self._when = "", 0.0

    def __enter__(self) -> Line:
        if self._console.is_terminal:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._live = Bar(
                BarColumn(24, complete_style="green", finished_style="green"),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=self._console,
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._live.add_task(self._first, total=1)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        """Shows what is going on, and how far it is."""
        text = f"{self._name}: {what}" if self._name else what
        if self._live is not None:
            self._live.update(self._task, description=text, completed=done, total=total)
            return
        now = time.monotonic()
        kind = what.split(",")[0].split(" ")[0] if self._every else text
        if kind != self._said or (self._every and now - self._when > self._every):
            self._said, self._when = kind, now
            place = f"{done}/{total} " if self._every and done else ""
            self._console.print(f"{place}{text}", highlight=False, markup=False, soft_wrap=True)
