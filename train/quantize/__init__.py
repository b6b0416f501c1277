"""Quantization: what gives a float model integers that answer like it, with data or without.

zsaq, game, generator,   sharpness-aware zero-shot quantization: student against generator, whose
adapters, scenes         outputs become the teacher's inputs; images drawn without data
calibrate                ranges, magnitudes and Gram matrices of the inputs of layers
baselines, gptq          rounding to nearest, second-order rounding, scaled inputs, QAT

The quantisers themselves and the files are in ``models`` (fake_quant, quantized, integer, packed).
"""

from steppe.train.quantize import baselines, calibrate, generator, zsaq
from steppe.train.quantize.baselines import awq, errors, qat, rtn, smooth
from steppe.train.quantize.game import Terms, discrepancy, game
from steppe.train.quantize.generator import Generator, Synthetic
from steppe.train.quantize.gptq import compensated, gptq, start
from steppe.train.quantize.zsaq import make_zsaq_step, players, result

__all__ = [
    "Generator",
    "Synthetic",
    "Terms",
    "awq",
    "baselines",
    "calibrate",
    "compensated",
    "discrepancy",
    "errors",
    "game",
    "generator",
    "gptq",
    "make_zsaq_step",
    "players",
    "qat",
    "result",
    "rtn",
    "smooth",
    "start",
    "zsaq",
]
