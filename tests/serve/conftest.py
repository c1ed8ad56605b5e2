"""A small model, and a server over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from retool.llm.llm import LLM
from tests.llm.models import write_model
from tests.serve.server import Served, serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", max_model_len=640, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="session")
def server(llm: LLM) -> Iterator[Served]:
    with serving(llm) as served:
        yield served
