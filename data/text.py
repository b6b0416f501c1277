"""Text to token ids, through Hugging Face ``tokenizers`` files (``transformers`` is not needed).

A directory with ``tokenizer.json`` is used as it is; one with only a WordPiece ``vocab.txt``
gets the BERT pipeline that its ``tokenizer_config.json`` describes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from steppe.data import tokenizer_files
from steppe.data.errors import DataError, listing
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
      source: the directory that it was read from, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: Special,
        has_token_types: bool,
        max_positions: int | None = None,
        source: Path | None = None,
    ) -> None:
        if special.pad < 0:
            raise DataError("the tokenizer has no padding token; batches cannot be padded")
        backend.no_truncation()  # files may carry the settings of some other use
        backend.no_padding()
        self._backend = backend
        self.special = special
        self.has_token_types = has_token_types
        self.max_positions = max_positions
        self.source = source

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
        return cls(
            backend,
            special=special,
            has_token_types=tokenizer_files.token_types(backend, config, settings),
            max_positions=tokenizer_files.positions(config, settings),
            source=folder,
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
    ) -> list[Encoding]:
        """Encodes texts, or pairs of texts, with special tokens.

        Args:
          max_length: longest result in tokens; of a pair the longer text is cut first.

        Raises:
          DataError: `pairs` has another length, or `max_length` exceeds the model's positions.
        """
        if pairs is not None and len(pairs) != len(texts):
            raise DataError(f"{len(texts)} texts but {len(pairs)} second texts")
        inputs: Any = list(texts) if pairs is None else list(zip(texts, pairs))
        if max_length is None:
            encodings = self._backend.encode_batch(inputs)
        else:
            self._backend.enable_truncation(self.check_length(max_length), strategy="longest_first")
            try:
                encodings = self._backend.encode_batch(inputs)
            finally:
                self._backend.no_truncation()
        return [_plain(encoding) for encoding in encodings]

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
        lengths = [len(e.ids) for e in self._backend.encode_batch(list(questions), False, False)]
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
            encodings = self._backend.encode_batch(list(zip(questions, contexts)))
        finally:
            self._backend.no_truncation()
        return [[_plain(e), *map(_plain, e.overflowing)] for e in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def save(self, folder: Path | str) -> None:
        """Writes the tokenizer's files into a model's directory.

        Files of the source directory are copied unchanged; ``tokenizer.json`` is written where
        the source had none.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        if self.source is not None and self.source.resolve() != target.resolve():
            for name in tokenizer_files.FILES:
                if (self.source / name).is_file():
                    shutil.copyfile(self.source / name, target / name)
        if not (target / "tokenizer.json").exists():
            self._backend.save(str(target / "tokenizer.json"))


def _plain(encoding: tokenizers.Encoding) -> Encoding:
    return {
        "input_ids": encoding.ids,
        "token_type_ids": encoding.type_ids,
        "offsets": encoding.offsets,
        "sequence_ids": encoding.sequence_ids,
        "cut": bool(encoding.overflowing),
    }
