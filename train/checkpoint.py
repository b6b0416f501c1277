"""Checkpoints: one state pytree, the data iterator's position, and what the run was.

The only file that knows Orbax (its v1 interface). A checkpoint appears by one rename after it
has been written whole, so a kill or a full disk leaves the earlier ones as they were. Frozen
parameters are not written again with every checkpoint: the manifest holds their fingerprint,
and a resume on another base is refused.

Layout: ``DIR/manifest.json``, ``DIR/<step>/``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.train.types import TrainState

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be used here; the message says why and what to do."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: made if need be.
      keep: how many of the newest to keep.
      manifest: JSON values that must be the same when the run is resumed (the config, the
        base's fingerprint); written with the first checkpoint.

    Raises:
      CheckpointError: the directory's manifest differs from ``manifest``; names the first
        difference.
      ValueError: keep < 1.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        manifest: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.directory = Path(directory).absolute()
        self._manifest = {"format": FORMAT, **json.loads(json.dumps(dict(manifest or {})))}
        self._check_manifest()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._pending: Any = None
        self._orbax = self._open()

    def _open(self) -> Any:
        from orbax.checkpoint.experimental import v1

        # Orbax reports every file that it opens; a run's terminal is for the run.
        logging.getLogger("absl").setLevel(logging.ERROR)
        return v1.training.Checkpointer(
            self.directory,
            preservation_policy=v1.training.preservation_policies.LatestN(self._keep),
            cleanup_tmp_directories=True,
        )

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(c.step for c in self._orbax.checkpoints)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    def save(
        self, state: TrainState, data: Mapping[str, int] | None = None, *, wait: bool = False
    ) -> int:
        """Writes ``state`` (frozen parameters apart) and the data iterator's state.

        The write goes on in the background while training continues; its failure is raised
        by the next call of ``save`` or ``wait``.

        Returns:
          The step under which it is kept.

        Raises:
          OSError: this or the previous write failed (disk full); earlier checkpoints stand.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps:
            return step
        self._write_manifest()
        tree_ = _stored(state)
        # The next step may reuse the memory of the state (donation), and on the CPU a host
        # view of an array *is* that memory: write from a copy.
        tree_ = jax.tree.map(jnp.copy, tree_)
        with _plain_errors(self.directory):
            self._pending = self._orbax.save_async(
                step, tree_, force=True, custom_metadata={"data": dict(data or {})}
            )
        if wait:
            self.wait()
        return step

    def wait(self) -> None:
        """Blocks until the write in the background is complete.

        Raises:
          OSError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with _plain_errors(self.directory):
                pending.result()
                self._orbax.wait()

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, int]]:
        """Reads a checkpoint onto the devices and shardings of ``like``.

        Args:
          like: a state of the same run, arrays or abstract, on any mesh; its ``frozen`` is
            taken over.
          step: which one; None = the newest.

        Returns:
          (state, data iterator's state).

        Raises:
          CheckpointError: there is none, it is damaged, or its leaves differ from ``like``.
        """
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory} ({there})")
        wanted = _stored(like)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            wanted,
        )
        self._check_leaves(step, abstract)
        try:
            found = self._orbax.load(step, abstract)
            data = self._orbax.metadata(step).custom_metadata or {}
        except Exception as error:
            first = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read ({first}); "
                f"remove it to use the one before"
            ) from error
        rng = jax.random.wrap_key_data(found["rng"], impl=jax.random.key_impl(like.rng))
        state = TrainState(
            step=found["step"],
            params=found["params"],
            frozen=like.frozen,
            opt_state=jax.tree.unflatten(
                jax.tree.structure(like.opt_state), jax.tree.leaves(found["opt_state"])
            ),
            extra=found["extra"],
            rng=rng,
        )
        return state, {k: int(v) for k, v in data.get("data", {}).items()}

    def close(self) -> None:
        """Waits for the write in the background and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _check_leaves(self, step: int, abstract: Any) -> None:
        stored = self._orbax.metadata(step).metadata
        have = {_name(k): tuple(v.shape) for k, v in _paths(stored) if hasattr(v, "shape")}
        want = {_name(k): tuple(v.shape) for k, v in _paths(abstract)}
        for path in (*want, *have):
            if have.get(path) != want.get(path):
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)} holds {path!r} of shape "
                    f"{have.get(path, 'none')}, the run needs {want.get(path, 'none')}"
                )

    def _check_manifest(self) -> None:
        file = self.directory / MANIFEST
        if not file.is_file():
            return
        try:
            found = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged ({error})") from error
        different = first_difference(found, self._manifest)
        if different is not None:
            path, old, new = different
            raise CheckpointError(
                f"the checkpoints in {self.directory} are of another run: {path} was {old!r}, "
                f"now it is {new!r}; resume with the old value or choose a new folder"
            )

    def _write_manifest(self) -> None:
        file = self.directory / MANIFEST
        if file.exists() or jax.process_index() != 0:
            return
        with tempfile.NamedTemporaryFile(
            "w", dir=self.directory, prefix=".manifest", delete=False, encoding="utf-8"
        ) as stream:
            json.dump(self._manifest, stream, indent=2)
        os.replace(stream.name, file)


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(path, old, new) of the first value that differs between two JSON values, or None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in (*old, *(k for k in new if k not in old)):
            where = f"{path}.{key}" if path else str(key)
            if key not in old or key not in new:
                return where, old.get(key), new.get(key)
            found = first_difference(old[key], new[key], where)
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def fingerprint(params: Any) -> str:
    """A short hash of a tree's paths, shapes, dtypes and bits, without moving it to the host.

    Equal trees have equal fingerprints on any mesh. It guards against mistakes, not attacks.
    """
    flat = {p: leaf for p, leaf in tree.flatten(params).items() if math.prod(leaf.shape)}

    @jax.jit
    def sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        def one(leaf: jax.Array) -> jax.Array:
            bits = jax.lax.bitcast_convert_type(
                leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
            ).astype(jnp.uint32)
            # The place of every entry counts: each axis weighs in with its own odd numbers.
            for axis, size in enumerate(bits.shape):
                places = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(2654435761)
                shape = [1] * bits.ndim
                shape[axis] = size
                bits = (bits ^ places.reshape(shape)) * jnp.uint32(2246822519)
                bits = bits ^ (bits >> 15)
            return bits.sum(dtype=jnp.uint32)

        return {path: one(leaf) for path, leaf in leaves.items()}

    digest = hashlib.sha256()
    for path, value in sorted(jax.device_get(sums(flat)).items()):
        leaf = flat[path]
        digest.update(f"{path} {tuple(leaf.shape)} {leaf.dtype} {int(value)}\n".encode())
    return digest.hexdigest()[:16]


def _stored(state: TrainState) -> dict[str, Any]:
    """What is written: plain dicts, keys as their bits, the optimiser's leaves by number.

    An optimiser state is made of named tuples that differ between versions of optax; its
    leaves in order do not, and ``like`` gives them their structure back.
    """
    rng = state.rng
    if isinstance(rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, rng)
    else:
        data = jax.random.key_data(rng)
    leaves = jax.tree.leaves(state.opt_state)
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": {f"{i:05d}": leaf for i, leaf in enumerate(leaves)},
        "extra": state.extra,
        "rng": data,
    }


def _paths(tree_: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree_)[0]


def _name(key: Any) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


class _plain_errors:  # noqa: N801 -- reads as a statement
    """Turns what Orbax and its file layer raise on a failed write into an OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (OSError, KeyboardInterrupt)):
            return
        first = " ".join(str(error).split())[:300]
        raise OSError(
            f"the checkpoint could not be written to {self._directory} ({first}); "
            "earlier checkpoints stand"
        ) from error
