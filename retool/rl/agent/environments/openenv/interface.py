"""What a turn of the model means to an OpenEnv environment, and what the model reads of it.

An action is a dict here, as it goes over the wire; so is an observation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Action = dict[str, Any]
LIST_TOOLS: Action = {"type": "list_tools"}  # of an environment whose tools are MCP's
OF_EVERY_ACTION = ("metadata", "title", "description")


@dataclass(frozen=True)
class Seen:
    """What `reset` or a step came to."""

    observation: Any
    reward: float | None
    done: bool


class WrongAction(ValueError):
    """The model's fault: it is told, and may try again."""


@dataclass(frozen=True)
class Interface:
    """How the model acts. `schema` is the action's JSON schema, `tool` the name of the tool that it
    becomes; `text` is the field of the action that all of a turn's text fills, without a tool.

    `to_action` makes actions of a message instead, `to_messages` a text, or messages, of an
    observation.
    """

    schema: Mapping[str, Any]
    tool: str = "act"
    text: str | None = None
    to_action: Callable[[Mapping[str, Any]], Any] | None = None
    to_messages: Callable[[Any], Any] | None = None

    @property
    def has_mcp_tools(self) -> bool:
        """Whether the environment lists its tools itself."""
        return {"tool_name", "arguments"} <= set(self.schema.get("properties", ()))

    @property
    def asks_for_tools(self) -> bool:
        return self.has_mcp_tools and self.text is None and self.to_action is None

    def tools(self, listed: Seen | None = None) -> list[dict[str, Any]]:
        """Schemas of what the model may call; `listed` is what LIST_TOOLS came to."""
        if self.text is not None or self.to_action is not None:
            return []
        if listed is not None:
            return [_of_mcp(tool) for tool in listed.observation["tools"]]
        fields = self.schema.get("properties", {})
        parameters = {
            **{key: value for key, value in self.schema.items() if key not in OF_EVERY_ACTION},
            "properties": {key: value for key, value in fields.items() if key != "metadata"},
        }
        described = str(self.schema.get("description", ""))
        function = {"name": self.tool, "description": described, "parameters": parameters}
        return [{"type": "function", "function": function}]

    def opening(self, prompt: Sequence[Mapping[str, Any]], seen: Seen) -> list[dict[str, Any]]:
        """The row's prompt, with what the environment shows at first. ValueError where it is done
        at once.
        """
        if seen.done:
            raise ValueError("it was done before the model did anything")
        messages = [dict(message) for message in prompt]
        shown = self.shown(seen.observation)
        if not isinstance(shown, str):
            return [*messages, *shown]
        if shown and messages and messages[-1]["role"] == "user":
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{shown}"
        elif shown:
            messages.append({"role": "user", "content": shown})
        return messages

    def actions(self, message: Mapping[str, Any]) -> list[tuple[Mapping[str, Any] | None, Any]]:
        """(the call that it is, or None; the action) for each that a turn asks for; none in a turn
        without a call, where there are tools.
        """
        if self.to_action is not None:
            made = self.to_action(message)
            return [(None, action) for action in (made if isinstance(made, list) else [made])]
        if self.text is not None:
            return [(None, {self.text: message["content"]})]
        return [(call, self._of_call(call["function"])) for call in message.get("tool_calls", ())]

    def _of_call(self, function: Mapping[str, Any]) -> Action:
        arguments = dict(function["arguments"])
        if not self.has_mcp_tools:
            return arguments
        return {"type": "call_tool", "tool_name": function["name"], "arguments": arguments}

    def shown(self, observation: Any) -> Any:
        """What the model reads of an observation: its only text, or all of it as JSON."""
        if self.to_messages is not None:
            return self.to_messages(observation)
        if not isinstance(observation, Mapping):
            return str(observation)
        if self.has_mcp_tools and "tool_name" in observation:
            return _result(observation)
        told = {key: value for key, value in observation.items() if value not in (None, "")}
        if not told:
            return ""
        (first, *others) = told.values()
        if isinstance(first, str) and not others:
            return first
        return json.dumps(told, ensure_ascii=False, default=str)


@dataclass
class Turn:
    """A turn of the model as it is carried out, action by action."""

    interface: Interface
    messages: list[dict[str, Any]] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False

    def add(self, call: Mapping[str, Any] | None, seen: Seen) -> None:
        shown = self.interface.shown(seen.observation)
        if isinstance(shown, str):
            self._say(call, shown)
        else:
            self.messages += shown
        self.reward += float(seen.reward or 0.0)
        self.done = seen.done

    def refuse(self, call: Mapping[str, Any] | None, error: WrongAction) -> None:
        self._say(call, f"error: {error}")

    def _say(self, call: Mapping[str, Any] | None, text: str) -> None:
        if call is None:
            self.messages.append({"role": "user", "content": text})
        else:
            named = {"tool_call_id": call["id"], "name": call["function"]["name"]}
            self.messages.append({"role": "tool", **named, "content": text})

    def answer(self) -> tuple[list[dict[str, Any]], float, bool]:
        """As `step` gives it. A turn that does nothing is the last."""
        return self.messages, self.reward, self.done or not self.messages


def name_of_tool(action: str) -> str:
    """What a tool is called whose action is of this class: `PlaceBetAction` is `place_bet`."""
    words = re.findall(r"[A-Z]+[a-z0-9]*|[a-z0-9]+", action.removesuffix("Action"))
    return "_".join(words).lower() or "act"


def _of_mcp(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {
        "name": tool["name"],
        "description": tool.get("description") or "",
        "parameters": tool["input_schema"],
    }
    return {"type": "function", "function": function}


def _result(observation: Mapping[str, Any]) -> str:
    """What an MCP tool answered, as the model reads it."""
    error = observation.get("error")
    if error:
        return f"error: {error['message']}"
    result = observation.get("result")
    if isinstance(result, Mapping) and result.get("data") is not None:
        result = result["data"]
    elif isinstance(result, Mapping) and "content" in result:
        # Of an image, say, the model reads that there was one
        texts = [str(part.get("text", f"[{part.get('type')}]")) for part in result["content"]]
        result = "\n".join(texts)
    return result if isinstance(result, str) else json.dumps(result, default=str)
