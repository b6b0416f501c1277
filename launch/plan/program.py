"""The partitioned program of a step, made in a process of its own and counted there.

What is compiled: the very step that would run, of all layers (they are one loop, so depth costs
nothing), for as many fake devices of this CPU as the mesh has, from abstract values. What is read
is the program right after XLA's partitioner: the collectives and dtypes are those that every
backend gets, before passes of the CPU's own (which multiply bf16 in float32). What a backend then
changes is not seen: combined collectives, fused attention kernels, overlap.

Above ``MOST`` devices the axis "data" is cut to 2 for compiling, rows in proportion: a device's
program is the same, and the collectives along that axis are rescaled to its size.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steppe.launch.plan import count
from steppe.launch.plan.count import Counts
from steppe.launch.plan.settings import PlanConfig, from_dict, to_dict

MOST = 1024
TIMEOUT = 900.0
# A pass after which dead code is gone, of programs that are not partitioned.
_PARTITIONED, _ALONE = "spmd-partitioning", "dce"


def counted(config: PlanConfig, mesh: Mapping[str, int]) -> Counts:
    """Compiles the step for a mesh in a fresh process and counts what one device does.

    Raises:
      RuntimeError: the process failed (what it said last), or took too long.
    """
    sizes, cut = _reduced(mesh)
    values = to_dict(config)
    if cut > 1:
        values["batch_size"] = config.batch_size // cut
    values["mesh"], values["on"], values["slices"] = "", f"cpu-{math.prod(sizes.values())}", 1
    with tempfile.TemporaryDirectory(prefix="steppe-plan-") as scratch:
        task = json.dumps({"config": values, "mesh": sizes, "scratch": scratch})
        devices = math.prod(sizes.values())
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__],
                input=task,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                env=_environment(devices, scratch),
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"the step did not compile for {devices} devices within {TIMEOUT:g} s: give "
                "--no-compiled, or a mesh with fewer devices on its model axis"
            ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        # The line of the exception; jax writes a note about its frames behind it.
        said = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        raise RuntimeError(f"the step could not be compiled: {' '.join((said or lines)[-1:])}")
    found = count.from_dict(json.loads(done.stdout.splitlines()[-1]))
    if cut > 1:
        found.collectives = [_restored(c, sizes["data"], cut) for c in found.collectives]
    return found


def _reduced(mesh: Mapping[str, int]) -> tuple[dict[str, int], int]:
    sizes = dict(mesh)
    data = sizes.get("data", 1)
    if math.prod(sizes.values()) <= MOST or data <= 2 or data % 2:
        return sizes, 1
    return sizes | {"data": 2}, data // 2


def _restored(one: count.Collective, data: int, cut: int) -> count.Collective:
    if "data" not in one.axes:
        return one
    devices = one.devices * cut
    share = ((devices - 1) / devices) / ((one.devices - 1) / one.devices)
    return one._replace(devices=devices, sent=one.sent * share)


def _environment(devices: int, scratch: str) -> dict[str, str]:
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        # Nothing will run: the code that LLVM would optimise is thrown away.
        "--xla_backend_optimization_level=0",
        f"--xla_dump_to={scratch}",
        "--xla_dump_hlo_as_text",
        "--xla_dump_hlo_module_re=.*jit_program.*",
        f"--xla_dump_hlo_pass_re={_PARTITIONED if devices > 1 else _ALONE}",
    )
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {**os.environ, **own}


def main() -> None:
    """The other process: reads the task from stdin and writes the counts as the last line."""
    task = json.load(sys.stdin)
    from steppe.launch.plan import work as work_

    # A child may not keep what it compiles: nobody runs it.
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    import jax

    from steppe.train import mesh as mesh_

    jax.config.update("jax_enable_compilation_cache", False)
    work = work_.build(from_dict(task["config"]))
    plan = mesh_.plan(task["mesh"], work.model.axes)
    state = work.state(plan)
    program = work.step(plan).lower(state, work.batch(plan))
    program.compile()
    shapes = {tuple(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(state.params)}
    text = dumped(Path(task["scratch"]))
    found = count.count(text, task["mesh"], shapes, work.dear)
    print(json.dumps(found.to_dict()))


def dumped(folder: Path) -> str:
    """The program that XLA left in a folder: after the partitioner, or after dead code went.

    Raises:
      RuntimeError: there is none, as where a version of XLA names its passes otherwise.
    """
    files = sorted(folder.glob(f"*after_{_PARTITIONED}*")) or sorted(
        folder.glob(f"*after_{_ALONE}.*")
    )
    if not files:
        raise RuntimeError(
            "XLA left no partitioned program (this jaxlib names its passes otherwise): use "
            "--no-compiled for state and estimates"
        )
    return files[0].read_text("utf-8")


def report(config: PlanConfig, mesh: Mapping[str, int]) -> dict[str, Any]:
    """As :func:`counted`, as JSON values."""
    return counted(config, mesh).to_dict()


if __name__ == "__main__":
    main()
