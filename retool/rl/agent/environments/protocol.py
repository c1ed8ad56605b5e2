"""What an environment is. What it returns is checked before any of it reaches the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from retool.rl.agent.calls import clean
from retool.rl.reward.foreign import plain, shown

ROLES = ("user", "tool", "system")  # of messages that an environment may answer with
FORM_OF_RESET = "messages, or (messages, tools)"
FORM_OF_STEP = "(messages, reward, done)"


class EnvironmentFailure(Exception):
    """An environment broke: that says nothing about the policy."""


class Environment(Protocol):
    """One trajectory's world; each trajectory has an object of its own.

    `reset` is given the row and returns the first messages, or (messages, tools). `step` is given
    the model's turn as a message, and returns (messages, reward, done). Both may be coroutines.

    It may have two more. `cut(message)` is called where our limits end a trajectory before the
    environment says that it is done: with the turn that was cut off, or None where it has heard of
    the last one. It returns a reward. `close` is called once, however the trajectory ends.
    """

    def reset(self, row: Mapping[str, Any], /) -> Any: ...

    def step(self, message: Mapping[str, Any], /) -> Any: ...


@runtime_checkable
class KeepsForRun(Protocol):
    """What makes environments, and keeps something for all of them: a server, a thread."""

    def __call__(self) -> Any: ...

    def let_go(self) -> None:
        """Called once, when the run is over and every environment is closed."""


@dataclass(frozen=True)
class Opening:
    """How a trajectory begins. `tools` are schemas, which the environment answers calls of itself,
    or functions, which are called.
    """

    messages: list[dict[str, Any]]
    tools: list[Any]


@dataclass(frozen=True)
class Answer:
    """What follows a turn of the model, and the turn's reward."""

    messages: list[dict[str, Any]]
    reward: float
    done: bool


def read_opening(given: Any) -> Opening:
    """What `reset` returned. ValueError where it isn't FORM_OF_RESET.

    The renderer checks the messages themselves, as it does those of a row.
    """
    tools: Any = []
    if isinstance(given, tuple) and len(given) == 2:
        given, tools = given
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"it returned {shown(given)}, not {FORM_OF_RESET}")
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        if tools is not None:
            raise ValueError(f"its tools are a {type(tools).__name__}, not a list")
        tools = []
    return Opening([_as_message(message) for message in given], list(tools))


def read_answer(given: Any) -> Answer:
    """What `step` returned. ValueError where it isn't FORM_OF_STEP."""
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 3:
        raise ValueError(f"it returned {shown(given)}, not {FORM_OF_STEP}")
    said, reward, done = given
    if isinstance(said, str):
        said = [{"role": "user", "content": said}] if said else []
    if said is not None and (not isinstance(said, Sequence) or isinstance(said, bytes)):
        raise ValueError(f"its messages are {shown(said)}: give a list of them, or a text")
    messages = [checked_message(message) for message in said or ()]
    over = read_done(done)
    if not messages and not over:
        raise ValueError("it gave no message and isn't done: the model has nothing to answer")
    return Answer(messages, read_reward(reward), over)


def checked_message(message: Any) -> dict[str, Any]:
    """A message that a turn may be followed by. ValueError where it isn't one."""
    message = _as_message(message)
    role = message.get("role")
    content = message.get("content")
    if role not in ROLES:
        raise ValueError(f"a message has the role {role!r}; it may be {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is a {type(content).__name__}, not text")
    return {**message, "content": clean(content)}


def _as_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is a {type(message).__name__}, not a dict")
    return dict(message)


def read_done(done: Any) -> bool:
    """Whether it is over; None is no. ValueError for what is neither true nor false: a text, say,
    which Python takes for true whatever it says.
    """
    found = plain(done)
    # Arrays of floats hold 0.0 and 1.0 for it
    if found is not None and not isinstance(found, (bool, int, float)):
        raise ValueError(f"its done is {shown(done)}, not true or false")
    return bool(found)


def read_reward(reward: Any) -> float:
    """A reward; None is none. ValueError for what is no finite number."""
    if reward is None:
        return 0.0
    found = plain(reward)
    try:
        number = float(found) if isinstance(found, (bool, int, float)) else math.nan
    except OverflowError:  # a whole number that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"its reward is {shown(reward)}, not a number")
    return number
