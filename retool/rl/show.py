"""The start-up plan in plain words, with the arithmetic of a step."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from retool.perf import GIB
from retool.preflight import show_faults, show_plan
from retool.rl.preflight import Report
from retool.rl.rewards import default_name


def show(report: Report, console: Console | None = None) -> None:
    """Print the faults, or else the plan and its notes."""
    console = console or Console(highlight=False)
    if report.faults:
        show_faults(report.faults, console)
    else:
        show_plan(list(in_words(report)), report.notes, console)


def in_words(report: Report) -> Iterator[tuple[str, str]]:
    """(topic, text) of what the run will do."""
    config, world, model, choice = report.config, report.world, report.model, report.choice
    assert model is not None and choice is not None and report.train is not None
    actor = config.actor_rollout_ref.actor
    sp, tp, processes = actor.ulysses_sequence_parallel_size, config.actor_rollout_ref.rollout.tensor_model_parallel_size, world.processes
    yield "model", f"{report.folder}: {model.family}, {model.layers} layers, {model.heads}/{model.kv_heads} heads of {model.head_dim}"
    yield "processes", f"{processes}: training {processes // sp} × {sp} sequence-parallel, {processes // tp} engine(s) of {tp}"
    yield "prompts", f"training: {report.train.said.sentence()}\nvalidation: {report.val.said.sentence() if report.val else 'none'}"
    yield "reward", _reward_words(report)
    yield "tools", ", ".join(tool.name for tool in report.tools) or "none"
    yield "a step", _step_words(report)
    yield "schedule", f"{report.steps:,} steps, {report.steps * report.updates_per_step:,} optimizer steps at {actor.optim.lr:g}"
    yield "memory", f"{choice.prediction.peak / GIB:.2f} GiB predicted for the update; recomputation: {choice.recompute}"
    yield "written", f"{config.trainer.default_local_dir}: metrics.jsonl, config.yaml, report/, global_step_N/actor"


def _reward_words(report: Report) -> str:
    source = report.reward
    assert source is not None and report.train is not None
    if source.name == "default" and source.path is None:
        sources = {**report.train.said.sources, **(report.val.said.sources if report.val else {})}
        return "by data source: " + ", ".join(f"{name} → {default_name(name)}" for name in sources)
    return source.name if source.path is None else f"{source.name} in {source.path}"


def _step_words(report: Report) -> str:
    config, updates = report.config, report.updates_per_step
    prompts, n, actor = config.data.train_batch_size, config.actor_rollout_ref.rollout.n, config.actor_rollout_ref.actor
    tokens = prompts * n * config.data.max_response_length
    return (
        f"{prompts:,} prompts × {n} samples = {prompts * n:,} trajectories, at most {tokens:,} response tokens\n"
        f"{updates} optimizer step(s) of {actor.ppo_mini_batch_size * n:,} trajectories, {actor.ppo_max_token_len_per_gpu:,} tokens "
        f"per GPU and micro-batch; {config.algorithm.adv_estimator}, {actor.policy_loss.loss_mode}, {actor.loss_agg_mode}"
    )
