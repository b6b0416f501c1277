"""Execution accuracy in the results of runs on data with databases."""

from steppe.launch import execution, setup
from steppe.launch.config import DataConfig
from steppe.train.evaluate import Generated


class Rows:
    """As much of a dataset as the metric reads."""

    def __init__(self, records):
        self._records = records

    def record(self, number):
        return self._records[number]


def test_queries_are_run_on_databases_made_of_the_data(asset, monkeypatch, tmp_path):
    monkeypatch.setattr(execution.assets, "root", lambda: tmp_path)
    asset("spider")
    data = DataConfig(source="asset:spider", task="chat")
    records = setup.records(data)
    gold = [records[n]["query"] for n in range(4)]
    said = [gold[0], f" {gold[1]}\n\nIt counts.", "SELECT nothing FROM nowhere", "SELECT 'x'"]
    execution.databases.cache_clear()
    try:
        found = execution.metrics(Generated(said, gold, rows=[0, 1, 2, 3]), Rows(records), data)
    finally:
        execution.databases.cache_clear()
    assert found == {"execution": 0.5, "valid_sql": 0.75}
    assert (tmp_path / "databases" / "spider").is_dir()
    assert execution.metrics(None, Rows(records), data) == {}
    other = DataConfig(source="file:x.jsonl", task="chat")
    assert execution.metrics(Generated(said, gold, rows=[0, 1, 2, 3]), Rows(records), other) == {}
