"""The run's environment, found, and tried on one question before the run; and the user's loop,
found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from retool.config import Fault
from retool.rl.agent.environments.load import EnvironmentSource, find_environment, let_go
from retool.rl.agent.environments.play import Attempt, prepare, seed_of
from retool.rl.agent.environments.protocol import EnvironmentFailure
from retool.rl.agent.environments.world import World
from retool.rl.agent.loops.load import find_loop
from retool.rl.agent.options import Agent, AgentOptions
from retool.rl.agent.tools.interpreter import InterpreterConfig
from retool.rl.agent.tools.load import RunLimits
from retool.rl.agent.tools.state import run_alone
from retool.rl.preflight.identity import ENVIRONMENT_KEY, LOOP_KEY
from retool.rl.preflight.plan import Held, RLReport
from retool.rl.types import Prompt

SPLIT = 2  # neither training's nor validation's
SAID = "AnAnswer"  # by the environment, to see whether the chat template shows it


def with_environment(report: RLReport, held: Held) -> RLReport:
    """The report with the environment that the configuration names, or that the program holds."""
    wanted = report.config.actor_rollout_ref.rollout.multi_turn.environment
    try:
        if held.environment is not None:
            source = replace(held.environment, kwargs=wanted.kwargs)
        else:
            source = find_environment(wanted.path, wanted.name, wanted.kwargs)
        if source is not None and wanted.sandboxed:
            source = replace(source, sandboxed=_sandbox_of(report))
        if source is not None:
            source.load()
    except ValueError as error:
        return report.blame(Fault(ENVIRONMENT_KEY, str(error)))
    return replace(report, environment=source)


def _sandbox_of(report: RLReport) -> InterpreterConfig:
    """The sandbox for an environment: as the code interpreter's, each call within its time."""
    multi = report.config.actor_rollout_ref.rollout.multi_turn
    limits = RunLimits(multi.tool_workers, isolation=multi.tool_isolation, session=True)
    return limits.over(InterpreterConfig(default_timeout=multi.environment.timeout_seconds))


def with_loop(report: RLReport, held: Held) -> RLReport:
    """The report with the loop that the configuration names, or that the program holds."""
    wanted = report.config.actor_rollout_ref.rollout.agent
    try:
        source = held.loop or find_loop(wanted.path, wanted.name)
        if source is not None:
            source.load()
    except ValueError as error:
        return report.blame(Fault(LOOP_KEY, str(error)))
    if source is not None and report.environment is not None:
        problem = f"and {ENVIRONMENT_KEY} are both given: a loop plays the whole trajectory."
        return report.blame(
            Fault(LOOP_KEY, problem, "Leave one out; a loop may be its world, too.")
        )
    return replace(report, loop=source)


def try_environment(report: RLReport) -> Iterator[Fault]:
    """A fault if an environment can't begin with the first question, or doesn't close."""
    questions = report.train or report.val
    if report.environment is None or report.renderer is None or questions is None:
        return
    prompt = questions.prompts[0]
    failure = _failure_on(report, report.environment, prompt)
    if failure:
        row = prompt.extra_info.get("row", "the first question")
        told = failure.removeprefix("environment.").removesuffix(".")
        problem = f"it fails on {row}: {told}."
        yield Fault(ENVIRONMENT_KEY, problem, "Mend it: the trajectory would be lost.")


def _failure_on(report: RLReport, source: EnvironmentSource, prompt: Prompt) -> str:
    """Why an environment can't begin with a question, or doesn't close; "" if it does both."""
    make = source.load()
    try:
        run_alone(_begin_and_close(report, make, prompt))
    except EnvironmentFailure as error:
        return str(error)
    finally:
        let_go(make)  # outside of the event loop: it may need one, and it may wait
    return ""


async def _begin_and_close(report: RLReport, make: Callable[[], Any], prompt: Prompt) -> None:
    config = report.config
    assert report.renderer is not None
    tools = {tool.name: tool for tool in report.tools}
    agent = Agent(tools, report.renderer, AgentOptions(config.data.max_response_length))
    seconds = config.actor_rollout_ref.rollout.multi_turn.environment.timeout_seconds
    seed = seed_of(config.trainer.seed, SPLIT, prompt.index)
    attempt = Attempt(prompt, 0, seed)
    world = World(make, seconds)
    try:
        opening = await world.reset(attempt.row())
        play = prepare(prompt, opening, agent, config.data.max_prompt_length)
        _require_shown(agent, play.prompt)
    finally:
        unclosed = await world.close()
    if unclosed:
        raise EnvironmentFailure(unclosed)


def _require_shown(agent: Agent, prompt: Prompt) -> None:
    """EnvironmentFailure if the chat template leaves out what follows a turn of the model."""
    said = [*prompt.messages, {"role": "assistant", "content": "!"}]
    answer = {"role": "user", "content": SAID}
    try:
        ids = agent.renderer.render_tool_turn(said, [answer], prompt.tools)
    except ValueError as error:
        raise EnvironmentFailure(f"step: its messages: {error}") from error
    if SAID not in agent.renderer.tokenizer.decode(ids):
        raise EnvironmentFailure(
            "step: the chat template leaves out a user's message after the model's. Use "
            "data.chat_template=hermes, or another file"
        )
