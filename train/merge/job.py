"""A streamed merge at work: what it learns of whole models, and the pieces of a tensor."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.train.merge import leafwise
from steppe.train.merge.dare import STEPS, draws
from steppe.train.merge.fisher import coefficients
from steppe.train.merge.inputs import Input, Report, open_input
from steppe.train.merge.methods import (
    Average,
    Dare,
    Fisher,
    Method,
    Slerp,
    TaskArithmetic,
    Ties,
    Weighted,
)
from steppe.train.merge.ties import (
    CANDIDATES,
    SAMPLE,
    Merge,
    Trim,
    begin,
    bounds,
    combine,
    elect,
    first_guesses,
    keep_count,
    reaching,
    spread,
    trimmed,
    unfinished,
    update,
)

PIECE = 1 << 20


def open_fishers(method: Method, report: Report) -> list[Input]:
    """The folders of Fisher diagonals, each with the shapes of its model.

    Raises:
      ValueError: a folder that lacks a tensor, or has it in another shape.
    """
    if not isinstance(method, Fisher):
        return []
    opened = [open_input(folder, f"Fisher {n}") for n, folder in enumerate(method.fishers)]
    family = report.reference.family
    prefix = f"{family.prefix}." if family is not None and family.prefix else ""
    out = []
    for one in opened:
        tensors = {name.removeprefix(prefix): t for name, t in one.tensors.items()}
        out.append(Input(one.name, one.folder, one.raw, tensors, one.store))
    for one in out:
        for name in report.shared:
            model = report.models[0].tensors[name]
            if not jnp.issubdtype(model.dtype, jnp.floating):
                continue
            if name not in one.tensors or one.tensors[name].shape != model.shape:
                raise ValueError(
                    f"{one.folder} must hold the Fisher diagonal of {name!r}, shape "
                    f"{list(model.shape)}, got {one.tensors.get(name, 'none')}"
                )
    return out


class Job:
    """One merge: what it knows of the whole model, and the pieces of a tensor."""

    def __init__(self, method: Method, report: Report, fishers: Sequence[Input]) -> None:
        self.method, self.report, self.fishers = method, report, fishers
        self.state: dict[str, Any] = {}
        inner = method.then if isinstance(method, Dare) else method
        self.ties = inner if isinstance(inner, Ties) else None

    # --- what concerns the whole model ---

    def prepare(self) -> dict[str, Any]:
        if self.ties is not None:
            self.state = self._thresholds(self.ties)
        elif isinstance(self.method, Fisher):
            self.state = {"squares": self._squares()}
        return self.state

    def restore(self, state: dict[str, Any]) -> None:
        self.state = state

    def _moving(self) -> list[str]:
        return [n for n in self.report.shared if n not in self.report.unbased and self._float(n)]

    def _float(self, name: str) -> bool:
        dtype = self.report.origin(name).tensors[name].dtype
        return bool(jnp.issubdtype(dtype, jnp.floating))

    def _thresholds(self, method: Ties) -> dict[str, Any]:
        """One threshold a task over all tensors, and the majority of signs."""
        names = self._moving()
        count = len(self.report.models)
        sizes = [int(np.prod(self.report.reference.tensors[n].shape)) for n in names]
        entries = sum(sizes)
        if entries == 0:
            raise ValueError("the models share no floating-point tensor: there is nothing to merge")
        keep = keep_count(method.k, entries)
        low, high = bounds(count)
        first = spread(low, high)
        if entries > 16 * SAMPLE:
            sample = self._sample(names, entries)
            first = first_guesses([sample], keep / entries)
        state = begin(entries, low, high, first)
        target = jnp.asarray(divmod(keep, 1 << 16), jnp.int32)
        while bool(unfinished(state)):
            words = np.zeros((count, CANDIDATES, 2), np.int64)
            for name in names:
                for piece in self._read(name):
                    taus = self._taus(name, piece)
                    words += np.asarray(_count(taus, state.guesses), np.int64)
            whole = words[..., 0] * 65536 + words[..., 1]
            carried = np.stack([whole >> 16, whole & 0xFFFF], axis=-1).astype(np.int32)
            state = update(state, target, jnp.asarray(carried))
        votes = 0
        for name in names:
            for piece in self._read(name):
                votes += int(_votes(self._taus(name, piece), state.low))
        return {"thresholds": np.asarray(state.low).tolist(), "majority": int(np.sign(votes))}

    def _sample(self, names: Sequence[str], entries: int) -> jax.Array:
        """Every s-th entry of every task vector, [N, S]: it steers the search, no more."""
        stride = (entries // SAMPLE) | 1
        parts = []
        for name in names:
            base = np.array(self.report.reference.read(name)[::stride], np.float32)
            models = [np.array(m.read(name)[::stride], np.float32) for m in self.report.models]
            parts.append(np.stack(models) - base)
        return jnp.asarray(np.concatenate(parts, axis=1))

    def _squares(self) -> list[float]:
        names = [n for n in self.report.shared if self._float(n)]
        sums = [0.0] * len(self.fishers)
        for number, one in enumerate(self.fishers):
            for name in names:
                flat = one.read(name)
                for start in range(0, len(flat), PIECE):
                    values = np.array(flat[start : start + PIECE], np.float64)
                    if not np.isfinite(values).all() or (values < 0).any():
                        raise ValueError(
                            f"{one.tensors[name].file}: tensor {one.tensors[name].stored!r} must "
                            "be finite and >= 0 to be a Fisher diagonal"
                        )
                    sums[number] += float(np.square(values).sum())
        return sums

    # --- pieces ---

    def _read(self, name: str) -> Iterator[Piece]:
        """The pieces of a tensor, one after another, each a copy of the files' bytes."""
        based = self.report.based and name not in self.report.unbased
        inputs = list(self.report.inputs) if based else list(self.report.models)
        size = int(np.prod(inputs[0].tensors[name].shape, dtype=np.int64))
        for number, start in enumerate(range(0, size, PIECE)):
            stop = min(start + PIECE, size)
            arrays = [_padded(one.read(name)[start:stop]) for one in inputs]
            finite = np.asarray(_finite(arrays))
            if not finite.all():
                bad = inputs[int(np.argmin(finite))].tensors[name]
                raise ValueError(
                    f"{bad.file}: tensor {bad.stored!r} holds NaN or infinity; a merge would "
                    "spread it"
                )
            base = arrays[0] if based else None
            yield Piece(number, start, stop, base, arrays[1:] if based else arrays)

    def _taus(self, name: str, piece: Piece) -> jax.Array:
        return _task_vectors(piece.base, piece.models, *self._draws(name, piece))

    def _draws(self, name: str, piece: Piece) -> tuple[Any, Any, Any]:
        """(key, dropped share of 2^16, scale) of DARE for a piece; None where it is not used."""
        if not isinstance(self.method, Dare):
            return None, None, None
        drop = min(round(self.method.p * STEPS), STEPS - 1)
        scale = STEPS / (STEPS - drop) if self.method.rescale else 1.0
        own = zlib.crc32(f"{name} {piece.number}".encode()) & 0x7FFFFFFF
        return jax.random.fold_in(jax.random.key(self.method.seed), own), drop, scale

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first entry, merged entries) of a tensor, in the dtype of the output.

        Sums are in float32, those of float64 tensors too.
        """
        origin = self.report.origin(name)
        if name in self.report.copied or not self._float(name):
            flat = origin.read(name)
            for start in range(0, len(flat), PIECE):
                yield start, np.array(flat[start : start + PIECE])
            return
        dtype = origin.tensors[name].dtype
        fixed = self._fixed(name)
        for piece in self._read(name):
            values = self._merged(name, piece, fixed)
            # jax has no float64 by default: it would silently leave float32.
            narrow = values if dtype.itemsize > 4 else values.astype(dtype)
            merged = np.asarray(narrow)[: piece.stop - piece.start].astype(dtype)
            if not np.isfinite(merged).all():
                raise ValueError(
                    f"tensor {origin.tensors[name].stored!r} of the merged model leaves the range "
                    f"of {dtype}; take smaller coefficients"
                )
            yield piece.start, merged

    def _fixed(self, name: str) -> list[Any] | None:
        """Coefficients of the models where the merge is a weighted sum, or None."""
        method, count = self.method, len(self.report.models)
        if isinstance(method, Weighted):
            return list(method.weights)
        if isinstance(method, Average) and method.weights is not None:
            return [w / sum(method.weights) for w in method.weights]
        if isinstance(method, Slerp):
            return self._angle(name, method.t)
        if isinstance(method, Average) or name in self.report.unbased:
            return [1.0 / count] * count
        return None

    def _angle(self, name: str, t: float) -> list[float]:
        xx = yy = xy = 0.0
        for piece in self._read(name):
            parts = np.asarray(_dots(*piece.models), np.float64)
            xx, yy, xy = xx + parts[0], yy + parts[1], xy + parts[2]
        norms = np.sqrt(xx) * np.sqrt(yy)
        cosine = xy / norms if norms else 1.0
        if abs(cosine) > leafwise.PARALLEL:
            return [1 - t, t]
        angle = np.arccos(cosine)
        return [float(np.sin(s * angle) / np.sin(angle)) for s in (1 - t, t)]

    def _merged(self, name: str, piece: Piece, fixed: list[Any] | None) -> jax.Array:
        if fixed is not None:
            return _sum(piece.models, fixed)
        method = self.method
        if isinstance(method, Fisher):
            return self._fisher(name, piece, method)
        taus = self._taus(name, piece)
        if self.ties is not None:
            limits = jnp.asarray(self.state["thresholds"], jnp.int32)
            sign = jnp.float32(self.state["majority"])
            return _ties(piece.base, taus, limits, sign, self.ties.lam, self.ties.merge)
        inner = method.then if isinstance(method, Dare) else method
        assert isinstance(inner, TaskArithmetic)
        lam = inner.lam if isinstance(inner.lam, tuple) else (inner.lam,) * len(piece.models)
        return _add(piece.base, taus, list(lam))

    def _fisher(self, name: str, piece: Piece, method: Fisher) -> jax.Array:
        norm = jnp.sqrt(jnp.asarray(self.state["squares"], jnp.float32))
        c = coefficients(norm, method.coef, method.normalize, method.eps)
        found = [_padded(one.read(name)[piece.start : piece.stop]) for one in self.fishers]
        return _fisher_sum(piece.models, found, c, method.eps)


class Piece(NamedTuple):
    """Entries start to stop of a tensor in every input, padded with zeros."""

    number: int
    start: int
    stop: int
    base: Any
    models: list[Any]


def _padded(values: np.ndarray) -> np.ndarray:
    """A copy, of a length that is a power of two: few lengths mean few compilations."""
    size = max(256, 1 << (len(values) - 1).bit_length())
    out = np.zeros(size, values.dtype)
    out[: len(values)] = values
    return out


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
    checked = [
        jnp.isfinite(a).all() if jnp.issubdtype(a.dtype, jnp.inexact) else jnp.bool_(True)
        for a in arrays
    ]
    return jnp.stack(checked)


@jax.jit
def _task_vectors(base: Any, models: list[Any], key: Any, drop: Any, scale: Any) -> jax.Array:
    low = base.astype(jnp.float32)
    taus = [model.astype(jnp.float32) - low for model in models]
    if key is not None:
        kept = draws(key, "", (len(taus), *low.shape), drop)
        taus = [jnp.where(keep, tau * scale, 0.0) for tau, keep in zip(taus, kept)]
    return jnp.stack(taus)


@jax.jit
def _count(taus: jax.Array, guesses: jax.Array) -> jax.Array:
    return reaching([taus], guesses)


@jax.jit
def _votes(taus: jax.Array, limits: jax.Array) -> jax.Array:
    parts = trimmed(taus, Trim(limits, None), 0)
    return jnp.sign(leafwise.total(parts)).astype(jnp.int32).sum()


@functools.partial(jax.jit, static_argnames="merge")
def _ties(
    base: Any, taus: jax.Array, limits: jax.Array, sign: jax.Array, lam: Any, merge: Merge
) -> jax.Array:
    parts = trimmed(taus, Trim(limits, None), 0)
    move = combine(parts, elect(parts, sign), merge)
    return base.astype(jnp.float32) + lam * move


@jax.jit
def _add(base: Any, taus: jax.Array, lam: list[Any]) -> jax.Array:
    return base.astype(jnp.float32) + leafwise.total(leafwise.rows(taus), lam)


@jax.jit
def _sum(models: list[Any], weights: list[Any]) -> jax.Array:
    return leafwise.total(models, weights)


@jax.jit
def _dots(x: Any, y: Any) -> jax.Array:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.stack([(x * x).sum(), (y * y).sum(), (x * y).sum()])


@jax.jit
def _fisher_sum(models: list[Any], found: list[Any], c: jax.Array, eps: Any) -> jax.Array:
    weights = [(f.astype(jnp.float32) + eps) * c[i] for i, f in enumerate(found)]
    return leafwise.total(models, weights) / leafwise.total(weights)
