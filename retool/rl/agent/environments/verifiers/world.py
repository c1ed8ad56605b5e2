"""One trajectory in a verifiers environment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from retool.rl.agent.environments.loop_thread import LoopThread
from retool.rl.agent.environments.verifiers.conversation import Asked, Conversation

Play = Callable[[Mapping[str, Any], Conversation], Awaitable[Any]]


class VerifiersWorld:
    """An `Environment`. `play` has verifiers run the episode of a row, on the event loop of `thread`.

    The reward is the trace's, with its weights: it comes with the last turn.
    """

    def __init__(self, play: Play, thread: LoopThread) -> None:
        self._play = play
        self._thread = thread
        self._conversation: Conversation | None = None
        self._episode: asyncio.Future[Any] | None = None

    async def reset(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        return await self._thread.run(self._begin(row))

    async def step(self, message: Mapping[str, Any]) -> tuple[list[dict[str, Any]], float, bool]:
        return await self._thread.run(self._answer(message))

    async def cut(self, message: Mapping[str, Any] | None) -> float:
        """What verifiers gives for a trajectory that our limits ended."""
        return await self._thread.run(self._cut_off(message))

    async def close(self) -> None:
        if self._episode is not None:
            await self._thread.run(self._leave(self._episode))

    # --- on that event loop ---

    async def _begin(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        self._conversation = Conversation()
        self._episode = asyncio.ensure_future(self._play(row, self._conversation))
        asked = await self._next(self._conversation)
        if asked is None:
            raise RuntimeError("its episode ended before the policy was asked anything")
        return asked.messages, asked.tools

    async def _answer(self, message: Mapping[str, Any]) -> tuple[list[dict[str, Any]], float, bool]:
        conversation = self._conversation
        assert conversation is not None
        conversation.answer(_wire(message))
        asked = await self._next(conversation)
        if asked is not None:
            return asked.messages, 0.0, False
        return [], conversation.trace.reward, True

    async def _cut_off(self, message: Mapping[str, Any] | None) -> float:
        conversation = self._conversation
        assert conversation is not None and self._episode is not None
        conversation.cut_off(None if message is None else _wire(message))
        self._check(await self._episode, conversation)
        return conversation.trace.reward

    async def _next(self, conversation: Conversation) -> Asked | None:
        """What the policy is asked next; None where the episode is over."""
        assert self._episode is not None
        asking = asyncio.ensure_future(conversation.next())
        try:
            await asyncio.wait({asking, self._episode}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        finally:
            asking.cancel()
        self._check(self._episode.result(), conversation)
        return None

    def _check(self, episode: Any, conversation: Conversation) -> None:
        """RuntimeError where the episode failed: its reward means nothing then."""
        if episode.ok and conversation.trace is not None:
            return
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        told = [f"{error.type}: {error.message}" for error in errors[:1]]
        reason = conversation.problem or "; ".join(told)
        raise RuntimeError(reason or "its episode never asked the policy")

    async def _leave(self, episode: asyncio.Future[Any]) -> None:
        """Have verifiers let go of what the episode started, if it is still under way."""
        episode.cancel()
        await asyncio.wait({episode})


def _wire(message: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's turn as OpenAI's API writes it: arguments as JSON."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    written = []
    for call in calls:
        function = call["function"]
        arguments = json.dumps(function["arguments"])
        written.append({**call, "function": {"name": function["name"], "arguments": arguments}})
    return {**message, "tool_calls": written}
