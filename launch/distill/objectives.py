"""From a scheme to its objective; all of them are those of ``steppe.train.distill``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steppe.data.text import Tokenizer
from steppe.launch.distill import settings
from steppe.launch.distill.schemes import PLAIN
from steppe.launch.distill.settings import DistillConfig
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.train import distill
from steppe.train.distill import features, offline
from steppe.train.distill.ctcd import LARGE, SMALL
from steppe.train.distill.pairs import STUDENT, TEACHER
from steppe.train.distill.store import Store
from steppe.train.objectives import basic
from steppe.train.types import Batch, LossOut, Objective


def make(
    config: DistillConfig,
    student: Model,
    teacher: distill.Teacher,
    tokenizer: Tokenizer,
    vocab: int | None = None,
    store: Store | None = None,
) -> Objective:
    """The objective of resolved settings, on parameters ``{"student": ..., "teacher": ...}``.

    Args:
      student: the model that trains, under its overlay where there is one.
      teacher: without parameters: they stand in the state.
      tokenizer: the student's, for the tokens that masks and ends are.
      vocab: see ``opened.Both``.
      store: what the teacher has said; it does not run then.

    Raises:
      ValueError: whatever does not fit, such as a layer map or a number of heads.
    """
    scheme, r = config.scheme, config.weight
    sizes: dict[str, Any] = {"vocab": vocab, "vocab_chunk": config.vocab_chunk}
    if scheme == "kid":
        assert r is not None
        return distill.kid(
            student,
            teacher,
            bos_id=_begin(tokenizer),
            eos_id=tokenizer.stop_ids or None,
            alpha=_number(config.mask_share),
            strategy=config.mask_strategy or "random",
            kind=config.divergence or "reverse_kl",
            mle=(1 - r) / r,
            **sizes,
        )
    if scheme == "minillm":
        return distill.minillm(student, teacher, vocab=vocab)
    if scheme == "ctcd":
        return _together(config, student, teacher.model)
    if scheme == "dwt":
        hard, soft = (1.0, None) if r is None else (1 - r, r)
        return distill.dwt(
            student,
            teacher,
            alpha_h=hard,
            alpha_s=soft,
            tau=_number(config.temperature),
            scale_tau2=True,
            **sizes,
        )
    # The cross entropy alone, in pieces of the vocabulary too: no teacher is in that program.
    labels = distill.dwt(student, teacher, alpha_h=1.0, alpha_s=0.0, **sizes)
    if scheme == "seqkd":
        return labels
    assert r is not None
    if store is not None:
        kept = offline.stored_kd(
            student,
            store,
            kind=config.divergence or "forward_kl",
            beta=0.5 if config.beta is None else config.beta,
            alpha=0.1 if config.alpha is None else config.alpha,
            scale_tau2=True,
        )
        return kept if r == 1 else basic.weighted({"kd": (kept, r), "ce": (labels, 1 - r)})
    inside = config.policy == "imperfect" and not filled_before(config)
    rewrite = fills(config, student, tokenizer, sizes) if inside else None
    if scheme in PLAIN:
        how: dict[str, Any] = {
            "kind": config.divergence or "forward_kl",
            "temperature": _number(config.temperature),
            "beta": 0.5 if config.beta is None else config.beta,
            "ratio": r,
            "scale_tau2": True,
            "top_k": config.top_k,
            "token_chunk": config.token_chunk,
            **sizes,
        }
        if scheme == "fdistill":
            return distill.fdistill(student, teacher, **how)
        alpha = 0.1 if config.alpha is None else config.alpha
        return distill.kd(student, teacher, alpha=alpha, policy=rewrite, **how)
    taught: Objective
    if scheme == "features":
        taught = _features(config, student, teacher)
    elif scheme == "dkd":
        taught = distill.decoupled_kd(
            student,
            teacher,
            alpha=_number(config.tkd),
            beta=_number(config.dkd),
            policy=rewrite,
            **sizes,
        )
    else:
        taught = distill.atkd(
            student,
            teacher,
            lam=_number(config.lam),
            hard_ratio=_number(config.hard_ratio),
            reverse=config.divergence == "reverse_kl",
            policy=rewrite,
            **sizes,
        )
    if r == 1:
        return taught
    return basic.weighted({scheme: (taught, r), "ce": (labels, 1 - r)})


def _together(config: DistillConfig, student: Model, teacher: Model) -> Objective:
    """Both learn from labels and from each other; see ``steppe.train.distill.ctcd``."""
    here, back = _number(config.weight), _number(config.back)
    distill.ctcd_pair(teacher, student)  # refuses two vocabularies
    inner = distill.ctcd(
        teacher,
        student,
        weights=distill.CTCDWeights(1 - back, back, 1 - here, here),
        tau=_number(config.temperature),
        scale_tau2=True,
    )

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        return inner({LARGE: params[TEACHER], SMALL: params[STUDENT]}, batch, key)

    return objective


def filled_before(config: DistillConfig) -> bool:
    """Whether masked tokens are filled before the step, and not inside the objective.

    ATKD splits a batch at the median of all its tokens, which must be those that are learnt from:
    no micro-batch can fill its own.
    """
    return config.scheme == "atkd" and config.policy == "imperfect" and config.microbatches > 1


def fills(
    config: DistillConfig, student: Model, tokenizer: Tokenizer, sizes: dict[str, Any]
) -> Any:
    """The policy "imperfect" of the settings."""
    return distill.imperfect(
        student,
        bos_id=_begin(tokenizer),
        eos_id=tokenizer.stop_ids or None,
        alpha=_number(config.mask_share),
        strategy=config.mask_strategy or "random",
        **sizes,
    )


def _begin(tokenizer: Tokenizer) -> int:
    """The token that stands for a masked one: that which begins a text, where there is one."""
    return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.pad_id


def _number(value: float | None) -> float:
    assert value is not None, "settings must be resolved"
    return value


# Features ------------------------------------------------------------------------------------


def layer_map(config: DistillConfig, student: Any, teacher: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of hidden states, or of layers of attention.

    Raises:
      ValueError: numbers of layers that do not divide, without a map of the user's.
    """
    given = settings.pairs(config.layer_map)
    if given:
        return given
    if teacher.layers % student.layers:
        raise ValueError(
            f"the teacher's {teacher.layers} layers are no multiple of the student's "
            f"{student.layers}: pair them with --layer-map, such as 1:2 2:4"
        )
    if config.features == "hidden":
        return features.even_map(student.layers, teacher.layers)
    return tuple(
        (i - 1, j - 1) for i, j in features.even_map(student.layers, teacher.layers, start=1)
    )


def _features(config: DistillConfig, student: Model, teacher: distill.Teacher) -> Objective:
    if config.features == "relation":
        given = settings.pairs(config.layer_map)
        if len(given) > 1:
            raise ValueError(
                f"features='relation' compares one pair of layers, got {len(given)}: "
                f"{', '.join(config.layer_map)}"
            )
        heads = _relation_heads(student.config.width, teacher.model.config.width)
        return features.relation(student, teacher, layers=given[0] if given else None, heads=heads)
    chosen = layer_map(config, student.config, teacher.model.config)
    made = features.hidden if config.features == "hidden" else features.attention
    return made(student, teacher, chosen)


def _relation_heads(a: int, b: int, most: int = 48) -> int:
    """The largest number up to ``most`` that divides both widths."""
    return max(n for n in range(1, most + 1) if a % n == 0 and b % n == 0)


def extra(config: DistillConfig, student: Model, teacher: Model) -> Callable[[Any], Params] | None:
    """What trains beside the student: projections of hidden states of another width."""
    if config.scheme != "features" or config.features != "hidden":
        return None
    if student.config.width == teacher.config.width:
        return None
    return features.projections(student, teacher, layer_map(config, student.config, teacher.config))
