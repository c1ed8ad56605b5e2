"""One trajectory in an OpenEnv environment, in this process or over a WebSocket."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from retool.rl.agent.environments.openenv.interface import (
    LIST_TOOLS,
    Interface,
    Seen,
    Turn,
    WrongAction,
)

Answered = tuple[list[dict[str, Any]], float, bool]
# What a server says of an action that doesn't fit the schema
NOT_VALID = "VALIDATION_ERROR"


def given_to_reset(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says to the environment: its seed, and what stands in `extra_info.reset`."""
    told = (row.get("extra_info") or {}).get("reset") or {}
    return {"seed": row["seed"], "episode_id": f"{row['seed']}-{row['sample']}", **told}


class LocalWorld:
    """An `Environment` around an OpenEnv environment of this process, on a thread of its own."""

    def __init__(
        self, make: Callable[[], Any], interface: Interface, to_action: Callable[[Any], Any]
    ) -> None:
        self._made = make()
        self._interface = interface
        self._to_action = to_action

    def reset(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        accepted = inspect.signature(self._made.reset).parameters
        any_name = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
        given = given_to_reset(row)
        told = {key: value for key, value in given.items() if any_name or key in accepted}
        messages = self._interface.opening(row["prompt"], _seen(self._made.reset(**told)))
        listed = self._act(LIST_TOOLS) if self._interface.asks_for_tools else None
        return messages, self._interface.tools(listed)

    def step(self, message: Mapping[str, Any]) -> Answered:
        turn = Turn(self._interface)
        for call, action in self._interface.actions(message):
            try:
                turn.add(call, self._act(action))
            except WrongAction as error:
                turn.refuse(call, error)
            if turn.done:
                break
        return turn.answer()

    def close(self) -> None:
        self._made.close()

    def _act(self, action: Any) -> Seen:
        try:
            made = self._to_action(action)
        except ValueError as error:
            raise WrongAction(" ".join(str(error).split())) from error
        return _seen(self._made.step(made))


class RemoteWorld:
    """An `Environment` behind a server: a session of the trajectory's own, over `client`."""

    def __init__(
        self,
        make: Callable[[], Any],
        interface: Interface,
        to_action: Callable[[Any], Any] | None,
    ) -> None:
        self._client = make()
        self._interface = interface
        self._to_action = to_action

    async def reset(self, row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        seen = _received(await self._client.reset(**given_to_reset(row)))
        messages = self._interface.opening(row["prompt"], seen)
        listed = await self._act(LIST_TOOLS) if self._interface.asks_for_tools else None
        return messages, self._interface.tools(listed)

    async def step(self, message: Mapping[str, Any]) -> Answered:
        turn = Turn(self._interface)
        for call, action in self._interface.actions(message):
            try:
                turn.add(call, await self._act(action))
            except WrongAction as error:
                turn.refuse(call, error)
            if turn.done:
                break
        return turn.answer()

    async def close(self) -> None:
        await self._client.close()

    async def _act(self, action: Any) -> Seen:
        try:
            made = action if self._to_action is None else self._to_action(action)
        except ValueError as error:
            raise WrongAction(" ".join(str(error).split())) from error
        try:
            return _received(await self._client.step(made))
        except RuntimeError as error:
            if NOT_VALID in str(error):
                raise WrongAction(str(error)) from error
            raise


def _seen(observation: Any) -> Seen:
    """What a server would send of an observation."""
    from openenv.core.env_server.serialization import serialize_observation

    sent = serialize_observation(observation)
    return Seen(sent["observation"], sent["reward"], bool(sent["done"]))


def _received(result: Any) -> Seen:
    """What a client gives; a typed observation as the dict that it was."""
    observation = result.observation
    if hasattr(observation, "model_dump"):
        observation = observation.model_dump(exclude={"reward", "done", "metadata"})
    return Seen(observation, result.reward, bool(result.done))
