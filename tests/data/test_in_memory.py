"""Rows that a program holds become a file named by their content, whatever holds them."""

import datetime
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from retool.data.in_memory import files_of
from retool.data.tool_schema import schema_of

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hé"}]},
    {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": ""}]},
]
FLAT = [{"prompt": "1+1?", "answer": 2}, {"prompt": "2+2?", "answer": None}]


def kept(data, tmp_path, **options):
    (path,) = files_of(data, cache_dir=tmp_path, **options)
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_names_of_files_stay():
    assert files_of("org/name") == ("org/name",)
    assert files_of(Path("/data/a.csv")) == ("/data/a.csv",)
    assert files_of(["a.csv", Path("my b.json")]) == ("a.csv", "my b.json")


def test_every_container_gives_the_same_file(tmp_path):
    table = pa.Table.from_pylist(FLAT)
    held = {
        "list": FLAT,
        "generator": (row for row in FLAT),
        "function": lambda: iter(FLAT),
        "dataset": datasets.Dataset.from_list(FLAT).with_format("numpy"),
        "stream": datasets.Dataset.from_list(FLAT).to_iterable_dataset(),
        "pandas": pd.DataFrame(FLAT).astype({"answer": "Int64"}),
        "arrow": table,
        "reader": table.to_reader(),
        "numpy": [{"prompt": np.str_(row["prompt"]), "answer": row["answer"]} for row in FLAT],
    }
    paths = {name: files_of(data, cache_dir=tmp_path) for name, data in held.items()}
    assert set(paths.values()) == {paths["list"]}, paths
    assert kept(FLAT, tmp_path) == FLAT


def test_what_was_given_comes_back_exactly(tmp_path):
    assert kept(ROWS, tmp_path) == ROWS
    found = kept([{"at": datetime.date(2026, 11, 29), "x": np.arange(2)}], tmp_path)
    assert found == [{"at": "2026-11-29", "x": [0, 1]}]


def test_the_same_rows_keep_their_file_and_others_get_another(tmp_path):
    (first,) = files_of(FLAT, cache_dir=tmp_path)
    written = Path(first).stat().st_mtime_ns
    assert files_of(FLAT, cache_dir=tmp_path) == (first,)
    assert Path(first).stat().st_mtime_ns == written
    assert files_of(FLAT[:1], cache_dir=tmp_path) != (first,)
    assert Path(files_of(FLAT, "train", tmp_path)[0]).name == "train.jsonl"
    assert not list((tmp_path / "rows").glob("writing-*"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "has no rows"),
        ([{"a": 1}, "b"], "row 1 of the data is a str, not a dict"),
        ([{"a": b"x"}], r"row 0 of the data: 'a' can't be kept \(it holds a bytes\): leave"),
        (["What is 2 + 2?"], "is a text, and a list of texts is read as names of files. Give rows"),
        (3, "a int isn't rows"),
        ({"a": [1]}, r"a dict \(a\) isn't rows"),
        (pd.Series([1]), "a pandas Series isn't rows"),
    ],
)
def test_what_is_no_data_is_named(tmp_path, data, said):
    with pytest.raises(ValueError, match=said):
        files_of(data, cache_dir=tmp_path)
    assert not list((tmp_path / "rows").glob("writing-*"))


def test_a_split_is_chosen_by_the_program(tmp_path):
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(FLAT))
    with pytest.raises(
        ValueError, match=r"is divided into splits: train\. Give one.*data\['train'\]"
    ):
        files_of(both, cache_dir=tmp_path)


def test_a_row_s_tools_may_be_functions(tmp_path):
    def price_of(fruit: str) -> str:
        """The price of a piece of fruit.

        Args:
            fruit: Its name.
        """
        return fruit

    def untyped(fruit):
        """The price of a piece of fruit."""

    rows = [{"prompt": "?", "tools": [price_of, {"type": "function"}]}]
    (row,) = kept(rows, tmp_path)
    assert row["tools"] == [schema_of(price_of), {"type": "function"}]
    with pytest.raises(ValueError, match="row 0 of the data: the tool untyped has no schema"):
        files_of([{"tools": [untyped]}], cache_dir=tmp_path)
