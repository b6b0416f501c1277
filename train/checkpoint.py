"""Checkpoints: one state pytree, the data iterator's position, and what the run was.

The only file that knows Orbax (its v1 interface). A checkpoint appears by one rename after it
has been written whole, so a kill or a full disk leaves the earlier ones as they were. Frozen
parameters are not written again with every checkpoint: its metadata hold their fingerprint,
and a resume on another base is refused.

What is read is checked against the fingerprint of what was written, on the devices and for any
mesh. A checkpoint that does not hold it, or cannot be read, is set aside, with a warning, and the
one before is taken.

Layout: ``DIR/manifest.json`` (what the run is), ``DIR/<step>/`` (Orbax; leaves by path; in its
metadata the shape and dtype of each, the fingerprints, and a hash of all these).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.train import damage
from steppe.train.damage import CheckpointError, Damaged
from steppe.train.types import TrainState

MANIFEST = "manifest.json"
FORMAT = 1
# Orbax writes this file last, inside the directory that it then renames.
COMMITTED = "_CHECKPOINT_METADATA"
PARTIAL = ".orbax-checkpoint-tmp"
DELETING = ".deleting-"
ASIDE = ".damaged"


class SaveFailed(OSError):
    """A checkpoint could not be written; the earlier ones stand."""


class Checkpoints:
    """The checkpoints of one run. Nothing is made or changed on disk before the first save.

    Args:
      directory: made if need be.
      keep: how many of the newest to keep.
      manifest: JSON values that must be the same when the run is resumed (the config, the
        name of the base); written with the first checkpoint.
      defaults: values of those of them that the directory's manifest does not know, because
        the program that wrote it did not.

    Attributes:
      hold: a step whose checkpoint is kept however many are newer, or None.

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
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.directory = Path(directory).absolute()
        self._manifest = {"format": FORMAT, **json.loads(json.dumps(dict(manifest or {})))}
        self._check_manifest(json.loads(json.dumps(dict(defaults or {}))))
        self._keep = keep
        self.hold: int | None = None
        self._pending: tuple[int, Any] | None = None
        self._base: tuple[Any, str] = ({}, "")

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(entry.name)
            for entry in self.directory.iterdir()
            if entry.name.isdigit() and (entry / COMMITTED).is_file()
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps, default=None)

    def save(
        self, state: TrainState, data: Mapping[str, Any] | None = None, *, wait: bool = False
    ) -> int:
        """Writes ``state`` (frozen parameters apart) and the data iterator's state.

        The state may be donated as soon as this returns: the write goes on in the background
        while training continues. Its failure is raised by the next ``save`` or ``wait``.

        Args:
          state: what to write; a step that is there already is not written again.
          data: JSON values, as ``batches.get_state()`` gives them.
          wait: return only when the checkpoint is complete.

        Returns:
          The step under which it is kept.

        Raises:
          SaveFailed: this or the previous write failed (disk full); earlier checkpoints stand.
        """
        self.wait()
        step = int(state.step)
        if step in self.steps:
            return step
        leaves = _stored(state)
        meta = {
            "data": dict(data or {}),
            "base": self._fingerprint(state.frozen),
            "layout": {path: _describe(leaf) for path, leaf in leaves.items()},
            "content": _hash_of(leaves),
        }
        meta["seal"] = _seal(meta)
        written = {path: leaf for path, leaf in leaves.items() if math.prod(leaf.shape)}
        with self._failures(step):
            self._open()
            response = _orbax().save_checkpointables_async(
                self.directory / str(step), {"state": written}, custom_metadata=meta
            )
        self._pending = (step, response)
        if wait:
            self.wait()
        return step

    def wait(self) -> None:
        """Blocks until the write in the background is complete.

        Raises:
          SaveFailed: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, response = pending
        with self._failures(step):
            response.result()
        if jax.process_index() == 0:
            for old in self.steps[: -self._keep]:
                if old != self.hold:
                    _remove(self.directory / str(old))

    def restore(
        self, like: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint straight onto the devices and shardings of ``like``.

        Args:
          like: a state of the same run, arrays or abstract (``step.abstract``), on any mesh;
            its ``frozen``, which must be arrays, is taken over.
          step: which one; None = the newest that is not damaged.

        Returns:
          (state, data iterator's state).

        Raises:
          CheckpointError: there is none, its leaves differ from ``like``, or the frozen
            parameters are not those it was trained on. Damaged: it is, and either it was asked
            for or there is none before it.
        """
        self.wait()
        there = self.steps
        if not there or (step is not None and step not in there):
            known = ", ".join(map(str, there)) or "none"
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise CheckpointError(f"no {wanted} in {self.directory}; steps there: {known}")
        if step is not None:
            return self._read(like, step)
        for newest in reversed(there):
            try:
                return self._read(like, newest)
            except Damaged as error:
                if newest == there[0]:
                    raise
                aside = self.directory / f"{newest}{ASIDE}"
                if jax.process_index() == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    (self.directory / str(newest)).rename(aside)
                    warnings.warn(f"{error}; it is now {aside.name}", stacklevel=2)
        raise AssertionError("unreachable")

    def _read(self, like: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        leaves = _stored(like)
        file = self.directory / str(step)

        def metadata() -> tuple[Any, ...]:
            meta = dict(_orbax().metadata(file, checkpointable_name="state").custom_metadata)
            # Those of older versions have neither.
            seal, content = meta.pop("seal", None), meta.get("content")
            if seal is not None and seal != _seal(meta):
                raise ValueError("its metadata are not those that were written")
            return meta["layout"], meta["base"], meta["data"], content

        layout, base, data, content = damage.together(metadata, file)
        for path in (*leaves, *layout):
            want = _describe(leaves[path]) if path in leaves else "nothing"
            if layout.get(path, "nothing") != want:
                held = layout.get(path, "nothing")
                raise CheckpointError(
                    f"{file} holds {held} at {path!r}, this run needs {want}: "
                    "resume with the model and optimiser that it was saved with"
                )
        if self._fingerprint(like.frozen) != base:
            raise CheckpointError(
                f"{file} was trained on other frozen parameters (fingerprint {base!r}, here "
                f"{self._fingerprint(like.frozen)!r}): load the same base to resume"
            )
        abstract = {p: _abstract(leaf) for p, leaf in leaves.items() if math.prod(leaf.shape)}
        found = damage.together(
            lambda: _orbax().load(file, abstract, checkpointable_name="state"), file
        )
        # All processes compute it together, and find the same.
        with damage.readable(file):
            if content is not None and content != _hash_of(found):
                raise ValueError("its arrays are not those that were written")
        return _unstored(like, found), data

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: the run goes on from this one otherwise."""
        self.wait()
        if jax.process_index() == 0:
            for later in (s for s in self.steps if s > step):
                _remove(self.directory / str(later))

    def close(self) -> None:
        """Waits for the write in the background."""
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def _open(self) -> None:
        """Makes the directory; drops what a killed run or a failed write left half done."""
        if jax.process_index() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in self.directory.iterdir():
            if PARTIAL in entry.name or entry.name.startswith(DELETING):
                shutil.rmtree(entry, ignore_errors=True)
        file = self.directory / MANIFEST
        if not file.exists():
            write_json(file, self._manifest)

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """Turns what Orbax and its file layer raise on a failed write into SaveFailed."""
        try:
            yield
        except Exception as error:
            if self.directory.is_dir() and jax.process_index() == 0:
                for entry in self.directory.glob(f"{step}{PARTIAL}*"):
                    shutil.rmtree(entry, ignore_errors=True)
            left = "no earlier one exists" if self.latest is None else f"step {self.latest} stands"
            raise SaveFailed(
                f"checkpoint {step} could not be written to {self.directory}; {left}. Free some "
                f"space and resume ({damage.one_line(error)})"
            ) from error

    def _fingerprint(self, frozen: Any) -> str:
        # The step hands the same frozen tree on from state to state, so this is done once.
        if self._base[0] is not frozen:
            self._base = (frozen, fingerprint(frozen) if jax.tree.leaves(frozen) else "")
        return self._base[1]

    def _check_manifest(self, defaults: Mapping[str, Any]) -> None:
        file = self.directory / MANIFEST
        if not file.is_file():
            return
        try:
            found = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged ({error})") from error
        different = first_difference(_filled(found, defaults, self._manifest), self._manifest)
        if different is not None:
            path, old, new = different
            raise CheckpointError(
                f"the checkpoints in {self.directory} are of another run: {path} was {old!r}, "
                f"now it is {new!r}; resume with the old value or choose a new folder"
            )


def _filled(found: Any, defaults: Any, now: Any) -> Any:
    """``found`` with the values that ``now`` has and it lacks, taken from ``defaults``."""
    if not all(isinstance(value, Mapping) for value in (found, defaults, now)):
        return found
    lacking = {k: defaults[k] for k in now if k not in found and k in defaults}
    known = {k: _filled(v, defaults.get(k), now.get(k)) for k, v in found.items()}
    return {**known, **lacking}


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

    Raises:
      ValueError: a leaf is not an array (an abstract shape has no bits).
    """
    flat = tree.flatten(params)
    for path, leaf in flat.items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"the parameter at {path!r} is a shape; give the loaded array")
    return _hash_of(flat)


def _hash_of(flat: Mapping[str, Any]) -> str:
    """That of leaves by path; those without elements do not count."""
    sums = _sums({path: leaf for path, leaf in flat.items() if math.prod(leaf.shape)})
    digest = hashlib.sha256()
    for path, value in sorted(jax.device_get(sums).items()):
        leaf = flat[path]
        digest.update(f"{path} {tuple(leaf.shape)} {leaf.dtype} {int(value)}\n".encode())
    return digest.hexdigest()[:16]


def _seal(meta: Mapping[str, Any]) -> str:
    """A hash of metadata that survives their way through JSON."""
    text = json.dumps(json.loads(json.dumps(dict(meta))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A 32-bit sum of each leaf's scrambled bits; integer sums do not depend on the mesh."""

    def one(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        # The place of every entry counts: each axis weighs in with its own odd numbers.
        for axis in range(bits.ndim):
            places = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            bits = (bits ^ (places * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
            bits = bits ^ (bits >> 15)
        return bits.sum(dtype=jnp.uint32)

    return {path: one(leaf) for path, leaf in leaves.items()}


def write_json(file: Path, values: Any) -> None:
    """Writes a JSON file in one move: a reader sees the old one, the new one, never a half."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(values, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _orbax() -> Any:
    # Importing Orbax takes longer than everything else here; most callers never save.
    from orbax.checkpoint import v1

    log = logging.getLogger("absl")
    if not any(isinstance(f, _Quiet) for f in log.filters):
        log.addFilter(_Quiet())
    return v1


class _Quiet(logging.Filter):
    """Drops what Orbax logs: every file it opens, and a traceback for each of its threads when
    a write fails. The failure itself reaches the caller as an exception."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """The generator of a key array; under a trace, so that the array may be abstract."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _stored(state: TrainState) -> dict[str, Any]:
    """path -> leaf of all that is written; PRNG keys as the integers that they hold."""

    def bits(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            data = jax.eval_shape(jax.random.key_data, leaf)
            return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
        return jax.random.key_data(leaf)

    flat, _ = jax.tree_util.tree_flatten_with_path(state.replace(frozen={}))
    return {tree.path_of(key): bits(leaf) for key, leaf in flat}


def _unstored(like: TrainState, found: Mapping[str, Any]) -> TrainState:
    def one(key: Any, leaf: Any) -> Any:
        path = tree.path_of(key)
        if path not in found:  # Orbax does not store arrays without elements
            return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), _abstract(leaf).sharding)
        if _is_key(leaf):
            return jax.random.wrap_key_data(found[path], impl=_key_impl(leaf))
        return found[path]

    state = jax.tree_util.tree_map_with_path(one, like.replace(frozen={}))
    return state.replace(frozen=like.frozen)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _remove(folder: Path) -> None:
    """Deletes a checkpoint so that a kill on the way leaves no damaged one behind."""
    doomed = folder.with_name(f"{DELETING}{folder.name}")
    with contextlib.suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
