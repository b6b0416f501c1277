"""What a model's directory says about its tokenizer: vocabulary, special tokens, limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steppe.data import files
from steppe.data.errors import DataError, listing

if TYPE_CHECKING:
    import tokenizers

# What a model's directory may hold about its tokenizer; copied when a model is exported.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)

# Position ids of these families start after the padding id, so fewer positions are usable.
_OFFSET_FAMILIES = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


class Special(NamedTuple):
    """Ids of the special tokens; -1 where the vocabulary has none."""

    pad: int
    cls: int
    sep: int
    mask: int
    unk: int


_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}


def wordpiece(
    vocabulary: Path, *, lowercase: bool = True, strip_accents: bool | None = None
) -> tokenizers.Tokenizer:
    """The BERT pipeline over a ``vocab.txt``, one token a line.

    Raises:
      DataError: not UTF-8, or [UNK], [CLS] or [SEP] is missing.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    lines = files.text(vocabulary).split("\n")
    words = [line.rstrip("\r") for line in lines]
    ids = {word: number for number, word in enumerate(words) if word}
    missing = [word for word in ("[UNK]", "[CLS]", "[SEP]") if word not in ids]
    if missing:
        raise DataError(f"{vocabulary}: not a WordPiece vocabulary, it lacks {listing(missing)}")
    backend = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=True,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    backend.decoder = decoders.WordPiece()
    names = [name for pair in _NAMES.values() for name in pair if name in ids]
    backend.add_special_tokens(names)
    return backend


def ends(
    backend: tokenizers.Tokenizer, named: dict[str, Any], *configs: dict[str, Any]
) -> tuple[int, tuple[int, ...]]:
    """Ids of the first token of a text (-1 = none) and of those that end one, the main one first.

    The tokenizer's own word comes first, then that of the model's configs (``eos_token_id`` may
    be a list there: a text ends with one token, a turn of a chat with another).
    """
    known = backend.get_vocab_size(with_added_tokens=True)

    def role(key: str) -> list[int]:
        told: list[Any] = []
        if named.get(f"{key}_token"):
            told.append(special_id(backend, named, key))
        if key == "bos" and f"{key}_token" in named:
            return told  # whatever the model's config says, the tokenizer never writes another
        for config in configs:
            value = config.get(f"{key}_token_id")
            told += value if isinstance(value, list) else [value]
        told = [n for n in told if isinstance(n, int) and 0 <= n < known]
        # A name that the settings leave out is guessed; one that they set to null is not there.
        guess = not told and f"{key}_token" not in named
        return [special_id(backend, named, key)] if guess else told

    first = [n for n in role("bos") if n >= 0]
    last = [n for n in role("eos") if n >= 0]
    return first[0] if first else -1, tuple(dict.fromkeys(last))


def template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template of a model's directory; a file of its own is the newer form."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return files.text(own)
    held = settings.get("chat_template")
    if isinstance(held, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in held if isinstance(t, dict)}
        held = named.get("default")
    return held if isinstance(held, str) else None


def settings(path: Path) -> dict[str, Any]:
    """A JSON object of settings; {} where there is no such file.

    Raises:
      DataError: damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(files.text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return value


def special_id(backend: tokenizers.Tokenizer, named: dict[str, Any], key: str) -> int:
    """Id of the token that the settings name for a role, or of its usual name; else -1."""
    own = named.get(f"{key}_token")
    text = own.get("content") if isinstance(own, dict) else own
    for candidate in (text, *_NAMES[key]):
        number = backend.token_to_id(candidate) if candidate else None
        if number is not None:
            return int(number)
    return -1


def token_types(
    backend: tokenizers.Tokenizer, config: dict[str, Any], settings: dict[str, Any]
) -> bool:
    """Whether the model wants token types: its config knows best, then its tokenizer's."""
    if config:
        return int(config.get("type_vocab_size") or 0) > 1
    if "model_input_names" in settings:
        return "token_type_ids" in settings["model_input_names"]
    return 1 in backend.encode("a", "b").type_ids


def positions(config: dict[str, Any], settings: dict[str, Any]) -> int | None:
    """Tokens that the model can take: by its config, else its tokenizer's; None if unknown."""
    held = config.get("max_position_embeddings")
    if held is not None:
        first = int(config.get("pad_token_id") or 0) + 1
        return int(held) - (first if config.get("model_type") in _OFFSET_FAMILIES else 0)
    told = settings.get("model_max_length")
    # transformers writes 1e30 for "unknown".
    return int(told) if isinstance(told, int) and told < 1_000_000 else None


def written(
    backend: tokenizers.Tokenizer,
    special: Special,
    *,
    bos: int,
    eos: int,
    max_positions: int | None,
    token_types: bool,
    chat_template: str | None,
) -> dict[str, Any]:
    """A ``tokenizer_config.json`` for a tokenizer that came without one."""
    roles = {"bos": bos, "eos": eos, "pad": special.pad, "unk": special.unk, "cls": special.cls}
    roles |= {"sep": special.sep, "mask": special.mask}
    out: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, number in roles.items():
        if number >= 0:
            out[f"{role}_token"] = backend.id_to_token(number)
    if max_positions is not None:
        out["model_max_length"] = max_positions
    out["clean_up_tokenization_spaces"] = False
    inputs = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    out["model_input_names"] = inputs
    if chat_template is not None:
        out["chat_template"] = chat_template
    return out
