"""ZSAQ: a quantised student and a generator play against each other, without data.

  min_x max_{|e| <= rho} max_y f(x + e, y)        f: see ``game``; steps: ``optim.minimax.sam_sga``

x are the student's float master weights, which every forward pass rounds: e moves them before
rounding, Q(x + e). They start as the teacher's, so that the first student is the teacher rounded
to nearest. y is the generator's. The state is a ``TrainState``: both players are saved and
restored by ``train.checkpoint``, sharded by the rules of :func:`rules`, and stepped by one
compiled program.

Large steps of x destroy a student that rounding alone leaves intact. So a champion is kept:
every ``judge_every`` iterations the present student and the champion are compared on inputs that
the present generator makes from held-out noise (the same noise every time), and the one with the
smaller D stays. The champion at the start is the rounded teacher, and :func:`result` gives the
champion. "First" and "now" are thus compared on the same inputs, however far the generator went.

At 32 bits there is nothing to play for, and rho must be 0: the gradient is what is left of
rounding, and a sharpness-aware step scales even that to the length rho.

Zhu et al., EMNLP 2023 (arXiv 2310.13315): rho, learning rates and the number of iterations are
not known; K_x = 5 and Adam at 1e-3 for a new generator are ZAQ's (Liu et al., CVPR 2021).

Deviations: the code of the paper is not public; see the notes of ``generator`` and ``game``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from steppe.models import tree
from steppe.models.model import Model
from steppe.models.quantized import QUANT, Quantized
from steppe.optim.minimax import Game, Minimax, sam_sga
from steppe.train import step
from steppe.train.distill.pairs import TeacherLike
from steppe.train.mesh import MeshPlan, Rules
from steppe.train.quantize.game import Terms, check_kind, game
from steppe.train.quantize.generator import Generator
from steppe.train.types import Batch, Metrics, Params, TrainState

STUDENT, GENERATOR, TEACHER = "student", "generator", "teacher"
BEST = "best"
HELD_OUT = 2**31 - 1


def players(
    rho: float = 0.05,
    k_min: int = 5,
    *,
    student_lr: Any = 1e-5,
    generator_lr: Any = 1e-3,
    freeze_generator: bool = False,
) -> Minimax:
    """The usual two optimisers: Adam for both, SAM around the student's.

    Args:
      rho: 0 is SGD-SGA.
      k_min: K_x, steps of the student an iteration.
      student_lr, generator_lr: numbers or schedules (over the steps of each player).
      freeze_generator: never step the generator.
    """
    return sam_sga(
        optax.adam(student_lr),
        optax.adam(generator_lr),
        rho,
        k_min,
        k_max=0 if freeze_generator else 1,
    )


def rules(student: Model, teacher: Model, generator: Generator) -> Rules:
    """Sharding rules for ``mesh.plan``: each player's, below its name."""
    parts = ((STUDENT, student.axes), (TEACHER, teacher.axes), (GENERATOR, generator.axes))
    return tuple((rf"{name}/(?:{pattern})", dims) for name, axes in parts for pattern, dims in axes)


def init(
    key: jax.Array,
    student: Quantized,
    teacher: TeacherLike,
    generator: Generator,
    opt: Minimax,
    plan: MeshPlan | None = None,
    *,
    params: Params | None = None,
    generator_params: Params | None = None,
    trainable: Sequence[str] = (".*",),
) -> TrainState:
    """The state before the first iteration.

    Args:
      key: typed key of the run; it makes the generator and later all noise.
      student: ``quantized.wrap(teacher.model, rules)``.
      teacher: the float model with its parameters, such as ``pretrained.load`` returns.
      plan: of :func:`rules`.
      params: what the student starts from, with its ``quant`` entries where it has such; default:
        the teacher's parameters.
      generator_params: what the generator starts from, such as a pretrained language model below
        ``body``; default: ``generator.init``.
      trainable: paths of the student that train; the rest stays as it is, and so does ``quant``.

    Raises:
      ValueError: a student that does not round floats, parameters that do not fit it, a pattern
        that matches nothing.
    """
    if not isinstance(student, Quantized) or student.stored != "float":
        raise ValueError(
            "student must be quantized.wrap(teacher.model, rules), which rounds float weights at "
            f"every step, got {getattr(student, 'stored', type(student).__name__)}"
        )
    make_key, run_key = jax.random.split(key)
    own = dict(teacher.params if params is None else params)
    tree.same_structure(own, student.abstract(), ("the student's params", "the student"))
    made = generator_params
    if made is None:
        made = jax.jit(generator.init)(make_key)
    full = {STUDENT: own, TEACHER: teacher.params, GENERATOR: made}
    patterns = [rf"{STUDENT}/(?!{QUANT}/)(?:{pattern})" for pattern in trainable]
    if jax.tree.leaves(made):
        patterns.append(rf"{GENERATOR}/.*")
    state = step.init(run_key, _both(full), _joint(opt), plan, params=full, trainable=patterns)

    def copies(live: Params) -> dict[str, Any]:
        return {BEST: {STUDENT: jax.tree.map(jnp.copy, live)}}

    live = state.params[STUDENT]
    out = None
    if plan is not None:
        out = plan.mirror(jax.eval_shape(copies, live), state.params)
    return state.replace(extra=jax.jit(copies, out_shardings=out)(live))


def make_zsaq_step(
    student: Quantized,
    teacher: Model,
    generator: Generator,
    opt: Minimax,
    plan: MeshPlan | None = None,
    *,
    terms: Terms | None = None,
    compute_dtype: Any = None,
    judge_every: int = 10,
    steps: int = 0,
    donate: bool = True,
) -> step.TrainStep:
    """The compiled iteration, ``(state, {}) -> (state, metrics)``: the batch is empty.

    It is a ``TrainStep``, so that ``loop.run`` can drive it with ``Noise()`` for batches.

    Args:
      student, teacher, generator, opt, plan: as :func:`init`; the teacher without parameters.
      terms: of f, see ``game``.
      compute_dtype: such as "bfloat16", of all networks; both players stay float32.
      judge_every: iterations between two looks at the champion; 0 = never: the champion stays the
        student of the start, and ``result(state, best=False)`` is the one that was trained.
      steps: iterations that are to come in all; with a number the champion is looked at after the
        last of them too. 0 = not known: what follows the last look of ``judge_every`` is lost to
        :func:`result`.
      donate: see ``step.make``.

    The metrics are float32 scalars (sum, weight): ``loss`` (f, mean over the student's steps),
    ``divergence``, ``grad_norm`` (the student's), ``f_max`` (f before the generator's step),
    ``generator_norm``, and D of student and champion on held-out noise, ``held_out`` and
    ``held_out_best`` (weight 0 in iterations without a look).

    Raises:
      ValueError: an unknown divergence, judge_every < 0, steps < 0.
    """
    terms = Terms() if terms is None else terms
    check_kind(terms.divergence)
    if not isinstance(judge_every, int) or isinstance(judge_every, bool) or judge_every < 0:
        raise ValueError(f"judge_every must be a whole number >= 0, got {judge_every!r}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0, got {steps!r}")

    def fn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        x, y = _sides(state.params)
        rest = state.frozen.get(STUDENT, {})
        f = game(
            student,
            teacher,
            generator,
            state.frozen[TEACHER],
            rest,
            terms,
            compute_dtype=compute_dtype,
        )
        key = jax.random.fold_in(state.rng, state.step)
        x, y, opt_state, found = opt.step(state.opt_state, x, y, _named(f), key)
        names = {"f": "loss", "min_norm": "grad_norm", "max_norm": "generator_norm"}
        metrics = {names.get(name, name): value for name, value in found.items()}
        one = jnp.float32(1)
        logged = {name: (jnp.float32(value), one) for name, value in metrics.items()}
        extra = state.extra
        if judge_every:
            done = state.step + 1
            due = (done % judge_every == 0) | (done == steps)
            best, now, before = _judged(f, x[STUDENT], y[GENERATOR], state, due)
            extra = {**extra, BEST: {STUDENT: best}}
            looked = due.astype(jnp.float32)
            logged.update(held_out=(now, looked), held_out_best=(before, looked))
        params = {**x, **(y if GENERATOR in state.params else {})}
        new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return _strong(new), logged

    return step.TrainStep(fn, plan, 1, donate)


def result(state: TrainState, *, best: bool = True) -> Params:
    """The student's float parameters, ``quant`` included.

    Args:
      best: the champion; False = the student as trained last.
    """
    live = state.extra[BEST][STUDENT] if best else state.params[STUDENT]
    return tree.merge(live, state.frozen.get(STUDENT, {}))


class Noise:
    """Endless empty batches for ``loop.run``: all that an iteration needs comes from its key."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Noise:
        return self

    def __next__(self) -> Mapping[str, Any]:
        self.count += 1
        return {}

    def get_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.count = int(state["count"])


def _judged(f: Any, x: Params, y: Params, state: TrainState, due: jax.Array) -> Any:
    """(champion, D of x, D of the champion before) on held-out noise; D is 0 where not due."""
    champion = state.extra[BEST][STUDENT]

    def look(players: tuple[Params, Params]) -> tuple[Params, jax.Array, jax.Array]:
        x, champion = players
        made = f.prepare(y, jax.random.fold_in(state.rng, HELD_OUT))
        now, before = (f.value(p, made)[1]["divergence"] for p in (x, champion))
        # NaN compares False: a student that has diverged never becomes champion.
        better = now < before
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), x, champion)
        return kept, now, before

    def skip(players: tuple[Params, Params]) -> tuple[Params, jax.Array, jax.Array]:
        return players[1], jnp.float32(0), jnp.float32(0)

    return jax.lax.cond(due, look, skip, (x, champion))


def _both(full: Params) -> Any:
    """What ``step.init`` needs of a model; everything is given."""

    def never(key: jax.Array) -> Params:
        raise NotImplementedError

    return SimpleNamespace(init=never, trainable=tuple(full), given=None)


def _sides(params: Params) -> tuple[Params, Params]:
    """The two trees that the optimisers see.

    They keep the players' names, so that a moment's path ends like its parameter's and is split
    over a mesh as that is.
    """
    return {STUDENT: params[STUDENT]}, {GENERATOR: params.get(GENERATOR, {})}


def _named(f: Game) -> Game:
    """The game between those trees."""
    return Game(
        lambda y, key: f.prepare(y[GENERATOR], key), lambda x, made: f.value(x[STUDENT], made)
    )


def _joint(opt: Minimax) -> Any:
    """Both optimisers as one transform over both players' parameters, for ``step.init``."""

    def start(params: Params) -> Any:
        return opt.init(*_sides(params))

    return SimpleNamespace(init=start)


def _strong(state: TrainState) -> TrainState:
    """Strips weak types, which would make the second call a new program."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state)
