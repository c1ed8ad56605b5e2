"""The seat of the policy in a verifiers environment: an endpoint for chat completions.

verifiers runs a program (a harness) for each seat, and stands between it and the model: that is
where it counts turns, applies a task's `@stop` and `@intercept`, and records. Ours runs here, in
the process, where theirs would start another one. The model is a `Client` whose answers come from
the trajectory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
from verifiers.v1 import Client, Harness, HarnessConfig, ProgramResult, Response
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.errors import ProviderError
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

from retool.rl.agent.environments.verifiers.conversation import Conversation

__all__ = ["InProcessHarness"]  # verifiers takes the one harness that a module lists

NO_LIMIT = aiohttp.ClientTimeout(total=None)  # verifiers and the trajectory have theirs


class PolicyClient(Client):
    """The model as verifiers sees it: each trace's questions go to its trajectory."""

    def __init__(self) -> None:
        self.conversations: dict[str, Conversation] = {}

    async def get_response(
        self,
        dialect: Any,
        body: dict[str, Any],
        sampling: Any,
        session_id: str | None = None,
        turn: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """`sampling` is left to the run, which samples everything alike."""
        messages = body.get("messages")
        conversation = self.conversations.get(session_id or "")
        if messages is None or conversation is None:
            raise ProviderError(
                "the policy answers chat completions, to the seats of a trajectory alone"
            )
        try:
            reply = await conversation.ask(str(session_id), messages, body.get("tools") or [])
        except ValueError as error:
            raise ProviderError(str(error)) from error
        completion = _completion(reply, conversation.was_cut)
        response = dialect.parse_response(dialect.validate_response(completion))
        response.raw = completion
        return response


def _completion(reply: Mapping[str, Any], was_cut: bool) -> dict[str, Any]:
    """A message as OpenAI's API gives it."""
    reason = "tool_calls" if reply.get("tool_calls") else "stop"
    if was_cut:
        reason = "length"
    choice = {"index": 0, "message": dict(reply), "finish_reason": reason}
    return {
        "id": "retool",
        "object": "chat.completion",
        "created": 0,
        "model": "policy",
        "choices": [choice],
    }


class InProcessHarness(Harness[HarnessConfig]):
    """The loop of a chat with tools: what verifiers' own harness `null` does in another process."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    SUPPORTS_TOOL_INTERCEPTION = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(  # the parameters are verifiers'
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: Any,
        tool_interception_url: str | None = None,
    ) -> ProgramResult:
        """Turns until one calls no tool."""
        seconds = self.config.tool_timeout
        servers = {name: {"url": url, "timeout": seconds} for name, url in mcp_urls.items()}
        async with AsyncExitStack() as stack:
            headers = {"Authorization": f"Bearer {secret}"}
            session = aiohttp.ClientSession(headers=headers, timeout=NO_LIMIT)
            table = Table(await stack.enter_async_context(session), tool_interception_url)
            if servers:
                await table.connect({"mcpServers": servers}, stack)
            problem = await table.talk(f"{endpoint}/chat/completions", self._opening(data))
        return ProgramResult(1 if problem else 0, "", problem)

    def _opening(self, data: Any) -> list[dict[str, Any]]:
        """What a conversation, or its next part, begins with."""
        system, prompt = self.resolve_prompt(data)
        messages = [] if system is None else [{"role": "system", "content": system}]
        if isinstance(prompt, str):
            return [*messages, {"role": "user", "content": prompt}]
        return [*messages, *(message_to_wire(message) for message in prompt or ())]


class Table:
    """A chat on its way: the model's address, and the tools with the servers that have them.

    `gate` is asked before a call is made, where the task wants to be.
    """

    def __init__(self, session: aiohttp.ClientSession, gate: str | None) -> None:
        self._session = session
        self._gate = gate
        self._tools: list[dict[str, Any]] = []
        self._places: dict[str, tuple[str, str]] = {}
        self._servers: dict[str, Any] = {}

    async def connect(self, servers: dict[str, Any], stack: AsyncExitStack) -> None:
        self._tools, self._places, self._servers = await connect_mcp(servers, stack)

    async def talk(self, url: str, messages: list[dict[str, Any]]) -> str:
        """Turns until one calls no tool, or the model is refused; what it said to that, or ""."""
        while True:
            body = {"model": "policy", "messages": messages}
            if self._tools:
                body["tools"] = self._tools
            async with self._session.post(url, json=body) as response:
                if response.status != 200:  # a limit, a @stop, or a failure: verifiers knows which
                    return f"{response.status}: {await response.text()}"
                choice = (await response.json())["choices"][0]
            said = {key: value for key, value in choice["message"].items() if value is not None}
            messages = [*messages, {"content": "", **said}]
            calls = said.get("tool_calls")
            if not calls or choice["finish_reason"] == "length":
                return ""
            messages += [await self._answer(call) for call in calls]

    async def _answer(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """What a call is answered with, as a message."""
        name = call["function"]["name"]
        arguments = json.loads(call["function"]["arguments"])
        message = {"role": "tool", "tool_call_id": call["id"], "name": name}
        if self._gate is not None:
            asked = {"tool_call_id": call["id"], "name": name, "arguments": arguments}
            async with self._session.post(self._gate, json=asked) as response:
                response.raise_for_status()
                verdict = await response.json()
            if verdict["action"] != "allow":
                # Of one that stops the rollout, the model isn't told: it isn't asked again
                return verdict.get("message") or {**message, "content": verdict["reason"]}
        if name not in self._places:
            return {**message, "content": f"error: unknown tool {name!r}"}
        content = await call_mcp(self._servers, self._places, name, arguments)
        return {**message, "content": content}
