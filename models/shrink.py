"""Students cut out of a teacher: fewer layers, heads, feed-forward units and channels.

  layers   of a stack 0..L-1: the first, the last, evenly spaced ones with both ends
           (round(i (L - 1) / (n - 1))), or a list
  heads    h of H in every layer: the columns of q, k, v and the rows of o that are theirs
  units    f of F in every layer: the columns of in (and gate) and the rows of out
  width    d of D channels of the hidden states, the same everywhere: entries of the embeddings,
           norms and biases, rows or columns of all kernels that meet them; heads keep their size

But for the width, a cut network computes what the whole one computes with the rest masked out
(``model.Masks``): what is left is exact, only the parameters are fewer. Without some of the
channels the norms see other means, so that a narrower network is a start, no more. By default
the largest stay; for heads and units by a magnitude that scaling one matrix of a pair up and the
other one down leaves alone:

  head i   |W_v,i|_F |W_o,i|_F            unit u   |W_in,u| |W_out,u| (|W_gate,u| where gated)
  channel c   |E_c| / |E| + mean over layers of |W_o,c| / |W_o| + |W_out,c| / |W_out|

where E is the table of words, whose columns, like those of W_o and W_out, write to channels.

Sanh et al. 2019 (arXiv 1910.01108) for every other layer as a start; Michel et al. 2019
(1905.10650) for heads by scores of any kind; Sajjad et al. 2023 (2004.03844) for which layers.

Deviations: the published code for six of twelve layers takes 0, 2, 4, 7, 9, 11, which is the
rule above. All layers keep equally many heads and units, since they are stacked.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.model import Model
from steppe.models.tree import Params

How = Literal["first", "last", "even"]


class Student(NamedTuple):
    """A model and its parameters, as ``pretrained.Loaded`` has them.

    Attributes:
      model, params: the network and its parameters, arrays of their own.
    """

    model: Model
    params: Params


def choose_layers(layers: int, count: int, how: How = "even") -> tuple[int, ...]:
    """``count`` of the layers 0..layers-1, ascending.

    Args:
      how: "first", "last", or "even" = evenly spaced, the first and the last among them.

    Raises:
      ValueError: count outside 1..layers, or an unknown rule.
    """
    if not 1 <= count <= layers:
        raise ValueError(f"count must lie in 1..{layers}, the teacher's layers, got {count}")
    if how == "first":
        return tuple(range(count))
    if how == "last":
        return tuple(range(layers - count, layers))
    if how != "even":
        raise ValueError(f"how must be 'first', 'last' or 'even', got {how!r}")
    if count == 1:
        return (0,)
    return tuple(round(i * (layers - 1) / (count - 1)) for i in range(count))


def keep_layers(model: Model, params: Params, layers: Sequence[int]) -> Student:
    """The student with these layers, in this order.

    Args:
      layers: numbers of the teacher's layers; ascending, without repetition.

    Raises:
      ValueError: no layers, numbers that do not ascend or do not exist, or a network that is
        neither an encoder nor a decoder.
    """
    config = _config(model)
    chosen = [int(n) for n in layers]
    ascending = all(a < b for a, b in itertools.pairwise(chosen))
    if not chosen or not ascending or chosen[0] < 0 or chosen[-1] >= config.layers:
        raise ValueError(
            f"layers must ascend within 0..{config.layers - 1}, got {chosen}; see choose_layers"
        )
    change: dict[str, Any] = {"layers": len(chosen)}
    if isinstance(config, DecoderConfig) and config.windowed is not None:
        change["windowed"] = tuple(config.windowed[n] for n in chosen)
    index = np.asarray(chosen)
    cut = jax.jit(lambda stack: jax.tree.map(lambda leaf: leaf[index], stack))(params["layers"])
    return _made(dataclasses.replace(config, **change), {**params, "layers": cut}, params)


def keep_heads(model: Model, params: Params, heads: Any) -> Student:
    """The student with these attention heads.

    Args:
      heads: numbers of the heads of each layer [L, h], ascending; or [h], the same in all
        layers. Where several heads share keys and values, the heads of a layer must be equally
        many of each group of which there are any; other groups go.

    Raises:
      ValueError: heads that are none, groups of different sizes, different heads by layer in a
        model whose position bias is shared by all layers, or a network of another kind.
    """
    config = _config(model)
    total, groups, dim = config.heads, _groups(config), config.dim
    chosen = _chosen(heads, config.layers, total, "heads")
    shared = total // groups
    kept_groups = [sorted(set(row // shared)) for row in chosen]
    # Members of each kept group, layer by layer: all of them the same number.
    sizes = {tuple(np.unique(row // shared, return_counts=True)[1]) for row in chosen}
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        raise ValueError(
            f"heads must take equally many of every group of {shared} heads that share keys and "
            f"values, and equally many groups in every layer, got {chosen.tolist()}"
        )
    # Dh stays, and with it the scale of the scores.
    plain = chosen.shape[1] * dim == config.width
    change: dict[str, Any] = {"heads": chosen.shape[1], "head_dim": None if plain else dim}
    table: dict[str, tuple[np.ndarray, int]] = {}
    if isinstance(config, DecoderConfig):
        change["kv_heads"] = len(kept_groups[0])
    elif config.relative_buckets:
        if (chosen != chosen[0]).any():
            raise ValueError(
                "heads must be the same in all layers: this model has one position bias for all "
                f"of them, got {chosen.tolist()}; give one list, such as best(scores.sum(0), n)"
            )
        table = {"relative/table": (chosen[0], -1)}
    rows = _columns(chosen, dim)
    of_keys = _columns(np.asarray(kept_groups), dim)
    index = {"layers/attn/o/kernel": (rows, 1)}
    for name, columns in (("q", rows), ("k", of_keys), ("v", of_keys)):
        index[f"layers/attn/{name}/kernel"] = index[f"layers/attn/{name}/bias"] = (columns, -1)
    cut = _cut(params, {**index, **table})
    return _made(dataclasses.replace(config, **change), cut, params)


def keep_units(model: Model, params: Params, units: Any) -> Student:
    """The student with these feed-forward units.

    Args:
      units: numbers of the units of each layer [L, f], ascending; or [f], the same in all.

    Raises:
      ValueError: units that are none, or a network that is neither an encoder nor a decoder.
    """
    config = _config(model)
    chosen = _chosen(units, config.layers, config.ffn_width, "units")
    index = {"layers/ffn/out/kernel": (chosen, 1)}
    for name in ("in", "gate"):
        index[f"layers/ffn/{name}/kernel"] = index[f"layers/ffn/{name}/bias"] = (chosen, -1)
    config = dataclasses.replace(config, ffn_width=chosen.shape[1])
    return _made(config, _cut(params, index), params)


def head_scores(model: Model, params: Params) -> Float[Array, "L H"]:
    """|W_v| |W_o| of every head, float32; heads that share values have those in common.

    Raises:
      ValueError: a network that is neither an encoder nor a decoder.
    """
    config = _config(model)
    attn, dim = params["layers"]["attn"], config.dim
    value = jnp.square(attn["v"]["kernel"].astype(jnp.float32))
    value = value.reshape(config.layers, -1, _groups(config), dim).sum((1, 3))
    value = jnp.repeat(value, config.heads // _groups(config), axis=1)
    out = jnp.square(attn["o"]["kernel"].astype(jnp.float32))
    out = out.reshape(config.layers, config.heads, -1).sum(2)
    return jnp.sqrt(value * out)


def unit_scores(model: Model, params: Params) -> Float[Array, "L F"]:
    """|W_in| |W_out| of every feed-forward unit, times |W_gate| where there is one, float32.

    Raises:
      ValueError: a network that is neither an encoder nor a decoder.
    """
    _config(model)
    ffn = params["layers"]["ffn"]
    score = jnp.linalg.norm(ffn["out"]["kernel"].astype(jnp.float32), axis=2)
    for name in ("in", "gate"):
        if name in ffn:
            score = score * jnp.linalg.norm(ffn[name]["kernel"].astype(jnp.float32), axis=1)
    return score


def keep_channels(model: Model, params: Params, channels: Any) -> Student:
    """The student whose hidden states have these channels; see the module.

    Args:
      channels: numbers [d], ascending.

    Raises:
      ValueError: channels that are none, or a network that is neither an encoder nor a decoder.
    """
    config = _config(model)
    chosen = np.asarray(channels)
    if chosen.ndim != 1:
        raise ValueError(f"channels must be numbers [d], the same everywhere, got {channels!r}")
    chosen = _chosen(chosen, 1, config.width, "channels")[0]
    narrow = dataclasses.replace(config, width=len(chosen), head_dim=config.dim)
    wanted = tree.flatten(narrow.build().abstract())

    def cut(path: str, leaf: jax.Array) -> jax.Array:
        # Where a size is the width, and only there, the narrower network has another one.
        for axis, (size, kept) in enumerate(zip(leaf.shape, wanted[path].shape, strict=True)):
            if size != kept:
                leaf = jnp.take(leaf, chosen, axis=axis)
        return leaf

    made = jax.jit(lambda own: tree.map_with_path(cut, own))(params)
    return _made(narrow, made, params)


def channel_scores(model: Model, params: Params) -> Float[Array, "D"]:
    """How much is written to every channel, float32: the formula of the module.

    Raises:
      ValueError: a network that is neither an encoder nor a decoder.
    """
    _config(model)

    def share(kernel: jax.Array) -> jax.Array:
        size = jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)
        return size / jnp.linalg.norm(size, axis=-1, keepdims=True)

    layers = params["layers"]
    written = (layers["attn"]["o"]["kernel"], layers["ffn"]["out"]["kernel"])
    return share(params["embed"]["word"]["table"]) + sum(share(w).mean(0) for w in written)


def best(
    scores: Any, count: int, *, groups: int = 1, kept_groups: int = 1
) -> Int[np.ndarray, "..."]:
    """Numbers of the ``count`` highest scores along the last axis, ascending; of equal ones the
    first.

    Args:
      scores: [..., N], finite.
      groups: the N stand in so many groups of equal size (heads that share keys and values).
      kept_groups: so many groups stay, those with the highest sum of what would be kept of
        them, each with count / kept_groups members.

    Raises:
      ValueError: a count, or numbers of groups, that do not fit; scores that are not finite.
    """
    values = np.asarray(scores, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite; look for NaN in the parameters")
    total = values.shape[-1]
    if not 1 <= count <= total:
        raise ValueError(f"count must lie in 1..{total}, got {count}")
    if groups < 1 or total % groups or not 1 <= kept_groups <= groups or count % kept_groups:
        raise ValueError(
            f"{count} of {total} cannot be kept as {kept_groups} of {groups} equal groups; "
            "count must be a multiple of kept_groups"
        )
    size, each = total // groups, count // kept_groups
    if each > size:
        raise ValueError(f"count {count} is more than {kept_groups} groups of {size} hold")
    inside = values.reshape(*values.shape[:-1], groups, size)
    order = np.argsort(-inside, axis=-1, kind="stable")[..., :each]
    worth = np.take_along_axis(inside, order, axis=-1).sum(-1)
    stay = np.sort(np.argsort(-worth, axis=-1, kind="stable")[..., :kept_groups], axis=-1)
    members = np.take_along_axis(order, stay[..., None], axis=-2)
    return np.sort((members + stay[..., None] * size).reshape(*values.shape[:-1], count), axis=-1)


def student(
    model: Model,
    params: Params,
    *,
    layers: int | Sequence[int] | None = None,
    how: How = "even",
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn_width: int | None = None,
    width: int | None = None,
    head_importance: Any = None,
    unit_importance: Any = None,
    channel_importance: Any = None,
) -> Student:
    """A student of the given size, all cuts in one call.

    Args:
      model, params: the teacher; its parameters are not changed.
      layers: how many, or which; None = all.
      how: which ones, see :func:`choose_layers`.
      heads: heads a layer; None = all.
      kv_heads: heads of keys and values; default all of them, or as many as ``heads`` where
        every head has its own.
      ffn_width: feed-forward units a layer; None = all.
      width: channels of the hidden states; None = all.
      head_importance, unit_importance, channel_importance: scores [L, H], [L, F] and [D] of the
        teacher, such as the expected change of the loss; default the magnitudes above.

    Raises:
      ValueError: sizes that the teacher does not have, or scores of another shape.
    """
    config = _config(model)
    groups = _groups(config)
    if isinstance(layers, bool):
        raise ValueError(f"layers must be a number of layers, or a list of them, got {layers}")
    for name, size, total in (
        ("heads", heads, config.heads),
        ("kv_heads", kv_heads, groups),
        ("ffn_width", ffn_width, config.ffn_width),
        ("width", width, config.width),
    ):
        if size is not None and (isinstance(size, bool) or not 1 <= size <= total):
            raise ValueError(f"{name} must lie in 1..{total}, the teacher's, got {size}")
    made = Student(model, params)
    layered = (config.layers,)
    if heads is not None:
        if kv_heads is None:
            kv_heads = heads if groups == config.heads else groups
        if heads % kv_heads or heads // kv_heads > config.heads // groups:
            raise ValueError(
                f"heads={heads} do not share kv_heads={kv_heads} equally, or share one among more "
                f"than the teacher's {config.heads // groups}; change one of them"
            )
        scores = _scores(
            head_importance, head_scores, made, (*layered, config.heads), "head_importance"
        )
        if isinstance(config, EncoderConfig) and config.relative_buckets:
            scores = np.broadcast_to(scores.sum(0), scores.shape)
        made = keep_heads(*made, best(scores, heads, groups=groups, kept_groups=kv_heads))
    elif kv_heads is not None:
        raise ValueError(f"kv_heads={kv_heads} needs heads; give the heads that are to stay too")
    if ffn_width is not None:
        scores = _scores(
            unit_importance, unit_scores, made, (*layered, config.ffn_width), "unit_importance"
        )
        made = keep_units(*made, best(scores, ffn_width))
    if width is not None:
        whole = (config.width,)
        scores = _scores(channel_importance, channel_scores, made, whole, "channel_importance")
        made = keep_channels(*made, best(scores, width))
    if layers is not None:
        if isinstance(layers, int):
            layers = choose_layers(config.layers, layers, how)
        made = keep_layers(*made, layers)
    return made


def _scores(
    given: Any, default: Any, made: Student, shape: tuple[int, ...], name: str
) -> np.ndarray:
    scores = np.asarray(default(*made) if given is None else given, np.float64)
    if scores.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, one score each, got {scores.shape}")
    return scores


def _config(model: Model) -> EncoderConfig | DecoderConfig:
    config = model.config
    if not isinstance(config, EncoderConfig | DecoderConfig):
        raise ValueError(
            f"model must be an encoder or a decoder, got one of {type(config).__name__}"
        )
    return config


def _groups(config: EncoderConfig | DecoderConfig) -> int:
    return config.groups if isinstance(config, DecoderConfig) else config.heads


def _chosen(given: Any, layers: int, total: int, name: str) -> np.ndarray:
    """[L, n] numbers, checked."""
    chosen = np.asarray(given)
    if chosen.dtype.kind not in "iu" or chosen.ndim not in (1, 2) or not chosen.size:
        raise ValueError(f"{name} must be numbers [n] or [{layers}, n], got {given!r}")
    chosen = np.broadcast_to(chosen, (layers, chosen.shape[-1])) if chosen.ndim == 1 else chosen
    ascending = (np.diff(chosen, axis=1) > 0).all()
    if len(chosen) != layers or not ascending or chosen.min() < 0 or chosen.max() >= total:
        raise ValueError(
            f"{name} must ascend within 0..{total - 1} in each of {layers} layers, got "
            f"{chosen.tolist()}"
        )
    return chosen


def _columns(heads: np.ndarray, dim: int) -> np.ndarray:
    """Columns [L, n * Dh] of the heads [L, n]."""
    return (heads[:, :, None] * dim + np.arange(dim)).reshape(len(heads), -1)


def _cut(params: Params, index: Mapping[str, tuple[np.ndarray, int]]) -> Params:
    """``params`` with other entries of some leaves: path -> (entries [L, n] or [n], axis).

    Paths that the model lacks (biases, gates) are passed over. One program cuts all leaves.
    """
    flat = tree.flatten(params)
    index = {path: how for path, how in index.items() if path in flat}

    def cut(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        out = {}
        for path, leaf in leaves.items():
            entries, axis = index[path]
            if entries.ndim == 1:
                out[path] = jnp.take(leaf, entries, axis=axis)
                continue
            inner = axis if axis < 0 else axis - 1  # of one layer
            out[path] = jax.vmap(lambda a, i, at=inner: jnp.take(a, i, axis=at))(leaf, entries)
        return out

    return tree.replace(params, jax.jit(cut)({path: flat[path] for path in index}))


def _made(config: EncoderConfig | DecoderConfig, params: Params, teacher: Params) -> Student:
    """The student; leaves that no cut touches are copied, so that either may be donated."""
    own = {id(leaf) for leaf in jax.tree.leaves(teacher)}
    params = jax.tree.map(lambda a: jnp.array(a, copy=True) if id(a) in own else a, params)
    model = config.build()
    tree.same_structure(params, model.abstract(), ("params", "the student"))
    return Student(model, params)
