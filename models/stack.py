"""A stack of equal layers: parameters with a leading layer axis, run by one ``lax.scan``.

Compile time is constant in depth, and everything that differs by layer (parameters, site
deltas, masks, keys) is one slice of the scan's inputs. A stack can be run in parts,
``start <= layer < stop``, which is how early exit, late prompts and truncated back-propagation
are written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.layout import rows
from steppe.models.model import Masks
from steppe.models.sites import OUTER_SITES, Hooks, Site, SiteContext, heard, listening, tell

REMAT = ("auto", "dots", "full", "none")


def init_stack(init: Callable[[jax.Array], Any], key: jax.Array, layers: int) -> Any:
    """``layers`` independent initialisations stacked on axis 0 of every leaf."""
    return jax.vmap(init)(jax.random.split(key, layers))


def _check_depth(params: Any, masks: Masks | None, layers: int) -> None:
    """A scan would quietly run the first layers of a deeper stack or mask."""
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 0 or leaf.shape[0] != layers:
            raise ValueError(
                f"the parameters hold {leaf.shape[0] if leaf.ndim else 'no'} layers, the config "
                f"{layers}; they are of another model"
            )
    for name, mask, ndim in zip(Masks._fields, masks or (), (2, 2, 1)):
        if mask is not None and (mask.ndim != ndim or mask.shape[0] != layers):
            wanted = "[L]" if ndim == 1 else "[L, H]" if name == "head" else "[L, F]"
            raise ValueError(
                f"masks.{name} must be {wanted} with L = {layers}, got shape {tuple(mask.shape)}"
            )


def run_stack(
    block: Callable[..., jax.Array],
    params: Any,
    x: jax.Array,
    *,
    layers: int,
    start: int = 0,
    stop: int | None = None,
    sites: Mapping[str, Site] | None = None,
    masks: Masks | None = None,
    context: SiteContext | None = None,
    remat: str = "auto",
    unroll: int = 1,
    all_hidden: bool = False,
    extra: Any = None,
) -> jax.Array:
    """Runs layers ``start <= l < stop`` of a stack.

    Args:
      block: ``(layer_params, x, *, hooks, head_mask, ffn_mask, layer_mask, rng) -> x``.
      params: the stacked parameters, all ``layers`` of them.
      x: input of layer ``start``, [B, T, D].
      sites: attached overlays; those inside the layers are sliced layer by layer.
      context: what sites see beside the layer's index and key; ``context.rng`` seeds both.
      remat: what the backward pass keeps of a layer: "none" = all intermediates, "dots" =
        outputs of the projections (the rest is cheap to compute again, and on a CPU
        recomputing is faster than writing it to the scan's buffers), "full" = the input only,
        "auto" = "dots" for layers that are looped over and "none" for those written out.
      unroll: ranges of at most so many layers are written out instead of looped over.
      all_hidden: return the input and every layer's output, [stop - start + 1, B, T, D].
      extra: further arrays [L, ...]; the block gets this layer's slice as ``extra``.

    Raises:
      ValueError: the range is not within the stack, params or masks are of another depth, or
        remat is unknown.
    """
    stop = layers if stop is None else stop
    if not 0 <= start <= stop <= layers:
        raise ValueError(f"layers {start}:{stop} are not within a stack of {layers}")
    if remat not in REMAT:
        raise ValueError(f"remat must be one of {', '.join(REMAT)}, got {remat!r}")
    _check_depth(params, masks, layers)
    context = context or SiteContext()
    masks = masks or Masks()
    inner = {n: s.delta for n, s in (sites or {}).items() if n not in OUTER_SITES}
    need_index = bool(inner) or context.rng is not None

    def cut(tree: Any) -> Any:
        if (start, stop) == (0, layers):
            return tree
        return jax.tree.map(lambda a: a[start:stop], tree)

    index = jnp.arange(start, stop) if need_index else None
    xs = (cut(params), cut(inner), cut(masks), index, cut(extra))

    ears = listening if heard() else contextlib.nullcontext

    def body(x: jax.Array, slices: Any) -> tuple[jax.Array, tuple[jax.Array | None, Any]]:
        layer_params, deltas, layer_masks, index, more = slices
        rng = None if context.rng is None else jax.random.fold_in(context.rng, index)
        hooks = Hooks(sites, deltas, context._replace(layer=index, rng=rng))

        def run(y: jax.Array) -> jax.Array:
            return block(
                layer_params,
                y,
                hooks=hooks,
                head_mask=layer_masks.head,
                ffn_mask=layer_masks.ffn,
                layer_mask=layer_masks.layer,
                rng=rng,
                **({} if extra is None else {"extra": more}),
            )

        # What sites tell is of this layer's trace: it leaves it as an output.
        with ears() as told:
            y = rows(hooks("resid", x, run))
        return y, (y if all_hidden else None, told)

    length = stop - start
    flat = length <= unroll
    if remat == "auto":
        remat = "none" if flat else "dots"
    if remat == "full":
        body = jax.checkpoint(body, prevent_cse=False)
    elif remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    if length == 1:  # no loop: the layer may give fewer positions than it is given
        out, single = body(rows(x), jax.tree.map(lambda a: a[0], xs))
        every, told = jax.tree.map(lambda a: a[None], single)
    else:
        out, (every, told) = jax.lax.scan(
            body, rows(x), xs, length=length, unroll=max(length, 1) if flat else 1
        )
    for name, value in (told or {}).items():
        tell(name, value)
    return out if every is None else jnp.concatenate([x[None], every])
