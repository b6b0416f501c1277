"""``steppe bench NAME``: runs a benchmark and prints its table."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from steppe.data.errors import unknown

# name -> (module, config dataclass); imported when asked for.
BENCHES = {
    "finetune": ("steppe.launch.bench.finetune", "FinetuneBench"),
    "lm-step": ("steppe.launch.bench.lm_step", "LmStepBench"),
    "generate": ("steppe.launch.bench.generate", "GenerateBench"),
    "compile": ("steppe.launch.bench.compile", "CompileBench"),
    "load": ("steppe.launch.bench.load", "LoadBench"),
    "imports": ("steppe.launch.bench.imports", "ImportBench"),
    "mfu": ("steppe.launch.bench.mfu", "MfuBench"),
    "sharpness": ("steppe.launch.bench.sharpness", "SharpnessBench"),
    "topk": ("steppe.launch.bench.topk", "TopKBench"),
    "distill": ("steppe.launch.bench.distill", "DistillBench"),
    "distill-step": ("steppe.launch.bench.distill_step", "DistillStepBench"),
    "quantize": ("steppe.launch.bench.quantize", "QuantizeBench"),
    "merge": ("steppe.launch.bench.merge", "MergeBench"),
    "plan": ("steppe.launch.bench.plan", "PlanBench"),
    "overlays": ("steppe.launch.bench.overlays", "OverlaysBench"),
    "overlay-step": ("steppe.launch.bench.overlay_step", "OverlayStepBench"),
    "chaos": ("steppe.launch.bench.chaos", "ChaosBench"),
    "overhead": ("steppe.launch.bench.overhead", "OverheadBench"),
    "scaling": ("steppe.launch.bench.scaling", "ScalingBench"),
    "few-shot": ("steppe.launch.bench.few_shot", "FewShotBench"),
}
USAGE = "usage: steppe bench NAME [options]      (steppe bench NAME --help lists the options)"


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark; returns the exit status.

    Raises:
      ValueError: an unknown benchmark, a setting out of range, or sides that do not agree.
      WorkerError: a side of a comparison failed.
    """
    if not argv or argv[0] in ("-h", "--help"):
        from steppe.launch import prose

        print(USAGE, prose.fill(", ".join(BENCHES), "NAME: "), sep="\n")
        return 0 if argv else 2
    name, *words = argv
    if name not in BENCHES:
        raise ValueError(unknown("benchmark", name, BENCHES))
    from rich.console import Console

    from steppe.launch import options

    module: Any = importlib.import_module(BENCHES[name][0])
    config = options.parse(getattr(module, BENCHES[name][1]), words, f"bench {name}")
    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    result = module.run(config, say)
    console.print(module.table(result))
    if config.out is not None:
        say(f"written to {config.out}")
    return 0
