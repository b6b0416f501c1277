"""Natural Instructions v1 (Mishra et al., ACL 2022), out of BIG-bench.

61 tasks that people described in words: for instruction tuning, and right and wrong answers that
people wrote for the same question. Its authors ask that the data never enter training corpora:
for private experiments only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from steppe.data.assets.readers.part import Part, Record, View, field, json_file
from steppe.data.errors import AssetError, DataError

# Numbers of the subtasks with right and with wrong answers to the same questions.
_BOTH = {
    "multirc": ("054", "055"),
    "mctaco-duration": ("004", "005"),
    "mctaco-ordering": ("010", "011"),
    "mctaco-timepoint": ("013", "014"),
    "mctaco-frequency": ("016", "017"),
}
# One subtask whose input ends in the right answer.
_INSIDE = {"cosmosqa": "025", "qasc": "042"}
_MARK = "\nCorrect Answer:"


class _Item(NamedTuple):
    number: int
    asked: str
    answers: list[str]


class _Row(NamedTuple):
    task: str
    definition: str
    item: _Item


def _tasks(folder: Path) -> list[Path]:
    found = sorted((folder / "tasks").glob("subtask*/task.json"))
    if not found:
        raise AssetError(f"{folder / 'tasks'} holds no subtasks; fetch the asset again")
    return found


def _items(path: Path, task: Any) -> Iterator[_Item]:
    """The items that have an answer, with their place in the file."""
    for number, example in enumerate(field(task, "examples", list, str(path))):
        where = f"{path}: example {number}"
        asked = field(example, "input", str, where)
        answers = field(example, "target", list, where)
        if not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{where}: 'target' must be a list of texts, got {answers!r:.60}")
        answers = [answer.strip() for answer in answers if answer.strip()]
        if answers:
            yield _Item(number, asked.strip(), answers)


def _rows(folder: Path) -> list[_Row]:
    rows = []
    for path in _tasks(folder):
        task = json_file(path)
        definition = field(task, "task_prefix", str, str(path)).strip()
        rows += [_Row(path.parent.name, definition, item) for item in _items(path, task)]
    return rows


def _instruction(row: _Row) -> Record:
    """``prompt`` is the definition and the input; ``answer`` the first of the references."""
    return {
        "id": f"natural-instructions/{row.task}/{row.item.number}",
        "prompt": f"{row.definition}\n\n{row.item.asked}",
        "answer": row.item.answers[0],
        "definition": row.definition,
        "input": row.item.asked,
        "references": row.item.answers,
        "group": row.task,
    }


def _pairs(folder: Path) -> list[Record]:
    """A record for each question with a right and a wrong answer.

    ``chosen`` and ``rejected`` are the first of each, ``right`` and ``wrong`` all of them;
    ``source`` is the set that the question comes from.
    """
    paths = {path.parent.name.removeprefix("subtask")[:3]: path for path in _tasks(folder)}
    records: list[Record] = []
    for source, number in _INSIDE.items():
        for item in _of(paths, number, folder):
            asked, mark, right = item.asked.rpartition(_MARK)
            if not mark:
                raise DataError(
                    f"{paths[number]}: example {item.number}: its input has no {_MARK.strip()!r}"
                )
            records.append(_pair(source, item.number, asked, [right.strip()], item.answers))
    for source, (good, bad) in _BOTH.items():
        wrong = {_key(item.asked): item.answers for item in _of(paths, bad, folder)}
        for item in _of(paths, good, folder):
            answers = wrong.get(_key(item.asked))
            if answers:
                records.append(_pair(source, item.number, item.asked, item.answers, answers))
    return records


def _of(paths: dict[str, Path], number: str, folder: Path) -> Iterator[_Item]:
    if number not in paths:
        raise AssetError(f"{folder / 'tasks'} has no subtask{number}; fetch the asset again")
    return _items(paths[number], json_file(paths[number]))


def _key(text: str) -> str:
    return " ".join(text.split())


def _pair(source: str, number: int, asked: str, right: list[str], wrong: list[str]) -> Record:
    return {
        "id": f"natural-instructions/{source}/{number}",
        "prompt": asked.strip(),
        "chosen": right[0],
        "rejected": wrong[0],
        "right": right,
        "wrong": wrong,
        "source": source,
        "group": f"natural-instructions/{_key(asked.partition('Question:')[0])[:200]}",
    }


PARTS: dict[str, Part] = {
    "natural-instructions": Part(
        lambda folder: View(_rows(folder), _instruction),
        "lm",
        columns=("prompt", "answer", "definition", "input", "references", "group"),
    ),
    "natural-instructions/pairs": Part(
        _pairs,
        "preference",
        columns=("prompt", "chosen", "rejected", "right", "wrong", "source", "group"),
    ),
}
