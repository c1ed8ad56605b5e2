"""The backends under attack: everything the machine has, and what is left where namespaces are refused."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from retool.rl.sandbox import Limits, Sandbox

from .world import World

LIMITS = Limits(wall_seconds=20, cpu_seconds=20, memory_mb=512, flood_mb=8, file_mb=32)
REFUSE = str(Path(__file__).with_name("refuse.py"))


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    opened = World.open(tmp_path_factory.mktemp("world"))
    os.environ["WANDB_API_KEY"] = os.environ["HF_TOKEN"] = "retool-canary-token"
    yield opened
    del os.environ["WANDB_API_KEY"], os.environ["HF_TOKEN"]
    opened.close()


def open_sandbox(kind: str) -> Sandbox:
    """`default`: all layers. `refused`: started the way a default container starts things, its kernel accounts out of reach too."""
    if kind == "default":
        return Sandbox(LIMITS, workers=2)
    return Sandbox(LIMITS, workers=2, launcher=[sys.executable, REFUSE], without=frozenset({"cgroup"}))


@pytest.fixture(scope="package", params=["default", "refused"])
def sandbox(request: pytest.FixtureRequest, world: World) -> Iterator[Sandbox]:
    """Strict isolation on each backend, after secrets were put into this process's environment."""
    with open_sandbox(request.param) as opened:
        yield opened


@pytest.fixture(scope="package")
def default_sandbox(world: World) -> Iterator[Sandbox]:
    with open_sandbox("default") as opened:
        yield opened
