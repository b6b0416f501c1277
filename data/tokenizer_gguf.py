"""The tokenizer inside a GGUF file, rebuilt from its metadata.

A GGUF file has no ``tokenizer.json``: it lists tokens, their kinds, merges or scores, and names
the way in which text is cut before merging. Two kinds of vocabulary are read:

- ``gpt2``: byte-level BPE. The name in ``tokenizer.ggml.pre`` picks the cutting rule; with the
  wrong rule every text still encodes, only to other ids, so a name that is not known is refused.
- ``llama``: SentencePiece BPE. The file gives scores in place of merges: of all neighbours that
  join into a token, the one of the highest score is joined first (Kudo and Richardson, 2018,
  arXiv:1808.06226), which is a merge list sorted by score.

The header is walked here, without the ``gguf`` package: its reader keeps an array object for
every token (0.7 GB for a vocabulary of 262,144).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steppe.data.errors import DataError, listing

if TYPE_CHECKING:
    import tokenizers

# Kinds of token, in ``tokenizer.ggml.token_type``.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"

# tokenizer.ggml.pre -> how text is cut: "gpt-2" is the rule of GPT-2, "digits" the same after
# every digit has been set apart, anything else a regular expression of its own.
_PRE = {
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "jais"), "gpt-2"),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), "digits"
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), _LLAMA3),
}
# Vocabularies of this rule hold whole words that no merge reaches.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3")


class Built(NamedTuple):
    """A tokenizer with what its file says about it.

    Attributes:
      backend: the tokenizer; it adds the first and last token by itself where the file asks.
      pad, unk, bos, eos: ids of these tokens, -1 where there is none.
      stops: ids that end a text or a turn; `eos` is the first of them.
      max_positions: tokens that the model was made for, or None.
      chat_template: the Jinja source, or None.
    """

    backend: tokenizers.Tokenizer
    pad: int
    unk: int
    bos: int
    eos: int
    stops: tuple[int, ...]
    max_positions: int | None
    chat_template: str | None


def metadata(path: Path) -> dict[str, Any]:
    """Every key of the file's header with its value; arrays are lists.

    Raises:
      FileNotFoundError: no such file.
      DataError: not a GGUF file, of another version, or cut off inside the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise DataError(f"{path}: not a GGUF file (it does not start with the letters GGUF)")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                version, _, count = struct.unpack_from("<IQQ", data, 4)
                if version not in (2, 3):
                    raise DataError(
                        f"{path}: GGUF version {version}; versions 2 and 3 are read "
                        "(a file of the other byte order shows as a huge version)"
                    )
                return _walk(data, count)
            except (
                struct.error,
                UnicodeDecodeError,
                MemoryError,
                OverflowError,
                RecursionError,
            ) as error:
                raise DataError(
                    f"{path}: damaged or cut off inside its header ({error}); fetch it again"
                ) from error


def _walk(data: mmap.mmap, count: int) -> dict[str, Any]:
    at = 24

    def string() -> str:
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        if at + 8 + length > len(data):
            raise struct.error(f"a text of {length} bytes at byte {at}")
        at += 8 + length
        return data[at - length : at].decode("utf-8")

    def value(kind: int) -> Any:
        nonlocal at
        if kind == _STRING:
            return string()
        if kind == _ARRAY:
            inner, length = struct.unpack_from("<IQ", data, at)
            at += 12
            if inner in _SCALARS:
                layout = f"<{length}{_SCALARS[inner]}"
                if at + struct.calcsize(layout) > len(data):
                    raise struct.error(f"a list of {length} values at byte {at}")
                at += struct.calcsize(layout)
                return list(struct.unpack_from(layout, data, at - struct.calcsize(layout)))
            return [value(inner) for _ in range(length)]
        if kind not in _SCALARS:
            raise struct.error(f"value of unknown type {kind} at byte {at}")
        (number,) = struct.unpack_from("<" + _SCALARS[kind], data, at)
        at += struct.calcsize("<" + _SCALARS[kind])
        return number

    found: dict[str, Any] = {}
    for _ in range(count):
        key = string()
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        found[key] = value(kind)
    return found


def build(path: Path) -> Built:
    """The tokenizer of a GGUF file.

    Raises:
      FileNotFoundError: no such file.
      DataError: a damaged file, metadata that are missing, or a vocabulary of a kind or with a
        cutting rule that is not known.
    """
    held = metadata(path)
    kind = _get(path, held, "tokenizer.ggml.model")
    if kind not in _KINDS:
        raise DataError(
            f"{path}: holds a tokenizer of kind {kind!r}; {listing(_KINDS)} are read "
            "(give the model's tokenizer.json instead)"
        )
    tokens: list[str] = _get(path, held, "tokenizer.ggml.tokens")
    kinds = held.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise DataError(f"{path}: lists {len(tokens)} tokens but the kinds of {len(kinds)}")
    backend = _KINDS[kind](path, held, tokens, kinds)
    # SentencePiece looks for them in the text in which spaces have become "▁" already.
    _mark(backend, tokens, kinds, normalized=kind == "llama" and not _prefixed(held))

    def token(role: str) -> int:
        number = int(held.get(f"tokenizer.ggml.{role}_token_id", -1))
        if number >= len(tokens):
            raise DataError(f"{path}: its {role} token {number} is not one of {len(tokens)} tokens")
        return number

    bos, eos = token("bos"), token("eos")
    # SentencePiece models begin texts with bos unless their file says otherwise.
    first = held.get("tokenizer.ggml.add_bos_token", kind == "llama")
    _ends(
        backend,
        tokens,
        bos if first else -1,
        eos if held.get("tokenizer.ggml.add_eos_token", False) else -1,
    )
    stops = [number for number in (eos, token("eot"), token("eom")) if number >= 0]
    length = held.get(f"{held.get('general.architecture')}.context_length")
    return Built(
        backend,
        pad=token("padding"),
        unk=token("unknown"),
        bos=bos,
        eos=eos,
        stops=tuple(dict.fromkeys(stops)),
        max_positions=None if length is None else int(length),
        chat_template=held.get("tokenizer.chat_template"),
    )


def _get(path: Path, held: Mapping[str, Any], key: str) -> Any:
    if key not in held:
        raise DataError(
            f"{path}: has no {key!r} in its metadata, so it holds no tokenizer; "
            "give the model's folder with tokenizer.json"
        )
    return held[key]


def _byte_level(
    path: Path, held: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    name = held.get("tokenizer.ggml.pre", "default")
    if name == "default" and held.get("general.architecture") == "gpt2":
        name = "gpt-2"  # older files do not say
    if name not in _PRE:
        raise DataError(
            f"{path}: cuts text by the rule {name!r} (tokenizer.ggml.pre), which is not known; "
            f"known: {listing(_PRE, 20)}. Give the model's tokenizer.json instead"
        )
    pairs = [tuple(merge.split(" ")) for merge in _get(path, held, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for pair in pairs:
        if len(pair) != 2 or any(part not in vocabulary for part in (*pair, "".join(pair))):
            raise DataError(f"{path}: its merge {' '.join(pair)!r} does not join two tokens")
    model = models.BPE(vocabulary, pairs, ignore_merges=name in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    rule = _PRE[name]
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=rule in ("gpt-2", "digits")
    )
    if rule == "digits":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    elif rule == "gpt-2":
        backend.pre_tokenizer = byte_level
    else:
        cut = pre_tokenizers.Split(tokenizers.Regex(rule), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    path: Path, held: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in held:
        pairs = [tuple(merge.split(" ")) for merge in held["tokenizer.ggml.merges"]]
    else:
        scores = _get(path, held, "tokenizer.ggml.scores")
        if len(scores) != len(tokens):
            raise DataError(f"{path}: lists {len(tokens)} tokens but the scores of {len(scores)}")
        pairs = _merges(tokens, kinds, scores)
    unknown = held.get("tokenizer.ggml.unknown_token_id")
    model = models.BPE(
        vocabulary,
        pairs,
        unk_token=None if unknown is None else tokens[int(unknown)],
        fuse_unk=True,
        byte_fallback=BYTE in kinds,
    )
    backend = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if _prefixed(held):
        # SentencePiece puts its space before every text, also before one that begins with one.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _prefixed(held: Mapping[str, Any]) -> bool:
    """Whether SentencePiece puts a space before a text."""
    return bool(held.get("tokenizer.ggml.add_space_prefix", True))


_KINDS: dict[str, Callable[..., Any]] = {"gpt2": _byte_level, "llama": _sentencepiece}


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that join into a token, those of the highest score first."""
    usable = {t: s for t, k, s in zip(tokens, kinds, scores) if k in (NORMAL, USER_DEFINED)}
    found = []
    for number, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind != NORMAL:  # user-defined tokens are taken whole, before any merge
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                found.append((-scores[number], number, cut, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _mark(
    backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int], normalized: bool
) -> None:
    """Tokens that are matched whole, before any merge: control and user-defined ones.

    As in Hugging Face's tokenizers, and unlike in SentencePiece, control tokens are found in
    texts too: chat templates write them.
    """
    from tokenizers import AddedToken

    control = [t for t, kind in zip(tokens, kinds) if kind == CONTROL]
    own = [t for t, kind in zip(tokens, kinds) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    backend.add_tokens([AddedToken(t, normalized=normalized, special=False) for t in own])


def _ends(backend: tokenizers.Tokenizer, tokens: list[str], first: int, last: int) -> None:
    """Makes the tokenizer add a first and a last token; -1 = none."""
    from tokenizers import processors

    if first < 0 and last < 0:
        return
    before = f"{tokens[first]} " if first >= 0 else ""
    after = f" {tokens[last]}" if last >= 0 else ""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} {before}$B{after}",
        special_tokens=[(tokens[n], n) for n in (first, last) if n >= 0],
    )
