"""A tiny model folder and two small parquet files of tool conversations, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.quickstart import data, model
from retool.data.template.choose import TEMPLATES


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`model/`, `train.parquet` (52 rows) and `val.parquet` (7 rows)."""
    yield make(tmp_path_factory.mktemp("sft"))


def make(folder: Path) -> Path:
    """`work` in a folder of one's own."""
    folder.mkdir(exist_ok=True)
    train = data.make_problems(52, seed=0)
    data.write_parquet(folder / "train.parquet", train)
    data.write_parquet(folder / "val.parquet", data.make_problems(7, seed=1))
    texts = [message["content"] for p in train for message in data.to_row(p, "t")["messages"]]
    tokenizer = model.train_tokenizer(texts)
    model.write_tokenizer(folder / "model", tokenizer, TEMPLATES["hermes"].read_text())
    model.write_model(folder / "model", tokenizer, seed=0)
    return folder
