"""Speed of training on one accelerator, as a share of what its matrix units can do.

  FLOPs a token = 6 N + 12 L D T

N counts the parameters that enter a matrix product at every token (no embeddings and no head
on the first token; the output layer of a language model, tied or not, counts); the second term
is attention, two products of T x D a layer, forward and twice backward. Operations that are
computed again (remat) are not counted. Chowdhery et al. 2022 (arXiv 2204.02311), appendix B.

Two yardsticks: the datasheet's dense peak, and the best rate that a chain of large matrix
products reaches on this very device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steppe.launch.bench import decoders, environment, harness
from steppe.launch.bench.decoders import GPT2, SMOLLM2, DecoderShapes
from steppe.launch.bench.environment import plain
from steppe.launch.bench.shapes import BERT_BASE, Shapes, batches

if TYPE_CHECKING:
    from rich.console import RenderableType

# Dense bf16 peak of the makers' datasheets, FLOP/s; the first name found in the device's kind.
PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
    ("TPU v3", 61.5e12),  # of a core, which is what jax calls a device there
)


@dataclass(frozen=True)
class MfuBench:
    """Measure tokens a second and model FLOPs utilisation on the default device.

    Attributes:
      model: encoder = a classifier of ``shapes``; gpt2 (124M) or smollm2 (135M) = a language
        model of that size on full rows. Random tensors in each case.
      shapes: size of the encoder; BERT base by default.
      batch, length: shape of a batch.
      dtype: of the computation; parameters and optimiser stay float32.
      remat: what the backward pass keeps, see ``EncoderConfig.remat``.
      attention: implementation, see ``EncoderConfig.attention``.
      full: every row has ``length`` tokens; else lengths vary, and padding is computed too.
      warmup, steps: unmeasured and measured steps.
      matmul: side of the square matrices of the ceiling; 0 = do not measure it.
      peak: datasheet FLOP/s of the device, where it is not in the table.
      out: file for the result as JSON.
    """

    model: Literal["encoder", "gpt2", "smollm2"] = "encoder"
    shapes: Shapes = field(default_factory=lambda: BERT_BASE)
    batch: int = 64
    length: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Literal["dots", "full", "none"] = "none"
    attention: str | None = None
    full: bool = True
    warmup: int = 5
    steps: int = 50
    matmul: int = 8192
    peak: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 1),
            ("length", 1),
            ("warmup", 1),
            ("steps", 1),
            ("matmul", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        positions = self.size.positions
        if self.length > positions:
            of = "shapes.positions" if self.model == "encoder" else f"positions of {self.model}"
            raise ValueError(f"length must be at most {of} = {positions}, got {self.length}")

    @property
    def size(self) -> Shapes | DecoderShapes:
        """The size of the chosen model."""
        if self.model == "encoder":
            return self.shapes
        return GPT2 if self.model == "gpt2" else SMOLLM2


def flops_per_token(shapes: Shapes | DecoderShapes, length: int) -> float:
    """Model FLOPs of one token of a training step (forward and backward)."""
    if isinstance(shapes, DecoderShapes):
        return 6.0 * shapes.matrices() + 12.0 * shapes.layers * shapes.width * length
    layer = 4 * shapes.width**2 + 2 * shapes.width * shapes.ffn_width
    return 6.0 * shapes.layers * layer + 12.0 * shapes.layers * shapes.width * length


def peak_of(kind: str) -> float | None:
    """Datasheet peak of a device kind (``jax.Device.device_kind``), FLOP/s; None = unknown."""
    return next((peak for name, peak in PEAKS if name.lower() in kind.lower()), None)


def run(config: MfuBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures on the default device and returns the result."""
    import jax

    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    device = jax.devices()[0]
    first, seconds, loss = _train(config)
    tokens = config.batch * config.length / seconds
    rate = tokens * flops_per_token(config.size, config.length)
    peak = config.peak if config.peak is not None else peak_of(device.device_kind)
    if peak is None:
        say(f"no datasheet peak is known for {device.device_kind!r}; give it with peak=")
    ceiling = matmul_rate(config.matmul, config.dtype) if config.matmul else None
    result = {
        "bench": "mfu",
        "config": plain(config),
        "load_average": load,
        **environment.environment(),
        "device": device.device_kind,
        "seconds": seconds,
        "first_step": first,
        "final_loss": loss,
        "tokens_per_s": tokens,
        "flops_per_token": flops_per_token(config.size, config.length),
        "flops_per_s": rate,
        "peak": peak,
        "mfu": None if peak is None else rate / peak,
        "ceiling": ceiling,
        "of_ceiling": None if ceiling is None else rate / ceiling,
        "memory": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _train(config: MfuBench) -> tuple[float, float, float]:
    """(seconds of the first step, seconds a step, last loss)."""
    import jax
    import optax

    from steppe.train import step
    from steppe.train.objectives import basic

    model = config.size.config(remat=config.remat, attention=config.attention).build()
    kind = "classification" if config.model == "encoder" else "lm"
    tx = optax.adamw(1e-5)
    state = step.init(jax.random.key(0), model, tx)
    dtype = None if config.dtype == "float32" else config.dtype
    train = step.make(basic.for_task(model, kind), tx, compute_dtype=dtype)
    shape = (4, config.batch, config.length, config.size.vocab_size)
    made = batches(*shape) if kind == "classification" else decoders.batches(*shape)
    if config.full:
        for batch in made:
            batch["attention_mask"][:] = 1
    fed = [jax.device_put(batch) for batch in made]  # input is not what is measured
    metrics: Any = None
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(train(state, fed[0]))
    first = time.perf_counter() - start
    for i in range(config.warmup):
        state, metrics = train(state, fed[i % len(fed)])
    jax.block_until_ready((state, metrics))
    start = time.perf_counter()
    for i in range(config.steps):
        state, metrics = train(state, fed[i % len(fed)])
    jax.block_until_ready((state, metrics))
    seconds = (time.perf_counter() - start) / config.steps
    total, weight = (float(x) for x in metrics["loss"])
    return first, seconds, total / weight


def matmul_rate(side: int, dtype: str, *, chain: int = 8, rounds: int = 5) -> float:
    """Best rate of a chain of products of square matrices, FLOP/s."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = x @ w
        return x

    # Entries that keep the size of x, so that no value overflows on the way.
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, (side, side), jnp.float32) for key in keys)
    x, w = x.astype(dtype), (w * side**-0.5).astype(dtype)
    turn = harness.timed(lambda: run(x, w), jax.block_until_ready)
    times = harness.measure(turn, harness.Protocol(warmup=2, rounds=rounds, steps=4))
    return 2.0 * side**3 * chain / min(times)


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.table import Table

    config = result["config"]
    title = (
        f"{config['model']}, AdamW step, batch {config['batch']} x {config['length']}, "
        f"{config['dtype']}"
    )
    grid = Table(title=title, title_justify="left", box=None, show_header=False)
    grid.add_row("device", str(result["device"]))
    grid.add_row("time a step", f"{1e3 * result['seconds']:.2f} ms")
    grid.add_row("tokens a second", f"{result['tokens_per_s']:,.0f}")
    grid.add_row("model TFLOP/s", f"{result['flops_per_s'] / 1e12:.4g}")
    if result["mfu"] is not None:
        grid.add_row("MFU", f"{result['mfu']:.1%} of {result['peak'] / 1e12:.0f} TFLOP/s")
    if result["ceiling"] is not None:
        text = f"{result['of_ceiling']:.1%} of {result['ceiling'] / 1e12:.4g} TFLOP/s"
        grid.add_row("of the matmul ceiling", text)
    grid.add_row("first step", f"{result['first_step']:.2f} s")
    return grid
