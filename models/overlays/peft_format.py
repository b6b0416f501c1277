"""Adapters in the format of the ``peft`` library: adapter_config.json and safetensors.

  method   tensors                                             here
  LORA     MODULE.lora_A.weight [r, in], lora_B [out, r]       A, B transposed, stacked by layer
  IA3      MODULE.ia3_l [out, 1], of feed-forward [1, in]      one vector a layer
  PROMPT_TUNING   prompt_embeddings [n, D]                     the prompt
  PREFIX_TUNING   prompt_embeddings [n, 2 L E]                 keys, values, keys, ... by layer

``peft`` lets the text begin at position n behind a prefix, here it begins at 0. With rotary
positions the same scores come from keys that are turned n positions back, which is done on the
way in and undone on the way out; with learned positions nothing would be the same: refused.

Modules carry the names that ``transformers`` gives them, behind ``base_model.model.`` and, where
the base has a head, the name of the body. Prefixes are those without a network: ``peft`` saves
what the network gave. What a file holds beside these is refused, so that nothing is lost
silently; heads that were trained along (``modules_to_save``) are the exception, and returned.
So is a setting that this module does not know, unless it is off.

Of an encoder-decoder ``peft`` makes a prompt of n rows for either stack, and uses the first n, in
front of the encoder's text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import rotary, tree, weights
from steppe.models.families import family as family_of
from steppe.models.families.names import Name
from steppe.models.model import Model
from steppe.models.overlays import ia3, lora, prefix, prompt
from steppe.models.overlays.files import settings_of
from steppe.models.overlays.overlay import Overlay, kernel_paths
from steppe.models.tree import Params

CONFIG, WEIGHTS, ROOT = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Keys of adapter_config.json as peft 0.21 writes them, which change nothing here: they say where
# the tensors came from, or something that the tensors themselves show.
COMMON = (
    "auto_mapping base_model_name_or_path inference_mode modules_to_save peft_type peft_version "
    "revision task_type"
)
VIRTUAL = "num_attention_heads num_layers num_transformer_submodules num_virtual_tokens token_dim"
KEYS = {
    "LORA": (
        "corda_config ensure_weight_tying eva_config exclude_modules layers_pattern "
        "layers_to_transform lora_alpha lora_dropout lora_ga_config megatron_core "
        "qalora_group_size r target_modules"
    ),
    "IA3": "exclude_modules feedforward_modules init_ia3_weights target_modules",
    "PROMPT_TUNING": (
        f"{VIRTUAL} prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs "
        "tokenizer_name_or_path"
    ),
    "PREFIX_TUNING": f"{VIRTUAL} encoder_hidden_size init_weights prefix_projection",
}
# Keys that change what the tensors mean, with the values that leave it alone.
NEUTRAL: dict[str, dict[str, Sequence[Any]]] = {
    "LORA": {
        "alora_invocation_tokens": ([],),
        "alpha_pattern": ({},),
        "arrow_config": (),
        "bias": ("none",),
        "fan_in_fan_out": (False,),
        # Every other one takes something out of the base's matrices when the file is loaded.
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
        "kasa_config": (),
        "layer_replication": ([],),
        "loftq_config": ({},),
        "lora_bias": (False,),
        "megatron_config": (),
        "monteclora_config": (),
        "rank_pattern": ({},),
        "target_parameters": ([],),
        "trainable_token_indices": ([], {}),
        "use_bdlora": (False,),
        "use_dora": (False,),
        "use_qalora": (False,),
        "use_rslora": (False, True),
        "velora_config": (),
    },
    "IA3": {"fan_in_fan_out": (False,)},
}


class Adapter(NamedTuple):
    """What an adapter folder holds.

    Attributes:
      overlay, delta: to be bound to the base and used as its ``overlay`` parameters.
      base: name of the base model, as the file says it.
      other: tensors of trained heads, by their names, which belong to no overlay.
    """

    overlay: Overlay
    delta: Params
    base: str
    other: dict[str, np.ndarray]


def load(folder: str | os.PathLike[str], model: Model) -> Adapter:
    """Reads an adapter of ``model``.

    Args:
      model: the base model, whose layers give the names.

    Raises:
      FileNotFoundError: the folder lacks one of the two files.
      ValueError: a method or setting that has no counterpart here, a tensor that is unknown,
        missing or of another shape (named).
    """
    source = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{folder} is no adapter: it holds no {name}")
    try:
        config = dict(json.loads((source / CONFIG).read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source / CONFIG} is damaged ({error})") from error
    store = weights.Safetensors([source / WEIGHTS])
    tensors = {n.removeprefix(ROOT): np.array(store.read(n)) for n in store.shapes()}
    other = {n: tensors.pop(n) for n in list(tensors) if _is_head(n, config)}
    kind = str(config.get("peft_type"))
    readers = {"LORA": _lora, "IA3": _ia3, "PROMPT_TUNING": _prompt, "PREFIX_TUNING": _prefix}
    if kind not in readers:
        raise ValueError(f"peft_type {kind!r} has no counterpart; known: {', '.join(readers)}")
    _refuse(config, kind)
    overlay, delta = readers[kind](config, tensors, model)
    if tensors:
        raise ValueError(
            f"{source / WEIGHTS} holds {next(iter(tensors))!r} and {len(tensors) - 1} other "
            f"tensors that no layer of this {model.config.family} model has a place for"
        )
    return Adapter(overlay, delta, str(config.get("base_model_name_or_path") or ""), other)


def save(
    folder: str | os.PathLike[str],
    overlay: Overlay,
    delta: Params,
    model: Model,
    *,
    base: str = "",
) -> Path:
    """Writes an overlay as an adapter that ``peft`` loads onto the base's Hugging Face folder.

    A head that was trained along is not in it: save it with the base.

    Args:
      overlay: lora, ia3, prompt, or prefix (of a network the prefix that it gives).
      model: the base model.
      base: its name or folder, for ``peft`` to find.

    Raises:
      ValueError: an overlay that the format has no place for, or a layer whose matrix the base's
        files hold as a part of a larger one.
    """
    from safetensors.numpy import save_file

    writers = {"lora": _write_lora, "ia3": _write_ia3}
    writers |= {"prompt": _write_prompt, "prefix": _write_prefix}
    if overlay.name not in writers:
        raise ValueError(
            f"{overlay.name!r} has no place in the adapter format; it has {', '.join(writers)}"
        )
    config, tensors = writers[overlay.name](overlay, delta, model)
    head = getattr(model.config, "head", None)
    tasks = {"lm": "SEQ_2_SEQ_LM" if _pair(model) else "CAUSAL_LM"}
    about = {
        "base_model_name_or_path": base,
        # With a classifier's type ``peft`` would look for the trained head too.
        "task_type": None if head is None else tasks.get(head.kind),
        "inference_mode": True,
        "modules_to_save": None,
        **config,
    }
    target = Path(folder)
    with weights.atomic_directory(target, (CONFIG, WEIGHTS)) as scratch:
        named = {ROOT + n if "." in n else n: np.ascontiguousarray(x) for n, x in tensors.items()}
        save_file(named, scratch / WEIGHTS, {"format": "pt"})
        (scratch / CONFIG).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    return target


# Names ----------------------------------------------------------------------------------------


def _modules(model: Model, *, bare: bool = False) -> dict[str, Name]:
    """Site of every dense layer -> how the files name its kernel, ``bare`` without a body's name
    in front."""
    config = model.config.with_head(None) if bare else model.config
    names = {name.path: name for name in family_of(config.family).names(config)}
    return {site: names[path] for site, path in kernel_paths(model.abstract()).items()}


def _module(name: Name, layer: int) -> str:
    return name.tensor.format(layer).removesuffix(".weight")


def _whole(site: str, name: Name) -> Name:
    if name.part is not None or name.codec is not None:
        raise ValueError(
            f"{site} is a part of {name.tensor!r} in the base's files, and the adapter format "
            "has one update for all of it"
        )
    return name


def _gathered(tensors: dict[str, np.ndarray], model: Model, suffix: str) -> dict[str, np.ndarray]:
    """site -> tensors of all layers [L, ...] whose names end in module + suffix; taken out.

    Raises:
      ValueError: a module that some layers have and others lack.
    """
    found = {}
    for site, name in _modules(model, bare=True).items():
        layers = tree.get(model.abstract(), kernel_paths(model.abstract())[site]).shape[0]
        keys = []
        for layer in range(layers):
            wanted = f"{_module(name, layer)}{suffix}"
            # Before it there may stand the name of the body, such as ``bert.``.
            keys.append(next((k for k in tensors if k == wanted or k.endswith("." + wanted)), None))
        if not any(keys):
            continue
        if None in keys:
            raise ValueError(
                f"the adapter has {site} in some layers only (not in layer {keys.index(None)}): "
                "here a site is in all of them"
            )
        _whole(site, name)
        found[site] = np.stack([tensors.pop(str(key)) for key in keys])
    return found


def _is_head(name: str, config: Mapping[str, Any]) -> bool:
    if "lora_" in name or "ia3_" in name:  # of the delta, whatever module it belongs to
        return False
    # As peft finds them: by the end of a module's name, ``pre_classifier`` of ``classifier`` too.
    return any(f"{part}." in f"{name}." for part in config.get("modules_to_save") or ())


def _refuse(config: Mapping[str, Any], kind: str) -> None:
    """Raises a ValueError of a setting that means something else than its tensors alone."""
    neutral, known = NEUTRAL.get(kind, {}), f"{COMMON} {KEYS[kind]}".split()
    for name, value in config.items():
        if value is None or name in known or value in neutral.get(name, ()):
            continue
        if name == "init_lora_weights":
            raise ValueError(
                f"{name}={value!r} of the adapter has no counterpart here: its base is not the "
                "model's own, see path_initial_model_for_weight_conversion of peft's "
                "save_pretrained, which makes a plain adapter of it"
            )
        if name in neutral:
            raise ValueError(f"{name}={value!r} of the adapter has no counterpart here")
        if value is not False and value not in ("", [], {}):
            raise ValueError(
                f"{name}={value!r} of the adapter is a setting of {kind} that is not known here, "
                "and may change what its tensors mean"
            )


def _whole_number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r} of the adapter must be a whole number >= 1")
    return value


def _number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r} of the adapter must be a number")
    return float(value)


# Methods --------------------------------------------------------------------------------------


def _lora(config: Any, tensors: dict[str, np.ndarray], model: Model) -> tuple[Overlay, Params]:
    a, b = (_gathered(tensors, model, f".lora_{n}.weight") for n in "AB")
    if set(a) != set(b) or not a:
        raise ValueError(f"the adapter has lora_A for {sorted(a)}, lora_B for {sorted(b)}")
    overlay = lora.overlay(
        rank=_whole_number(config, "r"),
        alpha=_number(config, "lora_alpha"),
        sites=tuple(a),
        drop=_number(config, "lora_dropout", 0.0),
        rank_stabilised=config.get("use_rslora") is True,
    )
    delta = {n: {"a": a[n].swapaxes(1, 2), "b": b[n].swapaxes(1, 2)} for n in a}
    return overlay, _checked(overlay, {tree.STACK: delta}, model)


def _ia3(config: Any, tensors: dict[str, np.ndarray], model: Model) -> tuple[Overlay, Params]:
    found = _gathered(tensors, model, ".ia3_l")
    inner = {n for n in found if n.split(".")[-2:] == ["ffn", "out"]}
    for site, vectors in found.items():
        if (vectors.shape[1] == 1) != (site in inner):
            raise ValueError(
                f"the adapter scales the {'outputs' if site in inner else 'inputs'} of {site}: "
                "here outputs are scaled, and of ffn.out the inputs"
            )
    overlay = ia3.overlay(sites=tuple(found))
    delta = {n: v.reshape(len(v), -1) for n, v in found.items()}
    return overlay, _checked(overlay, {tree.STACK: delta}, model)


def _prompt(config: Any, tensors: dict[str, np.ndarray], model: Model) -> tuple[Overlay, Params]:
    rows = _embeddings(tensors, config, 2 if _pair(model) else 1)
    overlay = prompt.overlay(length=len(rows), site=_embed_site(model), start="uniform")
    return overlay, _checked(overlay, {"prompt": rows}, model)


def _prefix(config: Any, tensors: dict[str, np.ndarray], model: Model) -> tuple[Overlay, Params]:
    if _pair(model):
        raise ValueError(
            f"a prefix of an encoder-decoder ({model.config.family}) has no counterpart here"
        )
    rows = _embeddings(tensors, config, 1)
    overlay = prefix.overlay(length=len(rows))
    layers, _, inner = tree.get(model.abstract(), "layers/attn/k/kernel").shape
    if rows.shape[1] != 2 * layers * inner:
        raise ValueError(
            f"prompt_embeddings is {tuple(rows.shape)}; this model needs {2 * layers * inner} "
            "numbers a row"
        )
    each = rows.reshape(len(rows), 2 * layers, inner).swapaxes(0, 1)
    keys = _turned(each[0::2], model, -len(rows))
    delta = {"attn.kv_prefix": {"k": keys, "v": each[1::2]}}
    return overlay, _checked(overlay, {tree.STACK: delta}, model)


def _embeddings(
    tensors: dict[str, np.ndarray], config: Mapping[str, Any], stacks: int
) -> np.ndarray:
    """The rows [n, ...] that ``peft`` uses of those in the file, n for every stack that it counts.

    Args:
      stacks: of the model.
    """
    if "prompt_embeddings" not in tensors:
        raise ValueError("the adapter holds no prompt_embeddings")
    rows = tensors.pop("prompt_embeddings")
    counted = config.get("num_transformer_submodules")
    if counted is None:
        counted = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    if counted not in (1, stacks):
        raise ValueError(
            f"num_transformer_submodules={counted!r} of the adapter has no counterpart here: this "
            f"model has {stacks}"
        )
    count = _whole_number(config, "num_virtual_tokens")
    if rows.ndim != 2 or len(rows) != counted * count:
        raise ValueError(
            f"prompt_embeddings is {tuple(rows.shape)}; num_virtual_tokens={count} needs "
            f"{counted * count} rows"
        )
    return rows[:count]


def _turned(keys: np.ndarray, model: Model, by: int) -> np.ndarray:
    """Keys [L, P, E] as they are ``by`` positions further on.

    Raises:
      ValueError: a model whose positions are not those of one rotation.
    """
    config = model.config
    turn = getattr(config, "rotary", None)
    if turn is None or getattr(config, "local_rotary", None) is not None or turn.xpos:
        raise ValueError(
            f"a prefix of a {config.family} model has no place in the adapter format: there the "
            "text stands behind it, here its positions begin at 0"
        )
    cos_sin = rotary.tables(jnp.full((keys.shape[1],), by), turn.freqs(config.dim))
    heads = keys.reshape(*keys.shape[:2], -1, config.dim)
    moved = rotary.rotate(jnp.asarray(heads), cos_sin, turn.layout)
    return np.asarray(moved).reshape(keys.shape)


def _pair(model: Model) -> bool:
    """Whether it is an encoder-decoder."""
    return "encoder" in model.abstract()


def _embed_site(model: Model) -> str:
    return "encoder.embed" if _pair(model) else "embed"


def _checked(overlay: Overlay, delta: Params, model: Model) -> Params:
    """The delta, after a comparison with what the overlay itself would make."""
    wanted = jax.eval_shape(overlay.init, jax.random.key(0), model.abstract())
    tree.same_structure(delta, wanted, ("the adapter", "this model's overlay"))
    return delta


def _write_lora(overlay: Overlay, delta: Params, model: Model) -> tuple[dict[str, Any], Any]:
    own, names = settings_of(overlay), _modules(model)
    tensors = {}
    for site, leaves in delta[tree.STACK].items():
        name = _whole(site, names[site])
        for letter, leaf in (("A", leaves["a"]), ("B", leaves["b"])):
            for layer, matrix in enumerate(np.asarray(leaf)):
                tensors[f"{_module(name, layer)}.lora_{letter}.weight"] = matrix.T
    config = {
        "peft_type": "LORA",
        "r": own["rank"],
        "lora_alpha": own["alpha"],
        "lora_dropout": own["drop"],
        "use_rslora": own["rank_stabilised"],
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _targets(delta[tree.STACK], names, _depth(delta)),
    }
    return config, tensors


def _write_ia3(overlay: Overlay, delta: Params, model: Model) -> tuple[dict[str, Any], Any]:
    names = _modules(model)
    tensors = {}
    inner = [n for n in delta[tree.STACK] if n.split(".")[-2:] == ["ffn", "out"]]
    for site, leaf in delta[tree.STACK].items():
        name = _whole(site, names[site])
        for layer, vector in enumerate(np.asarray(leaf)):
            shaped = vector[None] if site in inner else vector[:, None]
            tensors[f"{_module(name, layer)}.ia3_l"] = shaped
    config = {
        "peft_type": "IA3",
        "fan_in_fan_out": False,
        "target_modules": _targets(delta[tree.STACK], names, _depth(delta)),
        "feedforward_modules": _targets(inner, names, _depth(delta)),
    }
    return config, tensors


def _write_prompt(overlay: Overlay, delta: Params, model: Model) -> tuple[dict[str, Any], Any]:
    rows = np.asarray(delta["prompt"])
    return {"peft_type": "PROMPT_TUNING", **_virtual(rows, model)}, {"prompt_embeddings": rows}


def _write_prefix(overlay: Overlay, delta: Params, model: Model) -> tuple[dict[str, Any], Any]:
    own = settings_of(overlay)
    if tuple(own["attentions"]) != ("attn",):
        raise ValueError("a prefix of several stacks has no place in the adapter format")
    folded = prefix.fold(delta) if own["hidden"] else delta
    leaves = folded[tree.STACK]["attn.kv_prefix"]
    k, v = (np.asarray(leaves[n]) for n in "kv")  # [L, P, E]
    k = _turned(k, model, k.shape[1])
    rows = np.stack([k, v], 1).reshape(2 * len(k), *k.shape[1:]).swapaxes(0, 1)
    rows = rows.reshape(len(rows), -1)
    config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, **_virtual(k[0], model)}
    config["encoder_hidden_size"] = k.shape[-1]
    config["token_dim"] = k.shape[-1]
    return config, {"prompt_embeddings": rows}


def _virtual(rows: np.ndarray, model: Model) -> dict[str, Any]:
    config = model.config
    return {
        "num_virtual_tokens": len(rows),
        "token_dim": rows.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(config, "kv_heads", None) or config.heads,
        "num_layers": config.encoder_layers if _pair(model) else config.layers,
    }


def _depth(delta: Params) -> int:
    """Layers of the deepest stack."""
    return max(len(leaf) for leaf in jax.tree.leaves(delta[tree.STACK]))


def _targets(sites: Any, names: Mapping[str, Name], layers: int) -> list[str]:
    """Modules by the end of their names, as far as needed to tell them from all others; with the
    number of the layer in it, one for every layer."""
    every = {_module(name, 0) for name in names.values()}
    found = []
    for site in sites:
        each = [_module(names[site], layer).split(".") for layer in range(layers)]
        for size in range(1, len(each[0]) + 1):
            tail = ".".join(each[0][-size:])
            if sum(m == tail or m.endswith("." + tail) for m in every) == 1:
                found += [".".join(parts[-size:]) for parts in each]
                break
    return sorted(set(found))
