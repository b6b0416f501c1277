"""Hugging Face data sets from local folders, and TFDS without TensorFlow."""

import subprocess
import sys
import textwrap

import pytest

from steppe.data import sources
from steppe.data.errors import DataError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("hf")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    rows = {"text": ["a", "b", "c"], "label": [0, 1, -1], "tags": [[0, 1], [1], []]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder / "both")
    table.save_to_disk(folder / "one")
    (folder / "loose").mkdir()
    (folder / "loose" / "train.jsonl").write_text('{"text": "x", "id": 5}\n')
    return folder


def test_hf_folder_with_splits(saved):
    records = sources.load(f"hf:{saved / 'both'}", split="train")
    assert list(records) == [
        {"id": "both/train:0", "text": "a", "label": "neg", "tags": ["O", "B-x"]},
        {"id": "both/train:1", "text": "b", "label": "pos", "tags": ["B-x"]},
        {"id": "both/train:2", "text": "c", "label": -1, "tags": []},
    ]
    assert records[-1]["text"] == "c"
    assert [r["text"] for r in records[1:]] == ["b", "c"]
    with pytest.raises(IndexError):
        records[3]


def test_hf_single_table_and_loose_files(saved):
    assert sources.load(f"hf:{saved / 'one'}")[1]["label"] == "pos"
    assert sources.load(f"hf:{saved / 'loose'}")[0] == {"id": "5", "text": "x"}


def test_hf_errors(saved):
    with pytest.raises(DataError, match="has the splits train, test; name one with split="):
        sources.load(f"hf:{saved / 'both'}")
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        sources.load(f"hf:{saved / 'both'}", split="dev")
    with pytest.raises(DataError, match="no split 'dev'"):
        sources.load(f"hf:{saved / 'one'}", split="dev")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        sources.load(f"hf:{saved / 'nothing'}")
    with pytest.raises(DataError, match="hf:no/such-set cannot be opened: .*local folder") as e:
        sources.load("hf:no/such-set")
    assert "\n" not in str(e.value)


def test_tfds_is_read_at_random_without_tensorflow(tmp_path):
    """In a process of its own: TFDS registers builders globally."""
    script = textwrap.dedent(
        """
        import sys
        import tensorflow_datasets as tfds
        from steppe.data import sources
        from steppe.data.errors import DataError

        tfds.disable_progress_bar()

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                label = tfds.features.ClassLabel(names=["neg", "pos"])
                columns = {"text": tfds.features.Text(), "label": label}
                features = tfds.features.FeaturesDict(columns)
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _):
                return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {"text": f"text {i} é", "label": i % 2}

        Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
        records = sources.load("tfds:tiny", split="train")
        assert len(records) == 4
        assert records[0]["id"] == "tiny/train:0"
        found = sorted((r["text"], r["label"]) for r in records)
        assert found == [(f"text {i} é", ("neg", "pos")[i % 2]) for i in range(4)], found
        for address, split, part in (
            ("tfds:tiny", None, "has the splits"),
            ("tfds:tiny", "dev", "no split 'dev'"),
            ("tfds:no_such_set", None, "cannot be opened"),
            ("tfds:imdb_reviews", None, "is not prepared in"),
        ):
            try:
                sources.load(address, split=split)
            except DataError as error:
                assert part in str(error) and "\\n" not in str(error), error
            else:
                raise AssertionError(address)
        assert "tensorflow" not in sys.modules
        print("fine")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**__import__("os").environ, "TFDS_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip().endswith("fine"), done.stderr[-3000:]
