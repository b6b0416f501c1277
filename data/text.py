"""Text to token ids, through Hugging Face ``tokenizers`` files (``transformers`` is not needed).

A directory with ``tokenizer.json`` is used as it is; one with only a WordPiece ``vocab.txt``
gets the BERT pipeline that its ``tokenizer_config.json`` describes; a ``.gguf`` file holds a
tokenizer of its own (see ``tokenizer_gguf``).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from steppe.data import tokenizer_files, tokenizer_gguf
from steppe.data.errors import DataError, listing, shorten
from steppe.data.tokenizer_files import Special

if TYPE_CHECKING:
    import tokenizers


class Encoding(TypedDict):
    """One encoded text or pair, special tokens included, not padded.

    Attributes:
      input_ids, token_type_ids: one integer a token.
      offsets: (start, end) characters of each token in its own text; (0, 0) for special tokens.
      sequence_ids: 0 or 1 for tokens of the first or second text, None for special tokens.
      cut: whether something did not fit in ``max_length``.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    offsets: list[tuple[int, int]]
    sequence_ids: list[int | None]
    cut: bool


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with its special ids and the limits of its model.

    Attributes:
      max_positions: tokens that the model can take, or None where its directory does not say.
      has_token_types: whether the model has token-type embeddings for a second text.
      source: the directory or GGUF file that it was read from, or None.
      bos_id: id of the token that begins a text, -1 where there is none.
      stop_ids: ids that end a text or a turn of a chat, the main one first.
      chat_template: Jinja source that writes a chat as one text (see ``chat``), or None. May be
        set to another one; ``save`` keeps it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: Special,
        has_token_types: bool,
        max_positions: int | None = None,
        source: Path | None = None,
        bos_id: int = -1,
        stop_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ) -> None:
        if special.pad < 0 and stop_ids:
            # Language models often have none; padded places are masked, so any id will do.
            special = special._replace(pad=stop_ids[0])
        if special.pad < 0:
            raise DataError("the tokenizer has no padding token; batches cannot be padded")
        backend.no_truncation()  # files may carry the settings of some other use
        backend.no_padding()
        self._backend = backend
        self.special = special
        self.has_token_types = has_token_types
        self.max_positions = max_positions
        self.source = source
        self.bos_id = bos_id
        self.stop_ids = tuple(stop_ids)
        self.chat_template = chat_template

    @classmethod
    def open(cls, path: Path | str) -> Tokenizer:
        """Reads the tokenizer of a model: its directory, or a ``.gguf`` file.

        Raises:
          FileNotFoundError, DataError: see ``from_dir`` and ``from_gguf``.
        """
        suffix = Path(path).suffix.lower()
        return cls.from_gguf(path) if suffix == ".gguf" else cls.from_dir(path)

    @classmethod
    def from_gguf(cls, path: Path | str) -> Tokenizer:
        """Reads the tokenizer inside a GGUF file.

        Raises:
          FileNotFoundError: no such file.
          DataError: damaged, or a vocabulary of a kind that is not read.
        """
        file = Path(path).expanduser()
        built = tokenizer_gguf.build(file)
        return cls(
            built.backend,
            special=Special(pad=built.pad, cls=-1, sep=-1, mask=-1, unk=built.unk),
            has_token_types=False,
            max_positions=built.max_positions,
            source=file,
            bos_id=built.bos,
            stop_ids=built.stops,
            chat_template=built.chat_template,
        )

    @classmethod
    def from_dir(cls, path: Path | str) -> Tokenizer:
        """Reads the tokenizer of a Hugging Face model directory.

        Raises:
          FileNotFoundError: no directory, or neither ``tokenizer.json`` nor ``vocab.txt`` in it.
          DataError: a file is damaged.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such directory (tokenizer files wanted)")
        settings = tokenizer_files.settings(folder / "tokenizer_config.json")
        config = tokenizer_files.settings(folder / "config.json")
        if (folder / "tokenizer.json").is_file():
            import tokenizers

            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the Rust side raises bare Exception
                raise DataError(f"{folder / 'tokenizer.json'}: damaged ({error})") from error
        elif (folder / "vocab.txt").is_file():
            backend = tokenizer_files.wordpiece(
                folder / "vocab.txt",
                lowercase=bool(settings.get("do_lower_case", True)),
                strip_accents=settings.get("strip_accents"),
            )
        else:
            held = listing(sorted(p.name for p in folder.iterdir()))
            raise FileNotFoundError(
                f"{folder}: holds neither tokenizer.json nor vocab.txt, only {held}; "
                "give the directory of a model with its tokenizer"
            )
        named = {**settings, **tokenizer_files.settings(folder / "special_tokens_map.json")}
        special = Special(
            *(tokenizer_files.special_id(backend, named, key) for key in Special._fields)
        )
        generation = tokenizer_files.settings(folder / "generation_config.json")
        bos_id, stop_ids = tokenizer_files.ends(backend, named, config, generation)
        return cls(
            backend,
            special=special,
            has_token_types=tokenizer_files.token_types(backend, config, settings),
            max_positions=tokenizer_files.positions(config, settings),
            source=folder,
            bos_id=bos_id,
            stop_ids=stop_ids,
            chat_template=tokenizer_files.template(folder, settings),
        )

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The underlying ``tokenizers.Tokenizer``."""
        return self._backend

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return self.special.pad

    @property
    def cls_id(self) -> int:
        """Id of the first token of a sequence."""
        return self.special.cls

    @property
    def sep_id(self) -> int:
        """Id of the separator."""
        return self.special.sep

    @property
    def mask_id(self) -> int:
        """Id of the mask token; -1 when there is none."""
        return self.special.mask

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a text; -1 when there is none."""
        return self.stop_ids[0] if self.stop_ids else -1

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all tokens that are not text: those marked as special, and `stop_ids`."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(n for n, token in added.items() if token.special) | {*self.stop_ids}

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included; no id is larger than this minus one."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def check_length(self, max_length: int) -> int:
        """Returns `max_length` if the model can take it.

        Raises:
          DataError: not positive, or more than the model's positions.
        """
        if max_length < 4:
            raise DataError(f"max_length must be >= 4 tokens, got {max_length}")
        if self.max_positions is not None and max_length > self.max_positions:
            raise DataError(
                f"max_length {max_length} is more than the {self.max_positions} positions of the "
                f"model in {self.source}; give max_length <= {self.max_positions}"
            )
        return max_length

    def encode_batch(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        *,
        special: bool = True,
    ) -> list[Encoding]:
        """Encodes texts, or pairs of texts.

        Args:
          max_length: longest result in tokens; of a pair the longer text is cut first.
          special: adds the special tokens that the tokenizer puts around a text. Those that
            stand in the text itself are read as what they are in either case.

        Raises:
          DataError: `pairs` has another length, `max_length` exceeds the model's positions, or a
            text is not valid Unicode.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise DataError(f"{len(texts)} texts but {len(pairs)} second texts")
        inputs: Any = list(texts) if pairs is None else list(zip(texts, pairs))
        if max_length is None:
            encodings = self._encoded(inputs, special)
        else:
            self._backend.enable_truncation(self.check_length(max_length), strategy="longest_first")
            try:
                encodings = self._encoded(inputs, special)
            finally:
                self._backend.no_truncation()
        return [_plain(encoding) for encoding in encodings]

    def _encoded(self, inputs: list[Any], special: bool = True) -> list[Any]:
        try:
            return list(self._backend.encode_batch(inputs, add_special_tokens=special))
        except (TypeError, UnicodeEncodeError):
            for row, given in enumerate(inputs):
                for text in given if isinstance(given, tuple) else (given,):
                    _check_unicode(text, row)
            raise

    def encode_windows(
        self, questions: Sequence[str], contexts: Sequence[str], max_length: int, stride: int
    ) -> list[list[Encoding]]:
        """Encodes each question with its context in overlapping windows of the context.

        Args:
          stride: tokens that neighbouring windows share.

        Returns:
          One list of windows a pair; only contexts are cut.

        Raises:
          DataError: a question leaves no room for the stride plus one token of context.
        """
        self.check_length(max_length)
        if stride < 0:
            raise DataError(f"stride must be >= 0 tokens, got {stride}")
        special = self._backend.num_special_tokens_to_add(True)
        lengths = [len(e.ids) for e in self._encoded(list(questions), False)]
        for row, length in enumerate(lengths):
            room = max_length - special - length
            if room <= stride:
                raise DataError(
                    f"row {row}: its question takes {length} of {max_length} tokens and leaves "
                    f"{room} for the context, but windows share {stride}; "
                    "raise max_length, lower stride, or drop the row"
                )
        self._backend.enable_truncation(max_length, stride=stride, strategy="only_second")
        try:
            encodings = self._encoded(list(zip(questions, contexts)))
        finally:
            self._backend.no_truncation()
        return [[_plain(e), *map(_plain, e.overflowing)] for e in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def stream(self, *, skip_special: bool = True) -> Stream:
        """Text of ids that come a few at a time, as a model produces them."""
        return Stream(self, skip_special)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises DataError where the tokenizer knows ids that a model does not embed.

        Args:
          vocab_size: rows of the model's embedding; more of them than tokens is usual.
        """
        if self.vocab_size > vocab_size:
            raise DataError(
                f"the tokenizer in {self.source} has {self.vocab_size} tokens but the model embeds "
                f"{vocab_size}; they do not belong together"
            )

    def save(self, folder: Path | str) -> None:
        """Writes the tokenizer's files into a model's directory.

        Files of the source directory are copied unchanged; ``tokenizer.json`` is written where
        the source had none, and so are the settings of a tokenizer out of a GGUF file. A chat
        template that the files do not hold is written as ``chat_template.jinja``.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        from_folder = self.source is not None and self.source.is_dir()
        if self.source is not None and from_folder and self.source.resolve() != target.resolve():
            for name in tokenizer_files.FILES:
                if (self.source / name).is_file():
                    shutil.copyfile(self.source / name, target / name)
        if not (target / "tokenizer.json").exists():
            self._backend.save(str(target / "tokenizer.json"))
        settings = target / "tokenizer_config.json"
        if not from_folder and not settings.exists():
            told = tokenizer_files.written(
                self._backend,
                self.special,
                bos=self.bos_id,
                eos=self.eos_id,
                max_positions=self.max_positions,
                token_types=self.has_token_types,
                chat_template=self.chat_template,
            )
            settings.write_text(json.dumps(told, indent=2, ensure_ascii=False), "utf-8")
        kept = tokenizer_files.template(target, tokenizer_files.settings(settings))
        if self.chat_template is not None and self.chat_template != kept:
            (target / "chat_template.jinja").write_text(self.chat_template, "utf-8")


class Stream:
    """Joins ids that come one by one into text, without ever splitting a character.

    A token may hold a part of a character's bytes; what ends in such a part is held back until
    the rest has come. All pieces with that of ``end`` make the text that ``decode`` gives.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._ids: list[int] = []  # those given out last, as context, then those held back
        self._done = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` make certain; may be empty."""
        self._ids += [int(i) for i in ids]
        text = self._text(len(self._ids))
        return "" if text.endswith("\ufffd") else self._give(text)

    def end(self) -> str:
        """What was held back; the stream may then be used for another text."""
        rest = self._give(self._text(len(self._ids)))
        self._ids, self._done = [], 0
        return rest

    def _text(self, stop: int) -> str:
        return self._tokenizer.decode(self._ids[:stop], skip_special=self._skip)

    def _give(self, text: str) -> str:
        # Decoders may treat the first token apart (its space), so new text is what comes after
        # the text of the tokens before it.
        piece = text[len(self._text(self._done)) :]
        if piece:
            del self._ids[: self._done]
            self._done = len(self._ids)
        return piece


def _check_unicode(text: Any, row: int) -> None:
    """Refuses lone surrogates, which stand for bytes that were not decoded."""
    if not isinstance(text, str):
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise DataError(
            f"text {row} is not valid Unicode: {shorten(around)} holds "
            f"{text[error.start]!a} (character {error.start}); "
            "is the file or terminal in UTF-8?"
        ) from error


def _plain(encoding: tokenizers.Encoding) -> Encoding:
    return {
        "input_ids": encoding.ids,
        "token_type_ids": encoding.type_ids,
        "offsets": encoding.offsets,
        "sequence_ids": encoding.sequence_ids,
        "cut": bool(encoding.overflowing),
    }
