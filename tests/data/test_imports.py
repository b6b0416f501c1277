"""Importing steppe.data, and making batches from a file, needs none of the heavy libraries."""

import subprocess
import sys

HEAVY = ["transformers", "datasets", "tensorflow_datasets", "tensorflow", "grain", "pandas"]
HEAVY += ["tokenizers", "pyarrow", "torch", "jax", "PIL", "jinja2", "gguf"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_every_module_is_light():
    code = f"""
import sys
import steppe.data
from steppe.data import assets, batches, chat, collate, conversations, dataset, errors, files
from steppe.data import images, lm, masking, packing, seq2seq
from steppe.data import sources, spans, splits, tasks, text, tokens
from steppe.data.assets import frames, readers
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run(code).strip() == "[]"


def test_names_are_found_when_first_used():
    code = """
import steppe.data
assert "batches" in dir(steppe.data)
steppe.data.batches.train
try:
    steppe.data.nothing
except AttributeError as error:
    print(error)
"""
    assert run(code).strip() == "module 'steppe.data' has no attribute 'nothing'"


def test_all_names_of_the_room_exist():
    import steppe.data

    for name in steppe.data.__all__:
        assert getattr(steppe.data, name).__doc__
