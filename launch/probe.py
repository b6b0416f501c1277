"""``--probe``: a linear head fitted on features that are computed once, in place of training it.

The head of a classifier is logits = x W + b. With everything below it frozen x never changes,
so that the best W and b are a logistic regression (see ``steppe.train.evaluate.baseline``),
fitted in seconds, its strength of regularisation chosen on the validation split.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from steppe.models import tree
from steppe.models.overlays.overlay import BASE
from steppe.models.sites import Site
from steppe.train import evaluate
from steppe.train.evaluate import predict
from steppe.train.evaluate.gather import Rows, gather
from steppe.train.types import Params

if TYPE_CHECKING:
    from steppe.launch.pieces import Pieces

HEAD = ("head/out/kernel", "head/out/bias")


def check(model: Any, kind: str) -> None:
    """
    Raises:
      ValueError: the task is no classification, or the head is more than one linear layer.
    """
    if kind != "classification":
        raise ValueError(f"probe fits classes, but the task is of kind {kind}; leave probe out")
    head = sorted(p for p in tree.paths(model.abstract()) if p.startswith("head/"))
    if head != sorted(HEAD):
        raise ValueError(
            f"probe needs a head that is one linear layer with a bias, this model's has "
            f"{', '.join(head)}; freeze the rest with freeze instead"
        )


def trainable(bound: bool) -> tuple[str, str]:
    """Paths of the head's kernel and bias; ``bound``: below a fixed overlay."""
    kernel, bias = (f"{BASE}/{path}" if bound else path for path in HEAD)
    return kernel, bias


def fit(pieces: Pieces, params: Params) -> Params:
    """The fitted head, in the form of the trainable parameters."""
    features = _Features(pieces)
    train, valid = (features(params, split) for split in ("train", "valid"))
    count = pieces.data.task.num_labels
    fitted = evaluate.logistic_regression(train, valid, num_labels=count)
    # (x - center) / scale @ kernel + bias, written as one linear layer.
    kernel = fitted.kernel / fitted.scale[:, None]
    bias = fitted.bias - fitted.center @ kernel
    made = zip(trainable(pieces.overlay is not None), (kernel, bias), strict=True)
    placed = {
        path: jax.device_put(np.asarray(value, np.float32), pieces.plan.sharding(path, value.shape))
        for path, value in made
    }
    return tree.unflatten(placed)


class _Features:
    """What the head reads, of every example of a split."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        apply: Any = pieces.model.apply

        def fn(params: Params, batch: Any) -> dict[str, Any]:
            # The site wraps the head: what it is given is what the head would read.
            sites = {"logits": Site(lambda delta, x, base, context: x, ())}
            return {"features": apply(params, batch, sites=sites).logits}

        self._predict = predict.Predictor(fn, plan=pieces.plan)

    def __call__(self, params: Params, split: str) -> tuple[np.ndarray, np.ndarray]:
        rows: Rows = gather(self._predict, params, self._pieces.evaluation(split))
        return np.stack(rows.outputs["features"]), np.stack(rows.columns["labels"])
