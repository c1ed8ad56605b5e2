"""What makes two RL runs the same run: the questions in their order, the model, reward, tools and
objective.

A checkpoint's place in the stream of questions, and the groups that it keeps of them, mean nothing
in another stream; and its KL nothing against another reference. Nobody can ask to go on all the
same over another of these.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import CodeType
from typing import Any

from retool.preflight.identity import Trait, digest, file_digest, listed, model_traits
from retool.rl.agent.environments.load import EnvironmentSource
from retool.rl.agent.formats.table import own_format
from retool.rl.agent.loops.load import LoopSource
from retool.rl.agent.tools.function import FunctionTool
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.agent.tools.trajectory_tool import TrajectoryTool
from retool.rl.agent.tools.verl.tool import VerlTool
from retool.rl.config import RLConfig
from retool.rl.config.judge import LLMJudgeConfig
from retool.rl.objective.user_functions import own_function
from retool.rl.preflight.plan import Questions, RLReport, uses_reference
from retool.rl.reward.llm_judge.judge import prompt_of
from retool.rl.reward.source import RewardSource

FILES = "data.train_files"
PATH = "actor_rollout_ref.model.path"
REWARD = "reward_model"
ACTOR = "actor_rollout_ref.actor"
ENVIRONMENT_KEY = "actor_rollout_ref.rollout.multi_turn.environment"
LOOP_KEY = "actor_rollout_ref.rollout.agent"


def with_identity(report: RLReport) -> RLReport:
    """The report with what is known of the run's identity, without model, questions, reward or
    tools that couldn't be read.
    """
    config = report.config
    found = dict[str, Trait]()
    if (
        report.folder is not None
        and report.model is not None
        and not any(f.where.startswith(PATH) for f in report.faults)
    ):
        found |= model_traits(report.folder, report.model, PATH, strict=uses_reference(config))
    if report.train is not None:
        count, content = fingerprint(report.train)
        found["questions"] = Trait(FILES, count, strict=True)
        found["their content and order"] = Trait(FILES, content, strict=True)
        found["the date in the chat template"] = Trait(
            "data.template_date", config.data.template_date, strict=True
        )
    # The stream of questions is a function of these and of a position: with another, the position
    # is somewhere else.
    for key in ("shuffle", "seed"):
        found[f"data.{key}"] = Trait(f"data.{key}", getattr(config.data, key), strict=True)
    if report.reward is not None and not any(f.where.startswith(REWARD) for f in report.faults):
        found |= _reward(config, report.reward)
    if not any(fault.where.endswith("tool_config_path") for fault in report.faults):
        found |= _tools(report)
    found["the environment"] = Trait(ENVIRONMENT_KEY, _environment(report.environment))
    found["the agent loop"] = Trait(LOOP_KEY, _loop(report.loop))
    return replace(report, identity={**found, **_objective(report)})


def fingerprint(questions: Questions | None) -> tuple[int, str]:
    """(questions, hash of their tokens, of what their answers are judged by, and of their order)."""
    prompts = questions.prompts if questions else []
    parts = (
        part
        for prompt in prompts
        # Tokens, not texts: another template makes other questions of the same rows.
        for part in (prompt.ids.tobytes(), prompt.data_source, prompt.truth_text)
    )
    return len(prompts), digest(*parts)


def _reward(config: RLConfig, source: RewardSource) -> dict[str, Trait]:
    """The reward function's name and its file's content, and what is added to its scores."""
    custom = config.custom_reward_function.path
    shaping = config.reward_model.overlong_buffer
    where = "reward_model.name" if custom is None else "custom_reward_function.path"
    if source.parts:
        where = "reward_model.functions"
    names = [_reward_name(part) for part in source.parts or (source,)]
    if source.asks_a_judge:
        names.append(_judge(config.reward_model.judge))
    if source.asks_a_model:
        names.append(f"the reward model {Path(config.reward_model.model.path or '').name}")
    name = " + ".join(names)
    length = f"{shaping.len} tokens, factor {shaping.penalty_factor:g}" if shaping.enable else "off"
    return {
        "the reward function": Trait(where, name),
        "the punishment of long answers": Trait("reward_model.overlong_buffer", length),
    }


def _judge(settings: LLMJudgeConfig) -> str:
    """A judge behind an address, known by what its verdicts depend on and not by its address."""
    scale = f"{settings.lowest:g} to {settings.highest:g}"
    # All that a verdict depends on but the address: the same judge may move to another machine.
    asked = digest(prompt_of(settings), settings.pattern, scale, f"{settings.temperature:g}")
    return f"{settings.model} ({asked})"


def _reward_name(source: RewardSource) -> str:
    """A reward function by its content, with its weight among several."""
    name = source.name
    if source.path is not None:
        name = f"{source.name} in {Path(source.path).name} ({file_digest(source.path)})"
    elif source.own is not None:
        name = f"{source.name} ({digest(*function_code(source.own.load()))})"
    return name if source.weight == 1 else f"{source.weight:g} × {name}"


def _tools(report: RLReport) -> dict[str, Trait]:
    """Each tool's name, what the model is told of it and the code behind it; and how calls are
    written.
    """
    where = "actor_rollout_ref.rollout.multi_turn"
    known = [
        f"{tool.name} ({digest(json.dumps(tool.schema, sort_keys=True), *_code(tool))})"
        for tool in report.tools
    ]
    found = {"the tools": Trait(f"{where}.tool_config_path", listed(known))}
    if report.calls is not None:
        found["how calls are written"] = Trait(f"{where}.format", _format(report.calls[0]))
    elif not report.tools and report.environment is None:
        found["how calls are written"] = Trait(f"{where}.format", "none are read")
    return found


def _environment(source: EnvironmentSource | None) -> str:
    """The environment: its class's name, its file's content and its arguments."""
    if source is None:
        return "none"
    if source.path is None and source.own is None:
        name = f"{source.name} ({digest(*chain(*map(_class_code, source.classes())))})"
    else:
        name = _by_content(source)
    return f"{name} with {json.dumps(dict(source.kwargs), sort_keys=True, default=str)}"


def _loop(source: LoopSource | None) -> str:
    """A function of the user's by its name and its content."""
    return "retool's" if source is None else _by_content(source)


def _by_content(source: EnvironmentSource | LoopSource) -> str:
    """The name and the content of something from a file or a program."""
    if source.path is not None:
        return f"{source.name} in {Path(source.path).name} ({file_digest(source.path)})"
    if source.own is not None:
        return f"{source.name} ({digest(*function_code(source.own))})"
    return source.name


def _format(name: str) -> str:
    """A format by its name; a user's by the content of its file, too."""
    own = own_format(name)
    return name if own is None else f"{name} ({file_digest(own[0])})"


def _code(tool: AnyTool) -> Iterator[str | bytes]:
    """What a user's tool is: its class and its file.

    Ours changes with the version, which is no other tool.
    """
    if isinstance(tool, FunctionTool):
        yield from function_code(tool.function)
        return
    yield from _class_code(type(tool.made if isinstance(tool, TrajectoryTool | VerlTool) else tool))


def _class_code(kind: type) -> Iterator[str | bytes]:
    """A class by its name and its file."""
    yield kind.__qualname__
    if not kind.__module__.startswith("retool."):
        try:
            yield Path(inspect.getfile(kind)).read_bytes()
        except (TypeError, OSError):  # made in a notebook, say
            return


def function_code(function: Callable[..., Any]) -> Iterator[str | bytes]:
    """What a function that a program holds is: its source, or what it was compiled to where that
    can't be had. What it refers to isn't looked at.
    """
    try:
        # Dedented: a function that moves into a class or out of it is the same function.
        yield textwrap.dedent(inspect.getsource(function))
    except (TypeError, OSError):  # made by exec, or an object that can be called
        code = getattr(function, "__code__", None) or getattr(
            type(function).__call__, "__code__", None
        )
        if code is not None:
            yield from _compiled(code)


def _compiled(code: CodeType) -> Iterator[str | bytes]:
    # Not `hash(code)`, which is another in every process.
    yield code.co_code
    yield repr(code.co_names)
    for constant in code.co_consts:
        # Functions inside it: their repr has an address, which changes from run to run.
        if isinstance(constant, CodeType):
            yield from _compiled(constant)
        elif isinstance(constant, frozenset):
            # What `in {"a", "b"}` is compiled to; its order is each process's own.
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _objective(report: RLReport) -> dict[str, Trait]:
    """What is maximised, by key; not how fast or how carefully. None for what isn't in use.

    Without the estimator or the loss where there is none of that name.
    """
    algorithm = report.config.algorithm
    actor = report.config.actor_rollout_ref.actor
    traits: dict[str, str | bool | None] = {
        "algorithm.use_kl_in_reward": algorithm.use_kl_in_reward,
        "algorithm.kl_penalty": algorithm.kl_penalty if algorithm.use_kl_in_reward else None,
        f"{ACTOR}.use_kl_loss": actor.use_kl_loss,
        f"{ACTOR}.kl_loss_type": actor.kl_loss_type if actor.use_kl_loss else None,
    }
    traits["algorithm.mask_truncated"] = algorithm.mask_truncated
    traits["algorithm.credit_turns"] = algorithm.credit_turns
    if report.estimator is not None:
        normed = algorithm.norm_adv_by_std_in_grpo if report.estimator.reads_norm_by_std else None
        traits["algorithm.adv_estimator"] = _by_code(algorithm.adv_estimator)
        traits["algorithm.norm_adv_by_std_in_grpo"] = normed
    if report.loss is not None:
        traits[f"{ACTOR}.policy_loss.loss_mode"] = _by_code(actor.policy_loss.loss_mode)
        traits[f"{ACTOR}.loss_agg_mode"] = report.aggregation
    return {key: Trait(key, value) for key, value in traits.items()}


def _by_code(name: str) -> str:
    """A loss or estimator of ours by its name, a user's by its file's content too."""
    own = own_function(name)
    if own is None:
        return name
    path, function = own
    return f"{function} in {Path(path).name} ({file_digest(path)})"
