"""Two machines, and a tiny model with data, on a disk that they share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.network import Host, network
from tests.sft.conftest import work

__all__ = ["work"]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    with network(2, tmp_path / "machines") as found:
        yield found
