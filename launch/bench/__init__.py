"""Benchmarks that can be believed: interleaved, with their spread, load, versions and command."""

from steppe.launch.bench.compile import CompileBench
from steppe.launch.bench.finetune import FinetuneBench
from steppe.launch.bench.imports import ImportBench
from steppe.launch.bench.load import LoadBench
from steppe.launch.bench.mfu import MfuBench

__all__ = ["CompileBench", "FinetuneBench", "ImportBench", "LoadBench", "MfuBench"]
