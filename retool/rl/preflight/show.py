"""The start-up plan in plain words, with the arithmetic of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from retool.engine.backend import MEANING_NATIVE, meaning
from retool.engine.vllm.start import version as vllm_version
from retool.model.config import ModelConfig
from retool.perf import GIB
from retool.preflight.show import (
    expert_words,
    memory_words,
    model_words,
    traffic_words,
    written_words,
)
from retool.rl.agent.environments.load import EnvironmentSource
from retool.rl.agent.formats.table import AUTO
from retool.rl.preflight.memory import SERVER
from retool.rl.preflight.plan import RLReport
from retool.rl.reward.builtin import default_name
from retool.rl.reward.source import RewardSource


def in_words(report: RLReport) -> Iterator[tuple[str, str]]:
    """(topic, text) of what the run will do."""
    wanted = report.config.actor_rollout_ref
    name = wanted.rollout.name
    if name == SERVER:
        yield "engine", _server_words(report)
    elif name in MEANING_NATIVE:
        yield "engine", _engine_words(name, report.model)
    processes = report.world.processes
    assert report.train is not None
    sp = wanted.actor.ulysses_sequence_parallel_size
    tp = wanted.rollout.tensor_model_parallel_size
    yield "model", f"{report.folder}: {model_words(report)}"
    yield (
        "processes",
        (
            f"{processes}: training {processes // sp} × {sp} sequence-parallel"
            f"{expert_words(report.options)}, {processes // tp} engine(s) of {tp}"
        ),
    )
    yield (
        "prompts",
        (
            f"training: {report.train.said.sentence()}\nvalidation: "
            f"{report.val.said.sentence() if report.val else 'none'}"
        ),
    )
    yield "reward", _reward_words(report)
    yield "tools", _tool_words(report)
    if report.environment is not None:
        yield "environment", _environment_words(report.environment)
    if report.loop is not None:
        where = "the program" if report.loop.path is None else report.loop.path
        yield "loop", f"{report.loop.name} in {where} plays every trajectory"
    if report.config.trainer.val_only:
        yield "schedule", "a validation, and nothing is trained"
    else:
        yield "a step", _step_words(report)
        yield "schedule", _schedule_words(report)
    yield "memory", _memory_words(report)
    if network := _network_words(report):
        yield "network", network
    yield "written", written_words(report, ", report/")


def _engine_words(name: str, model: ModelConfig | None) -> str:
    """What stands behind the name of another engine, and how to have that one."""
    stands_for = meaning(name, model)
    if stands_for == "hf":
        return (
            "rollout.name=hf: transformers' continuous batching samples in the training processes, "
            "with the trainer's weights."
        )
    if stands_for == "vllm":
        return (
            f"rollout.name=vllm: vLLM {vllm_version()} samples in the training processes. Use "
            "rollout.name=native for retool's own engine."
        )
    said = f"rollout.name={name} means native here: the in-process engine samples."
    server = "start its server, and use rollout.name=server."
    if name == "vllm":
        return f"{said} For vLLM itself install it (pip install 'retool-train[vllm]'), or {server}"
    return said if name == "hf" else f"{said} For {name} itself {server}"


def _server_words(report: RLReport) -> str:
    """Which servers sample, and how the weights get there."""
    rollout = report.config.actor_rollout_ref.rollout
    folder = rollout.server.weights_dir or report.config.trainer.default_local_dir
    return (
        f"rollout.name=server: {', '.join(rollout.server.urls)} sample(s); every step's weights go there "
        f"by way of {folder}, which they must see."
    )


def _tool_words(report: RLReport) -> str:
    if report.calls is None:
        return "none"
    name, _ = report.calls
    wanted = report.config.actor_rollout_ref.rollout.multi_turn.format
    why = " (of the chat template)" if wanted == AUTO else ""
    names = [tool.name for tool in report.tools]
    names += ["what the environment has"] if report.environment is not None else []
    return f"{', '.join(names)}; calls are read as {name}{why}"


def _environment_words(source: EnvironmentSource) -> str:
    where = f" in {source.path}" if source.path is not None else ""
    if source.own is not None:
        where = " in the program"
    made_with = ", ".join(f"{key}={value}" for key, value in source.kwargs.items())
    if source.sandboxed is not None:
        where += ", in the sandbox"
    return f"{source.name}{where}" + (f", made with {made_with}" if made_with else "")


def _memory_words(report: RLReport) -> str:
    memory = report.memory
    data = report.config.data
    if report.config.actor_rollout_ref.rollout.name == SERVER:
        return memory_words(report, memory.phases, memory.fits)
    room = f"{memory.sequences:,.1f}".removesuffix(".0")
    engine = (
        f"engine: weights {memory.weights / GIB:.2f} GiB, cache {memory.cache / GIB:.2f} GiB with "
        f"room for {room} sequences of {data.max_prompt_length + data.max_response_length:,} "
        f"tokens; {'freed for' if memory.freed else 'kept during'} the update"
    )
    return f"{memory_words(report, memory.phases, memory.fits)}\n{engine}"


def _network_words(report: RLReport) -> str:
    """Of an update whose answers are all as long as they may be."""
    config = report.config
    actor = config.actor_rollout_ref.actor
    document = config.data.max_prompt_length + config.data.max_response_length
    answers = actor.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n
    assert report.choice is not None
    # An update reduces its gradients after each micro-batch
    unheld = replace(report, choice=replace(report.choice, hold=False))
    return traffic_words(unheld, answers * document, document)


def _reward_words(report: RLReport) -> str:
    source = report.reward
    assert source is not None and report.train is not None
    if source.name == "default" and not source.is_users:
        sources = {**report.train.said.sources, **(report.val.said.sources if report.val else {})}
        return "by data source: " + ", ".join(f"{name} → {default_name(name)}" for name in sources)
    names = [_function_words(part) for part in source.parts or (source,)]
    words = " + ".join(names)
    return f"{words}; it sees {', '.join(report.sees)}" if report.sees else words


def _function_words(source: RewardSource) -> str:
    """A reward function, where it is, and its weight among several."""
    where = "the program" if source.own is not None else source.path
    name = source.name if where is None else f"{source.name} in {where}"
    return name if source.weight == 1 else f"{source.weight:g} × {name}"


def _schedule_words(report: RLReport) -> str:
    updates = report.steps * report.updates_per_step
    rate = report.config.actor_rollout_ref.actor.optim.lr
    return f"{report.steps:,} steps, {updates:,} optimizer steps at {rate:g}"


def _step_words(report: RLReport) -> str:
    config = report.config
    updates = report.updates_per_step
    prompts = config.data.train_batch_size
    n = config.actor_rollout_ref.rollout.n
    actor = config.actor_rollout_ref.actor
    tokens = prompts * n * config.data.max_response_length
    return (
        f"{prompts:,} prompts × {n} samples = {prompts * n:,} trajectories, at most {tokens:,} response "
        "tokens\n"
        f"{updates} optimizer step(s) of {actor.ppo_mini_batch_size * n:,} trajectories, "
        f"{actor.ppo_max_token_len_per_gpu:,} tokens per GPU and micro-batch; "
        f"{config.algorithm.adv_estimator}, {actor.policy_loss.loss_mode}, {report.aggregation}"
    )
