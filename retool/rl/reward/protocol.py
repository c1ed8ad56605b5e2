"""What judges are asked and what they answer, in their own process or in the run's."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from retool.rl.reward.calling import Asked
from retool.rl.reward.foreign import words_of
from retool.rl.reward.score import MAX_CHARACTERS
from retool.rl.types import FAILURE

# The failure that isn't the function's: its processes are gone, or the server that it asks
JUDGES_LOST = "lost"
# Nor this one: a judge that costs money has spent what it may
BUDGET_SPENT = "budget"
RETRIES = 2  # of an answer that is lost so
# What clients raise where nobody answers, by the names of their classes: none of them need be
# installed here
NOBODY_ANSWERS = {
    "ConnectionError",  # Python's own, requests'
    "TransportError",  # httpx's
    "APIConnectionError",  # openai's
    "ClientConnectionError",  # aiohttp's
    "URLError",
}


@dataclass(frozen=True)
class Judged:
    """A score, and whatever else the function returned, in `info`.

    `failure` says how it failed, if it did: `exception`, `timeout`, `killed`, or JUDGES_LOST.
    `reason` says why (as `info` does), and `trace` where, of an exception.
    """

    score: float
    info: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    reason: str = ""
    trace: str = ""


class Raised(NamedTuple):
    """What a reward function raised, as text; `away`: it says that a server isn't there."""

    reason: str
    trace: str = ""
    away: bool = False

    @staticmethod
    def by(error: BaseException) -> Raised:
        """As text: an exception of the user's own may not survive the way to another process."""
        kind = type(error).__name__
        bases = {base.__name__ for base in type(error).__mro__}
        # urllib's HTTPError is a URLError, but of a server that does answer
        away = bool(NOBODY_ANSWERS & bases) and kind != "HTTPError"
        return Raised(words_of(error)[:MAX_CHARACTERS], trace_of(error), away)

    def judged(self, floor: float) -> Judged:
        """As a judgement: lost, or the floor."""
        failure = JUDGES_LOST if self.away else "exception"
        return Judged(floor, {FAILURE: self.reason}, failure, self.reason, self.trace)


class Judges(Protocol):
    """Whoever judges a rank's answers.

    `seen` names what their function asks for besides ARGUMENTS. `problem` says why they can't
    judge, with the way out; "" where they can. `score` puts one question to them
    (`Asked.about` a trajectory, with what is `seen`), within `timeout` seconds (None: their own).
    """

    @property
    def seen(self) -> tuple[str, ...]: ...

    def problem(self) -> str: ...

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged: ...

    def close(self) -> None: ...


async def retry_while_lost(attempt: Callable[[], Awaitable[Judged]]) -> Judged:
    """The result of `attempt`. If that is lost, it is tried again after a while."""
    judged = await attempt()
    for number in range(RETRIES):
        if judged.failure != JUDGES_LOST:
            break
        await asyncio.sleep(2**number)
        judged = await attempt()
    return judged


def trace_of(error: BaseException) -> str:
    """The traceback from the user's own function on: what called it is ours."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        file = Path(frames.tb_frame.f_code.co_filename)
        if file.parent != Path(__file__).parent:
            break
        frames = frames.tb_next
    lines = traceback.format_exception(type(error), error, frames)
    return "".join(lines)[-MAX_CHARACTERS:].rstrip()
