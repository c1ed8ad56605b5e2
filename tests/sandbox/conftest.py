"""The sandbox under attack in every mode there is: see `modes`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
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
def arena_of(secrets: None) -> Iterator[Callable[[Mode], Arena]]:
    """A mode's arena, opened when it is first asked for: it takes a second or two.

    Best effort: what holds in which mode is for the attacks to tell.
    """
    opened: dict[Mode, Arena] = {}

    def arena(mode: Mode) -> Arena:
        if mode not in opened:
            around = World.open(open_folder(), mode.uid, library(mode.python))
            opened[mode] = Arena(mode, mode.start(), around)
        return opened[mode]

    try:
        yield arena
    finally:
        for each in opened.values():
            each.sandbox.close()
            each.world.close()


@pytest.fixture(scope="package")
def arenas(arena_of: Callable[[Mode], Arena]) -> list[Arena]:
    """One for each mode."""
    return [arena_of(mode) for mode in modes_here()]


@pytest.fixture(scope="package")
def outermost_arenas(arena_of: Callable[[Mode], Arena]) -> list[Arena]:
    """Of the mode with all layers of isolation, and of the one with the fewest."""
    modes = modes_here()
    return [arena_of(mode) for mode in (modes[0], modes[-1])]
