"""Process settings: made before jax only, and never against the user's own."""

import os
import subprocess
import sys

import pytest

from steppe.launch import tuning

CODE = """
import os, sys
from steppe.launch import tuning
assert "jax" not in sys.modules
before = os.environ.get("XLA_FLAGS", "")
print(tuning.keep_memory(), tuning.wide_vectors(), os.environ.get("XLA_FLAGS", "") == before)
import jax
assert float(jax.numpy.ones(1000).sum()) == 1000
"""


def answers(**environment):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "GLIBC_TUNABLES")}
    out = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**env, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return out.stdout.split()


def test_nothing_is_touched_once_jax_is_imported():
    flags = os.environ.get("XLA_FLAGS")
    assert not tuning.keep_memory()
    assert not tuning.wide_vectors()
    assert os.environ.get("XLA_FLAGS") == flags


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is tuned")
def test_settings_of_the_user_win():
    assert answers(GLIBC_TUNABLES="glibc.malloc.top_pad=1")[0] == "False"
    assert answers(MALLOC_ARENA_MAX="2")[0] == "False"
    _, wide, untouched = answers(XLA_FLAGS="--xla_cpu_prefer_vector_width=128")
    assert (wide, untouched) == ("False", "True")


def test_in_a_fresh_process_jax_still_works():
    kept, wide, untouched = answers()
    assert kept in ("True", "False")
    assert (wide == "True") == (untouched == "False")
