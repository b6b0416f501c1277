"""The student in integers: rounded to nearest, and by the zero-shot game."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from steppe.launch.merge import methods as merging
from steppe.launch.quantize import methods, opened
from steppe.launch.quantize.opened import Opened
from steppe.launch.tour import shipped, small
from steppe.launch.tour.graph import Done, Result
from steppe.launch.tour.world import MODEL, World
from steppe.models import packed, quantized, tree
from steppe.models.tree import Params
from steppe.train.quantize import baselines

# A rounded model may lose so much of the validation accuracy (of 1) and still be the one that is
# handed out where it is smaller.
ROOM = 0.01


def quantize(
    world: World, student: Done, bits: str, method: str, seed: int, folder: Path
) -> Result:
    """One scheme and method; no data is seen. The packed folder is ``folder/model``.

    Returns:
      ``bits``, ``method``, ``sqnr`` (mean over the kernels, dB), ``kernels`` and
      ``kernels_float32`` (bytes), ``moved``, and what :func:`shipped.compared` finds.
    """
    config = world.config.quantize(seed)
    what, params = small.read(student.folder / MODEL)
    model = what.config.build()
    # Two players that hold the network several times: see ``rolled``.
    loop = merging.rolled(what.config).build()
    own = world.origin.tokenizer if world.origin.tokenizer.is_dir() else None
    held = Opened(loop, params, what.labels, own, None, opened.ends(world.origin, loop))
    made = methods.quantize(held, config, bits, method, seed, folder / "game", world.tell)
    packed.save(
        folder / MODEL,
        model,
        made.params,
        made.rules,
        labels=what.labels,
        tokenizer_dir=own,
        notes={"bits": bits, "seed": seed, **methods.describe(held, config, method)},
    )
    # As it is in memory, and as it is read: kernels on their grids on both sides.
    still = quantized.wrap(model, made.rules, weights=False)
    back = packed.load(folder / MODEL)
    here = (still, quantized.dequantize(made.params))
    opened_again = shipped.compared(world, here, (back.model, back.params), what)
    errors = baselines.errors(params, made.params)
    kernels = packed.sizes(folder / MODEL)
    return {
        "bits": bits,
        "method": method,
        "sqnr": sum(e.sqnr for e in errors.values()) / len(errors),
        "kernels": kernels.packed,
        "kernels_float32": kernels.float32,
        "moved": moved(made.params, quantized.quantize(params, made.rules)),
        **opened_again,
    }


def moved(made: Params, nearest: Params) -> float:
    """Share of the integers that are not those of rounding to nearest."""
    ours, theirs = tree.flatten(made), tree.flatten(nearest)
    paths = [path for path in ours if path.endswith("/q")]
    differ = sum(int((np.asarray(ours[p]) != np.asarray(theirs[p])).sum()) for p in paths)
    return differ / sum(ours[p].size for p in paths)


def choose(scores: Mapping[str, Done], sizes: Mapping[str, int], student: Done) -> Result:
    """Which rounded model is handed out.

    The smallest whose validation accuracy is within ``ROOM`` of the student's, of equally small
    ones the best; where there is none, the one of the best accuracy.
    """
    marks = {name: float(done.result["mean"]["valid"]) for name, done in scores.items()}
    wanted = float(student.result["mean"]["valid"]) - ROOM
    good = [name for name in marks if marks[name] >= wanted]
    if good:
        best = min(good, key=lambda name: (round(sizes[name] / 2**16), -marks[name]))
    else:
        best = max(marks, key=lambda name: marks[name])
    return {"best": best, "valid": marks, "within": bool(good), "wanted": wanted}
