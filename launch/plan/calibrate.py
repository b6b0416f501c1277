"""This machine as an accelerator: a matrix product, a pass over memory, exponentials, measured.

About a second. Fake devices of one CPU share it: each gets its part. The rates are those of
programs that run alone; on a busy machine they are what is left of it.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from steppe.launch.plan.accelerators import Accelerator

SIDE = 768  # of the square matrices
WORDS = 2**24  # float32 of the pass over memory: 64 MiB, beyond the caches
ROUNDS = 5


@functools.cache
def cpu(devices: int = 1) -> Accelerator:
    """The rates of one of ``devices`` equal parts of this machine's CPU."""
    import jax
    import jax.numpy as jnp

    home = jax.devices("cpu")[0]
    with jax.default_device(home):
        a = jnp.ones((SIDE, SIDE)) / SIDE
        big = jnp.ones((WORDS,))
        low = a.astype(jnp.bfloat16)
        product = jax.jit(lambda x: x @ x @ x @ x)
        flops = 3 * 2.0 * SIDE**3
        single = flops / _best(product, a)
        half = flops / _best(product, low)
        # Reads two and writes one in place, as an optimiser does: a new array for every result
        # would measure how fast the system hands out pages.
        turns = 4
        passes = jax.jit(lambda x, y: jax.lax.fori_loop(0, turns, lambda _, z: 0.5 * z + y, x))
        moved = 3 * 4.0 * WORDS * turns / _best(passes, big, big[::-1])
        small = big[: 2**20]
        several = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, z: jnp.exp(-z), x))
        exponentials = 8 * 2**20 / _best(several, small)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Accelerator(
        "cpu",
        half / devices,
        single / devices,
        total / devices,
        moved / devices,
        moved / devices,
        moved / devices,
        max(devices, 1),
        hop=5e-5,  # threads that wait for each other
        exp=exponentials / devices,
    )


def _best(fn: Callable[..., Any], *args: Any) -> float:
    """Least seconds of a call: what disturbs a measurement only ever adds to it."""
    import jax

    jax.block_until_ready(fn(*args))
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        found.append(time.perf_counter() - start)
    return min(found)
