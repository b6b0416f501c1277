"""The seam that every parameter-efficient method attaches to a frozen model by.

An overlay is three pure functions over a parameter tree of its own (its *delta*):

  init(key, params) -> delta            params: the base's, arrays or abstract shapes
  sites(delta) -> {site: Site}          what the base computes differently, see ``models.sites``
  merge(params, delta) -> params        the same function without the overlay, or None

``bind`` turns model + overlay into a model whose parameters are ``{"base": ..., "overlay":
...}``, so that the optimiser, sharding rules, checkpoints and objectives see nothing special:
the delta and the head train, the rest of the base is frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.model import Batch, Decode, Masks, Model, ModelOut, Rules
from steppe.models.sites import ENCODER, Site, stack_sites
from steppe.models.tree import Params

BASE, OVERLAY = "base", "overlay"
# The last sharding rule: what no other one names is whole on every device.
WHOLE = (r".*", ())


class Merged(NamedTuple):
    """Merged parameters and what the merge changed.

    Attributes:
      params: the base's tree with the overlay folded in.
      largest_difference: largest absolute difference between the logits of the overlay and
        of the merged model on the batch that was given.
    """

    params: Params
    largest_difference: float


@dataclass(frozen=True)
class Overlay:
    """A parameter-efficient method as a value.

    Attributes:
      name: for error messages and file names.
      init, sites, merge: see the module; merge is None where no merged form exists.
      axes: sharding rules of the delta, paths as in the delta.
      trainable: paths of the base that train beside the delta and the head, as regexes.
      settings: what it was made with, as (name, JSON value) pairs: written beside a saved delta.
      fixed: paths of the delta that do not train, as regexes.
      stops: paths of the base that get no gradient, or not in all layers, as regexes.
      rows: ``(deltas, ids) -> {site: Site}`` for a batch of which example i has the delta number
        ids[i] of a stack (leaves [adapters, ...]), see ``bank``; None where nothing is better
        than the model mapped over the examples.
      around: the base as this overlay needs it, with further sites that ``sites`` attaches to: a
        place between two layers, or one that sees the batch. None = the base as it is.
    """

    name: str
    init: Callable[[jax.Array, Params], Params]
    sites: Callable[[Params], dict[str, Site]]
    merge: Callable[[Params, Params], Params] | None = None
    axes: Rules = (WHOLE,)
    trainable: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    fixed: tuple[str, ...] = ()
    rows: Callable[[Params, jax.Array], dict[str, Site]] | None = None
    around: Callable[[Model], Model] | None = None
    stops: tuple[str, ...] = ()

    def bind(
        self,
        model: Model,
        frozen: Params | None = None,
        *,
        trainable: tuple[str, ...] | None = None,
        also: tuple[str, ...] = (),
    ) -> Model:
        """``model`` with this overlay attached.

        Args:
          frozen: the base's parameters; None = the bound model initialises them too.
          trainable: paths of the base that train beside the delta; those that match nothing
            are ignored. Default: the head, unless it is that of a language model, which is
            pretrained as the rest is.
          also: more such paths, beside those of ``trainable`` or of its default.

        Raises:
          ValueError: ``frozen`` are not the parameters of ``model``, or what is to train gets no
            gradient (``stops``).
        """
        if model.given is not None:
            raise ValueError("the model is bound already; compose the overlays instead")
        if frozen is not None:
            tree.same_structure(frozen, model.abstract(), ("frozen", "the model"))
        host = model if self.around is None else self.around(model)

        def init(key: jax.Array) -> Params:
            base_key, delta_key = jax.random.split(key)
            if frozen is not None:
                return {OVERLAY: self.init(delta_key, frozen)}
            base = model.init(base_key)
            return {BASE: base, OVERLAY: self.init(delta_key, base)}

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
            ours = self.sites(params.get(OVERLAY, {}))
            return host.apply(
                params[BASE],
                batch,
                sites=stack_sites(ours, sites or {}),
                masks=masks,
                embeds=embeds,
                rng=rng,
                train=train,
                all_hidden=all_hidden,
            )

        decode = host.decode
        if decode is not None:
            base_start, base_step = decode

            def start(
                params: Params,
                batch: Batch,
                more: int,
                *,
                sites: Mapping[str, Site] | None = None,
                **options: Any,
            ) -> tuple[jax.Array, Any]:
                both = stack_sites(self.sites(params.get(OVERLAY, {})), sites or {})
                return base_start(params[BASE], batch, more, sites=both, **options)

            def step(
                params: Params,
                tokens: jax.Array,
                state: Any,
                *,
                sites: Mapping[str, Site] | None = None,
                **options: Any,
            ) -> tuple[jax.Array, Any]:
                both = stack_sites(self.sites(params.get(OVERLAY, {})), sites or {})
                return base_step(params[BASE], tokens, state, sites=both, **options)

            decode = Decode(start, step)

        if trainable is None:  # what the overlay names, and the head
            head = getattr(model.config, "head", None)
            own = () if head is not None and head.kind in ("lm", "mlm") else (r"head/.*",)
            trainable = (*self.trainable, *own)
        trainable = (*trainable, *also)
        base_paths = tree.paths(model.abstract())
        live = [p for p in trainable if any(tree.matches(path, (p,)) for path in base_paths)]
        dead = [p for p in base_paths if tree.matches(p, live) and tree.matches(p, self.stops)]
        if dead:
            raise ValueError(
                f"{dead[0]} of the base is to train, but {self.name} ends the gradient above it; "
                "use stop=False, or leave what trains it out"
            )
        given = None if frozen is None else {BASE: frozen}
        shapes = frozen if frozen is not None else model.abstract()
        leaves = tree.paths(jax.eval_shape(self.init, jax.random.key(0), shapes))
        still = rf"(?!(?:{'|'.join(self.fixed)})$)" if self.fixed else ""
        # A pattern that matches nothing is refused where it is used.
        learnt = any(not tree.matches(path, self.fixed) for path in leaves)
        ours = (rf"{OVERLAY}/{still}.*",) if learnt else ()
        return dataclasses.replace(
            model,
            init=init,
            apply=apply,
            axes=prefixed(BASE, model.axes) + prefixed(OVERLAY, self.axes),
            trainable=(*ours, *(rf"{BASE}/(?:{p})" for p in live)),
            parts=None,
            decode=decode,
            given=given,
        )

    def merged(self, model: Model, params: Params, batch: Batch | None = None) -> Merged:
        """Folds the delta of bound ``params`` into its base, in float32.

        Args:
          model: the base model (not the bound one).
          params: parameters of the bound model.
          batch: where the largest logit difference is taken; None reports NaN.

        Raises:
          ValueError: this overlay has no merged form.
        """
        if self.merge is None:
            raise ValueError(f"the overlay {self.name!r} has no merged form; keep it attached")
        folded = self.merge(params[BASE], params.get(OVERLAY, {}))
        if batch is None:
            return Merged(folded, float("nan"))

        @jax.jit
        def difference(params: Params, folded: Params, batch: Batch) -> jax.Array:
            attached = model.apply(params[BASE], batch, sites=self.sites(params.get(OVERLAY, {})))
            plain = model.apply(folded, batch)
            outputs = [o.hidden if o.logits is None else o.logits for o in (attached, plain)]
            left, right = (o.astype(jnp.float32) for o in outputs)
            return jnp.abs(left - right).max()

        return Merged(folded, float(difference(params, folded, dict(batch))))


def prefixed(root: str, rules: Rules) -> Rules:
    """Rules of a tree as those of the same tree below ``root``."""
    return tuple((rf"{root}/(?:{pattern})", axes) for pattern, axes in rules)


def kernel_paths(params: Params) -> dict[str, str]:
    """Site of every dense layer -> the path of its stacked kernel.

    ``attn.q`` -> ``layers/attn/q/kernel``; of a model with several stacks, ``encoder.attn.q``
    -> ``encoder/layers/attn/q/kernel``.
    """
    found = {}
    for path in tree.paths(params):
        *parents, last = path.split(tree.SEPARATOR)
        if last == "kernel" and tree.STACK in parents:
            found[".".join(p for p in parents if p != tree.STACK)] = path
    return found


def site_path(params: Params, site: str) -> str:
    """The path of the stacked kernel that the dense layer of ``site`` multiplies by.

    Raises:
      ValueError: the site is not a dense layer of this model; those that are get listed.
    """
    dense = kernel_paths(params)
    if site not in dense:
        raise ValueError(f"no dense layer at site {site!r}; there are {', '.join(sorted(dense))}")
    return dense[site]


def site_kernel(params: Params, site: str) -> Any:
    """The stacked kernel [L, d_in, d_out] that the dense layer of ``site`` multiplies by.

    Raises:
      ValueError: as :func:`site_path`.
    """
    return tree.get(params, site_path(params, site))


def stack_prefix(stack: str) -> str:
    """What the sites of a stack of layers begin with: "encoder.", or nothing in a model of one.

    Raises:
      ValueError: neither "encoder" nor empty.
    """
    if stack not in ("", ENCODER):
        raise ValueError(f"stack must be 'encoder', or empty for a model of one, got {stack!r}")
    return f"{stack}." if stack else ""


def stack_shape(params: Params, stack: str, what: str) -> tuple[int, int]:
    """Depth and width (L, D) of the layers of ``stack``.

    Args:
      stack: "" = of a model that has one stack.
      what: who asks, for the message.

    Raises:
      ValueError: the model has no such stack.
    """
    found, site = kernel_paths(params), f"{stack_prefix(stack)}attn.q"
    if site not in found:
        cure = f"; use stack={ENCODER} for its encoder" if f"{ENCODER}.attn.q" in found else ""
        cure = "; leave stack out" if stack and "attn.q" in found else cure
        raise ValueError(
            f"{what} needs a model of {'two stacks' if stack else 'one stack'} of layers; this one "
            f"has {', '.join(sorted(found)) or 'no dense layer'}{cure}"
        )
    layers, width, _ = tree.get(params, found[site]).shape
    return layers, width
