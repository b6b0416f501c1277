"""Shared set-up of the test suite: eight fake CPU devices, strict warnings, cached compiles."""

import os
import tempfile
from pathlib import Path

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
        " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    ).strip()
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
