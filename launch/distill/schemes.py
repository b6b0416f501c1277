"""The schemes of ``steppe distill``: what each compares, on whose texts, and its own settings.

scheme    divergences (the first is the default)   texts (the first is the default)     classes
kd        any, forward_kl                          any, gt                              yes
dkd       forward_kl, in two weighted parts        any, gt                              yes
seqkd     none: the label loss on those texts      teacher
imitkd    forward_kl                               mix_request, student, mix_token
gkd       any, jsd                                 mix_request, student, gt
fdistill  tvd, jsd, forward_kl, reverse_kl         mix_request, student, teacher, mix_token (1)
minillm   reverse_kl, by policy gradient           mix_token, student
distillm  skew_forward_kl, skew_reverse_kl         replay, student, mix_request, gt
atkd      forward_kl, reverse_kl, by difficulty    any, gt                              yes
kid       any, reverse_kl                          imperfect
dwt       forward_kl, with a falling weight        gt                                   yes
ctcd      forward_kl, both ways: both train        gt                                   yes
features  none: hidden states or attention         gt                                   yes

(1) forward_kl: teacher first, reverse_kl: student first, on whose texts alone they are taken.

The objectives are those of ``steppe.train.distill``. Settings that are None are the scheme's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from steppe.launch.distill.settings import DistillConfig

# As in steppe.train.distill.KINDS; named here so that settings can be read without jax.
KINDS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
)
ANY = ("gt", "teacher", "student", "mix_request", "mix_token", "imperfect", "replay")
# Policies that write texts between steps; "imperfect" fills masked tokens inside the step.
WRITING = ("teacher", "student", "mix_request", "mix_token", "replay")
WRITTEN_TASKS = ("lm", "chat")
CLASS_TASKS = ("classification", "pair")


def _any(first: str) -> tuple[str, ...]:
    return (first, *(kind for kind in KINDS if kind != first))


class Scheme(NamedTuple):
    """A row of the table above.

    Attributes:
      divergences, policies: what goes with it, the default first; no divergence = none is
        compared.
      weight: default share of the distillation loss.
      fixed: whether that share cannot be chosen.
      classes: whether it serves classification too.
      says: its name in a report.
    """

    divergences: tuple[str, ...]
    policies: tuple[str, ...]
    weight: float | None
    fixed: bool
    classes: bool
    says: str


SCHEMES: dict[str, Scheme] = {
    "kd": Scheme(_any("forward_kl"), ANY, 0.5, False, True, "distillation"),
    "dkd": Scheme(("forward_kl",), ANY, 0.5, False, True, "decoupled distillation"),
    "seqkd": Scheme((), ("teacher",), 0.0, True, False, "SeqKD"),
    "imitkd": Scheme(
        ("forward_kl",), ("mix_request", "student", "mix_token"), 1.0, False, False, "ImitKD"
    ),
    "gkd": Scheme(_any("jsd"), ("mix_request", "student", "gt"), 1.0, False, False, "GKD"),
    "fdistill": Scheme(
        ("tvd", "jsd", "forward_kl", "reverse_kl"),
        ("mix_request", "student", "teacher", "mix_token"),
        1.0,
        False,
        False,
        "f-distill",
    ),
    "minillm": Scheme(("reverse_kl",), ("mix_token", "student"), 1.0, True, False, "MiniLLM"),
    "distillm": Scheme(
        ("skew_forward_kl", "skew_reverse_kl"),
        ("replay", "student", "mix_request", "gt"),
        1.0,
        False,
        False,
        "DistiLLM",
    ),
    "atkd": Scheme(("forward_kl", "reverse_kl"), ANY, 1.0, False, True, "ATKD"),
    "kid": Scheme(_any("reverse_kl"), ("imperfect",), 0.5, False, False, "KID"),
    "dwt": Scheme(("forward_kl",), ("gt",), None, False, True, "DWT"),
    "ctcd": Scheme(("forward_kl",), ("gt",), 0.5, False, True, "CTCD, both train"),
    "features": Scheme((), ("gt",), 0.5, False, True, "feature distillation"),
}
# Schemes whose objective is ``steppe.train.distill.kd``.
PLAIN = ("kd", "imitkd", "gkd", "fdistill", "distillm")

# Where the default of a divergence is not the first of the scheme's policies.
WRITERS = {("fdistill", "forward_kl"): "teacher", ("fdistill", "reverse_kl"): "student"}

Reads = Callable[[Any], bool]
# setting -> (default, whether a configuration reads it, what does)
OPTIONS: dict[str, tuple[Any, Reads, str]] = {
    "temperature": (
        1.0,
        lambda c: c.scheme in (*PLAIN, "dwt", "ctcd"),
        f"scheme {', '.join(PLAIN)}, dwt, ctcd",
    ),
    "beta": (
        0.5,
        lambda c: c.divergence in ("jsd", "symmetric_kl"),
        "divergence jsd, symmetric_kl",
    ),
    "alpha": (
        0.1,
        lambda c: str(c.divergence).startswith("skew_"),
        "divergence skew_forward_kl, skew_reverse_kl",
    ),
    "top_k": (None, lambda c: c.scheme in PLAIN, f"scheme {', '.join(PLAIN)}"),
    "store": (
        None,
        lambda c: (
            (c.scheme, c.policy) == ("kd", "gt")
            and c.data.task in WRITTEN_TASKS
            and c.top_k is not None
            and c.vocab_chunk is None
        ),
        "scheme kd with policy gt, data.task lm, chat, a top_k and no vocab_chunk",
    ),
    "vocab_chunk": (
        None,
        lambda c: c.data.task in WRITTEN_TASKS and c.scheme not in ("minillm", "features", "ctcd"),
        "data.task lm, chat, and no scheme minillm, features or ctcd",
    ),
    "token_chunk": (
        None,
        lambda c: c.data.task in WRITTEN_TASKS and c.scheme in PLAIN and c.top_k is None,
        f"data.task lm, chat with scheme {', '.join(PLAIN)}, and no top_k",
    ),
    "tkd": (1.0, lambda c: c.scheme == "dkd", "scheme dkd"),
    "dkd": (8.0, lambda c: c.scheme == "dkd", "scheme dkd"),
    "lam": (0.2, lambda c: c.scheme == "atkd", "scheme atkd"),
    "hard_ratio": (0.5, lambda c: c.scheme == "atkd", "scheme atkd"),
    "soft_start": (4.0, lambda c: c.scheme == "dwt" and c.weight is None, "scheme dwt, no weight"),
    "soft_end": (1.0, lambda c: c.scheme == "dwt" and c.weight is None, "scheme dwt, no weight"),
    "back": (0.5, lambda c: c.scheme == "ctcd", "scheme ctcd"),
    "features": ("hidden", lambda c: c.scheme == "features", "scheme features"),
    "layer_map": ((), lambda c: c.scheme == "features", "scheme features"),
    "share": (0.5, lambda c: str(c.policy).startswith("mix_"), "policy mix_request, mix_token"),
    "mix_with": ("gt", lambda c: c.policy == "mix_request", "policy mix_request"),
    "mask_share": (0.2, lambda c: c.policy == "imperfect", "policy imperfect"),
    "mask_strategy": ("random", lambda c: c.policy == "imperfect", "policy imperfect"),
    "capacity": (1000, lambda c: c.policy == "replay", "policy replay"),
    "prompt_tokens": (
        16,
        lambda c: c.policy in WRITING and c.data.task == "lm",
        "data.task lm with a policy that writes texts",
    ),
    "max_new_tokens": (64, lambda c: c.policy in WRITING, "policies that write texts"),
    "sample_temperature": (1.0, lambda c: c.policy in WRITING, "policies that write texts"),
}
# Where a scheme's default is another one.
OWN: dict[tuple[str, str], Any] = {
    ("minillm", "share"): 0.2,
    ("fdistill", "mix_with"): "teacher",
}


def resolved(config: DistillConfig) -> DistillConfig:
    """The settings with everything that is None filled in, as they are written beside the run.

    Raises:
      ValueError: settings that do not go together; see :func:`check`.
    """
    scheme = SCHEMES[config.scheme]
    change: dict[str, Any] = {}
    if config.divergence is None and scheme.divergences:
        change["divergence"] = scheme.divergences[0]
    if config.policy is None:
        change["policy"] = policy_of(config)
    if config.weight is None:
        change["weight"] = scheme.weight
    named = dataclasses.replace(config, **change)
    filled = {
        name: OWN.get((config.scheme, name), usual)
        for name, (usual, reads, _) in OPTIONS.items()
        if getattr(named, name) in (None, ()) and reads(named)
    }
    if "share" in filled and named.scheme == "fdistill" and named.divergence == "jsd":
        # The student's half of the divergence weighs 1 - beta.
        beta = filled["beta"] if named.beta is None else named.beta
        filled["share"] = round(1.0 - beta, 9)
    if named.policy in WRITING and config.data.packed:
        # A row of several texts has no prompt that could be gone on with.
        filled["data"] = dataclasses.replace(config.data, packed=False)
    return dataclasses.replace(named, **filled)


def policy_of(config: DistillConfig) -> str:
    """The policy of the settings, or the default of their scheme and divergence."""
    if config.policy is not None:
        return config.policy
    scheme = SCHEMES[config.scheme]
    return WRITERS.get((config.scheme, str(config.divergence)), scheme.policies[0])


def check(config: DistillConfig) -> None:
    """Refuses what does not go with the scheme, before anything is read.

    Raises:
      ValueError: naming the setting, its value and what goes.
    """
    if config.scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {config.scheme!r}")
    scheme, task = SCHEMES[config.scheme], config.data.task
    if task not in (*WRITTEN_TASKS, *CLASS_TASKS):
        raise ValueError(
            f"data.task={task!r} is not distilled: it takes "
            f"{', '.join((*CLASS_TASKS, *WRITTEN_TASKS))}"
        )
    _goes("divergence", config.divergence, scheme.divergences, config.scheme)
    _goes("policy", config.policy, scheme.policies, config.scheme)
    policy = policy_of(config)
    if task in CLASS_TASKS and not scheme.classes:
        having = ", ".join(name for name, one in SCHEMES.items() if one.classes)
        raise ValueError(
            f"scheme={config.scheme!r} needs a decoder that writes text (data.task lm or chat), "
            f"got data.task={task!r}; classes are distilled by {having}"
        )
    if task in CLASS_TASKS and policy != "gt":
        raise ValueError(
            f"policy={policy!r} needs a decoder that writes text (data.task lm or chat), got "
            f"data.task={task!r}; with classes the policy is gt"
        )
    if config.weight is not None and scheme.fixed and config.weight != scheme.weight:
        raise ValueError(
            f"weight={config.weight} is no setting of scheme={config.scheme!r}, whose loss has one "
            "term; leave it out"
        )
    if config.scheme == "minillm" and config.sample_temperature not in (None, 1.0):
        raise ValueError(
            f"sample_temperature={config.sample_temperature} does not go with scheme='minillm', "
            "whose importance weights are those of samples at temperature 1"
        )
    if config.weight == 0 and not scheme.fixed:
        raise ValueError("weight=0 leaves the teacher out: use steppe finetune for that")
    if config.scheme == "ctcd" and config.teacher_dtype != "float32":
        raise ValueError(
            f"teacher_dtype={config.teacher_dtype!r} does not go with scheme='ctcd', whose teacher "
            "trains: leave it at float32 (compute_dtype=bfloat16 computes in bf16)"
        )
    _check_options(config)


def _goes(name: str, value: Any, among: tuple[str, ...], scheme: str) -> None:
    if value is None or value in among:
        return
    having = [s for s, one in SCHEMES.items() if value in getattr(one, _PLURAL[name])]
    raise ValueError(
        f"{name}={value!r} does not go with scheme={scheme!r}, which takes "
        f"{', '.join(among) or 'none'}; it goes with {', '.join(having)}"
    )


_PLURAL = {"divergence": "divergences", "policy": "policies"}


def _check_options(config: DistillConfig) -> None:
    scheme = SCHEMES[config.scheme]
    first = scheme.divergences[0] if scheme.divergences else None
    divergence: str | None = config.divergence or first
    shown = _View(config, divergence, policy_of(config))
    for name, (_, reads, where) in OPTIONS.items():
        value = getattr(config, name)
        if value not in (None, ()) and not reads(shown):
            raise ValueError(
                f"{name}={value!r} is not read by scheme={config.scheme!r} with "
                f"divergence={divergence}, policy={shown.policy}; it belongs to {where}"
            )


class _View:
    """A config with divergence and policy filled in, without making one anew."""

    def __init__(self, config: Any, divergence: str | None, policy: str) -> None:
        self._config, self.divergence, self.policy = config, divergence, policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def describe(config: DistillConfig) -> str:
    """The scheme in a few words: ``ATKD, reverse_kl on the student's texts, weight 1``."""
    scheme = SCHEMES[config.scheme]
    what = [scheme.says]
    if config.divergence is not None:
        what.append(config.divergence)
    if config.scheme == "features":
        what.append(str(config.features))
    mixed = {"gt": "the data's texts", "teacher": "the teacher's texts"}[config.mix_with or "gt"]
    texts = {
        "gt": "the data's texts",
        "teacher": "the teacher's texts",
        "student": "the student's texts",
        "mix_request": f"the student's texts or {mixed}",
        "mix_token": "texts by student and teacher in turn",
        "imperfect": "the data's texts with the student's fills",
        "replay": "the data's texts and the student's, old and new",
    }[config.policy or "gt"]
    if config.data.task in WRITTEN_TASKS:
        what.append(f"on {texts}")
    if config.weight is None:
        what.append(f"weight {config.soft_start:g} to {config.soft_end:g}")
    elif not scheme.fixed:
        what.append(f"weight {config.weight:g}")
    return ", ".join(what)
