"""Shared set-up of the test suite: eight fake CPU devices, strict warnings, cached compiles."""

import functools
import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before jax is imported anywhere: the mesh tests need several devices, and the
# suite must behave the same on a machine with an accelerator unless asked.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    # Eight device threads on two cores may join a collective late; the default is to abort
    # the process after 40 s. And a program that comes out of the compilation cache starts its
    # independent collectives in an order of its own on every device (jaxlib 0.10.2), so that
    # the devices wait for each other for ever; this scheduler fixes the order.
    os.environ["XLA_FLAGS"] = (
        f"{_flags} --xla_force_host_platform_device_count=8"
        " --xla_cpu_enable_concurrency_optimized_scheduler=false"
        " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    ).strip()
EMITTERS = "xla_cpu_use_fusion_emitters"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # The suite compiles thousands of programs that run for milliseconds: LLVM's optimiser took
    # more than half of its time, and of what was left the emitters that write a fusion by way of
    # MLIR took half. To test what users run: XLA_FLAGS="--xla_backend_optimization_level=3".
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # a later one ends the process at this flag
        os.environ["XLA_FLAGS"] += f" --{EMITTERS}=false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

# Tests share compiled programs within a run and between runs on one machine.
jax.config.update(
    "jax_compilation_cache_dir",
    os.environ.get("STEPPE_TEST_CACHE", str(Path(tempfile.gettempdir()) / "steppe-test-xla")),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _of_one_device() -> None:
    """Programs over several devices are compiled in every process, whatever the cache holds.

    Some that came out of it have let their devices wait for each other for ever in spite of the
    scheduler above, on a machine that nothing else could be told from. JAX has no switch for it.
    """
    from jax._src import compilation_cache as cache

    read = getattr(cache, "get_executable_and_time", None)
    if read is None:  # another JAX: its cache is as it is
        return

    @functools.wraps(read)
    def get(key: str, options: Any, backend: Any, devices: Any, *more: Any, **named: Any) -> Any:
        # ``more``: later releases hand over the callbacks of the host too.
        if len(devices) > 1:
            return None, None
        return read(key, options, backend, devices, *more, **named)

    cache.get_executable_and_time = get


_of_one_device()

# Every compiled program holds some forty memory maps, and Linux gives a process 65,530 of them:
# beyond that LLVM fails to allocate, which ends the process without a word.
MAPS = 20_000


HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks ``long`` what ``long.txt`` lists, before ``-m`` chooses."""
    lines = (HERE / "long.txt").read_text(encoding="utf-8").splitlines()
    listed = {line for line in lines if line and not line.startswith("#")}
    for item in items:
        file = f"{HERE.name}/{item.path.relative_to(HERE).as_posix()}"
        fixtures = getattr(item, "fixturenames", ())
        place = f"{file}::{item.nodeid.partition('::')[2]}"
        if place in listed or any(f"{file} {fixture}" in listed for fixture in fixtures):
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory_maps() -> Iterator[None]:
    """Drops the compiled programs after a module that leaves too many memory maps."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def emitters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fusions as users compile them: two programs that agree to the bit there, and are not the
    same program, may differ by a rounding without the emitters."""
    if f"--{EMITTERS}=false" in os.environ["XLA_FLAGS"]:
        jit = functools.partial(jax.jit, compiler_options={EMITTERS: True})
        monkeypatch.setattr(jax, "jit", jit)


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """All local devices; eight fake ones on the CPU."""
    return jax.devices()


@pytest.fixture
def asset():
    """``asset("minilm-l6")`` gives the folder of a fetched asset, or skips with the cure."""

    def find(name: str) -> Path:
        from steppe.data import assets

        try:
            return assets.path(name)
        except assets.AssetMissing as missing:
            pytest.skip(str(missing))

    return find
