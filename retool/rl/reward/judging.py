"""What judges are asked, and what they answer: the same in a process of their own and in the run's."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from retool.rl.reward.rewards import LONGEST
from retool.rl.types import FAILURE, Trajectory

# the failure that isn't the function's: its processes are gone, or the server that it asks
JUDGES_LOST = "lost"
RETRIES = 2  # of an answer that is lost so
# what clients raise where nobody answers, by the names of their classes: none of them need be
# installed here
AWAY = {
    "ConnectionError",  # Python's own, requests'
    "TransportError",  # httpx's
    "APIConnectionError",  # openai's
    "ClientConnectionError",  # aiohttp's
    "URLError",
}


@dataclass(frozen=True)
class Judged:
    """A score, what else the function told, and how it failed (`exception`, `timeout`, `killed`, or
    JUDGES_LOST), why (in `info` too) and where (`trace`, of an exception), if it did.
    """

    score: float
    info: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    reason: str = ""
    trace: str = ""


class Asked(NamedTuple):
    """What a reward function is called with."""

    data_source: str
    solution: str
    truth: str
    extra: Mapping[str, Any]


class Raised(NamedTuple):
    """What a reward function raised, as text; `away`: it says that a server isn't there."""

    reason: str
    trace: str = ""
    away: bool = False

    def judged(self, floor: float) -> Judged:
        """As a judgement: lost, or the floor."""
        return Judged(
            floor,
            {FAILURE: self.reason},
            JUDGES_LOST if self.away else "exception",
            self.reason,
            self.trace,
        )


class Judges(Protocol):
    """Whoever judges a rank's answers.

    `problem` says why they can't, with the way out; "" where they can.
    """

    def problem(self) -> str: ...

    async def judge(self, trajectory: Trajectory, /) -> Judged: ...

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged: ...

    def close(self) -> None: ...


async def insistently(ask: Callable[[], Awaitable[Judged]]) -> Judged:
    """What `ask` gives; asked again, after a while, where it is lost."""
    judged = await ask()
    for attempt in range(RETRIES):
        if judged.failure != JUDGES_LOST:
            break
        await asyncio.sleep(2**attempt)
        judged = await ask()
    return judged


def asked_of(trajectory: Trajectory) -> Asked:
    """What the reward function of a finished trajectory is called with."""
    prompt = trajectory.prompt
    extra = {
        **prompt.extra_info,
        "num_turns": trajectory.num_turns,
        "tool_calls": trajectory.tool_calls,
        "stop_reason": trajectory.stop.value,
    }
    return Asked(prompt.data_source, trajectory.assistant_text, prompt.ground_truth, extra)


def raised(error: BaseException) -> Raised:
    """What a reward function raised, as text: an exception of the user's own may not survive the
    way to another process.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    refused = type(error).__name__ == "HTTPError"  # urllib's URLError of a server that does answer
    return Raised(
        f"{type(error).__name__}: {error}"[:LONGEST],
        trace_of(error),
        bool(AWAY & kinds) and not refused,
    )


def trace_of(error: BaseException) -> str:
    """The traceback from the user's own function on: what called it is ours."""
    frames = error.__traceback__
    while (
        frames is not None
        and Path(frames.tb_frame.f_code.co_filename).parent == Path(__file__).parent
        and frames.tb_next
    ):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))[-LONGEST:].rstrip()
