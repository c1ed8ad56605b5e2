"""What verifiers' program and the policy say to each other in one trajectory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CUT_OFF = "cut_off"  # why verifiers' rollout stopped, where our limits ended it


@dataclass(frozen=True)
class Asked:
    """What the policy is asked: the messages since its last turn, and the tools' schemas."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


class Conversation:
    """Both sides meet here, on one event loop: the program asks, and waits for the reply.

    What was sampled is never changed afterwards. So a program that goes on from another past than
    the one there was, or that speaks for a second seat, is refused: `problem` says so.
    """

    def __init__(self) -> None:
        self.problem = ""
        self.trace: Any = None  # verifiers' record of the policy's side
        self._traces: dict[str, Any] = {}
        self._requests: asyncio.Queue[Asked] = asyncio.Queue()
        self._reply: asyncio.Future[dict[str, Any]] | None = None
        self._said: list[dict[str, Any]] = []
        self._tools: list[dict[str, Any]] = []
        self._over = False

    # --- verifiers' side ---

    def add_trace(self, trace: Any) -> None:
        """A seat's record, made before the seat says anything."""
        self._traces[trace.id] = trace

    async def ask(
        self, trace: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The policy's reply to a whole conversation, as a message. ValueError: see the class."""
        self.trace = self.trace or self._traces[trace]
        if self.trace.id != trace:
            self._refuse(
                f"the policy plays two seats, {_seat(self.trace)} and {_seat(self._traces[trace])}; "
                "give all but one a model and a client of its own"
            )
        if self._over:  # what is answered now isn't recorded: the trace has stopped
            self.trace.stop(CUT_OFF)
            return {"role": "assistant", "content": ""}
        self._requests.put_nowait(Asked(self._new(messages), self._same(tools)))
        self._reply = asyncio.get_running_loop().create_future()
        reply = await self._reply
        self._said = [*map(dict, messages), reply]
        return reply

    def _new(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        known = len(self._said)
        before = [_gist(message) for message in messages[:known]]
        if before != [_gist(message) for message in self._said]:
            self._refuse(
                "its program changed what had been said before; only what is added can be trained"
            )
        return [_plain(message) for message in messages[known:]]

    def _same(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        given = [dict(tool) for tool in tools]
        if self._said and given != self._tools:
            self._refuse("its tools changed between two turns; the prompt has shown the first ones")
        self._tools = given
        return given

    def _refuse(self, problem: str) -> None:
        self.problem = problem
        raise ValueError(problem)

    # --- the rollout's side ---

    async def next(self) -> Asked:
        """What the policy is asked next."""
        return await self._requests.get()

    def answer(self, message: dict[str, Any]) -> None:
        """The policy's turn."""
        assert self._reply is not None
        self._reply.set_result(message)

    def cut_off(self, message: dict[str, Any] | None) -> None:
        """The trajectory has no room for more: `message` is the turn that doesn't end, or None
        where there is none.
        """
        self._over = True
        if message is None:
            self.trace.stop(CUT_OFF)
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(message or {"role": "assistant", "content": ""})

    @property
    def was_cut(self) -> bool:
        return self._over


def _seat(trace: Any) -> str:
    agent = trace.agent
    return repr(agent.name) if agent is not None else "one"


def _gist(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a message has to stay: programs differ in which empty fields they write."""
    calls = message.get("tool_calls") or ()
    named = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return message.get("role"), _text(message.get("content")), named


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with text as its content."""
    return {**message, "content": _text(message.get("content"))}


def _text(content: Any) -> Any:
    """Parts of text as one; parts of another kind stay, and are refused later by name."""
    if content is None:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") for part in content]
        return "\n".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content
