"""Distillation: divergences, dense and in pieces of the vocabulary, and the schemes around them.

divergences, topk             what two next-token distributions differ by
chunked, rowwise              the same without all logits: some columns, or some tokens, at a time
pairs, vocabularies           a student and its frozen teacher as one set of parameters
kd, fdistill, atkd, kid, dwt, ctcd, minillm, features    objectives
policies, replay              whose texts are learnt from
"""

from steppe.train.distill import features, policies, replay
from steppe.train.distill.atkd import KDTerms, atkd, atkd_loss, kd_decompose, with_threshold
from steppe.train.distill.chunked import chunked_divergence
from steppe.train.distill.ctcd import (
    CTCDWeights,
    ctcd,
    ctcd_optimiser,
    ctcd_pair,
    export_large,
    export_small,
    mutual_kd_loss,
)
from steppe.train.distill.divergences import (
    KINDS,
    masked_token_mean,
    masked_token_sum,
    token_divergence,
)
from steppe.train.distill.dwt import (
    alpha_schedule,
    dwt,
    dwt_loss,
    remap_parameters,
    soft_kl,
    with_alpha,
)
from steppe.train.distill.fdistill import fdistill, written
from steppe.train.distill.kd import decoupled_kd, kd
from steppe.train.distill.kid import imperfect, kid, rewrite, sample_mask
from steppe.train.distill.minillm import minillm, minillm_scored
from steppe.train.distill.pairs import Teacher, check_batch, with_teacher
from steppe.train.distill.readout import Readout, readout_of
from steppe.train.distill.rowwise import rowwise_loss
from steppe.train.distill.topk import TopK, stored_divergence, top_k, topk_divergence
from steppe.train.distill.vocabularies import check_tokenizers, first_unknown

__all__ = [
    "KINDS",
    "CTCDWeights",
    "KDTerms",
    "Readout",
    "Teacher",
    "TopK",
    "alpha_schedule",
    "atkd",
    "atkd_loss",
    "check_batch",
    "check_tokenizers",
    "chunked_divergence",
    "ctcd",
    "ctcd_optimiser",
    "ctcd_pair",
    "decoupled_kd",
    "dwt",
    "dwt_loss",
    "export_large",
    "export_small",
    "fdistill",
    "features",
    "first_unknown",
    "imperfect",
    "kd",
    "kd_decompose",
    "kid",
    "masked_token_mean",
    "masked_token_sum",
    "minillm",
    "minillm_scored",
    "mutual_kd_loss",
    "policies",
    "readout_of",
    "remap_parameters",
    "replay",
    "rewrite",
    "rowwise_loss",
    "sample_mask",
    "soft_kl",
    "stored_divergence",
    "token_divergence",
    "top_k",
    "topk_divergence",
    "with_alpha",
    "with_teacher",
    "with_threshold",
    "written",
]
