"""Adapting without labels, and noticing when it goes wrong.

Entropy can fall for two reasons: the merged model becomes right, or it answers one class
whatever it sees. Neither needs a label to be told apart: over a window of steps, with p(x) the
predicted probabilities,

  information_i = H(mean_x p(x)) - mean_x H(p(x))        nats, task i

is large where answers are certain and differ, and 0 where they are all the same (Bridle et al.,
NIPS 1991). A task has collapsed where exp(H(histogram of its answers)) - 1, the number of classes
that it still uses beside one, falls below a share of the largest number that it had: with two
classes, where the rarer one gets less than a seventh of the answers that were once divided
evenly. Then the run stops, and the state with the largest sum of informations is kept.

A collapse shows only beside answers that once differed. Where nearly all of the first answers
are of one class, the start may have collapsed, or the data may hold little else (a rare class,
a small batch): without labels the two look alike. So that is said, once there are enough
answers that a class with a tenth of the examples would have shown, but it stops nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from steppe.train.loop import NonFiniteLoss

# Batches of all tasks, drawn again and again: an iterator, or a function of the draw's number.
Data: TypeAlias = Iterator[Any] | Callable[[int], Any]
# (what phase, steps done, the state after them, the window just passed)
Watch: TypeAlias = Callable[[str, int, Any, "Window"], None]


# Batches by which a state is judged: the last ones before it. Over a whole window the drift of
# the states would look like answers that differ.
JUDGED = 5

# A start of one class is told by at least so many answers, of which less than this share is of
# other classes. With 66, a class with a tenth of the examples is missed once in a thousand times.
ANSWERS, STRAY = 66, 0.01


class Entropy(NamedTuple):
    """What an entropy function says of one batch a task.

    Attributes:
      total: scalar, nats, the sum over tasks: what is minimised.
      tasks: [N], nats, the mean over each task's examples.
      classes: for each task [C_i], the mean predicted probability of each class.
      answers: for each task [C_i], how many examples got this class.
    """

    total: jax.Array
    tasks: jax.Array
    classes: tuple[jax.Array, ...]
    answers: tuple[jax.Array, ...]


@dataclass(frozen=True)
class Guard:
    """When a run is watched, and when it is stopped.

    Attributes:
      window: steps over which answers are counted; also how often a state can be kept.
      share: a task has collapsed below this share of the classes that it once used, the first
        one apart, which is always there.
      stop: stop and keep the best state; False only warns (for parity with published runs).
    """

    window: int = 20
    share: float = 0.5
    stop: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window must be >= 1, got {self.window}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1), got {self.share}")


class Window(NamedTuple):
    """Means over some steps: the window just passed, or the last ``window`` steps where what is
    left at the end is shorter. A few answers use fewer classes than many.

    Attributes:
      step: steps done at its end.
      entropy: [N], nats.
      information: [N], nats; empty where the entropy function returns a scalar only.
      classes: [N], the number of classes in use.
    """

    step: int
    entropy: np.ndarray
    information: np.ndarray
    classes: np.ndarray


class Run(NamedTuple):
    """What :func:`run` gives back.

    Attributes:
      state: the state of step ``kept``.
      entropy: [steps, N] nats, at the state before each step.
      windows: one a window.
      kept: the step whose state is returned; fewer than were asked for after a collapse.
      notes: what a report has to say, in sentences; empty for a quiet run.
    """

    state: Any
    entropy: np.ndarray
    windows: tuple[Window, ...]
    kept: int
    notes: tuple[str, ...]


def entropy_of(found: Any) -> Entropy:
    """The full form of what an entropy function returned; a scalar stands for one task.

    Raises:
      ValueError: an array that is no scalar.
    """
    if isinstance(found, Entropy):
        return found
    total = jnp.asarray(found, jnp.float32)
    if total.ndim:
        raise ValueError(f"an entropy function must return a scalar, got shape {total.shape}")
    return Entropy(total, total[None], (), ())


def draw(data: Data, number: int) -> Any:
    """Draw ``number`` of ``data``.

    Raises:
      ValueError: the iterator has ended.
    """
    if callable(data):
        return data(number)
    try:
        return next(data)
    except StopIteration:
        raise ValueError(
            f"data ended at draw {number}: it must be endless, such as itertools.cycle of batches"
        ) from None


def run(
    step: Callable[[Any, Any], tuple[Any, Entropy]],
    state: Any,
    batches: Callable[[int], Any],
    *,
    begin: int,
    steps: int,
    guard: Guard,
    phase: str,
    watch: Watch | None = None,
    names: Sequence[str] | None = None,
) -> Run:
    """Calls ``step`` from ``begin`` up to ``steps``, and watches what the model answers.

    Args:
      step: ``(state, batches) -> (state, Entropy)``; the state may be donated.
      batches: the number of a step -> what it sees.
      phase: named in warnings and handed to ``watch``.
      watch: called at the end of every window; may save the state, must not keep it.
      names: of the tasks, for warnings and notes; default their numbers.

    Raises:
      ValueError: there are not as many names as tasks.
      NonFiniteLoss: the entropy is not finite at the first step.
    """
    best = (-np.inf, begin, _copy(state))
    entropies: list[np.ndarray] = []
    windows: list[Window] = []
    notes: list[str] = []
    most = np.zeros(0)
    past: list[Entropy] = []  # the last ``window`` steps
    early: dict[int, Any] = {}
    told = False
    number = begin
    while number < steps:
        first, number = number, min(number + guard.window, steps)
        pending = []
        for at in range(first, number):
            state, found = step(state, batches(at))
            pending.append(found)
        rows = jax.device_get(pending)
        entropies += [np.asarray(row.tasks) for row in rows]
        bad = next((first + i for i, row in enumerate(rows) if not np.isfinite(row.total)), None)
        if bad is not None:
            what = f"{phase}: the entropy is not finite at step {bad}"
            if bad == begin:
                raise NonFiniteLoss(
                    f"{what}, the first one: look for NaN in the models and the batches"
                )
            notes.append(_say(f"{what}; stopped, the state of step {best[1]} is kept"))
            state, number = best[2], best[1]
            break
        if names is not None and rows[0].classes and len(names) != len(rows[0].classes):
            raise ValueError(
                f"names must be {len(rows[0].classes)}, one a task, got {len(names)}: "
                f"{', '.join(names)}"
            )
        if not windows and rows[0].classes:
            # Entropies are those before an update: the first few stand for the first state.
            start = _window(begin, rows[:JUDGED])
            most, best = start.classes, (float(start.information.sum()), *best[1:])
            early = dict.fromkeys(range(len(most)), 0)
        past = [*past, *rows][-guard.window :]
        window = _window(number, past)
        windows.append(window)
        if watch is not None:
            watch(phase, number, state, window)
        if not window.classes.size:
            best = (0.0, number, _copy(state))
            continue
        most = np.maximum(most, window.classes)
        value = float(_window(number, past[-JUDGED:]).information.sum())
        if value > best[0]:
            best = (value, number, _copy(state))
        for task, answers in _uniform(early, rows):
            what = (
                f"{phase}: the first {answers} answers to {_tasks([task], names)}, by step "
                f"{number}, are nearly all of one class: either the merge had collapsed before "
                "the first step, which the guard cannot see, or the data hold hardly another "
                "class; look at the scores"
            )
            notes.append(_say(what))
        gone = np.flatnonzero(window.classes - 1 < guard.share * (most - 1))
        if not gone.size:
            continue
        what = (
            f"{phase}: the answers to {_tasks(gone, names)} have collapsed by step {number} "
            f"({_tasks(gone[:1], names)} uses {window.classes[gone[0]]:.1f} classes, it used "
            f"{most[gone[0]]:.1f})"
        )
        if guard.stop:
            kept = f"stopped, the state of step {best[1]} is kept, where answers told most"
            notes.append(_say(f"{what}; {kept}"))
            state, number = best[2], best[1]
            break
        if not told:
            notes.append(_say(what))
            told = True
    tasks = len(entropies[0]) if entropies else 0
    table = np.stack(entropies) if entropies else np.zeros((0, tasks))
    return Run(state, table, tuple(windows), number, tuple(notes))


def _uniform(early: dict[int, Any], rows: Sequence[Entropy]) -> list[tuple[int, int]]:
    """(task, answers) of the tasks whose first answers are known by now to be of one class.

    Args:
      early: task -> answers of each class until now; a task leaves it with enough of them.
    """
    found = []
    for task in tuple(early):
        early[task] = early[task] + np.sum([row.answers[task] for row in rows], axis=0)
        whole, largest = float(early[task].sum()), float(early[task].max())
        if whole >= ANSWERS:
            del early[task]
            if whole - largest < STRAY * whole:
                found.append((task, round(whole)))
    return found


def _tasks(numbers: Sequence[int] | np.ndarray, names: Sequence[str] | None) -> str:
    return "task " + ", ".join(str(i) if names is None else names[i] for i in numbers)


def _window(step: int, rows: list[Entropy]) -> Window:
    entropy = np.mean([row.tasks for row in rows], axis=0)
    if not rows[0].classes:
        return Window(step, entropy, np.zeros(0), np.zeros(0))
    mean = [np.mean([row.classes[i] for row in rows], axis=0) for i in range(len(entropy))]
    counts = [np.sum([row.answers[i] for row in rows], axis=0) for i in range(len(entropy))]
    spread = np.array([_entropy(p) for p in mean])
    used = np.array([np.exp(_entropy(c / max(c.sum(), 1))) for c in counts])
    return Window(step, entropy, spread - entropy, used)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0].astype(np.float64)
    return float(-(p * np.log(p)).sum())


def _copy(state: Any) -> Any:
    """The next step takes the memory of the state over."""
    return jax.tree.map(jnp.copy, state)


def _say(note: str) -> str:
    warnings.warn(note, stacklevel=4)
    return note
