"""Training: ways to obtain parameters. The step, the loop and what they stand on.

``mesh.plan`` -> ``step.init`` -> ``step.make`` -> ``loop.run``; a method is an objective, an
optax transform or a function around them, never another loop.
"""

from steppe.train import checkpoint, cut, loop, mesh, parallel, step, types
from steppe.train.ascent import Ascent, Cut
from steppe.train.checkpoint import CheckpointError, Checkpoints, SaveFailed
from steppe.train.loop import Interrupted, NonFiniteLoss
from steppe.train.mesh import MeshPlan
from steppe.train.step import TrainStep
from steppe.train.types import GradFn, LossOut, Objective, TrainState

__all__ = [
    "Ascent",
    "CheckpointError",
    "Checkpoints",
    "Cut",
    "GradFn",
    "Interrupted",
    "LossOut",
    "MeshPlan",
    "NonFiniteLoss",
    "Objective",
    "SaveFailed",
    "TrainState",
    "TrainStep",
    "checkpoint",
    "cut",
    "loop",
    "mesh",
    "parallel",
    "step",
    "types",
]
