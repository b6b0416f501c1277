"""Many adapters in one batch: example i of a batch runs under the delta number ids[i] of a bank.

  params = {"base": ..., "overlay": stack [adapters, ...], "own": {...}}
  f(params, batch)_i = f_base(batch_i) under overlay[ids_i], and under own[ids_i] in place of the
                       leaves of the base that every adapter has trained with it, such as its head

The result is that of one call an adapter. LoRA, alone or with own heads of an encoder, takes the
short way: the base runs once over the whole batch, and beside it every example has low-rank
products of its own (a batched matrix product with A [B, d_in, r]), never a weight matrix of its
own. Any other overlay is mapped over the examples by ``jax.vmap``, in which the base's matrices
stay shared. Generation goes the same two ways, token by token: the ids are part of its state, so
that beams and continued prompts keep the adapter of their text.

Adapters of several ranks, kinds or bases do not fit into one bank: a stack has one shape.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.models.encoder import EncoderConfig
from steppe.models.model import Batch, Decode, Inputs, Masks, Model, ModelOut, Rules
from steppe.models.overlays import files
from steppe.models.overlays.overlay import BASE, OVERLAY, WHOLE, Overlay, prefixed
from steppe.models.sites import Site, stack_sites
from steppe.models.tree import Params

OWN = "own"
IDS = "adapter_ids"
_HEAD = "head"


class Bank(NamedTuple):
    """Adapters that were read from folders.

    Attributes:
      params: ``{"overlay": stacked deltas, "own": stacked leaves of the base}``.
      name, settings: of the overlay that all of them are of.
      folders: one an adapter, in the order of the ids.
    """

    params: Params
    name: str
    settings: dict[str, Any]
    folders: tuple[Path, ...]


@flax.struct.dataclass
class BankState:
    """What generation under a bank carries from token to token.

    Attributes:
      inner: the base's state; mapped, one a row along a leading axis of every leaf.
      ids: number of every row's adapter [B].
      mapped: which of the two it is.
    """

    inner: Any
    ids: jax.Array
    mapped: bool = flax.struct.field(pytree_node=False, default=False)

    def take(self, rows: jax.Array) -> BankState:
        """The state of the rows [N] of the batch, in that order; N may differ from B."""
        if self.mapped:
            inner = jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), self.inner)
        else:
            inner = self.inner.take(rows)
        return self.replace(inner=inner, ids=jnp.take(self.ids, rows))  # type: ignore[attr-defined]


def stack(deltas: Sequence[Params]) -> Params:
    """One tree of leaves [adapters, ...] from trees of equal shapes; id i is ``deltas[i]``.

    Raises:
      ValueError: no delta, or one that differs from the first in a path or a shape.
    """
    if not deltas:
        raise ValueError("deltas must hold at least one, got none")
    for number, delta in enumerate(deltas[1:], 1):
        tree.same_structure(deltas[0], delta, ("adapter 0", f"adapter {number}"))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas)


def select(stacked: Params, number: int) -> Params:
    """The delta of one adapter of a stack.

    Raises:
      ValueError: there is none of that number.
    """
    size = _size(stacked)
    if not 0 <= number < size:
        raise ValueError(f"the bank has no adapter {number}; it holds 0 to {size - 1}")
    return jax.tree.map(lambda leaf: leaf[number], stacked)


def load(folders: Sequence[str | os.PathLike[str]], *, fingerprint: str | None = None) -> Bank:
    """Reads saved overlays of one kind and one base into a bank.

    Args:
      fingerprint: of the base's parameters; None = that which the first folder names.

    Raises:
      FileNotFoundError: a folder holds no overlay.
      ValueError: no folder, a delta of another base or with other settings than the first one's.
    """
    if not folders:
        raise ValueError("folders must name at least one saved overlay, got none")
    saved = [files.load(folder, fingerprint=fingerprint) for folder in folders]
    first = saved[0]
    for folder, one in zip(folders[1:], saved[1:], strict=True):
        for what, here, there in (
            ("base", one.base.get("hash"), first.base.get("hash")),
            ("overlay", one.name, first.name),
            *((k, one.settings.get(k), first.settings.get(k)) for k in first.settings),
        ):
            if here != there:
                raise ValueError(
                    f"{folder} has {what} {here!r}, {folders[0]} has {there!r}: the adapters of a "
                    "bank share one base and one kind of overlay"
                )
    params = {OVERLAY: stack([one.params.get(OVERLAY, {}) for one in saved])}
    own = [one.params.get(BASE, {}) for one in saved]
    if any(tree.paths(leaves) for leaves in own):
        params[OWN] = stack(own)
    return Bank(params, first.name, first.settings, tuple(Path(f) for f in folders))


def bind(
    model: Model,
    overlay: Overlay,
    adapters: int,
    *,
    frozen: Params | None = None,
    own: Sequence[str] = (),
    ids: str = IDS,
    mapped: bool = False,
) -> Model:
    """``model`` under a bank of ``adapters`` deltas of ``overlay``.

    Its batches hold ``ids`` int [B], each below ``adapters``. All deltas (and own leaves) train
    at once, each on its own examples, but for what the overlay holds fixed. It generates where
    the model under one delta does.

    Args:
      model: the base, with a head where one is wanted.
      frozen: the base's parameters; None = the bound model initialises them too.
      own: regexes of leaves of the base of which every adapter has its own, such as ``head/.*``.
      ids: the batch's column of ids.
      mapped: take the way of ``jax.vmap`` where there is a shorter one too.

    Raises:
      ValueError: adapters < 1, a pattern that matches nothing, a model that is bound already;
        from ``apply``, a batch without ids or an id outside the bank. An id that is only known
        when the compiled program runs gives NaN.
    """
    if adapters < 1:
        raise ValueError(f"adapters must be >= 1, got {adapters}")
    if model.given is not None:
        raise ValueError("the model is bound already; give the base, and the overlay by itself")
    shapes = model.abstract()
    if frozen is not None:
        tree.same_structure(frozen, shapes, ("frozen", "the model"))
    theirs = tree.paths(tree.split(shapes, tuple(own))[0]) if own else []
    heads = all(path.startswith(f"{_HEAD}/") for path in theirs)
    # Heads by themselves are run on what an encoder returns; a decoder's has its norm in it.
    alone = not theirs or (isinstance(model.config, EncoderConfig) and model.parts is not None)
    short = not mapped and overlay.rows is not None and heads and alone
    host = model if overlay.around is None else overlay.around(model)

    def init(key: jax.Array) -> Params:
        base_key, delta_key = jax.random.split(key)
        base = model.init(base_key) if frozen is None else frozen
        keys = jax.random.split(delta_key, adapters)
        made: Params = {OVERLAY: jax.vmap(lambda k: overlay.init(k, base))(keys)}
        if theirs:
            leaves, _ = tree.split(base, tuple(own))
            made[OWN] = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * adapters), leaves)
        return made if frozen is not None else {BASE: base, **made}

    def apply(
        params: Params,
        batch: Batch,
        *,
        sites: Mapping[str, Site] | None = None,
        masks: Masks | None = None,
        embeds: jax.Array | None = None,
        rng: jax.Array | None = None,
        train: bool = False,
        all_hidden: bool = False,
    ) -> ModelOut:
        chosen, rest = _ids(batch, ids, adapters)
        options: dict[str, Any] = {"masks": masks, "train": train, "all_hidden": all_hidden}
        held = params.get(OVERLAY, {})
        if short and not (theirs and sites):
            assert overlay.rows is not None
            both = stack_sites(overlay.rows(held, chosen), sites or {})
            out = model.apply(params[BASE], rest, sites=both, embeds=embeds, rng=rng, **options)
            if not theirs:
                return out
            final = out.hidden[-1] if all_hidden else out.hidden
            return out._replace(logits=_heads(model, params, chosen, final, rng, train))
        deltas = _rows(params, chosen)
        keys = None if rng is None else jax.random.split(rng, chosen.shape[0])

        columns = {n for n, v in rest.items() if _by_row(n, v)}

        def one(delta: Params, row: Batch, embed: Any, key: Any) -> tuple[Any, jax.Array]:
            base = tree.replace(params[BASE], tree.flatten(delta[OWN]))
            out = host.apply(
                base,
                {n: v[None] if n in columns else v for n, v in row.items()},
                sites=stack_sites(overlay.sites(delta[OVERLAY]), sites or {}),
                embeds=None if embed is None else embed[None],
                rng=key,
                **options,
            )
            hidden = out.hidden[:, 0] if all_hidden else out.hidden[0]
            return None if out.logits is None else out.logits[0], hidden

        axes = {n: 0 if n in columns else None for n in rest}
        every = jax.vmap(
            one,
            in_axes=(0, axes, None if embeds is None else 0, None if keys is None else 0),
            out_axes=(0, 1 if all_hidden else 0),
        )
        logits, hidden = every(deltas, rest, embeds, keys)
        return ModelOut(logits, hidden)

    def start(
        params: Params,
        batch: Batch,
        more: int,
        *,
        sites: Mapping[str, Site] | None = None,
        **options: Any,
    ) -> tuple[jax.Array, BankState]:
        assert host.decode is not None
        begin = host.decode.start
        chosen, rest = _ids(batch, ids, adapters)
        if short and not theirs:
            assert overlay.rows is not None
            both = stack_sites(overlay.rows(params.get(OVERLAY, {}), chosen), sites or {})
            logits, state = begin(params[BASE], rest, more, sites=both, **options)
            return logits, BankState(state, chosen)
        columns = {n for n, v in rest.items() if _by_row(n, v)}

        def one(delta: Params, row: Batch) -> tuple[jax.Array, Any]:
            base = tree.replace(params[BASE], tree.flatten(delta[OWN]))
            mine = {n: v[None] if n in columns else v for n, v in row.items()}
            both = stack_sites(overlay.sites(delta[OVERLAY]), sites or {})
            logits, state = begin(base, mine, more, sites=both, **options)
            # A copy of the layers that a step reads faster would be one a row here.
            return logits[0], state.replace(weights=None) if hasattr(state, "weights") else state

        axes = {n: 0 if n in columns else None for n in rest}
        logits, state = jax.vmap(one, in_axes=(0, axes))(_rows(params, chosen), rest)
        return logits, BankState(state, chosen, True)

    def step(
        params: Params,
        tokens: jax.Array,
        state: BankState,
        *,
        sites: Mapping[str, Site] | None = None,
        **options: Any,
    ) -> tuple[jax.Array, BankState]:
        assert host.decode is not None
        further = host.decode.step
        if not state.mapped:
            assert overlay.rows is not None
            both = stack_sites(overlay.rows(params.get(OVERLAY, {}), state.ids), sites or {})
            logits, inner = further(params[BASE], tokens, state.inner, sites=both, **options)
            return logits, state.replace(inner=inner)  # type: ignore[attr-defined]

        def one(delta: Params, token: jax.Array, inner: Any) -> tuple[jax.Array, Any]:
            base = tree.replace(params[BASE], tree.flatten(delta[OWN]))
            both = stack_sites(overlay.sites(delta[OVERLAY]), sites or {})
            logits, inner = further(base, token[None], inner, sites=both, **options)
            return logits[0], inner

        logits, inner = jax.vmap(one)(_rows(params, state.ids), tokens, state.inner)
        return logits, state.replace(inner=inner)  # type: ignore[attr-defined]

    rules: Rules = tuple((pattern, (None, *places)) for pattern, places in overlay.axes)
    leaves = tree.paths(jax.eval_shape(lambda key: overlay.init(key, shapes), jax.random.key(0)))
    still = rf"(?!(?:{'|'.join(overlay.fixed)})$)" if overlay.fixed else ""
    # A pattern that matches nothing is refused where it is used.
    learnt = any(not tree.matches(path, overlay.fixed) for path in leaves)
    trainable = [rf"{OVERLAY}/{still}.*"] if learnt else []
    trainable += [rf"{OWN}/.*"] if theirs else []
    return dataclasses.replace(
        model,
        init=init,
        apply=apply,
        axes=(
            *prefixed(BASE, model.axes),
            *prefixed(OVERLAY, rules),
            *prefixed(OWN, (WHOLE,)),
        ),
        trainable=tuple(trainable),
        parts=None,
        decode=None if host.decode is None else Decode(start, step),
        given=None if frozen is None else {BASE: frozen},
    )


def _rows(params: Params, ids: jax.Array) -> Params:
    """The delta and the own leaves of every row's adapter, [B, ...]."""
    return tree.rows({OVERLAY: params.get(OVERLAY, {}), OWN: params.get(OWN, {})}, ids)


def _heads(
    model: Model, params: Params, ids: jax.Array, hidden: jax.Array, rng: Any, train: bool
) -> jax.Array | None:
    """Every example's final hidden states [B, T, D] through the head of its adapter."""
    assert model.parts is not None
    head = model.parts.head
    own = tree.rows(params[OWN], ids)
    keys = None if rng is None else jax.random.split(rng, ids.shape[0])

    def one(leaves: Params, row: jax.Array, key: Any) -> Any:
        base = tree.replace(params[BASE], tree.flatten(leaves))
        inputs = Inputs(row[None], None, None, None)
        logits = head(base, row[None], inputs, rng=key, train=train)
        return None if logits is None else logits[0]

    found: jax.Array | None = jax.vmap(one, in_axes=(0, 0, None if keys is None else 0))(
        own, hidden, keys
    )
    return found


def _ids(batch: Batch, name: str, adapters: int) -> tuple[jax.Array, dict[str, Any]]:
    """The ids, and the batch without them."""
    if name not in batch:
        raise ValueError(
            f"the batch lacks {name!r} [B], the number of every row's adapter; it holds "
            f"{', '.join(batch)}"
        )
    given = batch[name]
    if not jnp.issubdtype(given.dtype, jnp.integer) or given.ndim != 1:
        raise ValueError(
            f"batch[{name!r}] must be integers [B], got {given.dtype} of shape {given.shape}"
        )
    if not isinstance(given, jax.core.Tracer):
        known = np.asarray(given)
        wrong = known[(known < 0) | (known >= adapters)]
        if wrong.size:
            raise ValueError(
                f"batch[{name!r}] names adapter {wrong[0]}; the bank holds 0 to {adapters - 1}"
            )
    return jnp.asarray(given), {n: v for n, v in batch.items() if n != name}


def _by_row(name: str, value: Any) -> bool:
    """Whether a column has a row an example: scalars and shared positions [T] do not."""
    return bool(np.ndim(value)) and not (name == "position_ids" and np.ndim(value) == 1)


def _size(stacked: Params) -> int:
    leaves = jax.tree.leaves(stacked)
    if not leaves:
        raise ValueError("the stack of deltas is empty")
    return int(leaves[0].shape[0])
