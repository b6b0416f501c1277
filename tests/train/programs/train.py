"""Trains the toy model with checkpoints, to be killed or starved from outside.

usage: train.py FOLDER STEPS DELAY [MAX_FILE_BYTES]
"""

import resource
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import optax

from steppe.train import loop, step
from steppe.train.checkpoint import Checkpoints
from steppe.train.metrics import JsonLines

toy = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "toy.py")))


def setup():
    """State and step of the run, dropout and warm-up included."""
    tx = optax.adamw(optax.linear_schedule(0.0, 1e-2, 5))
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    return state, step.make(toy.dropped, tx, microbatches=2)


def main(folder, steps, delay, limit=None):
    """Trains until ``steps``; with a limit, files written after step 10 may not exceed it."""
    state, train = setup()
    checkpoints = Checkpoints(Path(folder) / "checkpoints", manifest={"config": {"seed": 0}})

    def starve(batch):
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return batch

    batches = toy.Batches(delay=delay, act={10: starve} if limit else None)
    loop.run(
        train,
        state,
        batches,
        steps=steps,
        checkpoints=checkpoints,
        save_every=4,
        log_every=1,
        writers=[] if limit else [JsonLines(Path(folder) / "metrics.jsonl")],
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
