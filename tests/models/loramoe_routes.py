"""Where the routers of LoRAMoE send two types of texts: the runs of RESULTS, Overlays.

  python tests/models/loramoe_routes.py mix FILE.jsonl       headlines and lines of help, 600 each
  python tests/models/loramoe_routes.py share RUN ...        mass of the first half of the experts

No test: the runs take five minutes each. `share` reads the test split that the run itself has.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from steppe.data import batches, sources
from steppe.launch import evaluation, opening, overlays, setup
from steppe.models.overlays.loramoe import ROUTER_MASS
from steppe.models.sites import listening


def mix(file: Path, count: int = 600) -> None:
    """Two types of questions and answers, told apart by the column ``kind``."""
    headlines = sources.load("asset:sarcasm")
    pairs = [r for r in sources.load("asset:libreoffice-help/en-de") if len(r["source"]) < 80]
    with file.open("x") as out:
        for a, b in zip(headlines[:count], pairs[:count], strict=True):
            asked = f"Is this headline sarcastic? {a['text']}"
            row = {"prompt": asked, "answer": a["label"], "kind": "headline"}
            other = {
                "prompt": f"Translate to German: {b['source']}",
                "answer": b["target"],
                "kind": "help",
            }
            for each in (row, other):
                out.write(json.dumps(each, ensure_ascii=False) + "\n")


def share(run: str) -> dict[str, list[float]]:
    """For every kind, of each of its test texts the mass that experts [0, E / 2) get, a mean over
    layers and sites."""
    loaded = overlays.load(Path(run) / "model")
    data = evaluation.own_data(run)
    split = setup.prepare(data, opening.resolve(run), loaded.model.config).splits["test"]

    @jax.jit
    def masses(params, batch):
        with listening() as told:
            loaded.model.apply(params, batch)
        return {name: value for name, value in told.items() if name.startswith(ROUTER_MASS)}

    found: dict[str, list[float]] = {}
    for batch in batches.evaluate(split, 8, buckets=setup.buckets(data)):
        seen = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
        q = np.concatenate([np.asarray(v) for v in masses(loaded.params, seen).values()])
        half = (q[..., : q.shape[-1] // 2].sum(-1) / q.sum(-1)).mean(0)
        for row, number in enumerate(batch["example_index"]):
            if number >= 0:
                kind = split.record(int(number))["kind"]
                found.setdefault(kind, []).append(float(half[row]))
    return found


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "mix":
        mix(Path(given[0]))
    else:
        for run in given:
            told = {k: (np.mean(v), np.std(v), len(v)) for k, v in sorted(share(run).items())}
            print(
                run, *(f"{k} {m:.3f} ± {s:.3f} of {n}" for k, (m, s, n) in told.items()), sep="; "
            )
