"""``steppe plan``: from settings to a report."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from steppe.launch.plan import memory, program, propose, roofline, table
from steppe.launch.plan import work as work_
from steppe.launch.plan.settings import PlanConfig
from steppe.launch.plan.work import Work
from steppe.models import tree
from steppe.train import mesh


def run(config: PlanConfig) -> dict[str, Any]:
    """Plans, prints the table (or JSON) and returns the report."""
    found = report(config)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        from rich.console import Console

        Console().print(table.render(found))
    return found


def report(config: PlanConfig) -> dict[str, Any]:
    """What a step needs, as JSON values.

    Bytes are per device, FLOPs and collectives per device and step, times in seconds.

    Raises:
      ValueError: settings that do not go together; no mesh that fits, where none is given; a
        given one that does not divide a dimension or the rows.
      RuntimeError: the step does not compile.
    """
    work = work_.build(config)
    place = config.place
    accelerator = place.accelerator
    sizes = work_.mesh_of(config)
    why: tuple[str, ...] = ("as given",)
    if sizes is None:
        sizes, why = propose.propose(work, accelerator, place.devices, config.slices)
    plan = mesh.abstract(sizes, work.model.axes)
    if plan.mesh.shape.get("data", 1) % config.slices and config.slices > 1:
        raise ValueError(
            f"slices={config.slices} must divide the axis data of mesh {sizes}: it is the one "
            "that runs across slices"
        )
    state = work.state(plan)
    held = memory.held(work, plan, state)
    estimated = memory.activations(work, plan)
    found: dict[str, Any] = {
        "model": config.model,
        "teacher": config.teacher,
        "on": config.on,
        "accelerator": dataclasses.asdict(accelerator),
        "devices": place.devices,
        "slices": config.slices,
        "mesh": sizes,
        "why": list(why),
        "kind": work.kind,
        "rows": work.rows(plan),
        "length": work.length,
        "microbatches": config.microbatches,
        "compute_dtype": config.compute_dtype,
        "remat": config.remat or getattr(work.bare.config, "remat", "auto"),
        "gradients_a_step": work.gradients,
        "parameters": tree.count(state.params) + tree.count(state.frozen),
        "trainable": tree.count(state.params),
        "state": held.state,
        "gradients": held.gradients,
        "ascent_copy": held.ascent,
        "compute_copies": held.copies,
        "activations_estimated": estimated,
        "model_flops": work.model_flops(work.rows(plan)) / place.devices,
    }
    fixed = sum(held.state.values())
    total = held.total + estimated
    if config.compiled:
        total = fixed + _program(found, config, work, sizes)
    found["total"] = total
    found["usable"] = memory.USABLE * accelerator.memory
    found["fits"] = total <= found["usable"]
    found["change"] = [] if found["fits"] else changes(work, config, found)
    return found


def _program(found: dict[str, Any], config: PlanConfig, work: Work, sizes: dict[str, int]) -> int:
    """Adds what is counted in the program; returns the bytes of what lives inside a step."""
    counts = program.counted(config, sizes)
    accelerator = config.place.accelerator
    times = roofline.times(counts, accelerator, sizes, config.slices)
    inside = sum(counts.memory.values())
    tokens = found["rows"] * max(found["length"], 1)
    found |= {
        "inside": counts.memory,
        "flops": counts.flops,
        "elementwise": counts.elementwise,
        "exponentials": counts.exponentials,
        "traffic": counts.nbytes,
        "unknown_loops": counts.unknown,
        "times": roofline.to_dict(times),
        "mfu": found["model_flops"] / accelerator.rate(_short(config)) / times.step,
        "tokens_per_s": tokens / times.step,
    }
    return inside


def _short(config: PlanConfig) -> str:
    return "bf16" if config.compute_dtype == "bfloat16" else "f32"


def changes(work: Work, config: PlanConfig, found: dict[str, Any]) -> list[str]:
    """What to change about a step that does not fit: other meshes first, then other settings."""
    sizes: dict[str, int] = found["mesh"]
    out = []
    accelerator = config.place.accelerator
    try:
        other = propose.propose(work, accelerator, found["devices"], config.slices).mesh
    except ValueError:
        other = None
    if other is not None and other != sizes:
        out.append("mesh " + ",".join(f"{n}={s}" for n, s in other.items()))
    elif sizes.get("data", 1) > config.slices:
        fsdp = found["devices"] // sizes.get("model", 1) // config.slices
        names = {"data": config.slices, "fsdp": fsdp, "model": sizes.get("model", 1)}
        out.append("mesh " + ",".join(f"{n}={s}" for n, s in names.items() if s > 1))
    short = found["total"] - found["usable"]
    state = sum(found["state"].values()) + found["gradients"]
    if state > found["usable"]:
        factor = 2 ** math.ceil(math.log2(state / found["usable"]))
        out.append(f"about {factor} times as many devices (the state alone is too large)")
    out += propose.cures(work)
    return [f"{short / propose.GIB:.3g} GiB a device too much: try " + out[0], *out[1:]]
