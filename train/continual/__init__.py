"""Continual learning: tasks one after the other, what is kept of them, and how it is scored.

accuracy.py   the matrix of accuracies, average accuracy, backward transfer, forgetting
stream.py     the loop over the tasks of a stream: sequential LoRA, O-LoRA
o_lora.py     O-LoRA's loss
replay.py     a memory of earlier examples
classes.py    one head whose classes belong to several tasks
"""

from steppe.train.continual import classes, replay, stream
from steppe.train.continual.accuracy import (
    average_accuracy,
    backward_transfer,
    continual_matrix,
    forgetting,
    learning_accuracy,
)
from steppe.train.continual.o_lora import olora_loss
from steppe.train.continual.stream import Learnt, Stage

__all__ = [
    "Learnt",
    "Stage",
    "average_accuracy",
    "backward_transfer",
    "classes",
    "continual_matrix",
    "forgetting",
    "learning_accuracy",
    "olora_loss",
    "replay",
    "stream",
]
