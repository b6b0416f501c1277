"""Which kernels of a model are rounded, and how.

A scheme, a rule for a whole model, or pairs of a pattern and a scheme; what a layer needs beside
its kernel, and where among the parameters that stands. ``models.quantized`` does the rounding.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from steppe.models import fake_quant as fq
from steppe.models import tree
from steppe.models.model import Model
from steppe.models.overlays.overlay import kernel_paths
from steppe.models.tree import Params

QUANT = "quant"
STACKED = r"(.*/)?layers/(.*/)?kernel"
MODES = ("token", "tensor", "static")


@dataclass(frozen=True)
class QuantConfig:
    """How one dense layer is rounded.

    Attributes:
      w_bits, a_bits: bits of its kernel and of its input, 2 to 8; 32 = as it is.
      group: so many inputs of a kernel share a step; None = all of an output channel.
      a_mode: range of the input: "token" = of each token, "tensor" = of all real tokens of the
        (global) batch, "static" = as ``params["quant"]`` has it, see ``train.quantize.calibrate``.
      ste_clip: no gradient for inputs outside of a static range.
      smooth: whether the layer has an entry ``smooth``, see the module.
      fit: step of a kernel: "absmax" or "mse", see ``fake_quant.steps``, or "fixed" = as
        ``params["quant"]`` has it, see ``train.quantize.gptq.start``.
    """

    w_bits: int = 8
    a_bits: int = 8
    group: int | None = None
    a_mode: Literal["token", "tensor", "static"] = "token"
    ste_clip: bool = False
    smooth: bool = False
    fit: Literal["absmax", "mse", "fixed"] = "absmax"

    @property
    def fixed(self) -> bool:
        """Whether the layer's kernel has steps that do not follow it."""
        return self.fit == "fixed" and self.w_bits != fq.BYPASS

    @property
    def own_fit(self) -> fq.Fit:
        """``fit`` for a method that makes the steps itself.

        Raises:
          ValueError: they are fixed.
        """
        if self.fit == "fixed":
            raise ValueError(
                "fit='fixed' has steps already: give a method that makes its own 'absmax' or 'mse'"
            )
        return self.fit

    def __post_init__(self) -> None:
        fq.check_bits(self.w_bits, "w_bits")
        fq.check_bits(self.a_bits, "a_bits")
        if self.fit != "fixed":
            fq.check_fit(self.fit)
        if self.a_mode not in MODES:
            raise ValueError(f"a_mode must be one of {', '.join(MODES)}, got {self.a_mode!r}")
        whole = isinstance(self.group, int) and not isinstance(self.group, bool)
        if self.group is not None and not (whole and self.group >= 1):
            raise ValueError(f"group must be a whole number >= 1, or None, got {self.group!r}")


# (regular expression on the whole path of a kernel, how it is rounded or None = not at all); the
# first match counts. A QuantConfig alone stands for all kernels of dense layers in the stack.
QuantRules: TypeAlias = QuantConfig | Sequence[tuple[str, QuantConfig | None]]


def parse(text: str, **more: Any) -> QuantConfig:
    """A scheme from its usual name: "w8a8", "w4a16" (inputs as they are), "w3a8-g64".

    Args:
      more: further fields of :class:`QuantConfig`.

    Raises:
      ValueError: an unknown scheme, or bits outside 2 to 8.

    Example:
      >>> parse("w4a8-g64").w_bits
      4
    """
    found = re.fullmatch(r"w([1-9]\d*)a([1-9]\d*)(?:-?g([1-9]\d*))?", text.strip().lower())
    if found is None:
        raise ValueError(f"scheme must look like w8a8, w4a16 or w4a8-g64, got {text!r}")
    w, a = (fq.BYPASS if int(n) in (16, 32) else int(n) for n in found.groups()[:2])
    group = None if found[3] is None else int(found[3])
    return QuantConfig(w, a, group, **more)


def rules(
    config: QuantConfig, *, quantize_embed: bool = False, quantize_head: bool = False
) -> tuple[tuple[str, QuantConfig | None], ...]:
    """The rules for a whole model: its stack, and where wanted the matrices around it.

    Those have no site at their inputs, so that their weights alone are rounded. Embeddings have a
    step for every column and no groups, whose sizes are of inputs and not of words, positions or
    types; a tied language-model head is rounded with them.
    """
    alone = dataclasses.replace(config, a_bits=fq.BYPASS, smooth=False)
    chosen: list[tuple[str, QuantConfig | None]] = [(STACKED, config)]
    if quantize_head:
        chosen.append((r"(head|pooler|projection)/(.*/)?kernel", alone))
    if quantize_embed:
        whole = dataclasses.replace(alone, group=None)
        chosen.append((r"(.*/)?embed/(.*/)?(table|kernel)", whole))
    return tuple(chosen)


def unquant(params: Params) -> tuple[Params, dict[str, Any]]:
    """(the network's parameters, ``quant``'s entries by site)."""
    own = {name: part for name, part in params.items() if name != QUANT}
    return own, dict(params.get(QUANT, {}).get(tree.STACK, {}))


def requant(params: Params, extra: Mapping[str, Any]) -> Params:
    """The reverse of :func:`unquant`."""
    return {**params, QUANT: {tree.STACK: dict(extra)}} if extra else params


def as_pairs(rules: QuantRules) -> tuple[tuple[str, QuantConfig | None], ...]:
    """Rules as pairs.

    Raises:
      ValueError: they are none, or a pattern is no regular expression.
    """
    if isinstance(rules, QuantConfig):
        return ((STACKED, rules),)
    if isinstance(rules, str):
        raise ValueError(f"rules must be a QuantConfig or pairs, got text: use parse({rules!r})")
    pairs = tuple((pattern, config) for pattern, config in rules)
    for pattern, _ in pairs:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule {pattern!r} is no regular expression ({error})") from error
    if not pairs:
        raise ValueError("rules must hold at least one (pattern, QuantConfig or None), got none")
    return pairs


def without_steps(rules: QuantRules) -> tuple[tuple[str, QuantConfig | None], ...]:
    """The rules for kernels that bring no steps: where they were fixed, from what is largest."""

    def one(config: QuantConfig | None) -> QuantConfig | None:
        if config is None or config.fit != "fixed":
            return config
        return dataclasses.replace(config, fit="absmax")

    return tuple((pattern, one(config)) for pattern, config in as_pairs(rules))


def resolve(model: Model | Params, rules: QuantRules) -> dict[str, QuantConfig]:
    """The path of every kernel that a rule rounds, and how.

    Args:
      model: a model, or parameters (arrays or shapes).

    Raises:
      ValueError: a pattern matches no kernel; a leaf that is no matrix or holds integers; a
        group that does not divide its inputs; inputs to be rounded where no site is.
    """
    sites = model.sites if isinstance(model, Model) else None
    params = model.abstract() if isinstance(model, Model) else unquant(model)[0]
    pairs, flat = as_pairs(rules), tree.flatten(params)
    for pattern, _ in pairs:
        if not any(re.fullmatch(pattern, path) for path in flat):
            done = any(re.fullmatch(pattern, path.removesuffix("/q")) for path in flat)
            if done:
                raise ValueError(f"the kernels of rule {pattern!r} are quantized already")
            kernels = [path for path in flat if path.endswith("/kernel")]
            raise ValueError(
                f"rule {pattern!r} matches no kernel; there are {', '.join(kernels[:4])}, ..."
            )
    known = set(kernel_paths(params).values())
    chosen = {}
    for path, leaf in flat.items():
        config = next((c for p, c in pairs if re.fullmatch(p, path)), None)
        if config is None:
            continue
        lead = int(tree.is_stacked(path))
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            raise ValueError(f"{path!r} holds integers: it is quantized already")
        if leaf.ndim - lead != 2:
            raise ValueError(
                f"a rule matches {path!r} of shape {tuple(leaf.shape)}, which is no matrix"
            )
        if config.group is not None:
            fq.check_group(config.group, leaf.shape[-2], f"{path!r} {tuple(leaf.shape)}")
        inputs = config.a_bits != fq.BYPASS or config.smooth or config.fixed
        hooked = path in known and (sites is None or site_of(path) in sites)
        if inputs and not hooked:
            raise ValueError(
                f"the model has no site at the input of {path!r}: give it a rule with a_bits=32, "
                "smooth=False and fit 'absmax' or 'mse', which rounds its weights alone"
            )
        chosen[path] = config
    return chosen


def site_of(path: str) -> str:
    """Site of the dense layer whose kernel stands at ``path``."""
    parts = path.split(tree.SEPARATOR)[:-1]
    return ".".join(part for part in parts if part != tree.STACK)
