"""Readers of Spider, LibreOffice Help and BIG-bench on small made files, whole and broken."""

import json

import pytest

from steppe.data.assets import readers
from steppe.data.assets.readers import spider, translation
from steppe.data.errors import AssetError, DataError

TABLES = {
    "db_id": "pets",
    "table_names_original": ["Owner", "Dog"],
    "column_names_original": [[-1, "*"], [0, "id"], [0, "name"], [1, "id"], [1, "owner"]],
    "column_types": ["text", "number", "text", "number", "number"],
    "primary_keys": [1, [3, 4]],
    "foreign_keys": [[4, 1]],
}
QUESTION = {"db_id": "pets", "question": "How  many dogs?", "query": "SELECT count(*)\nFROM Dog"}


def write(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def read(part: str, folder):
    return readers.PARTS[part].read(folder)


def columns(part: str, records) -> None:
    assert all(set(r) == {"id", *readers.PARTS[part].columns} for r in records)


def test_spider_records_show_the_schema(tmp_path):
    write(tmp_path / "tables.json", [TABLES])
    write(tmp_path / "dev.json", [QUESTION])
    (record,) = read("spider", tmp_path)
    columns("spider", [record])
    assert record["schema"] == (
        "Owner(id number primary key, name text)\n"
        "Dog(id number primary key, owner number primary key -> Owner.id)"
    )
    assert record["question"] == "How many dogs?"
    assert record["answer"] == record["query"] == "SELECT count(*) FROM Dog"
    assert record["prompt"].startswith("Database:\nOwner(")
    assert record["prompt"].endswith("Question: How many dogs?")
    assert (record["id"], record["group"]) == ("spider/0", "spider/pets")


def test_broken_spider_files_name_the_row(tmp_path):
    write(tmp_path / "tables.json", [TABLES])
    for row, message in [
        (
            {**QUESTION, "db_id": "cars"},
            r"dev\.json: row 1: no schema of 'cars'; tables.json has pets",
        ),
        ({"db_id": "pets", "query": "x"}, "row 1: 'question' must be text, got nothing"),
        ({**QUESTION, "query": 3}, "row 1: 'query' must be text, got 3"),
        ("x", "row 1: 'db_id' must be text"),
    ]:
        write(tmp_path / "dev.json", [QUESTION, row])
        with pytest.raises(DataError, match=message):
            read("spider", tmp_path)
    write(tmp_path / "dev.json", {"rows": []})
    with pytest.raises(DataError, match=r"dev\.json: must be a list"):
        read("spider", tmp_path)
    for change, message in [
        ({"foreign_keys": [[4, 9]]}, r"row 0 .pets.: its keys and columns do not fit"),
        ({"foreign_keys": [[4]]}, "do not fit together"),
        ({"column_types": ["text"]}, "1 column types for 5 columns"),
        ({"column_names_original": None}, "'column_names_original' must be a list, got None"),
    ]:
        write(tmp_path / "tables.json", [{**TABLES, **change}])
        with pytest.raises(DataError, match=message):
            spider.schemas(tmp_path)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ('a <span class="emph">bold</span>\n  word', "a bold word"),
        ("R &amp; D &lt;x&gt; caf&eacute;", "R & D <x> café"),
        ("one<br>two", "one two"),
        ('<img src="x.png" alt="Icon"> Open', "Open"),
        (
            '<span id="sw" class="switchinline"><span hidden="true" class="MAC">Command</span>'
            '<span hidden="true" id="default1">Ctrl<span class="k">+</span></span></span>0',
            "Ctrl+0",
        ),
        (
            '<span class="switchinline"><span class="A">first</span><span class="B">second</span>'
            "</span>",
            "first",
        ),
        ("</span>never <span>closed", "never closed"),
        ("&nbsp; <b></b>", ""),
    ],
)
def test_plain_text_of_markup(markup, text):
    assert translation.plain(markup) == text


def page(**paragraphs: str) -> str:
    tags = [f'<p id="par_id{key}" class="paragraph">{text}</p>' for key, text in paragraphs.items()]
    return "<html><body><p>no id</p>" + "\n".join(tags) + "</body></html>"


def test_paragraphs_are_paired_by_page_and_id(tmp_path):
    english = page(a="Open a <b>file</b>.", b="LibreOffice", c="Close it.", d="Only here", e="")
    write(tmp_path / "en-US" / "x" / "1.html", english + '<h2 id="hd_id1">Print</h2>')
    german = page(c="Schließen.", b="LibreOffice", a="Datei öffnen.", e="")
    write(tmp_path / "de" / "x" / "1.html", german + '<h2 id="hd_id1">Drucken</h2>')
    for language, text in (("en-US", "Close it."), ("de", "Schließen.")):  # shared by two pages
        write(tmp_path / language / "x" / "2.html", page(c=text))
    records = read("libreoffice-help/en-de", tmp_path)
    columns("libreoffice-help/en-de", records)
    assert [(r["source"], r["target"]) for r in records] == [
        ("Open a file.", "Datei öffnen."),
        ("Close it.", "Schließen."),
        ("Print", "Drucken"),
    ]
    assert records[0]["id"] == "libreoffice-help/en-de/x/1.html#par_ida"
    assert records[0]["group"] == "libreoffice-help/x/1.html"


def test_pages_without_ids_are_refused(tmp_path):
    write(tmp_path / "en-US" / "1.html", "<p>text</p>")
    write(tmp_path / "de" / "1.html", "<p>Text</p>")
    with pytest.raises(DataError, match="de: none of its 1 pages has a paragraph with an id"):
        read("libreoffice-help/en-de", tmp_path)
    write(tmp_path / "de" / "1.html", page(a="Text"))
    write(tmp_path / "en-US" / "1.html", page(b="text"))
    with pytest.raises(DataError, match="no paragraph of en-US has a translation in de"):
        read("libreoffice-help/en-de", tmp_path)
    (tmp_path / "de" / "1.html").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"1\.html: not UTF-8"):
        read("libreoffice-help/en-de", tmp_path)
    with pytest.raises(DataError, match="none of its 0 pages"):
        read("libreoffice-help/en-pt-br", tmp_path)


def review(text: str, label: str) -> dict:
    names = ("ambivalent", "positive", "negative", "neutral")
    return {"input": text, "target_scores": {name: int(name == label) for name in names}}


def test_multiemo_drops_blank_reviews_and_keeps_places(tmp_path):
    path = tmp_path / "tasks" / "hotels_sentence_en" / "task.json"
    write(
        path,
        {
            "examples": [
                review("good", "positive"),
                review(" ", "neutral"),
                review("no", "negative"),
            ]
        },
    )
    records = read("multiemo/hotels-sentence-en", tmp_path)
    assert [(r["id"], r["label"]) for r in records] == [
        ("multiemo/hotels-sentence-en/0", "positive"),
        ("multiemo/hotels-sentence-en/2", "negative"),
    ]
    write(path, {"examples": [{"input": "x", "target_scores": {"positive": 1, "neutral": 1}}]})
    with pytest.raises(DataError, match=r"task\.json: example 0: expected one of negative"):
        read("multiemo/hotels-sentence-en", tmp_path)
    with pytest.raises(AssetError, match="products_text_pl.*is missing; fetch the asset again"):
        read("multiemo/products-text-pl", tmp_path)


def squad(answers) -> dict:
    question = {"id": "q1", "question": "What?", "answers": answers}
    return {"data": [{"paragraphs": [{"context": "a cat, a dog, a cat", "qas": [question]}]}]}


def test_squad_answers_are_put_in_their_place(tmp_path):
    path = tmp_path / "amazon_reviews_v1.0.json"
    answers = [{"text": "a cat", "answer_start": 12}, {"text": " a dog", "answer_start": 7}]
    write(path, squad(answers))
    (record,) = read("squad-shifts/amazon", tmp_path)
    columns("squad-shifts/amazon", [record])
    assert record["answers"] == [
        {"text": "a cat", "answer_start": 14},
        {"text": "a dog", "answer_start": 7},
    ]
    write(path, squad([{"text": "a cow", "answer_start": 0}]))
    with pytest.raises(DataError, match="paragraph 0, 'What.': the answer 'a cow' is not in its"):
        read("squad-shifts/amazon", tmp_path)
    write(path, squad([{"text": "a cat"}]))
    with pytest.raises(DataError, match="'answer_start' must be an integer, got nothing"):
        read("squad-shifts/amazon", tmp_path)


def task(tmp_path, name: str, *examples: tuple[str, list]) -> None:
    rows = [{"input": asked, "target": answers} for asked, answers in examples]
    write(tmp_path / "tasks" / name / "task.json", {"task_prefix": " Do it. ", "examples": rows})


@pytest.fixture
def instructions(tmp_path):
    for name in ("004", "005", "010", "011", "013", "014", "016", "017", "054", "055"):
        task(tmp_path, f"subtask{name}_x")
    inside = "Context: c \nQuestion: q? \nCorrect Answer: yes."
    task(tmp_path, "subtask025_cosmosqa", (inside, ["no.", "never."]))
    task(tmp_path, "subtask042_qasc")
    task(
        tmp_path,
        "subtask004_x",
        ("Sentence: s \nQuestion: how long?", ["1 h", "2 h"]),
        ("b", [" "]),
    )
    task(tmp_path, "subtask005_x", ("other", ["z"]), ("Sentence: s\nQuestion: how long? ", ["1 s"]))
    return tmp_path


def test_instructions_of_all_tasks(instructions):
    records = read("natural-instructions", instructions)
    columns("natural-instructions", records)
    assert len(records) == 4  # an item without an answer is left out
    first = records[0]
    assert first["prompt"] == "Do it.\n\nSentence: s \nQuestion: how long?"
    assert (first["answer"], first["references"]) == ("1 h", ["1 h", "2 h"])
    assert (first["id"], first["group"]) == ("natural-instructions/subtask004_x/0", "subtask004_x")
    assert [r["group"] for r in records[1:]] == [
        "subtask005_x",
        "subtask005_x",
        "subtask025_cosmosqa",
    ]


def test_pairs_of_right_and_wrong_answers(instructions):
    records = read("natural-instructions/pairs", instructions)
    columns("natural-instructions/pairs", records)
    cosmos, mctaco = records
    assert cosmos["prompt"] == "Context: c \nQuestion: q?"
    assert (cosmos["chosen"], cosmos["rejected"]) == ("yes.", "no.")
    assert cosmos["wrong"] == ["no.", "never."]
    assert (mctaco["chosen"], mctaco["rejected"]) == ("1 h", "1 s")
    assert mctaco["id"] == "natural-instructions/mctaco-duration/0"


def test_broken_instructions_are_named(instructions):
    task(instructions, "subtask025_cosmosqa", ("Question: q?", ["no."]))
    with pytest.raises(DataError, match=r"subtask025.*task\.json: example 0: its input has no"):
        read("natural-instructions/pairs", instructions)
    task(instructions, "subtask025_cosmosqa", ("Question: q?", [3]))
    with pytest.raises(DataError, match="example 0: 'target' must be a list of texts"):
        read("natural-instructions", instructions)
    (instructions / "tasks" / "subtask042_qasc" / "task.json").unlink()
    task(instructions, "subtask025_cosmosqa")
    with pytest.raises(AssetError, match="has no subtask042"):
        read("natural-instructions/pairs", instructions)
    with pytest.raises(AssetError, match="holds no subtasks"):
        read("natural-instructions", instructions / "tasks")
