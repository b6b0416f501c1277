"""The programs of the merge benchmark: ours, PyTorch's plain formulas, and fusion_bench's.

All of them work on the same memory: PyTorch's tensors are views of jax's arrays.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.launch import tuning
from steppe.launch.bench import environment

K, LAM, P = 0.2, 0.3, 0.5
METHODS = ("average", "task-arithmetic", "ties", "dare", "concrete mask")
PEERS = ("torch", "fusion_bench")


def tensors(width: int, layers: int, ffn: int, patch: int, positions: int) -> dict[str, Any]:
    """Shapes of a vision transformer's trunk, stacked as ours are."""
    d, n, f = width, layers, ffn
    square = {f"layers/attn/{name}/kernel": (n, d, d) for name in "qkvo"}
    biases = {f"layers/attn/{name}/bias": (n, d) for name in "qkvo"}
    norms = {f"layers/{at}_norm/{kind}": (n, d) for at in ("attn", "ffn")
             for kind in ("scale", "bias")}  # fmt: skip
    return {
        "embed/patch/kernel": (3 * patch * patch, d),
        "embed/position/table": (positions, d),
        **square,
        **biases,
        "layers/ffn/in/kernel": (n, d, f),
        "layers/ffn/in/bias": (n, f),
        "layers/ffn/out/kernel": (n, f, d),
        "layers/ffn/out/bias": (n, d),
        **norms,
    }


class Side:
    """Base, task vectors and mask in memory, and every program on them."""

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], tasks: int, seed: int, threads: int
    ) -> None:
        tuning.prepare()
        import jax
        import jax.numpy as jnp
        import numpy as np

        from steppe.models import tree

        self._threads, self._count = threads, tasks
        rng = np.random.default_rng(seed)

        def normal(shape: Sequence[int], scale: float) -> Any:
            return jnp.asarray(np.float32(scale) * rng.standard_normal(tuple(shape), np.float32))

        self._base = tree.unflatten({p: normal(s, 0.02) for p, s in shapes.items()})
        self._taus = tree.unflatten({p: normal((tasks, *s), 2e-3) for p, s in shapes.items()})
        self._mask = tree.unflatten(
            {p: jnp.asarray(rng.random(tuple(s), np.float32)) for p, s in shapes.items()}
        )
        self._lambdas = jnp.full(tasks, LAM, jnp.float32)
        self._key = jax.random.key(seed)
        self._ours = self._steppe()
        self._theirs: dict[str, dict[str, Callable[[], Any]]] = {}
        self._found: dict[tuple[str, str], Any] = {}

    def facts(self) -> dict[str, int]:
        """Entries of a model, bytes that a merge has to move at least: N + 1 in, 1 out."""
        from steppe.models import tree

        entries = tree.count(self._base)
        return {"entries": entries, "bytes": 4 * entries * (self._count + 2)}

    def _steppe(self) -> dict[str, Callable[[], Any]]:
        import jax

        from steppe.train import merge
        from steppe.train.merge import concrete

        base, taus = self._base, self._taus

        def models(stacked: Any) -> list[Any]:
            return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self._count)]

        average = jax.jit(lambda stacked: merge.average(models(stacked)))
        arithmetic = jax.jit(lambda b, t: merge.task_arithmetic(b, t, LAM))
        dropped = jax.jit(lambda k, b, t: merge.task_arithmetic(b, merge.dare(k, t, P), LAM))
        return {
            "average": lambda: average(taus),
            "task-arithmetic": lambda: arithmetic(base, taus),
            "ties": lambda: merge.ties(base, taus, K, LAM),
            "dare": lambda: dropped(self._key, base, taus),
            "concrete mask": lambda: concrete.masked_merge(base, taus, self._lambdas, self._mask),
        }

    def open(self, peer: str) -> list[str]:
        """Prepares a peer; the methods that it has here.

        Raises:
          ImportError: it is not installed.
        """
        import torch

        torch.set_num_threads(self._threads or environment.cores())
        self._theirs[peer] = (_torch if peer == "torch" else _fusion_bench)(
            _views(self._base), _views(self._taus), _views(self._mask), self._count
        )
        return list(self._theirs[peer])

    def turn(self, side: str, method: str, steps: int) -> float:
        """Runs a program so many times and returns the seconds."""
        import jax

        program = self._ours[method] if side == "steppe" else self._theirs[side][method]
        start = time.perf_counter()
        result = None
        for _ in range(steps):
            result = None  # the memory of the one before is free again
            result = program()
            if side == "steppe":
                jax.block_until_ready(result)
        seconds = time.perf_counter() - start
        self._found[side, method] = _sample(result)
        return seconds

    def difference(self, side: str, method: str) -> float:
        """Largest difference of the last results of a side and ours, on a sample of entries,
        relative to the largest entry; for dare, of other draws, of their root mean square."""
        import numpy as np

        ours, theirs = self._found["steppe", method], self._found[side, method]
        if method == "dare":
            a, b = (np.sqrt(np.mean(np.square(x))) for x in (ours, theirs))
            return float(abs(a - b) / a)
        return float(np.abs(ours - theirs).max() / np.abs(ours).max())

    def bandwidth(self, entries: int, rounds: int) -> dict[str, list[float]]:
        """GB/s of a copy and of a triad (a = b + s c) over arrays of so many float32, by PyTorch
        where it is there, else by numpy; bytes read and written, without write-allocation."""
        found: dict[str, list[float]] = {"copy": [], "triad": []}
        try:
            import torch

            torch.set_num_threads(self._threads or environment.cores())
            b, c = torch.ones(entries), torch.ones(entries)
            a = torch.empty_like(b)
            runs: dict[str, Callable[[], Any]] = {
                "copy": lambda: a.copy_(b),
                "triad": lambda: torch.add(b, c, alpha=0.3, out=a),
            }
        except ImportError:
            import jax
            import jax.numpy as jnp

            x, y = jnp.ones(entries), jnp.ones(entries)
            copy, triad = jax.jit(lambda v: v * 1.0000001), jax.jit(lambda v, w: v + 0.3 * w)
            runs = {
                "copy": lambda: copy(x).block_until_ready(),
                "triad": lambda: triad(x, y).block_until_ready(),
            }
        moved = {"copy": 8 * entries, "triad": 12 * entries}
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                found[name].append(moved[name] / (time.perf_counter() - start) / 1e9)
        return found

    def available(self) -> int:
        """Bytes of memory that are free; 0 where that is not known."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return 0

    def peak_memory(self) -> int:
        """Largest resident memory of this process, bytes."""
        return environment.peak_memory()


def _sample(result: Any) -> Any:
    """About a thousand entries of every tensor, in the order of the names."""
    import numpy as np

    from steppe.models import tree

    nested = any(isinstance(value, Mapping) for value in result.values())
    flat = tree.flatten(result) if nested else result
    parts = []
    for name in sorted(flat):
        leaf = np.asarray(flat[name]).reshape(-1)
        parts.append(np.asarray(leaf[:: max(1, leaf.size // 1000)], np.float64))
    return np.concatenate(parts)


def _views(params: Any) -> dict[str, Any]:
    import torch

    from steppe.models import tree

    return {path: torch.from_dlpack(leaf) for path, leaf in tree.flatten(params).items()}


def _torch(
    base: Mapping[str, Any], taus: Mapping[str, Any], mask: Mapping[str, Any], count: int
) -> dict[str, Callable[[], Any]]:
    """The plain formulas, tensor by tensor."""
    import torch

    def dare() -> Any:
        found = {}
        for name, tau in taus.items():
            kept = torch.rand_like(tau) > P
            found[name] = base[name] + LAM * (tau * kept / (1 - P)).sum(0)
        return found

    def ties() -> Any:
        entries = sum(tensor.numel() for tensor in base.values())
        thresholds = []
        for task in range(count):
            flat = torch.cat([taus[name][task].reshape(-1) for name in taus]).abs()
            thresholds.append(torch.kthvalue(flat, entries - int(entries * K)).values)
        line = torch.stack(thresholds)

        def trimmed(tau: Any) -> Any:
            return torch.where(tau.abs() >= line.reshape(-1, *[1] * (tau.ndim - 1)), tau, 0.0)

        votes = sum(torch.sign(trimmed(tau).sum(0)).sum() for tau in taus.values())
        majority = torch.sign(torch.as_tensor(votes))
        found = {}
        for name, tau in taus.items():
            parts = trimmed(tau)
            sign = torch.sign(parts.sum(0))
            sign = torch.where(sign == 0, majority, sign)
            agreeing = torch.where(torch.where(sign > 0, parts > 0, parts < 0), parts, 0.0)
            found[name] = base[name] + LAM * agreeing.sum(0)
        return found

    def masked() -> Any:
        found = {}
        for name, tau in taus.items():
            m = mask[name]
            axes = tuple(range(1, m.ndim)) if name.startswith("layers/") else None
            mean = m.mean() if axes is None else m.mean(axes, keepdim=True)
            found[name] = base[name] + (m / mean) * (LAM * tau).sum(0)
        return found

    return {
        "average": lambda: {name: tau.mean(0) for name, tau in taus.items()},
        "task-arithmetic": lambda: {n: base[n] + LAM * tau.sum(0) for n, tau in taus.items()},
        "ties": ties,
        "dare": dare,
        "concrete mask": masked,
    }


def _fusion_bench(
    base: Mapping[str, Any], taus: Mapping[str, Any], mask: Mapping[str, Any], count: int
) -> dict[str, Callable[[], Any]]:
    """The library's own functions on its own form, one dictionary of tensors a task.

    Its packages import much that a merge does not need, so the files are loaded by themselves.
    """
    import torch

    found = importlib.util.find_spec("fusion_bench")
    if found is None or not found.submodule_search_locations:
        raise ImportError("fusion_bench is not installed; put its folder on PYTHONPATH")
    root = Path(found.submodule_search_locations[0])
    ties_ = _file(root / "method" / "ties_merging" / "ties_merging_utils.py")
    dare_ = _file(root / "method" / "dare" / "utils.py")
    arithmetic = _file(root / "utils" / "state_dict_arithmetic.py")
    states = [{name: tau[task] for name, tau in taus.items()} for task in range(count)]
    start = dict(base)

    def added(total: Mapping[str, Any]) -> Any:
        return arithmetic.state_dict_add(start, arithmetic.state_dict_mul(total, LAM))

    def ties() -> Any:
        flat = torch.vstack([ties_.state_dict_to_vector(state) for state in states])
        with contextlib.redirect_stdout(io.StringIO()):
            merged = ties_.ties_merging(flat, reset_thresh=K, merge_func="sum")
        del flat
        first = ties_.state_dict_to_vector(start)
        return ties_.vector_to_state_dict(first + LAM * merged, start)

    def dare() -> Any:
        dropped = []
        for state in states:
            own = {name: tensor.clone() for name, tensor in state.items()}
            dare_.module_random_drop_(own, P, True)
            dropped.append(own)
        return added(arithmetic.state_dict_sum(dropped))

    return {
        "average": lambda: arithmetic.state_dict_avg(states),
        "task-arithmetic": lambda: added(arithmetic.state_dict_sum(states)),
        "ties": ties,
        "dare": dare,
    }


def _file(path: Path) -> Any:
    """A module from its file, under stand-ins for the types that it names."""
    names = ("StateDictType", "BoolStateDictType", "TorchModelType")
    for package in ("fusion_bench", "fusion_bench.utils", "fusion_bench.utils.type"):
        if package not in sys.modules:
            made = types.ModuleType(package)
            made.__path__ = []
            for name in names:
                setattr(made, name, dict)
            sys.modules[package] = made
    own = f"fusion_bench.utils.{path.stem}"
    spec = importlib.util.spec_from_file_location(own, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
