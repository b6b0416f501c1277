"""Prefixes of several tasks on one frozen network: one representation for tasks to come.

  1  a prefix Theta_k a source task, each learnt by itself (``prefix``) with a head that is then
     thrown away
  2  K^l = [K_1^l ; ... ; K_K^l], V alike, in every layer: one run of the network with all of them
  3  r(x) = pool(LM(x; Theta_1, ..., Theta_K));  a light classifier on r(x) is all that trains

A query's attention is sum_k Z_k o_k / sum_k Z_k over the blocks (each prefix, and the text), where
Z_k = sum_j exp(q k_j / sqrt(h)) and o_k is the attention within block k: prefixes weigh themselves,
their order makes no difference, and one that stands there twice counts twice. A task is added,
taken away or replaced by its rows alone; no other prefix and no weight of the base changes.

Huang et al., Findings of EMNLP 2023, arXiv 2305.13499.

Deviations: the abstract says that prefixes are combined; concatenation is our reading of it, the
means of the K prefixes (``mean_prefixes``) and of the K runs (``represent``) are alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models import tree
from steppe.models.model import Batch, Model
from steppe.models.overlays import prefix
from steppe.models.overlays.overlay import Overlay
from steppe.models.sites import Site
from steppe.models.tree import Params


def overlay(
    *,
    lengths: Sequence[int] = (10,),
    attentions: Sequence[str] = ("attn",),
    prefixes: Sequence[Params] = (),
) -> Overlay:
    """Fixed prefixes: none of them trains, whatever stands on top of them does.

    Args:
      lengths: rows of each prefix, in the order in which they stand.
      attentions: as in ``overlays.prefix``.
      prefixes: the deltas, one a length; empty = zeros, to be replaced by those of a saved run.

    Returns:
      An overlay whose delta is that of ``prefix.overlay(length=sum(lengths))``, all of it fixed.

    Raises:
      ValueError: no length or one < 1, prefixes that are not of these lengths; from ``init``,
        prefixes that do not fit the model.
    """
    sizes = tuple(int(n) for n in lengths)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"lengths must be given, each >= 1, got {sizes}")
    if prefixes and tuple(length_of(p) for p in prefixes) != sizes:
        raise ValueError(
            f"lengths={sizes} are not those of the prefixes, "
            f"{tuple(length_of(p) for p in prefixes)}"
        )
    plain = prefix.overlay(length=sum(sizes), attentions=attentions)

    def init(key: jax.Array, params: Params) -> Params:
        made = plain.init(key, params)
        if not prefixes:
            return jax.tree.map(jnp.zeros_like, made)
        found = stack_prefixes(prefixes)
        tree.same_structure(found, made, ("the prefixes", "this model"))
        return jax.tree.map(jnp.asarray, found)

    def attach(delta: Params) -> dict[str, Site]:
        return plain.sites(delta)

    settings = (("lengths", sizes), ("attentions", tuple(attentions)))
    return Overlay(
        "prefix-fixed", init, attach, None, prefix.RULES, settings=settings, fixed=(".*",)
    )


def stack_prefixes(prefixes: Sequence[Params]) -> Params:
    """Prefixes one behind the other along their rows, as the delta of one ``prefix.overlay``.

    Args:
      prefixes: folded deltas (see ``prefix.fold``) of one base.

    Raises:
      ValueError: none is given, a network that makes a prefix, or prefixes of different shapes.
    """
    if not prefixes:
        raise ValueError("prefixes must hold at least one, got none")
    for one in prefixes:
        length_of(one)
    flat = [tree.flatten(one) for one in prefixes]
    for number, other in enumerate(flat[1:], 1):
        for path in {*flat[0], *other}:
            shapes = [one[path].shape if path in one else None for one in (flat[0], other)]
            if shapes[0] is None or shapes[1] is None or _without_rows(shapes) is None:
                raise ValueError(
                    f"prefix {number} does not fit prefix 0: {path!r} has {shapes[1]} and "
                    f"{shapes[0]}; they must be of one base and the same attentions"
                )
    return tree.unflatten({p: jnp.concatenate([one[p] for one in flat], 1) for p in flat[0]})


def drop_prefix(stacked: Params, number: int, lengths: Sequence[int]) -> Params:
    """``stacked`` without prefix ``number``; the others keep every bit.

    Args:
      lengths: of the prefixes in it, in order.

    Raises:
      ValueError: lengths of another stack, or a number that is none of its prefixes.
    """
    begin, end = _rows_of(stacked, number, lengths)
    return jax.tree.map(lambda a: jnp.concatenate([a[:, :begin], a[:, end:]], 1), stacked)


def take_prefix(stacked: Params, number: int, lengths: Sequence[int]) -> Params:
    """Prefix ``number`` of ``stacked``; raises as :func:`drop_prefix`."""
    begin, end = _rows_of(stacked, number, lengths)
    return jax.tree.map(lambda a: a[:, begin:end], stacked)


def mean_prefixes(prefixes: Sequence[Params]) -> Params:
    """The mean of keys and of values of prefixes of equal lengths.

    Raises:
      ValueError: they are of different lengths, and what :func:`stack_prefixes` refuses.
    """
    stack_prefixes(prefixes)
    lengths = {length_of(one) for one in prefixes}
    if len(lengths) > 1:
        raise ValueError(
            f"a mean takes prefixes of one length, got {sorted(lengths)}; concatenate them"
        )
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *prefixes)


def length_of(one: Params) -> int:
    """Rows of a prefix.

    Raises:
      ValueError: it is the delta of a network that makes a prefix, or no prefix at all.
    """
    paths = tree.flatten(one)
    if not paths or not all(
        p.split("/")[0] == tree.STACK and p[-2:] in ("/k", "/v") for p in paths
    ):
        raise ValueError(
            "a prefix is {'layers': {'ATTENTION.kv_prefix': {'k', 'v'}}}; fold the network that "
            f"makes it first (prefix.fold), got {', '.join(list(paths)[:3]) or 'nothing'}"
        )
    lengths = {int(leaf.shape[1]) for leaf in paths.values()}
    if len(lengths) > 1:
        raise ValueError(f"a prefix has as many keys as values in every attention, got {lengths}")
    return lengths.pop()


class Cost(NamedTuple):
    """What bringing a representation up to date takes.

    Attributes:
      parameters: that an optimiser holds state for.
      examples: that are trained on.
    """

    parameters: int
    examples: int


def update_cost(
    one: Params, base: Params, examples: Sequence[int], changed: int
) -> tuple[Cost, Cost]:
    """(prefixes, multi-task fine-tuning) when the data of one source task change.

    Args:
      one: the prefix of the task; ``base``: the network; arrays or shapes.
      examples: training examples of every source task.
      changed: number of the task.
    """
    return (
        Cost(tree.count(one), examples[changed]),
        Cost(tree.count(base), sum(examples)),
    )


def represent(
    model: Model,
    params: Params,
    prefixes: Sequence[Params],
    batch: Batch,
    *,
    combine: Literal["concat", "mean_kv", "mean_repr", "concat_repr"] = "concat",
    pool: Literal["mean", "first"] = "mean",
) -> Float[Array, "B H"]:
    """r(x) of every text, float32, without dropout and without gradient.

    Args:
      model: the base, an encoder or a decoder with or without a head.
      params: its parameters.
      prefixes: of the source tasks, none = the frozen network.
      combine: ``concat``: one run with all of them; ``mean_kv``: with their mean; ``mean_repr``
        and ``concat_repr``: a run each, whose vectors are averaged or put side by side.
      pool: ``mean`` over the tokens that ``attention_mask`` [B, T] shows, or the ``first`` one.

    Raises:
      ValueError: an unknown combine or pool, and prefixes that do not go together.
    """
    runs = {
        "concat": lambda: [stack_prefixes(prefixes)],
        "mean_kv": lambda: [mean_prefixes(prefixes)],
        "mean_repr": lambda: list(prefixes),
        "concat_repr": lambda: list(prefixes),
    }
    if combine not in runs:
        raise ValueError(f"combine must be one of {', '.join(runs)}, got {combine!r}")
    if pool not in ("mean", "first"):
        raise ValueError(f"pool must be 'mean' or 'first', got {pool!r}")
    make: Callable[[], list[Any]] = runs[combine]
    for one in prefixes:
        length_of(one)
    vectors = [_vector(model, params, one, batch, pool) for one in (make() if prefixes else [None])]
    if combine == "concat_repr":
        return jnp.concatenate(vectors, axis=-1)
    return sum(vectors[1:], vectors[0]) / len(vectors)


def _vector(model: Model, params: Params, one: Params | None, batch: Batch, pool: str) -> jax.Array:
    sites = {} if one is None else {n: Site(prefix.in_front, d) for n, d in one[tree.STACK].items()}
    hidden = model.apply(params, batch, sites=sites).hidden.astype(jnp.float32)
    hidden = jax.lax.stop_gradient(hidden)
    mask = batch.get("attention_mask")
    shown = jnp.ones(hidden.shape[:2]) if mask is None else jnp.asarray(mask) != 0
    if pool == "first":  # a decoder's text may be padded in front
        return jnp.take_along_axis(hidden, jnp.argmax(shown, 1)[:, None, None], axis=1)[:, 0]
    shown = shown.astype(jnp.float32)[..., None]
    return (hidden * shown).sum(1) / jnp.maximum(shown.sum(1), 1.0)


def _without_rows(shapes: Sequence[Any]) -> Any:
    left, right = ((s[0], *s[2:]) for s in shapes)
    return left if left == right else None


def _rows_of(stacked: Params, number: int, lengths: Sequence[int]) -> tuple[int, int]:
    if length_of(stacked) != sum(lengths):
        raise ValueError(
            f"lengths={tuple(lengths)} add up to {sum(lengths)} rows, the stack has "
            f"{length_of(stacked)}"
        )
    if not 0 <= number < len(lengths):
        raise ValueError(f"number must be in 0..{len(lengths) - 1}, got {number}")
    begin = sum(lengths[:number])
    return begin, begin + lengths[number]
