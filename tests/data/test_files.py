"""Local files: what is read, and the line that every error names."""

import json

import pytest

from steppe.data import files, sources
from steppe.data.errors import DataError


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"text": "é\\u2028x", "label": 1}\r\n\n{"id": 7, "text": "b"}\n'
    )
    assert files.read(path) == [
        {"id": "a.jsonl:1", "text": "é\u2028x", "label": 1},
        {"id": "7", "text": "b"},
    ]


def test_raw_line_separators_inside_a_text_do_not_split_it(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x\u2028\x85y"}, ensure_ascii=False))
    assert files.read(path)[0]["text"] == "x\u2028\x85y"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', r"a\.jsonl: line 2 is not JSON: Expecting value at column"),
        ("[1]\n", r"a\.jsonl: line 1 is not a JSON object but \[1\]"),
        ("\n\n", r"a\.jsonl: holds no records"),
        (b'{"a": 1}\n{"a": "caf\xe9"}', r"not UTF-8: byte 0xe9 at offset 19 \(line 2\); .*iconv"),
    ],
)
def test_jsonl_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        files.read(write(tmp_path / "a.jsonl", text))
    assert "\n" not in str(caught.value)


def test_csv_with_quotes_newlines_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.csv", '\ufefftext,label\n"one, two\nthree",1\n\n"a ""b""",0\n')
    assert files.read(path) == [
        {"id": "a.csv:2", "text": "one, two\nthree", "label": "1"},
        {"id": "a.csv:5", "text": 'a "b"', "label": "0"},
    ]


def test_tsv_and_long_fields(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tid\n" + "x" * 200_000 + "\tk\n")
    (record,) = files.read(path)
    assert record["id"] == "k"
    assert len(record["text"]) == 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", r"line 3 has 3 fields, the header has 2 \(a, b\); quote"),
        ("a,a\n1,2\n", "distinct, non-empty names"),
        ("a,\n1,2\n", "distinct, non-empty names"),
        ('a,b\n"1,2\n', "malformed CSV"),
        ("", "holds no records"),
    ],
)
def test_csv_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        files.read(write(tmp_path / "a.csv", text))


def test_text(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\n two \r\n")
    assert files.read(path) == [
        {"id": "a.txt:1", "text": "one"},
        {"id": "a.txt:3", "text": " two "},
    ]


def test_parquet_rows_are_made_when_asked_for(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a", "b", "c"], "tags": [["x"], [], ["y"]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    records = files.read(tmp_path / "a.parquet")
    assert len(records) == 3
    assert records[1] == {"id": "a.parquet:2", "text": "b", "tags": []}
    assert records[-1] == {"id": "a.parquet:3", "text": "c", "tags": ["y"]}
    assert [r["text"] for r in records[:2]] == ["a", "b"]
    assert len(list(records)) == 3
    with pytest.raises(IndexError):
        records[3]
    write(tmp_path / "b.parquet", "no")
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet file"):
        files.read(tmp_path / "b.parquet")


def test_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl: no such file"):
        files.read(tmp_path / "no.jsonl")
    write(tmp_path / "a.xlsx", "x")
    with pytest.raises(DataError, match=r"cannot read '\.xlsx' files; known: \.jsonl, \.csv"):
        files.read(tmp_path / "a.xlsx")


def test_a_folder_with_one_file_a_split(tmp_path):
    write(tmp_path / "train.jsonl", '{"text": "a"}')
    write(tmp_path / "test.csv", "text\nb\n")
    assert files.read(tmp_path, "train")[0]["text"] == "a"
    assert files.read(tmp_path, "test")[0]["id"] == "test.csv:2"
    with pytest.raises(DataError, match=r"is a folder; name a file, or a split= of: test, train"):
        files.read(tmp_path)
    with pytest.raises(DataError, match="no file for split 'dev'; it has test.csv, train.jsonl"):
        files.read(tmp_path, "dev")
    with pytest.raises(DataError, match="needs a folder with one file a split"):
        files.read(tmp_path / "test.csv", "train")


def test_load_by_address_with_columns(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"sentence": "x", "y": 1, "z": 2}\n{"sentence": "w", "y": 0}\n'
    )
    assert len(sources.load(f"file:{path}")) == 2
    renamed = sources.load(f"file:{path}", columns={"text": "sentence", "label": "y"})
    assert list(renamed) == [
        {"id": "a.jsonl:1", "text": "x", "label": 1},
        {"id": "a.jsonl:2", "text": "w", "label": 0},
    ]
    assert renamed[0:1][0]["text"] == "x"
    kept = sources.load(f"file:{path}", columns=["y", "z"])
    with pytest.raises(DataError, match=r"row 1 \(id 'a.jsonl:2'\) has no column 'z'"):
        list(kept)
    with pytest.raises(DataError, match="no column 'nope', only id, sentence, y, z"):
        sources.load(f"file:{path}", columns=["nope"])
    with pytest.raises(DataError, match="must be a list of names or a mapping"):
        sources.load(f"file:{path}", columns="y")
    own = sources.load(f"file:{path}", columns={"id": "y"})
    assert own[0] == {"id": "1"}


@pytest.mark.parametrize("address", ["movies.jsonl", "ftp:x", ""])
def test_unknown_schemes_list_the_known(address):
    message = r"no known scheme \(file:, hf:, tfds:, asset:, reasoning-gym:\)"
    with pytest.raises(DataError, match=message):
        sources.load(address)


def test_address_without_a_name():
    with pytest.raises(DataError, match="names nothing after 'file'"):
        sources.load("file:")
