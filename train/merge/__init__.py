"""Merging: many fine-tuned models of one base into one model.

Trees are the nested dicts of :mod:`steppe.models.tree`; task vectors ``taus`` are one tree whose
leaves have a leading axis of N tasks. What works on trees is pure and runs under jit; ``stream``
merges folders on disk, a tensor at a time.
"""

from steppe.train.merge import heads, joined, lowrank, stream
from steppe.train.merge.adaptive import AdaMergingConfig, adamerging, entropies
from steppe.train.merge.concrete import (
    ConcreteConfig,
    concrete_adamerging,
    concrete_task_arithmetic,
    masked_merge,
)
from steppe.train.merge.dare import dare
from steppe.train.merge.fisher import diag_fisher, fisher_merge
from steppe.train.merge.guard import Guard
from steppe.train.merge.leafwise import (
    average,
    slerp,
    task_arithmetic,
    task_vectors,
    weighted,
)
from steppe.train.merge.regmean import collect_grams, regmean
from steppe.train.merge.ties import ties, ties_components

__all__ = [
    "AdaMergingConfig",
    "ConcreteConfig",
    "Guard",
    "adamerging",
    "average",
    "collect_grams",
    "concrete_adamerging",
    "concrete_task_arithmetic",
    "dare",
    "diag_fisher",
    "entropies",
    "fisher_merge",
    "heads",
    "joined",
    "lowrank",
    "masked_merge",
    "regmean",
    "slerp",
    "stream",
    "task_arithmetic",
    "task_vectors",
    "ties",
    "ties_components",
    "weighted",
]
