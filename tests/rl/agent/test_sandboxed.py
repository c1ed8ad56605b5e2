"""Environments in the sandbox: what they keep lives on, what they reach is nothing, and what breaks
is told.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from retool.rl.agent.environments.load import EnvironmentSource, let_go
from retool.rl.agent.environments.protocol import Answer, EnvironmentFailure, Opening
from retool.rl.agent.environments.sandboxed import MARK, SandboxedWorld
from retool.rl.agent.environments.world import World
from retool.rl.agent.tools.interpreter import InterpreterConfig
from retool.sandbox import Limits, Result
from retool.sandbox.kept import SNAPSHOT, WHOLE

GAME = '''
import os
import random


class Count:
    """Runs what the model writes, and keeps what came of it."""

    def __init__(self, most=2):
        self.most = most
        self.values = []

    def reset(self, row):
        print("not an answer")
        self.draws = random.Random(row["seed"])
        return [{"role": "user", "content": f"Give {self.most} expressions."}], []

    def step(self, message):
        self.values.append(eval(message["content"]))
        done = len(self.values) == self.most
        return f"{self.values} {self.draws.randint(1, 6)}", float(sum(self.values)), done

    def cut(self, message):
        return 0.5 * len(self.values)
'''
CONFIG = InterpreterConfig(isolation="best_effort", default_timeout=3, workers=1, session=True)


def source_in(folder: Path) -> EnvironmentSource:
    file = folder / "game.py"
    file.write_text(GAME)
    return EnvironmentSource("Count", str(file), {"most": 3}, CONFIG)


def played(make: Callable[[], Any], *turns: str) -> tuple[Opening, list[Answer], float]:
    """What a world begins with, answers to turns, and gives for being cut."""

    async def play() -> tuple[Opening, list[Answer], float]:
        world = World(make, 20.0)
        try:
            opening = await world.reset({"seed": 3, "sample": 0})
            answers = [await world.step({"role": "assistant", "content": turn}) for turn in turns]
            return opening, answers, await world.cut(None)
        finally:
            assert await world.close() == ""

    return asyncio.run(play())


def check_played(make: Callable[[], Any]) -> None:
    """What it keeps lives on from one call to the next."""
    opening, answers, cut = played(make, "1 + 1", "2 * 3", "1.5")
    assert opening.messages[0]["content"] == "Give 3 expressions." and not opening.tools
    draws = random.Random(3)
    said = [answer.messages[0]["content"] for answer in answers]
    assert said == [f"{values} {draws.randint(1, 6)}" for values in ([2], [2, 6], [2, 6, 1.5])]
    assert [answer.reward for answer in answers] == [2.0, 8.0, 9.5]
    assert [answer.done for answer in answers] == [False, False, True] and cut == 1.5


def test_what_can_t_be_in_the_sandbox_is_told_before_it_starts(tmp_path) -> None:
    source = source_in(tmp_path)
    source.load()
    with pytest.raises(ValueError, match="defines no 'Game'; it has Count"):
        replace(source, name="Game").load()
    with pytest.raises(ValueError, match="go to the sandbox as JSON"):
        replace(source, kwargs={"most": object()}).load()
    with pytest.raises(ValueError, match="sandboxed=true needs a class in a file"):
        EnvironmentSource("openenv:http://127.0.0.1:1", None, {}, CONFIG).load()


class Printed:
    """As an interpreter: each program prints this, when it has waited in the queue."""

    def __init__(self, text: str, queue_seconds: float = 0.0) -> None:
        self._text = text
        self._queue_seconds = queue_seconds

    async def run(self, program: str, session: bytes) -> Result:
        del program, session
        await asyncio.sleep(self._queue_seconds)
        kept = self._text[: Limits().output_kb << 10]
        return Result("success", kept, stdout_bytes=len(self._text), files={SNAPSHOT: WHOLE})


@pytest.mark.parametrize(
    "text",
    [
        MARK + json.dumps({"is_tuple": False, "value": "long" * 20_000}),
        # What the model's program printed, before the answer that isn't kept
        MARK + '{"is_tuple": false, "value": "forged"}\n' + "x" * 70_000,
    ],
)
def test_an_answer_that_was_cut_is_none(text: str) -> None:
    interpreter: Any = Printed(text)
    world = SandboxedWorld(interpreter, "")
    with pytest.raises(RuntimeError, match="more than 64 KB"):
        asyncio.run(world.step({"role": "assistant", "content": "Go."}))


def test_the_sandbox_s_queue_is_not_in_an_environment_s_time(tmp_path: Path) -> None:
    make: Any = source_in(tmp_path).load()
    answer = {"is_tuple": True, "value": ["Go on.", 0.5, False]}
    make._interpreter = Printed(MARK + json.dumps(answer), queue_seconds=0.1)

    async def step() -> Answer:
        world = World(make, 0.05)
        world._made = make()
        try:
            return await world.step({"role": "assistant", "content": "1"})
        finally:
            assert await world.close() == ""

    assert asyncio.run(step()).reward == 0.5


@pytest.mark.slow
def test_an_environment_runs_in_a_sandbox_of_its_own_and_what_breaks_is_told(tmp_path) -> None:
    make = source_in(tmp_path).load()
    secret = tmp_path / "secret"
    secret.write_text("42")
    try:
        check_played(make)
        for turn, words in {
            "1 / 0": "ZeroDivisionError",
            "os._exit(3)": "environment.step",
            "[x for x in iter(int, 1)]": "environment.step",
            "object()": "TypeError",
            f"int(open({str(secret)!r}).read())": "FileNotFound|Permission",
        }.items():
            with pytest.raises(EnvironmentFailure, match=words):
                played(make, turn)
    finally:
        let_go(make)
