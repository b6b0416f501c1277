"""From settings to the optimiser: AdamW, or a sharpness-aware method around it.

=========  ====================================  ==========================================
method     its own settings                      gradients a step
=========  ====================================  ==========================================
none       (AdamW)                               1
sam        rho, ascent, climb                    2
asam       rho, eta, ascent, climb               2
fsam       rho, keep_ratio, refresh_every,       2
           fisher, mask, exclude, ascent, climb
gsam       rho, alpha, ascent                    2
looksam    rho, alpha, look_every                1 + 1 / look_every
esam       rho, beta, gamma, climb               1 + gamma, and a forward pass
=========  ====================================  ==========================================

``climb`` makes the first gradient an estimate that costs less, see ``steppe.train.ascent``.

The default radii are meant for fine-tuning small pretrained encoders with AdamW: far below the
papers' 0.05, which is for networks that are trained from the beginning. So is LookSAM's alpha, 0.7
in the paper: the kept direction has that share of the gradient's length whatever rho is, and with
0.7 MiniLM-L6 learnt nothing (RESULTS, Flat minima).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from steppe.launch.config import FinetuneConfig
    from steppe.optim.fsam import Structure
    from steppe.train.ascent import Ascent
    from steppe.train.types import Objective

Method = Literal["none", "sam", "asam", "fsam", "gsam", "looksam", "esam"]

WHOLE = "whole"

# method -> its settings and their defaults; rho is every method's first.
DEFAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "sam": {"rho": 0.01, "ascent": "global", "climb": WHOLE},
    "asam": {"rho": 0.1, "eta": 0.01, "ascent": "global", "climb": WHOLE},
    "fsam": {
        "rho": 0.02,
        "keep_ratio": 0.1,
        "refresh_every": 100,
        "fisher": "batch",
        "mask": "element",
        "ascent": "global",
        "climb": WHOLE,
    },
    "gsam": {"rho": 0.01, "alpha": 0.4, "ascent": "global"},
    "looksam": {"rho": 0.01, "alpha": 0.1, "look_every": 5},
    "esam": {"rho": 0.01, "beta": 0.5, "gamma": 0.5, "climb": WHOLE},
}
# Settings that are None until somebody gives them.
OPTIONS = tuple(dict.fromkeys(name for own in DEFAULTS.values() for name in own))
# All settings of this file: they are nothing to a run without a method.
SETTINGS = ("sharpness", "rho_warmup", "exclude", *OPTIONS)


def check(config: FinetuneConfig) -> None:
    """Refuses settings that the method does not have, and values out of range.

    Raises:
      ValueError: naming the setting, its value and the cure.
    """
    method = config.sharpness
    if method not in DEFAULTS:
        raise ValueError(f"sharpness must be one of {', '.join(DEFAULTS)}, got {method!r}")
    own = DEFAULTS[method]
    given = {name: getattr(config, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if config.rho_warmup:
        given["rho_warmup"] = config.rho_warmup
    if config.exclude:
        given["exclude"] = config.exclude
    for name, value in given.items():
        like = {"rho_warmup": "rho", "exclude": "mask"}.get(name, name)
        if like in own:
            continue
        having = [m for m, names in DEFAULTS.items() if like in names]
        raise ValueError(
            f"{name}={value!r} is no setting of sharpness={method!r}; it belongs to "
            f"sharpness {' or '.join(having)}"
        )
    if method != "none" and config.probe:
        raise ValueError(
            "probe=True fits the head without steps: it goes with sharpness='none' only, "
            f"got {method!r}"
        )
    if not 0.0 <= config.rho_warmup <= 1.0:
        raise ValueError(f"rho_warmup must be in [0, 1], got {config.rho_warmup}")
    _check_values(given)


def _check_values(given: dict[str, Any]) -> None:
    for name in ("rho", "eta"):
        value = given.get(name, 0.0)
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    if not 0.0 <= given.get("keep_ratio", 0.0) <= 1.0:
        raise ValueError(f"keep_ratio must be in [0, 1], got {given['keep_ratio']}")
    for name in ("refresh_every", "look_every"):
        if given.get(name, 1) < 1:
            raise ValueError(f"{name} must be >= 1, got {given[name]}")
    if not math.isfinite(given.get("alpha", 0.0)):
        raise ValueError(f"alpha must be a finite number, got {given['alpha']}")
    for name in ("beta", "gamma"):
        if not 0.0 < given.get(name, 1.0) <= 1.0:
            raise ValueError(f"{name} must be in (0, 1], got {given[name]}")
    if given.get("fisher", "batch") not in ("batch", "per_sample"):
        raise ValueError(f"fisher must be 'batch' or 'per_sample', got {given['fisher']!r}")
    if "mask" in given:
        structure(given["mask"])
    if "ascent" in given:
        groups(given["ascent"])
    if (
        "climb" in given
        and climb_parts(given["climb"])
        and given.get("ascent", "global") != "global"
    ):
        raise ValueError(
            f"climb={given['climb']!r} is of the whole batch, and ascent={given['ascent']!r} lets "
            "groups of rows climb by themselves: leave one of them out"
        )


def options(config: FinetuneConfig) -> dict[str, Any]:
    """The method's own settings, its defaults where none are given."""
    given = {name: getattr(config, name) for name in DEFAULTS[config.sharpness]}
    usual = DEFAULTS[config.sharpness]
    return {name: usual[name] if value is None else value for name, value in given.items()}


def resolved(config: FinetuneConfig) -> FinetuneConfig:
    """The config with the method's defaults filled in, as it is written beside the run."""
    return dataclasses.replace(config, **options(config))


def structure(mask: str) -> Structure:
    """The text of ``--mask`` as ``steppe.optim.fsam`` takes it.

    ``element``, ``tensor``, ``layer``, ``head:HEADS``, ``head:HEADS:KV_HEADS`` or ``N:M``.

    Raises:
      ValueError: none of these.
    """
    if mask in ("element", "tensor", "layer"):
        return mask
    first, *rest = mask.split(":")
    numbers = tuple(int(word) for word in rest if word.isdecimal() and int(word))
    if len(numbers) == len(rest):
        if first == "head" and len(numbers) == 1:
            return "head", numbers[0]
        if first == "head" and len(numbers) == 2:
            return "head", numbers[0], numbers[1]
        if first.isdecimal() and len(numbers) == 1 and 0 < int(first) <= numbers[0]:
            return int(first), numbers[0]
    raise ValueError(
        f"mask must be element, tensor, layer, head:HEADS or N:M with 0 < N <= M, got {mask!r}"
    )


def groups(ascent: str) -> str | int:
    """``"global"``, ``"device"`` or a number of rows as ``steppe.optim.sam`` takes it.

    Raises:
      ValueError: none of these.
    """
    if ascent in ("global", "device"):
        return ascent
    if ascent.isdecimal() and int(ascent):
        return int(ascent)
    raise ValueError(f"ascent must be global, device or a number of rows, got {ascent!r}")


def climb_parts(text: str) -> dict[str, Any]:
    """The text of ``--climb``: ``fraction``, ``cut`` and ``dtype``, those of them that it names.

    Raises:
      ValueError: a part that is none of them, or one that comes twice.
    """
    parts: dict[str, Any] = {}
    for word in () if text == WHOLE else text.split("+"):
        name, _, number = word.partition(":")
        made: dict[str, Any] = {}
        if word in ("bfloat16", "float16"):
            made["dtype"] = word
        elif name == "cut" and number.isdecimal() and int(number):
            made["cut"] = int(number)
        elif name == "fraction" and _share_of(number):
            made["fraction"] = float(number)
        if not made or made.keys() & parts.keys():
            raise ValueError(
                "climb must be whole, or of fraction:SHARE with a share in (0, 1], cut:LAYER with "
                "a layer from 1 on, and bfloat16 or float16, each once and joined by +, got "
                f"{text!r}"
            )
        parts |= made
    return parts


def _share_of(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def climb(
    config: FinetuneConfig, model: Any, objective: Callable[[Any], Objective] | None
) -> Ascent | None:
    """How a step of the run computes its first gradient; None = on the whole.

    Args:
      model: the model that is trained.
      objective: makes the step's objective of a model; None where that is not a function of a
        model alone, which cannot be cut.

    Raises:
      ValueError: a cut that the model or the objective does not allow.
    """
    from steppe.train import ascent, cut

    given = options(config).get("climb", WHOLE)
    parts = climb_parts(given)
    if not parts:
        return None
    if "cut" in parts:
        if objective is None:
            raise ValueError(
                f"climb={given!r} cuts the network, which the objective of this run does not "
                "allow: use fraction:SHARE or bfloat16"
            )
        try:
            parts["cut"] = cut.at_layer(model, parts["cut"], objective)
        except ValueError as error:
            raise ValueError(f"climb={given!r}: {error}") from error
    return ascent.Ascent(**parts)


def warmed(rho: Any, share: float, steps: int) -> Any:
    """rho that rises linearly from 0 over the first share of the steps.

    Args:
      rho: a number, or a scalar array.
      share: of the run; 0 = rho from the first step on.
      steps: length of the run, in updates.

    Returns:
      A schedule, or ``rho`` itself where it does not rise. The first update has radius 0 and
      costs one gradient.
    """
    import jax.numpy as jnp

    rise = round(share * steps)
    if rise == 0:
        return rho
    return lambda step: rho * jnp.minimum(step / rise, 1.0)


def transform(
    config: FinetuneConfig, schedule: Callable[[Any], Any], steps: int, rho: Any = None
) -> Any:
    """The optax transform of a run.

    Args:
      schedule: step -> learning rate.
      steps: length of the run, for the warm-up of rho.
      rho: in place of the config's, such as an array that is filled in later.
    """
    from steppe import optim

    o = config.optim
    base = optim.adamw(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    method, own = config.sharpness, options(config)
    if method == "none":
        return base
    radius = warmed(own["rho"] if rho is None else rho, config.rho_warmup, steps)
    if method in ("sam", "asam", "gsam"):
        ascent = groups(own["ascent"])
        if method == "sam":
            return optim.sam(base, radius, ascent=ascent)
        if method == "asam":
            return optim.asam(base, radius, eta=own["eta"], ascent=ascent)
        return optim.gsam(base, radius, alpha=own["alpha"], ascent=ascent)
    if method == "looksam":
        return optim.looksam(base, radius, every=own["look_every"], alpha=own["alpha"])
    if method == "esam":
        return optim.esam(base, radius, beta=own["beta"], gamma=own["gamma"], seed=config.seed)
    return optim.fsam(
        base,
        radius,
        keep_ratio=own["keep_ratio"],
        refresh_every=own["refresh_every"],
        fisher=own["fisher"],
        structure=structure(own["mask"]),
        exclude=config.exclude,
        ascent=groups(own["ascent"]),
    )


def gradients(config: FinetuneConfig) -> float:
    """Gradients that a step takes, on average over a run and apart from a warm-up of rho."""
    own = options(config)
    if config.sharpness == "none" or own["rho"] == 0 or own.get("keep_ratio") == 0:
        return 1.0
    if config.sharpness == "looksam":
        return 1.0 + 1.0 / float(own["look_every"])
    parts = climb_parts(own.get("climb", WHOLE))
    # A cut saves as much as lies below it of the network, whose depth is not known here.
    first = float(parts.get("fraction", 1.0))
    if config.sharpness == "esam":
        share = float(own["gamma"])
        # Losses of all rows, of which a first gradient of all rows has one half already; a forward
        # pass is about a third of a gradient.
        rows = (2 if parts else 1) / 3 if share < 1.0 else 0.0
        return first + share + rows
    return 1.0 + first


def describe(config: FinetuneConfig) -> str:
    """The optimiser in a few words: ``FSAM, rho 0.02, keep_ratio 0.1; 2 gradients a step``."""
    if config.sharpness == "none":
        return "AdamW; 1 gradient a step"
    usual = DEFAULTS[config.sharpness]
    said = [
        f"{name} {value:g}" if isinstance(value, (int, float)) else f"{name} {value}"
        for name, value in options(config).items()
        if value != usual[name] or name not in ("fisher", "mask", "eta", "ascent", "climb")
    ]
    if config.rho_warmup:
        said.append(f"rho rising over the first {config.rho_warmup:.0%} of the steps")
    cost = gradients(config)
    what = {"looksam": "LookSAM"}.get(config.sharpness, config.sharpness.upper())
    return f"{what} on AdamW, {', '.join(said)}; {cost:.3g} gradients a step"
