"""The sandbox under attack in every mode there is: see `modes`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from retool.sandbox import Sandbox
from tests.sandbox.modes import LIMITS, Mode, library, modes_here
from tests.sandbox.world import World


@dataclass(frozen=True)
class Arena:
    """A sandbox, and the host around it."""

    mode: Mode
    sandbox: Sandbox
    world: World


@pytest.fixture(scope="package")
def secrets() -> Iterator[None]:
    """In this process's environment, for programs not to find."""
    os.environ["WANDB_API_KEY"] = os.environ["HF_TOKEN"] = "retool-canary-token"
    yield
    del os.environ["WANDB_API_KEY"], os.environ["HF_TOKEN"]


def open_folder() -> Path:
    """Not in pytest's own folder: that is closed to others, and only the sandbox may stand between
    a program and the secret.
    """
    return Path(tempfile.mkdtemp(prefix="retool-world-"))


@pytest.fixture(scope="package")
def world(secrets: None) -> Iterator[World]:
    opened = World.open(open_folder())
    yield opened
    opened.close()


@pytest.fixture(scope="package")
def default_sandbox(secrets: None) -> Iterator[Sandbox]:
    """Strict isolation with all that this machine has."""
    with Sandbox(LIMITS, workers=2) as opened:
        yield opened


@pytest.fixture(scope="package")
def arenas(secrets: None) -> Iterator[list[Arena]]:
    """One for each mode, best effort: what holds in which is for the attacks to tell."""
    opened = []
    try:
        for mode in modes_here():
            around = World.open(open_folder(), mode.uid, library(mode.python))
            opened.append(Arena(mode, mode.start(), around))
        yield opened
    finally:
        for arena in opened:
            arena.sandbox.close()
            arena.world.close()
