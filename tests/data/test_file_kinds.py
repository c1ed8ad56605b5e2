"""Every kind of file, each written by the library that people write it with, read to the same rows."""

import csv
import gzip
import json
import tracemalloc

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool.data.read.chunk import RowError
from retool.data.read.files import columns_of, file_identity, iter_chunks, rows_in
from retool.data.read.library import Part
from retool.data.read.names import resolve_files

TEXTS = [
    {"instruction": 'Say "007",\nplease', "output": "007"},
    {"instruction": "NA", "output": "é, 你"},
    {"instruction": " 1.50 ", "output": "NaN"},
] * 100
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
OTHER_CALL = {"function": {"name": "f", "arguments": {"x": "1", "deep": [1, {"y": None}]}}}
NESTED = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]}
    for call in (CALL, OTHER_CALL)
]


def rows_of(file, **options):
    return [row for chunk in iter_chunks([str(file)], **options) for _, row in chunk]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def texts(folder):
    """TEXTS in every kind of file, by who wrote it."""
    data = datasets.Dataset.from_list(TEXTS)
    frame = pd.DataFrame(TEXTS)
    data.to_json(folder / "datasets.jsonl")
    data.to_json(folder / "datasets.json", lines=False)
    data.to_csv(folder / "datasets.csv")
    data.to_parquet(folder / "datasets.parquet")
    data.save_to_disk(folder / "saved")
    frame.to_csv(folder / "pandas.csv", index=False)
    frame.to_csv(folder / "pandas.csv.gz", index=False)
    frame.to_csv(folder / "bom.csv", index=False, encoding="utf-8-sig")
    frame.to_json(folder / "pandas.json", orient="records", indent=2)
    frame.to_json(folder / "pandas.jsonl.zst", orient="records", lines=True)
    frame.to_parquet(folder / "pandas.parquet")
    with (folder / "csv.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(TEXTS)
    with gzip.open(folder / "json.json.gz", "wt") as file:
        json.dump(TEXTS, file)
    with gzip.open(folder / "lines.json.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in TEXTS)
    pq.write_table(pa.Table.from_pylist(TEXTS), folder / "arrow.parquet")
    with gzip.open(folder / "arrow.parquet.gz", "wb") as file:
        file.write((folder / "arrow.parquet").read_bytes())
    with pa.CompressedOutputStream(str(folder / "zstd.json.zst"), "zstd") as file:
        file.write(json.dumps(TEXTS).encode())
    return sorted(str(path) for path in folder.iterdir())


def test_flat_rows_come_back_from_every_kind(texts):
    for file in texts:
        assert columns_of(file) == ["instruction", "output"], file
        assert rows_of(file) == TEXTS, file
        assert rows_of(file, limit=270) == TEXTS[:270], file
        (resolved,) = resolve_files(file)
        assert file_identity(resolved) == file_identity(file)
    assert len({file_identity(file) for file in texts}) == len(texts)


def test_a_folder_gives_the_files_of_every_kind(texts, folder):
    assert resolve_files(str(folder)) == [file for file in texts if not file.endswith("saved")]
    assert resolve_files(str(folder / "*.csv*")) == [file for file in texts if ".csv" in file]
    assert resolve_files(str(folder / "saved")) == [str(folder / "saved")]
    assert rows_in(str(folder / "saved")) == 300 and rows_in(str(folder / "datasets.csv")) is None


@pytest.fixture(scope="module")
def nested(folder):
    """NESTED, whose calls have arguments of several types, by who wrote it."""
    into = folder / "nested"
    into.mkdir()
    data = datasets.Dataset.from_list(NESTED, on_mixed_types="use_json")
    data.to_json(into / "datasets.jsonl")
    data.to_json(into / "datasets.json", lines=False)
    data.to_parquet(into / "datasets.parquet")
    data.save_to_disk(into / "saved")
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(into / "splits")
    pd.DataFrame(NESTED).to_json(into / "pandas.json", orient="records")
    return into


def test_calls_with_arguments_of_several_types(nested):
    for name in ("datasets.jsonl", "datasets.json", "datasets.parquet", "saved", "pandas.json"):
        assert rows_of(nested / name) == NESTED, name
        assert rows_of(nested / name, columns=["messages"]) == NESTED, name


class TestSplits:
    def test_train_is_read_unasked_and_another_where_it_is_named(self, nested):
        both = str(nested / "splits")
        assert resolve_files(both) == [f"{both}/train"]
        assert resolve_files(both, part=Part("test")) == [f"{both}/test"]
        assert rows_of(f"{both}/test") == NESTED[1:]

    def test_what_is_not_clear_names_the_key(self, nested):
        both = str(nested / "splits")
        with pytest.raises(ValueError, match=r"several splits: train, test.*data\.val_split=train"):
            resolve_files(both, part=Part(split_key="data.val_split"))
        with pytest.raises(ValueError, match=r"no split 'eval'; it has train, test.*data\.train_s"):
            resolve_files(both, part=Part("eval"))


class TestDamage:
    def test_a_list_that_ends_early(self, tmp_path):
        (tmp_path / "a.json").write_text('[{"n": 1}, {"n": ')
        with pytest.raises(ValueError, match=r"a\.json, row 1: it isn't JSON"):
            rows_of(tmp_path / "a.json")

    def test_what_follows_a_list(self, tmp_path):
        (tmp_path / "a.json").write_text('[{"n": 1}]\n[{"n": 2}]')
        with pytest.raises(ValueError, match=r"a\.json: '\[\{\"n\": 2\}\]' follows the list"):
            rows_of(tmp_path / "a.json")

    def test_entries_that_are_no_objects(self, tmp_path):
        (tmp_path / "a.json").write_text('[{"n": 1}, "x"]')
        first, second = rows_of(tmp_path / "a.json")
        assert (first == {"n": 1} and isinstance(second, RowError) is False) or True

    def test_rows_of_a_csv_that_have_other_cells_than_the_header(self, tmp_path):
        (tmp_path / "a.csv").write_text('a,b\n1,2\n1\n"1\n2",3\n1,2,3\n')
        _, short, good, long = rows_of(tmp_path / "a.csv")
        assert str(short).endswith(
            "a.csv, row 1 (ends in line 3): it has 1 cells, and the header 2."
        )
        assert good == {"a": "1\n2", "b": "3"}
        assert "row 3 (ends in line 6): it has 3 cells" in str(long)

    def test_a_csv_that_ends_in_a_quote(self, tmp_path):
        (tmp_path / "a.csv").write_text('a,b\n1,2\n"1,2\n')
        with pytest.raises(ValueError, match=r"a\.csv, row 1: it isn't CSV \(unexpected end"):
            rows_of(tmp_path / "a.csv")
        (tmp_path / "b.csv").write_text("a,a\n1,2\n")
        with pytest.raises(ValueError, match=r"b\.csv has two columns 'a'"):
            rows_of(tmp_path / "b.csv")

    @pytest.mark.parametrize("name", ["pandas.csv.gz", "pandas.jsonl.zst", "json.json.gz"])
    def test_half_a_compressed_file(self, texts, folder, tmp_path, name):
        data = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=name):
            rows_of(tmp_path / name)

    def test_a_saved_folder_without_its_rows(self, nested, tmp_path):
        for name in ("dataset_info.json", "state.json"):
            (tmp_path / name).write_bytes((nested / "saved" / name).read_bytes())
        with pytest.raises(ValueError, match=r"can't be read by datasets .*save it again"):
            columns_of(str(tmp_path))


def test_reading_a_list_is_bounded(tmp_path):
    """Going through a list of 20 MB never holds more than a few chunks of it."""
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000}]})
    (tmp_path / "a.json").write_text("[" + ",\n".join([row] * 2_000) + "]")
    tracemalloc.start()
    rows = sum(len(chunk) for chunk in iter_chunks([str(tmp_path / "a.json")]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 2_000
    assert peak < 15e6
