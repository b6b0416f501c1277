"""The command line, but process 1 fails by itself at step 3 and says when."""

import os
import sys
import time
from pathlib import Path

from steppe.launch import cli
from steppe.train import step

plain = step.TrainStep.__call__


def failing(self, state, batch):
    if int(state.step) == 3:
        Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
        raise ValueError("this host has a broken disk")
    return plain(self, state, batch)


if os.environ["STEPPE_PROCESS_INDEX"] == "1":
    step.TrainStep.__call__ = failing
sys.exit(cli.main())
