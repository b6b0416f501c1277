"""Modular prompts: K prompts that tasks share, and a router a task that mixes them.

  p_k = reshape(Z_k A, (n, D)),   Z in R^{K x r},  A in R^{r x n D}
  g_k = sigmoid((W_k + log u_k - log(1 - u_k)) / tau),   u ~ U(0, 1)    training, relaxed Bernoulli
  g_k = sigmoid(W_k)                                                    evaluation
  P   = sum_k a_k p_k,   a = g / (sum g + 1e-12)

  input    [<s> ; w_1 ... w_n ; x_1 ...]       n ordinary words, which never change
  shallow  h^1_{1..n} + P                      on the embeddings
  deep     h^l_{1..n} + P^l,   l = 1..L        on the input of every layer, each with Z, A, W

Modules are trained on many tasks at once, W being [tasks, K] (layers first where deep). A new task
takes p_k over as they are (``adapt``) and learns a router of K numbers first, then its prompts;
see ``train.modular_prompts``. Where all rows of Z are one z, the router makes no difference
(``with_intrinsic``): a search in R^r without gradients begins at sum_k a_k Z_k.

Sun et al., ACL 2023, arXiv 2210.07565.

Deviations: gates and their normalisation are in float32; a micro-batch has one draw a task, where
the published code has one a batch, of one task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.model import Inputs, Model
from steppe.models.overlays.batchwise import Call, attached, sees_batch
from steppe.models.overlays.inside import added, first_column, inserted, removed
from steppe.models.overlays.overlay import Overlay, stack_prefix, stack_shape
from steppe.models.overlays.prompt import table_of
from steppe.models.sites import Site, SiteContext
from steppe.models.tree import Params

SITE = "mp2"
# Where a batch has the number of every row's task, int [B].
TASKS = "task_ids"
# The first of the ordinary tokens; what stands below is often special.
FIRST_ID = 1000
EPSILON = 1e-12
_STREAM = 9


def overlay(
    *,
    modules: int = 8,
    length: int = 50,
    intrinsic: int = 300,
    deep: bool = False,
    tasks: int = 1,
    temperature: float = 1.0,
    sample: bool = True,
    first: int = -1,
    ids: Sequence[int] = (),
    stack: str = "",
) -> Overlay:
    """The overlay of modular prompts.

    Args:
      modules: K.
      length: n, positions that are added to.
      intrinsic: r; 0 = the p_k themselves are learnt, as after ``adapt``.
      deep: modules and routers for every layer.
      tasks: routers; of more than one, the batch says which by ``task_ids`` [B].
      temperature: tau of the draws.
      sample: draw gates in training; False = the sigmoid there too.
      first: column of the first of the words: 1 behind the first token, 0 in front (decoders);
        -1 = 1, and 0 in a stack.
      ids: the words; empty = the n ids from 1000 on.
      stack: ``encoder`` in an encoder-decoder, where they stand in the source.

    Returns:
      An overlay whose delta is ``{"words": [n, D], "prompt": {"router": [tasks, K], "z": [K, r],
      "a": [r, n D]}}`` or, deep, ``{"words", "layers": {"resid": ...}}`` with an axis of L in
      front; ``"modules"`` [K, n, D] in place of z and a without an intrinsic space. The words are
      constants of the base. No merged form; with one task alone the bound model generates.

    Raises:
      ValueError: a size, rate or stack that it cannot have; from ``init`` an id outside the
        vocabulary, no position left for the text, or a model without words or with other stacks;
        from ``bind`` a decoder with first=1; from ``apply`` a batch without tasks or with one that
        there is not, or another overlay that puts rows in front. A task that is only known when
        the compiled program runs gives NaN.
    """
    if min(modules, length, tasks) < 1 or intrinsic < 0:
        raise ValueError(
            "modules, length and tasks must be >= 1 and intrinsic >= 0, got "
            f"{modules}, {length}, {tasks} and {intrinsic}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    first = first_column(first, stack)
    place = stack_prefix(stack)
    words = tuple(int(i) for i in ids) or tuple(range(FIRST_ID, FIRST_ID + length))
    if len(words) != length:
        raise ValueError(f"ids must name length={length} tokens, got {len(words)}")

    def init(key: jax.Array, params: Params) -> Params:
        layers, _ = stack_shape(params, stack, "mp2")
        table = table_of(params, "word")
        if table is None:
            raise ValueError("mp2 needs a model that embeds words")
        size, width = table.shape
        bad = next((i for i in words if not 0 <= i < size), None)
        if bad is not None:
            raise ValueError(
                f"ids must be of the vocabulary of {size} tokens, got {bad}; name others by ids"
            )
        positions = table_of(params, "position")
        if positions is not None and length + first >= positions.shape[0]:
            raise ValueError(
                f"length={length} leaves the text none of the model's {positions.shape[0]} "
                "positions; take fewer prompt tokens"
            )
        lead = (layers,) if deep else ()
        keys = jax.random.split(key, 3)

        def uniform(key: jax.Array, bound: float, *shape: int) -> jax.Array:
            return jax.random.uniform(key, (*lead, *shape), minval=-bound, maxval=bound)

        own: Params = {"router": uniform(keys[0], 1e-3, tasks, modules)}
        if intrinsic:
            own["z"] = uniform(keys[1], 1e-3, modules, intrinsic)
            own["a"] = uniform(keys[2], (length * width) ** -0.5, intrinsic, length * width)
        else:
            own["modules"] = uniform(keys[1], 1e-3, modules, length, width)
        if isinstance(table, jax.ShapeDtypeStruct):  # only shapes are asked for
            made: Params = {"words": jnp.zeros((length, width))}
        else:
            made = {"words": jnp.asarray(table, jnp.float32)[jnp.asarray(words)]}
        return {**made, **({tree.STACK: {"resid": own}} if deep else {"prompt": own})}

    def prompts(own: Params, context: SiteContext, batch: int, ids: Any) -> jax.Array:
        """P of every row, [B, n, D]."""
        key = context.rng if sample and context.train else None
        weights = gates(own["router"], temperature, key)
        weights = (
            jnp.broadcast_to(weights, (batch, modules)) if ids is None else tree.rows(weights, ids)
        )
        return mix(weights, own, length)

    def sites_of(delta: Params, ids: Any = None) -> dict[str, Site]:
        def embed(own: Any, x: Inputs, base: Callable[[Any], Any], context: SiteContext) -> Any:
            if context.step:  # they stand in the cache already
                return base(x)
            batch = len(x.hidden)
            rows = jnp.broadcast_to(own["words"], (batch, *own["words"].shape))
            ours = inserted(x, rows, first)
            ours = ours._replace(prompt=0 if first else length)
            done: Inputs = base(ours)
            if x.prompt or done.hidden.shape[1] != ours.hidden.shape[1]:
                raise ValueError(
                    "mp2 counts columns of the text itself, and another overlay puts rows in "
                    "front; attach one of them"
                )
            if deep:
                return done
            return done._replace(
                hidden=added(done.hidden, prompts(own["prompt"], context, batch, ids), first)
            )

        def resid(own: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
            if context.step:
                return base(x)
            return base(added(x, prompts(own, context, len(x), ids), first))

        def logits(_: Any, x: Any, base: Callable[[Any], Any], context: SiteContext) -> Any:
            # A head of one label a token: the words are none of the text's.
            return base(x if x.ndim == 2 or context.step else removed(x, length, first))

        sites = {f"{place}embed": Site(embed, {n: v for n, v in delta.items() if n != tree.STACK})}
        if deep:
            # What is added to a token depends on nothing else.
            sites[f"{place}resid"] = Site(resid, delta[tree.STACK]["resid"], tokenwise=True)
        if first and not stack:
            sites["logits"] = Site(logits, {})
        return sites

    def make(delta: Params, call: Call) -> dict[str, Site]:
        ids = call.batch.get(TASKS)
        if ids is None or jnp.ndim(ids) != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"the batch must hold {TASKS!r}, integers [batch] below tasks={tasks}; it holds "
                f"{', '.join(call.batch)}"
            )
        if not isinstance(ids, jax.core.Tracer):
            wrong = np.asarray(ids)[(np.asarray(ids) < 0) | (np.asarray(ids) >= tasks)]
            if wrong.size:
                raise ValueError(f"batch[{TASKS!r}] names task {wrong[0]}, but tasks={tasks}")
        return sites_of(delta, jnp.asarray(ids))

    def around(model: Model) -> Model:
        if first and isinstance(model.config, DecoderConfig):
            raise ValueError(
                "first=1 puts the words behind the first token, which tells an encoder's text from "
                "its padding; use first=0 for a decoder"
            )
        if tasks == 1:
            return model
        return sees_batch(model, SITE, make, stream=_STREAM)

    def attach(delta: Params) -> dict[str, Site]:
        return sites_of(delta) if tasks == 1 else {SITE: Site(attached, delta)}

    settings: dict[str, Any] = {"modules": modules, "length": length, "intrinsic": intrinsic}
    settings |= {"deep": deep, "tasks": tasks, "temperature": temperature, "sample": sample}
    settings |= {"first": first, "ids": words, "stack": stack}
    return Overlay(
        "mp2",
        init,
        attach,
        None,
        settings=tuple(settings.items()),
        fixed=("words",),
        around=around,
    )


def gates(
    router: Float[Array, "... K"], temperature: float = 1.0, rng: jax.Array | None = None
) -> Float[Array, "... K"]:
    """Weights a of the modules, float32, summing to 1; ``rng`` None is evaluation."""
    logits = router.astype(jnp.float32)
    drawn = jax.nn.sigmoid(logits) if rng is None else relaxed_bernoulli(rng, logits, temperature)
    return drawn / (drawn.sum(-1, keepdims=True) + EPSILON)


def relaxed_bernoulli(
    rng: jax.Array, logits: Float[Array, "..."], temperature: float
) -> Float[Array, "..."]:
    """Draws in (0, 1) that become those of a coin of these logits as the temperature falls.

    Maddison, Mnih, Teh, ICLR 2017, arXiv 1611.00712.
    """
    return jax.nn.sigmoid((logits + jax.random.logistic(rng, logits.shape)) / temperature)


def mix(weights: Float[Array, "B K"], own: Params, length: int) -> Float[Array, "B n D"]:
    """sum_k a_k p_k of one layer; ``own`` holds z and a, or the modules themselves."""
    if "modules" in own:
        return jnp.einsum("bk,knd->bnd", weights.astype(own["modules"].dtype), own["modules"])
    rows = (weights.astype(own["z"].dtype) @ own["z"]) @ own["a"]
    return rows.reshape(len(weights), length, -1)


def adapt(delta: Params, key: jax.Array, *, task: int | None = None) -> Params:
    """The delta of ``overlay(intrinsic=0)`` with which a new task begins.

    Args:
      delta: of the overlay that was trained on several tasks.
      task: whose router to copy; None = a new one, uniform in +-1e-3.

    Raises:
      ValueError: there is no such task.
    """
    own = _own(delta)
    tasks, modules = own["router"].shape[-2:]
    if task is not None and not 0 <= task < tasks:
        raise ValueError(f"task must be in 0..{tasks - 1}, got {task}")
    width = delta["words"].shape[-1]
    rows = own["z"] @ own["a"]
    shape = (*own["router"].shape[:-2], 1, modules)
    router = jax.random.uniform(key, shape, minval=-1e-3, maxval=1e-3)
    if task is not None:
        router = own["router"][..., task : task + 1, :]
    return _with(delta, {"router": router, "modules": rows.reshape(*rows.shape[:-1], -1, width)})


def intrinsic_start(delta: Params, task: int = 0) -> Float[Array, "... r"]:
    """sum_k a_k Z_k of one task, [r], or of every layer [L, r]."""
    own = _own(delta)
    return jnp.einsum("...k,...kr->...r", gates(own["router"][..., task, :]), own["z"])


def with_intrinsic(delta: Params, z: Float[Array, "... r"]) -> Params:
    """``delta`` with all rows of Z set to ``z``, [r] or [L, r]: the mixture is z whatever W is."""
    own = _own(delta)
    return _with(delta, {**own, "z": jnp.broadcast_to(z[..., None, :], own["z"].shape)})


def _own(delta: Params) -> Params:
    own: Params = delta[tree.STACK]["resid"] if tree.STACK in delta else delta["prompt"]
    return own


def _with(delta: Params, own: Params) -> Params:
    place = {tree.STACK: {"resid": own}} if tree.STACK in delta else {"prompt": own}
    return {"words": delta["words"], **place}
