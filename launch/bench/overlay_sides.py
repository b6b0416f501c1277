"""The steps that ``overlay-step`` measures: overlays by their words, and adapters of peft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.launch.bench import sides

FULL = "full"
# Words of ``--overlay``. Prompts and prefixes have as many rows as peft's beside them.
OVERLAYS: Mapping[str, str] = {
    FULL: "",
    "lora": "lora:rank=8",
    "ia3": "ia3",
    "bitfit": "bitfit",
    "pfeiffer": "pfeiffer",
    "compacter": "compacter",
    "prefix": "prefix:length=10",
    "prompt": "prompt:length=10",
    "lpt": "lpt:length=10",
    "idpg": "idpg",
    "unipelt": "unipelt",
}
# Ours -> peft's configuration of the same method: class, settings. The rows begin as the base,
# where a method does; first losses of these are compared.
PEERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    FULL: ("", {}),
    "lora": ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}),
    "ia3": (
        "IA3Config",
        {
            "target_modules": r".*(key|value|layer\.\d+\.output\.dense)",
            "feedforward_modules": r".*layer\.\d+\.output\.dense",
        },
    ),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 10}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 10}),
}
NEUTRAL = (FULL, "lora", "ia3", "bitfit", "pfeiffer")


class Steppe(sides.Steppe):
    """``train.step.make`` over a model with an overlay."""

    def __init__(self, overlay: str, **arguments: Any) -> None:
        """
        Args:
          overlay: a name of :data:`OVERLAYS`.
          arguments: of :class:`steppe.launch.bench.sides.Steppe`.
        """
        self.overlay = overlay
        super().__init__(**arguments)

    def _build(self, directory: str) -> None:
        import jax
        import optax

        from steppe.launch import overlays
        from steppe.models import pretrained, tree
        from steppe.models.overlays.overlay import BASE
        from steppe.train import step
        from steppe.train.objectives import basic

        loaded = pretrained.load(directory)
        model, params = loaded.model, loaded.params
        if OVERLAYS[self.overlay]:
            overlay = overlays.parse((OVERLAYS[self.overlay],))
            model = overlay.bind(loaded.model, frozen=loaded.params)
            params = tree.merge(jax.jit(model.init)(jax.random.key(0)), {BASE: loaded.params})
        tx = optax.adamw(**self.optimizer)
        self._train = step.make(basic.for_task(model, self.kind), tx)
        self._state = step.init(
            jax.random.key(0), model, tx, params=params, trainable=model.trainable
        )

    def trained(self) -> int:
        """Number of trained parameters."""
        import jax

        return sum(leaf.size for leaf in jax.tree.leaves(self._state.params))


class Torch(sides.Torch):
    """PyTorch eager with an adapter of peft, or the whole model; the head trains too."""

    def __init__(self, overlay: str, **arguments: Any) -> None:
        """
        Args:
          overlay: a name of :data:`PEERS`.
          arguments: of :class:`steppe.launch.bench.sides.Torch`.
        """
        self.overlay = overlay
        super().__init__(**arguments)

    def _build(self, directory: str) -> None:
        super()._build(directory)
        kind, settings = PEERS[self.overlay]
        if not kind:
            return
        import peft

        config = getattr(peft, kind)(task_type=peft.TaskType.SEQ_CLS, **settings)
        self._model = peft.get_peft_model(self._model, config).eval()
        self._optimize(p for p in self._model.parameters() if p.requires_grad)

    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self._model.parameters() if p.requires_grad)
