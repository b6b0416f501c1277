"""How task vectors lie to each other: their angles, and where their signs disagree.

Read from disk a tensor at a time, like the merge itself. An entry is kept, as TIES keeps it, if
it is among the share k largest in magnitude of its whole task vector; of the entries that two
tasks or more keep, the share on which their signs differ is what merging loses. The threshold
comes from a histogram of the upper 16 bits of the magnitudes: it is at most 0.8% too low.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from steppe.models import pretrained, tree
from steppe.models.families import family as family_of
from steppe.train.merge.inputs import Report

PIECE = 1 << 20


class Geometry(NamedTuple):
    """What was found.

    Attributes:
      norms: [N], of the task vectors.
      cosines: [N, N].
      k: share of the entries that is kept.
      tensors: rows (tensor, entries kept by two tasks or more, those whose signs differ).
    """

    norms: list[float]
    cosines: list[list[float]]
    k: float
    tensors: list[tuple[str, int, int]]

    @property
    def disagreement(self) -> float:
        """Share over the whole model."""
        met = sum(row[1] for row in self.tensors)
        return sum(row[2] for row in self.tensors) / met if met else float("nan")


def measure(
    report: Report, k: float = 0.2, tell: Callable[[int, int, str], Any] | None = None
) -> Geometry:
    """Angles and disagreements of the models of a report, against its base.

    Args:
      k: share of the entries that counts as kept.
      tell: called with (tensors done, of how many, name).
    """
    names = [
        name
        for name in report.shared
        if name not in report.unbased and _floating(report.origin(name).tensors[name].dtype)
    ]
    count = len(report.models)
    gram = np.zeros((count, count))
    histogram = np.zeros((count, 1 << 16), np.int64)
    for number, name in enumerate(names):
        for taus in _pieces(report, name):
            gram += taus.astype(np.float64) @ taus.T.astype(np.float64)
            for task in range(count):
                bits = np.abs(taus[task]).view(np.uint32) >> 16
                histogram[task] += np.bincount(bits, minlength=1 << 16)
        if tell is not None:
            tell(number + 1, 2 * len(names), name)
    norms = np.sqrt(np.diag(gram))
    scale = np.where(norms > 0, norms, 1.0)
    keep = max(int(k * histogram[0].sum()), 1)
    thresholds = [_threshold(row, keep) for row in histogram]
    labels = _paths(report)
    rows = []
    for number, name in enumerate(names):
        met = differ = 0
        for taus in _pieces(report, name):
            kept = np.abs(taus) >= np.asarray(thresholds, np.float32)[:, None]
            up = ((taus > 0) & kept).sum(0)
            down = ((taus < 0) & kept).sum(0)
            met += int((up + down >= 2).sum())
            differ += int(((up > 0) & (down > 0)).sum())
        rows.append((labels.get(name, name), met, differ))
        if tell is not None:
            tell(len(names) + number + 1, 2 * len(names), name)
    cosines = gram / scale[:, None] / scale[None, :]
    return Geometry(norms.tolist(), cosines.tolist(), k, rows)


def _floating(dtype: Any) -> bool:
    # bfloat16 is no subtype of numpy's floats.
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _pieces(report: Report, name: str) -> Iterator[np.ndarray]:
    """Task vectors [N, up to PIECE] of a tensor, float32."""
    assert report.base is not None
    base = report.base.read(name)
    models = [one.read(name) for one in report.models]
    for start in range(0, base.shape[0], PIECE):
        low = np.asarray(base[start : start + PIECE], np.float32)
        parts = [np.asarray(m[start : start + PIECE], np.float32) - low for m in models]
        yield np.stack(parts)


def _threshold(histogram: np.ndarray, keep: int) -> np.float32:
    """The smallest magnitude of the bin at which ``keep`` entries are reached; above 0."""
    reached = np.cumsum(histogram[::-1])
    place = len(histogram) - 1 - int(np.searchsorted(reached, keep))
    smallest = np.array([max(place, 0) << 16], np.uint32).view(np.float32)[0]
    return max(smallest, np.float32(np.finfo(np.float32).tiny))


def _paths(report: Report) -> dict[str, str]:
    """Names in the files, without the family's prefix -> our names, layer by layer."""
    base = report.reference
    try:
        config = pretrained.load_config(base.folder)
        family = family_of(config.family)
        shapes = tree.flatten(config.build().abstract())
    except (OSError, ValueError):
        return {}
    prefix = f"{family.prefix}." if family.prefix else ""
    found = {}
    for name in family.names(config):
        if name.path not in shapes or (name.part is not None and name.part[0]):
            continue
        for layer, tensor in enumerate(name.tensors(shapes[name.path].shape)):
            parts = name.path.split(tree.SEPARATOR)
            own = [f"{p}.{layer}" if name.stacked and p == tree.STACK else p for p in parts]
            found[tensor.removeprefix(prefix)] = tree.SEPARATOR.join(own)
    return found
