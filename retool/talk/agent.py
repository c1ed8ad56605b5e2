"""A model and its tools, as the agent loop wants them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from retool.llm.llm import LLM
from retool.llm.sampling import SamplingParams
from retool.rl.agent.calls import clean
from retool.rl.agent.environments.load import find_environment, parts_of_name
from retool.rl.agent.environments.play import Worlds
from retool.rl.agent.formats.choose import choose_format, shown_format
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.formats.table import AUTO
from retool.rl.agent.loop import calls_in
from retool.rl.agent.options import Agent, AgentOptions, ends_of_calls
from retool.rl.agent.reading.call import Call
from retool.rl.agent.reading.form import THOUGHT_CLOSES, before_calls
from retool.rl.agent.tools.load import RunLimits, load_tools
from retool.rl.agent.tools.of_row import tools_offered
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.types import Prompt, Stop
from retool.talk.options import CODE, NO_TOOLS

MAX_TURNS = 32  # of the model's in one answer: a model may call its tool for ever
TOOL_TOKENS = 2048  # of a tool's text that the model reads
WORLD_SECONDS = 120.0  # of a call of an environment, as in training

# Why an answer ended, in the words of OpenAI's API where it has any
FINISH_REASONS = {
    Stop.EOS: "stop",
    Stop.NO_CALL: "stop",
    Stop.DONE: "stop",
    Stop.LENGTH: "length",
    Stop.MAX_TURNS: "max_turns",
    Stop.INFRASTRUCTURE: "tool_failure",
    # It filled the cache, or the model's positions: cut off, for who reads it
    Stop.ABORTED: "length",
}


@dataclass(frozen=True)
class Talker:
    """Who answers: the model, and what stands around it.

    `shows_calls`: the chat template shows calls as the model writes them. `worlds`: it plays in an
    environment.
    """

    llm: LLM
    agent: Agent
    sampling: SamplingParams
    shows_calls: bool
    worlds: Worlds | None = None

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        """What the chat template is told of the tools."""
        return self.agent.schemas or None

    def within(self, prompt: Prompt) -> Agent:
        """The agent for an answer to `prompt`, which ends where the model has no more room."""
        options = self.agent.options
        room = self.llm.max_model_len - len(prompt.ids)
        limit = min(options.max_response_length, room)
        return replace(self.agent, options=replace(options, max_response_length=limit))

    def in_world(self, prompt: Prompt) -> Agent:
        """The agent for an episode. What its world begins with has half of the model's room."""
        options = self.agent.options
        assert self.worlds is not None, "there is no environment"
        room = self.llm.max_model_len - self.worlds.max_prompt_length
        limit = min(options.max_response_length, room)
        return replace(
            self.agent,
            tools=tools_offered(self.agent.tools, prompt.extra_info),
            options=replace(options, max_response_length=limit),
        )


def sampling_of(options: argparse.Namespace, n: int = 1) -> SamplingParams:
    """How the command line wants tokens drawn. ValueError for values that mean nothing."""
    return SamplingParams(
        n=n,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )


def open_tools(choice: str, isolation: str, session: bool) -> list[AnyTool]:
    """The tools of `--tools`, started; with `session` the code interpreter's variables live on.
    ValueError where there are none, or they can't be.
    """
    if choice == NO_TOOLS:
        return []
    try:
        limits = RunLimits(isolation=isolation, session=session)
        return load_tools(None if choice == CODE else choice, limits)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--tools {choice}: {error} Or use --tools none, or --isolation best_effort."
        ) from error


def open_worlds(name: str, given: str | None, llm: LLM) -> Worlds:
    """The environments of `--environment`, made with what `--environment-kwargs` gives. ValueError
    where there are none.
    """
    try:
        kwargs = yaml.safe_load(given or "{}")
    except yaml.YAMLError as error:
        raise ValueError(f"--environment-kwargs can't be read: {error}.") from error
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"--environment-kwargs {kwargs!r}: give a mapping, such as {{most: 5}}.")
    try:
        source = find_environment(*parts_of_name(name), kwargs)
        assert source is not None
        return Worlds(source.load(), WORLD_SECONDS, llm.max_model_len // 2)
    except ValueError as error:
        raise ValueError(f"--environment {name}: {error}") from error


def open_llm(options: argparse.Namespace, max_num_seqs: int, enforce_eager: bool) -> LLM:
    """The model of the command line. ValueError where it can't be loaded."""
    return LLM(
        options.model,
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
        max_model_len=options.max_model_len,
        max_num_seqs=max_num_seqs,
        enforce_eager=enforce_eager,
        trust_remote_code=options.trust_remote_code,
        chat_template=options.chat_template,
    )


def make_talker(
    llm: LLM, tools: Sequence[AnyTool], sampling: SamplingParams, form: str = AUTO
) -> Talker:
    """The model with these tools. `form`: how it writes calls; ValueError for one that isn't known."""
    name, found = choose_format(form, llm.renderer)
    options = AgentOptions(
        max_response_length=sampling.max_tokens or llm.max_model_len,
        max_assistant_turns=MAX_TURNS,
        format=found,
        max_tool_response_length=TOOL_TOKENS,
        max_parallel_calls=8,
        eos_ids=tuple(llm.eos_ids),
        call_end_ids=ends_of_calls(llm.renderer, found),
    )
    by_name = {tool.name: tool for tool in tools}
    agent = Agent(by_name, llm.renderer, options)
    return Talker(llm, agent, sampling, shown_format(llm.renderer) == name)


def to_message(text: str, talker: Talker) -> dict[str, Any]:
    """A turn of the model's as a message that templates show as they show others.

    Calls that the template shows as the model wrote them, and hermes' in any case, become
    `tool_calls`. Another turn, and one with a call that can't be read, stays the text that it is.
    """
    agent = talker.agent
    form = agent.options.format
    calls = calls_in(text, agent)
    # One that can't be read can't stand in fields: then the turn stays the text that it was.
    readable = [call for call in calls if not call.problem and isinstance(call.arguments, dict)]
    in_fields = talker.shows_calls or form is HERMES
    if not in_fields or not calls or len(readable) < len(calls):
        return {"role": "assistant", "content": clean(text)}
    before = before_calls(form, text, agent.renderer.reasoning)
    return {
        "role": "assistant",
        "content": clean(before).strip(),
        "tool_calls": [_tool_call(call) for call in calls],
    }


def _tool_call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"type": "function", "id": call.id, "function": function}


def without_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    """A message as it stands in the history: what was thought for it is over."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return message
    # All of it where nothing was thought
    return {**message, "content": content.rpartition(THOUGHT_CLOSES)[2].strip()}
