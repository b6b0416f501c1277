"""Black-box tuning: prompts from forward passes alone, by evolution in a random subspace."""

from steppe.train.blackbox.losses import (
    negative_accuracy,
    verbalizer_ce,
    verbalizer_hinge,
)
from steppe.train.blackbox.prototypes import Prototypes, left_out, prototypes
from steppe.train.blackbox.subspace import (
    check_rank,
    clipped_std,
    projection_std,
    random_projection,
    scales,
)
from steppe.train.blackbox.tuning import (
    BlackBox,
    BlackBoxState,
    bbt_step,
    bbtv2_cycle,
    black_box,
    evaluator,
)

__all__ = [
    "BlackBox",
    "BlackBoxState",
    "Prototypes",
    "bbt_step",
    "bbtv2_cycle",
    "black_box",
    "check_rank",
    "clipped_std",
    "evaluator",
    "left_out",
    "negative_accuracy",
    "projection_std",
    "prototypes",
    "random_projection",
    "scales",
    "verbalizer_ce",
    "verbalizer_hinge",
]
