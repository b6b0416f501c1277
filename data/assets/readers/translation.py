"""LibreOffice Help: paragraphs that people translated, paired by file and paragraph id.

The pages of one language differ from those of another in the text only: every paragraph and
heading keeps its id. A paragraph that pages share (an embedded one) is kept once, at its first
page; what is left in English is dropped. ``group`` is the page. One source text in fifty stands
on several pages, with different translations: divide with ``key="source"`` to keep those together.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from steppe.data.assets.readers.part import Part, Record
from steppe.data.errors import DataError

_PARAGRAPH = re.compile(
    r"<(p|h[1-6])\b[^>]*?\bid=\"((?:par|hd)_[^\"]+)\"[^>]*>(.*?)</\1\s*>", re.DOTALL
)
_TAG = re.compile(r"(<[^>]*>)")
_SOURCE = "en-US"


def plain(markup: str) -> str:
    """The text of a piece of HTML: no tags, entities decoded, white space made single.

    Where a page offers one wording for each program or system, the default one is kept.
    """
    frames = [_Frame()]
    for token in _TAG.split(markup):
        if not token.startswith("<"):
            frames[-1].text += token
        elif token.startswith("<span"):
            inside = frames[-1].choice and not frames[-1].case
            choice = 'class="switchinline"' in token
            frames.append(_Frame(choice, inside and not choice, 'id="default' in token))
        elif token.startswith("</span") and len(frames) > 1:
            done = frames.pop()
            if done.case:
                frames[-1].cases.append((done.default, done.text))
            else:
                frames[-1].text += done.chosen() if done.choice else done.text
        elif token.startswith("<br"):
            frames[-1].text += " "
    return " ".join(html.unescape("".join(frame.text for frame in frames)).split())


class _Frame:
    """An open span: a choice between cases, a case of one, or neither."""

    def __init__(self, choice: bool = False, case: bool = False, default: bool = False) -> None:
        self.choice, self.case, self.default = choice, case, default
        self.text = ""
        self.cases: list[tuple[bool, str]] = []

    def chosen(self) -> str:
        preferred = [text for default, text in self.cases if default]
        return (preferred or [text for _, text in self.cases] or [self.text])[0]


def paragraphs(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(page, paragraph id, text) of all pages below a folder, in the order of their names.

    An id that a page repeats counts once. Empty paragraphs are left out.

    Raises:
      DataError: a page is not UTF-8, or no page has a paragraph with an id.
    """
    pages = sorted(folder.rglob("*.html"))
    seen = False
    for path in pages:
        page = path.relative_to(folder).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 ({error})") from None
        names = set()
        for _, name, markup in _PARAGRAPH.findall(text):
            if name in names:
                continue
            names.add(name)
            seen = True
            if found := plain(markup):
                yield page, name, found
    if not seen:
        raise DataError(
            f"{folder}: none of its {len(pages)} pages has a paragraph with an id such as "
            "par_id3155960; the package is not the one in the catalogue"
        )


def _read(language: str, part: str) -> Callable[[Path], list[Record]]:
    def read(folder: Path) -> list[Record]:
        targets = {(page, name): text for page, name, text in paragraphs(folder / language)}
        records: list[Record] = []
        pairs = set()
        for page, name, source in paragraphs(folder / _SOURCE):
            target = targets.get((page, name))
            if target is None or target == source or (source, target) in pairs:
                continue
            pairs.add((source, target))
            key = f"libreoffice-help/{part}/{page}#{name}"
            group = f"libreoffice-help/{page}"
            records.append({"id": key, "source": source, "target": target, "group": group})
        if not records:
            raise DataError(f"{folder}: no paragraph of {_SOURCE} has a translation in {language}")
        return records

    return read


PARTS: dict[str, Part] = {
    f"libreoffice-help/{part}": Part(
        _read(language, part), "seq2seq", columns=("source", "target", "group")
    )
    for part, language in (("en-de", "de"), ("en-pt-br", "pt-BR"))
}
