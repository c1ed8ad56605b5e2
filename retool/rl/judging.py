"""What judges are asked, and what they answer: the same in a process of their own and in the run's."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from retool.rl.rewards import LONGEST
from retool.rl.types import Trajectory

JUDGES_LOST = "lost"  # the failure that isn't the function's: the pool broke, and did so again when it was tried anew


@dataclass(frozen=True)
class Judged:
    """A score, what else the function told, and how it failed (`exception`, `timeout`, `killed`, or JUDGES_LOST), why (in `info` too) and
    where (`trace`, of an exception), if it did."""

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
    """What a reward function raised, as text."""

    reason: str
    trace: str = ""


class Judges(Protocol):
    """Whoever judges a rank's answers. `problem` says why they can't, with the way out; "" where they can."""

    def problem(self) -> str: ...

    async def judge(self, trajectory: Trajectory, /) -> Judged: ...

    async def score(self, asked: Asked, timeout: float | None = None) -> Judged: ...

    def close(self) -> None: ...


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
    """What a reward function raised, as text: an exception of the user's own may not survive the way to another process."""
    return Raised(f"{type(error).__name__}: {error}"[:LONGEST], trace_of(error))


def trace_of(error: BaseException) -> str:
    """The traceback from the user's own function on: what called it is ours."""
    frames = error.__traceback__
    while frames is not None and Path(frames.tb_frame.f_code.co_filename).parent == Path(__file__).parent and frames.tb_next:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))[-LONGEST:].rstrip()
