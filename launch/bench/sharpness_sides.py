"""The steps that the sharpness benchmark measures: a table of methods, and PyTorch's SAM.

A method is a transform around AdamW and, where its first gradient is made cheaper, an
``Ascent``; a new one is a new row of :data:`METHODS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from steppe.launch.bench import sides

NEVER = 10**9


@dataclasses.dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
      transform: ``(base, rho) -> optax transform``.
      ascent: ``(model, objective of a model) -> train.ascent.Ascent``, or None.
      goal: largest ratio to the AdamW step that is aimed at, or None.
      every: steps over which the method's cost repeats; a turn is a multiple of it.
      equals: the PyTorch side whose losses must be the same, or None.
    """

    transform: Callable[[Any, float], Any]
    ascent: Callable[[Any, Callable[[Any], Any]], Any] | None = None
    goal: float | None = None
    every: int = 1
    equals: str | None = None


def _optim() -> Any:
    from steppe import optim

    return optim


def _esam(base: Any, rho: float) -> Any:
    from steppe.optim.esam import esam

    return esam(base, rho)


def _upper(model: Any, objective: Callable[[Any], Any]) -> Any:
    from steppe.train.ascent import Ascent
    from steppe.train.cut import at_layer

    return Ascent(cut=at_layer(model, model.config.layers // 2, objective))


def _half(model: Any, objective: Callable[[Any], Any]) -> Any:
    from steppe.train.ascent import Ascent

    return Ascent(fraction=0.5)


def _coarse(model: Any, objective: Callable[[Any], Any]) -> Any:
    from steppe.train.ascent import Ascent

    return Ascent(dtype="bfloat16")


def _sam(base: Any, rho: float) -> Any:
    return _optim().sam(base, rho)


def _fsam(refresh_every: int) -> Callable[[Any, float], Any]:
    return lambda base, rho: _optim().fsam(base, rho, keep_ratio=0.1, refresh_every=refresh_every)


METHODS: dict[str, Method] = {
    "adamw": Method(lambda base, rho: base, equals="torch adamw"),
    "sam": Method(_sam, goal=1.75, equals="torch sam"),
    "asam": Method(lambda base, rho: _optim().asam(base, 10 * rho)),
    "gsam": Method(lambda base, rho: _optim().gsam(base, rho)),
    "fsam": Method(_fsam(NEVER)),
    "fsam, refreshing": Method(_fsam(1)),
    "esam": Method(_esam, goal=1.45),
    "looksam(5)": Method(
        lambda base, rho: _optim().looksam(base, rho, every=5), goal=1.25, every=5
    ),
    "sam, upper half": Method(_sam, _upper, goal=1.5),
    "fsam, upper half": Method(_fsam(NEVER), _upper, goal=1.5),
    "sam, half the batch": Method(_sam, _half),
    "sam, ascent in bf16": Method(_sam, _coarse),
}
TORCH = ("torch adamw", "torch sam")


class Steppe(sides.Steppe):
    """``train.step.make`` with one method of the table."""

    def __init__(self, method: str, rho: float, **arguments: Any) -> None:
        """
        Args:
          method: a name of :data:`METHODS`.
          rho: radius.
          arguments: of :class:`steppe.launch.bench.sides.Steppe`.
        """
        self.method, self.rho = method, rho
        super().__init__(**arguments)

    def _build(self, directory: str) -> None:
        import jax
        import optax

        from steppe.models import pretrained
        from steppe.train import step
        from steppe.train.objectives import basic

        loaded = pretrained.load(directory)
        o = self.optimizer
        base = optax.adamw(
            o["learning_rate"], o["b1"], o["b2"], o["eps"], weight_decay=o["weight_decay"]
        )
        method = METHODS[self.method]

        def objective(model: Any) -> Any:
            return basic.for_task(model, self.kind)

        tx = method.transform(base, self.rho)
        ascent = None if method.ascent is None else method.ascent(loaded.model, objective)
        self._train = step.make(objective(loaded.model), tx, ascent=ascent)
        self._state = step.init(jax.random.key(0), loaded.model, tx, params=loaded.params)


class Torch(sides.Torch):
    """PyTorch eager: AdamW, or SAM around it by two calls of the model a step."""

    def __init__(self, method: str, rho: float, **arguments: Any) -> None:
        """
        Args:
          method: a name of :data:`TORCH`.
          rho: radius.
          arguments: of :class:`steppe.launch.bench.sides.Torch`.
        """
        self.method, self.rho = method, rho
        super().__init__(**arguments)

    def _step(self, batch: dict[str, Any]) -> Any:
        if self.method == "torch adamw":
            return super()._step(batch)
        torch = self._torch
        tensors = {
            name: torch.from_numpy(value).long()
            for name, value in batch.items()
            if name != "label_mask"
        }
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._model(**tensors).loss
        loss.backward()
        with torch.no_grad():
            live = [p for p in self._model.parameters() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in live]))
            scale = self.rho / (norm + 1e-12)
            kept = [p.clone() for p in live]
            for parameter in live:
                parameter.add_(parameter.grad * scale)
        self._optimizer.zero_grad(set_to_none=True)
        self._model(**tensors).loss.backward()
        with torch.no_grad():
            for parameter, old in zip(live, kept):
                parameter.copy_(old)
        self._optimizer.step()
        return loss.detach()


def target(method: str) -> str:
    """The class that measures a method, as ``worker.Worker`` takes it."""
    return f"{__name__}:{'Torch' if method in TORCH else 'Steppe'}"
