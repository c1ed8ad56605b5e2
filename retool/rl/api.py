"""`retool.rl(…)`: reinforcement learning from Python, the run that `python -m retool.rl` makes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from retool.config import Parsed, read
from retool.metrics.loggers import OnStep
from retool.rl.agent.environments.load import EnvironmentSource, parts_of_name
from retool.rl.agent.loops.load import LoopSource
from retool.rl.agent.tools.load import close_tools
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.agent.tools.state import run_alone
from retool.rl.config import RLConfig
from retool.rl.config.names import IGNORED, SYNONYMS
from retool.rl.preflight.checks import preflight
from retool.rl.preflight.identity import ENVIRONMENT_KEY, LOOP_KEY
from retool.rl.preflight.plan import Held
from retool.rl.preflight.show import in_words
from retool.rl.reward.source import (
    OF_PROGRAM,
    RewardSource,
    find_reward,
    own_reward,
    several,
)
from retool.rl.train import train
from retool.run.caller import Caller
from retool.run.program import as_guest, carry_out, given_files, pass_on, stated, with_faults
from retool.run.result import Refused, Result

# What others call it → ours
OTHER_NAMES = {
    "data": "prompts",
    "train_dataset": "prompts",
    "dataset": "prompts",
    "train_files": "prompts",
    "eval_dataset": "eval_prompts",
    "eval_data": "eval_prompts",
    "val_files": "eval_prompts",
    "model_name_or_path": "model",
    "reward_funcs": "reward",
    "reward_functions": "reward",
    "reward_function": "reward",
    "compute_score": "reward",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "steps": "max_steps",
    "total_training_steps": "max_steps",
    "per_device_train_batch_size": "batch_size, prompts of all GPUs together",
    "train_batch_size": "batch_size",
    "n": "num_generations",
    "group_size": "num_generations",
    "max_response_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_tokens": "max_completion_length",
    "kl_coef": "beta",
    "kl_loss_coef": "beta",
    "logger": "report_to",
    "callbacks": "on_step",
    "args": "config",
}
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
MINI_BATCH = f"{ACTOR}.ppo_mini_batch_size"
MOST_PROMPTS_AN_UPDATE = 64  # the command's default

Reward = str | Callable[..., Any]
Tools = str | os.PathLike[str] | Sequence[Callable[..., Any] | AnyTool | object]


def rl(
    model: str | os.PathLike[str] | None = None,
    prompts: Any = None,
    *,
    reward: Reward | Sequence[Reward] | None = None,
    reward_weights: Sequence[float] | None = None,
    tools: Tools | None = None,
    environment: str | Callable[..., Any] | None = None,
    loop: str | Callable[..., Any] | None = None,
    eval_prompts: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    learning_rate: float | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    num_generations: int | None = None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    temperature: float | None = None,
    beta: float | None = None,
    chat_template: str | None = None,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    report_to: str | Sequence[str] | None = None,
    run_name: str | None = None,
    seed: int | None = None,
    device: Literal["auto", "cuda", "cpu"] | None = None,
    resume: bool = True,
    quiet: bool = False,
    on_step: OnStep | None = None,
    config: RLConfig | None = None,
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Improve `model` on `prompts` by what `reward` says. Returns the run's folder and what is in it.

    `prompts` and `eval_prompts` are whatever the command reads, or rows: a list of dicts, a
    `datasets.Dataset`, a data frame. A step samples `num_generations` answers to each of `batch_size`
    prompts, over all GPUs. `beta` weighs the KL to the first model; None: there is no KL.

    `reward`: a function that takes any of data_source, solution_str (or completion), ground_truth and
    extra_info, and returns a number or {"score": …}; it runs in processes of its own. Or a built-in
    reward's name, or FILE.py/function; None: chosen by data source. Of a list of these the score is
    the sum, weighted by `reward_weights`. `tools`: functions with type hints and a docstring, objects
    as `retool.rl.agent.tools.Tool` describes them (closed at the end), "code_interpreter", or a file.
    `environment`: a class, or FILE.py/name; its rewards count if no `reward` is given. `loop`: an
    async function of (row, generate, tools), or FILE.py/name. Everything else: as for `retool.sft`.
    """
    functions, held = functions_given(reward, reward_weights, tools)
    held = _with_loop(loop, functions, _with_world(environment, functions, held))
    asked = stated(RLConfig, options, quiet, functions | {
        "actor_rollout_ref.model.path": model,
        "data.train_batch_size": batch_size,
        "data.max_prompt_length": max_prompt_length,
        "data.max_response_length": max_completion_length,
        "data.chat_template": chat_template,
        f"{ROLLOUT}.n": num_generations,
        f"{ROLLOUT}.temperature": temperature,
        f"{ACTOR}.use_kl_loss": None if beta is None else beta > 0,
        f"{ACTOR}.kl_loss_coef": beta,
        f"{ACTOR}.optim.lr": learning_rate,
        "trainer.default_local_dir": output_dir,
        "trainer.total_epochs": epochs,
        "trainer.total_training_steps": max_steps,
        "trainer.test_freq": eval_steps,
        "trainer.save_freq": save_steps,
        "trainer.logger": report_to,
        "trainer.experiment_name": run_name,
        "trainer.seed": seed,
        "trainer.device": device,
        "trainer.resume_mode": None if resume else "disable",
    })  # fmt: skip
    if batch_size is not None and config is None:
        asked.setdefault(MINI_BATCH, prompts_an_update(batch_size))
    with as_guest():
        files, faults = given_files({"train": prompts, "val": eval_prompts}, asked, config)
        parsed = read(RLConfig, [], SYNONYMS, IGNORED, base=config, options={**asked, **files})
        parsed = with_faults(parsed, faults)
        result, stopped_by = _run(parsed, held, Caller(False, on_step, quiet))
    pass_on(stopped_by)
    return result


def functions_given(
    reward: Reward | Sequence[Reward] | None,
    weights: Sequence[float] | None,
    tools: Tools | None,
) -> tuple[dict[str, Any], Held]:
    """What the configuration says of reward and tools, and what of them the program holds."""
    keys: dict[str, Any] = {}
    own = None
    if weights is not None and (isinstance(reward, str) or not isinstance(reward, Sequence)):
        raise ValueError(
            "reward_weights weigh several rewards: give reward=[…], or leave them out."
        )
    if isinstance(reward, str):
        keys["reward_model.name"] = reward
    elif names := _all_names(reward):
        keys["reward_model.functions"] = names
        keys["reward_model.weights"] = list(weights or ())
    elif reward is not None:
        own = _held_reward(reward, weights)
        keys["custom_reward_function.path"] = OF_PROGRAM
        keys["custom_reward_function.name"] = own.name
    if tools is None:
        return keys, Held(own)
    keys[f"{ROLLOUT}.multi_turn.enable"] = True
    if isinstance(tools, os.PathLike) or (isinstance(tools, str) and tools != "code_interpreter"):
        keys[f"{ROLLOUT}.multi_turn.tool_config_path"] = tools
        return keys, Held(own)
    if not isinstance(tools, str):
        keys[f"{ROLLOUT}.multi_turn.tool_config_path"] = OF_PROGRAM
    return keys, Held(own, None if isinstance(tools, str) else list(tools))


def _with_world(
    environment: str | Callable[..., Any] | None, keys: dict[str, Any], held: Held
) -> Held:
    """What the program holds, with the class of its environment; `keys` get its name."""
    if environment is None:
        return held
    if isinstance(environment, str):
        path, name = parts_of_name(environment)
        keys |= {f"{ENVIRONMENT_KEY}.path": path, f"{ENVIRONMENT_KEY}.name": name}
        return held
    name = getattr(environment, "__name__", type(environment).__name__)
    keys |= {f"{ENVIRONMENT_KEY}.path": OF_PROGRAM, f"{ENVIRONMENT_KEY}.name": name}
    return replace(held, environment=EnvironmentSource(name, own=environment))


def _with_loop(loop: str | Callable[..., Any] | None, keys: dict[str, Any], held: Held) -> Held:
    """What the program holds, with its loop; `keys` get its name."""
    if loop is None:
        return held
    if isinstance(loop, str):
        path, _, name = loop.rpartition("/")
        keys |= {f"{LOOP_KEY}.path": path or None, f"{LOOP_KEY}.name": name}
        return held
    name = getattr(loop, "__name__", type(loop).__name__)
    keys |= {f"{LOOP_KEY}.path": OF_PROGRAM, f"{LOOP_KEY}.name": name}
    return replace(held, loop=LoopSource(name, own=loop))


def _all_names(reward: Reward | Sequence[Reward] | None) -> list[str]:
    """Several rewards that all are named; none where the program holds one of them."""
    if not isinstance(reward, Sequence):
        return []
    names = [one for one in reward if isinstance(one, str)]
    return names if len(names) == len(reward) else []


def _held_reward(
    reward: Callable[..., Any] | Sequence[Reward],
    weights: Sequence[float] | None,
) -> RewardSource:
    """A function that the program holds, or several, of which some may be named."""
    if not isinstance(reward, Sequence):
        return own_reward(reward)
    sources = [
        find_reward(one, None, None) if isinstance(one, str) else own_reward(one) for one in reward
    ]
    return several(sources, weights or ())


def prompts_an_update(prompts: int) -> int:
    """Of a step's prompts, how many one optimizer step takes: the most that divide them evenly."""
    sizes = range(1, min(max(prompts, 1), MOST_PROMPTS_AN_UPDATE) + 1)
    return max(size for size in sizes if prompts % size == 0)


def _run(parsed: Parsed[RLConfig], held: Held, caller: Caller) -> tuple[Result, int | None]:
    """What the command does with a configuration: (what there is then, what stopped it)."""
    report = preflight(parsed, held=held)
    try:
        return carry_out(report, in_words, train, caller)
    except Refused:
        run_alone(close_tools(report.tools))  # which preflight started to try them
        raise
