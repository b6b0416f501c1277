"""f-distill: a divergence whose two halves are taken on the texts of those who wrote them.

With p the teacher, q the student and m = beta p + (1 - beta) q:

  tvd         1/2 E_{y~q} TVD(p, q) + 1/2 E_{y~p} TVD(p, q)
  jsd         (1 - beta) E_{y~q} KL(q || m) + beta E_{y~p} KL(p || m)
  reverse_kl  E_{y~q} KL(q || p)
  forward_kl  E_{y~p} KL(p || q)

each a mean over the tokens of the texts, exact over the vocabulary at every prefix. One batch
holds the texts of one writer: :func:`written` marks a policy's batches with theirs, the coin of
``policies.mix_request`` chooses between them (its share that of the student's half: 1/2, for jsd
1 - beta), and of the jsd the half that belongs to the writer is taken. Of the KLs only one half
is there, and so one writer.

Wen et al., ACL 2023 (arXiv 2307.15190).

Deviations: the published code runs both halves in every step and weighs them; one of them a step,
drawn with its weight, is the same in the mean at half the work. Its beta is our 1 - beta. Where
nobody is named as the writer, as with tokens drawn from both in turn, the whole JSD is taken.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from steppe.models.model import Model
from steppe.train.distill.kd import Rewrite, kd
from steppe.train.distill.pairs import TeacherLike
from steppe.train.types import Batch, LossOut, Objective, Params

KINDS = ("tvd", "jsd", "forward_kl", "reverse_kl")
STUDENTS = "written_by_student"


def written(policy: Rewrite, by_student: bool) -> Rewrite:
    """``policy``, whose batches say whose texts they are (``written_by_student``, 1 or 0)."""

    def marked(params: Params, batch: Batch, key: Any) -> Batch:
        return {**policy(params, batch, key), STUDENTS: np.float32(by_student)}

    return marked


def fdistill(
    student: Model,
    teacher: TeacherLike,
    *,
    kind: str = "tvd",
    beta: float = 0.5,
    **how: Any,
) -> Objective:
    """f-distill as an objective; weight and aux are those of ``kd``.

    Args:
      kind: "tvd", "jsd", "forward_kl" or "reverse_kl".
      beta: of jsd, the teacher's share of m and of the loss, inside (0, 1).
      how: further arguments of ``kd``: temperature, ratio, scale_tau2, top_k, vocab,
        vocab_chunk, token_chunk, shards, shift.

    Raises:
      ValueError: an unknown kind, a beta at which one half is 0; as ``kd``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    whole = kd(student, teacher, kind=kind, beta=beta, **how)
    if kind != "jsd":
        return whole
    if beta in (0, 1):
        raise ValueError(
            f"beta={beta:g} leaves one half of the JSD out, and makes the other 0: take "
            "kind='forward_kl' or 'reverse_kl', which are its limits"
        )
    own = kd(student, teacher, kind="skew_reverse_kl", alpha=1 - beta, **how)
    other = kd(student, teacher, kind="skew_forward_kl", alpha=beta, **how)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        if STUDENTS not in batch:
            return whole(params, batch, key)
        found: LossOut = jax.lax.cond(
            batch[STUDENTS] > 0,
            lambda: own(params, batch, key),
            lambda: other(params, batch, key),
        )
        return found

    return objective
