"""Text assets out of BIG-bench: MultiEmo and the shifted SQuAD test sets.

Their authors ask that the data never enter training corpora: for private experiments only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steppe.data.assets.readers.part import Part, Record, field, json_file
from steppe.data.errors import DataError

SENTIMENTS = ("negative", "neutral", "ambivalent", "positive")
DOMAINS = ("hotels", "medicine", "products", "reviews")
LANGUAGES = ("de", "en", "es", "fr", "it", "ja", "nl", "pl", "pt", "ru", "zh")
SQUADS = {
    "squad": "squaddev_v1.1",
    "wiki": "new_wiki_v1.0",
    "nyt": "nyt_v1.0",
    "reddit": "reddit_v1.0",
    "amazon": "amazon_reviews_v1.0",
}


def _multiemo(part: str) -> Callable[[Path], list[Record]]:
    """Reviews (text) or their sentences; people labelled the Polish ones, the rest is translated.

    The number in an id is the place in the file, which is that of the same item in every
    language, with two exceptions: hotels-sentence-de lacks the item 22,364 or one just before it,
    and hotels-text-pl has one more at 581. medicine-sentence-pt ends 1,273 items early.
    """

    def read(folder: Path) -> list[Record]:
        path = folder / "tasks" / part.replace("-", "_") / "task.json"
        records: list[Record] = []
        for number, example in enumerate(field(json_file(path), "examples", list, str(path))):
            where = f"{path}: example {number}"
            text = field(example, "input", str, where)
            scores = field(example, "target_scores", dict, where)
            right = [name for name, score in scores.items() if score == 1]
            if len(right) != 1 or right[0] not in SENTIMENTS:
                raise DataError(f"{where}: expected one of {', '.join(SENTIMENTS)}, got {right}")
            if text.strip():
                name = f"multiemo/{part}/{number}"
                records.append({"id": name, "text": text, "label": right[0]})
        return records

    return read


def _squad(part: str, stem: str) -> Callable[[Path], list[Record]]:
    """Questions with answer spans (up to 5 people); ``group`` is the paragraph.

    Some places are wrong in the files: an answer is looked for at the nearest place that has it.
    """

    def read(folder: Path) -> list[Record]:
        path = folder / f"{stem}.json"
        records: list[Record] = []
        count = 0
        for article in field(json_file(path), "data", list, str(path)):
            for paragraph in field(article, "paragraphs", list, str(path)):
                where = f"{path}: paragraph {count}"
                context = field(paragraph, "context", str, where)
                for question in field(paragraph, "qas", list, where):
                    asked = field(question, "question", str, where)
                    answers = [
                        _placed(context, answer, f"{where}, {asked!r}")
                        for answer in field(question, "answers", list, where)
                    ]
                    record: Record = {
                        "id": f"squad-shifts/{part}/{field(question, 'id', str, where)}",
                        "question": asked,
                        "context": context,
                        "answers": answers,
                        "group": f"squad-shifts/{part}/{count}",
                    }
                    records.append(record)
                count += 1
        return records

    return read


def _placed(context: str, answer: Record, where: str) -> Record:
    text = field(answer, "text", str, where).strip()
    start = field(answer, "answer_start", int, where)
    places = []
    place = context.find(text) if text else -1
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    if not places:
        raise DataError(f"{where}: the answer {text!r} is not in its paragraph")
    return {"text": text, "answer_start": min(places, key=lambda found: abs(found - start))}


PARTS: dict[str, Part] = {
    **{
        f"multiemo/{domain}-{level}-{language}": Part(
            _multiemo(f"{domain}-{level}-{language}"), "classification", SENTIMENTS
        )
        for domain in DOMAINS
        for level in ("sentence", "text")
        for language in LANGUAGES
    },
    **{
        f"squad-shifts/{part}": Part(
            _squad(part, stem), "span", columns=("question", "context", "answers", "group")
        )
        for part, stem in SQUADS.items()
    },
}
