"""A tiny model folder and two small parquet files of tool conversations, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from examples.quickstart import data, model
from retool.data.template.choose import TEMPLATES


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`model/`, `train.parquet` (52 rows) and `val.parquet` (7 rows)."""
    yield make(tmp_path_factory.mktemp("sft"))


def make(folder: Path, small: bool = True) -> Path:
    """`work` in a folder of one's own; without `small` a checkpoint's file has many checksums."""
    folder.mkdir(exist_ok=True)
    train = data.make_problems(52, seed=0)
    data.write_parquet(folder / "train.parquet", train)
    data.write_parquet(folder / "val.parquet", data.make_problems(7, seed=1))
    texts = [message["content"] for p in train for message in data.to_row(p, "t")["messages"]]
    tokenizer = model.train_tokenizer(texts)
    model.write_tokenizer(folder / "model", tokenizer, TEMPLATES["hermes"].read_text())
    model.write_model(folder / "model", tokenizer, seed=0)
    if small:
        shrink(folder / "model")
    # As a base model's files have it: a document ends, and nothing is said of turns
    settings = GenerationConfig(eos_token_id=tokenizer.token_to_id(model.END_OF_TEXT))
    settings.save_pretrained(folder / "model")
    return folder


def shrink(folder: Path) -> None:
    """Half the layers of half the width: a run of the tests is for what it writes and says, and
    most of its time went into matrices.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config.from_pretrained(folder)
    config.update({"hidden_size": 64, "intermediate_size": 128})
    config.update({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
