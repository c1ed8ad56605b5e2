"""Data sets of the hub by name, offline: those in the library's cache are read, others are a fault."""

import json
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest

from retool.data.read.files import columns_of, file_identity, iter_chunks, rows_in
from retool.data.read.library import Part, _load_hub
from retool.data.read.names import resolve_files


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache as `load_dataset` leaves it behind, of org/sums with two configurations and splits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    for config in ("main", "other"):
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
        for split, file in files.items():
            Path(file).write_text(
                json.dumps({"question": f"{config} {split}", "answer": "2"}) + "\n"
            )
        made = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / config))
        built = Path(made["train"].cache_files[0]["filename"]).parent
        place = tmp_path / "cache" / "org___sums" / config / "0.0.0" / ("a" * 64)
        place.parent.mkdir(parents=True)
        built.rename(place)
        for file in place.glob("json-*.arrow"):
            file.rename(place / file.name.replace("json-", "sums-"))
        info = json.loads((place / "dataset_info.json").read_text())
        info |= {"builder_name": "sums", "dataset_name": "sums", "config_name": config}
        (place / "dataset_info.json").write_text(json.dumps(info))
    _load_hub.cache_clear()
    yield
    _load_hub.cache_clear()


def rows_of(source):
    return [row for chunk in iter_chunks([source]) for _, row in chunk]


def test_a_cached_one_is_read(cached):
    (train,) = resolve_files("org/sums", part=Part(name="main"))
    assert train == "org/sums:main:train"
    assert rows_of(train) == [{"question": "main train", "answer": "2"}]
    assert columns_of(train) == ["question", "answer"] and rows_in(train) == 1
    (test,) = resolve_files("org/sums", part=Part("test", "other", "data.val_split"))
    assert rows_of(test) == [{"question": "other test", "answer": "2"}]
    assert resolve_files("org/sums:other:test") == [test] == resolve_files([test])
    assert rows_of("org/sums:main:train[:100%]") == rows_of(train)
    assert len({file_identity(source) for source in (train, test)}) == 2


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        (
            "org/sums",
            Part(),
            r"multiple 'org/sums' configurations.*(main, other|other, main).*with data\.name",
        ),
        ("org/sums", Part(name="x"), r"Available configs.*'main', 'other'.*with data\.name"),
        ("org/sums:main:dev", Part(), r"no split 'dev'; it has train, test.*data\.train_split"),
        (
            "org/sums",
            Part(name="main", split_key="data.val_split"),
            r"several splits: train, test.*data\.val_split=train",
        ),
        (
            "org/nowhere",
            Part(),
            r"org/nowhere is no file or folder here, and the hub can't be reached.*give the folder",
        ),
        ("sums", Part(), r"sums doesn't exist.*of the hub is named org/name"),
        ("org/sums.jsonl", Part(), r"org/sums\.jsonl doesn't exist\. Check the path"),
    ],
)
def test_what_it_takes_is_said(cached, name, part, said):
    with pytest.raises(ValueError, match=said):
        resolve_files(name, part=part)


def test_a_path_that_went_wrong_is_not_looked_for_on_the_hub(cached, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"data/train doesn't exist\. Check the path"):
        resolve_files("data/train")


def test_a_split_of_files_that_have_none_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"has no splits, and data\.train_split=test names one"):
        resolve_files(str(tmp_path / "a.jsonl"), part=Part("test"))
    with pytest.raises(ValueError, match="has no splits"):
        resolve_files(str(tmp_path), part=Part("test"))
