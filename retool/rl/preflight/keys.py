"""Keys that are wrong, or without effect, only in combination."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from retool.config import Fault, nearest, options
from retool.rl.agent.formats.table import problem_of_name
from retool.rl.config import RLConfig, run_options
from retool.rl.config.actor import ActorConfig
from retool.rl.config.rollout import LEAST_TEMPERATURE
from retool.rl.objective.advantages import ESTIMATORS
from retool.rl.objective.losses import LOSSES
from retool.rl.objective.user_functions import own_function
from retool.rl.preflight.reward import ESTIMATOR_KEY, several_faults

_ARR = "actor_rollout_ref"
MOST_TIMES_PUBLISHED = 25  # a clip ratio, of what the loss was published with
LOSS_KEY = f"{_ARR}.actor.policy_loss.loss_mode"
FORMAT_KEY = f"{_ARR}.rollout.multi_turn.format"
# Estimators that exist elsewhere
SECOND_MODEL = {"gae": "a value model", "remax": "a greedy rollout of its own for each prompt"}


def contradictions(config: RLConfig) -> Iterator[Fault]:
    """Faults that only several keys together make, and what no single type can say."""
    yield from _estimator(config.algorithm.adv_estimator)
    yield from _known(LOSS_KEY, config.actor_rollout_ref.actor.policy_loss.loss_mode, LOSSES)
    yield from _format(config.actor_rollout_ref.rollout.multi_turn.format)
    yield from _aggregation(config)
    yield from _mini_batches(config)
    yield from _sampling(config)
    yield from _files(config)
    yield from _functions(config)
    yield from options.contradictions(run_options(config))
    yield from options.date_faults(config.data.template_date)


def notes(config: RLConfig) -> Iterator[str]:
    """Notes on keys whose value means something else here."""
    rollout = config.actor_rollout_ref.rollout
    actor = config.actor_rollout_ref.actor
    algorithm = config.algorithm
    if algorithm.rollout_correction.bypass_mode and algorithm.rollout_correction.rollout_is:
        yield "with rollout_correction.bypass_mode the weights of rollout_is only undo top-p and top-k."
    yield from _clip_notes(actor)
    multi = rollout.multi_turn
    for key in ("tool_config_path", "tools"):
        if getattr(multi, key) is not None and not multi.enable:
            yield (
                f"rollout.multi_turn.{key} is given, but multi_turn.enable is false: no tool is called."
            )
    reward = config.reward_model
    if reward.concurrent and (reward.network or reward.environment):
        yield (
            "reward_model.network and .environment have no effect with reward_model.concurrent=true: the "
            "function has the run's own."
        )
    if config.data.gen_batch_size is not None and not algorithm.filter_groups.enable:
        yield "data.gen_batch_size has no effect without algorithm.filter_groups.enable=true."
    if config.trainer.test_freq > 0 and not config.data.val_files:
        yield "there is no data.val_files: trainer.test_freq validates nothing."
    overlong = reward.overlong_buffer
    if overlong.enable and config.data.max_response_length < overlong.len:
        yield (
            "reward_model.overlong_buffer.len is more than data.max_response_length: every response is "
            "punished."
        )


def _estimator(name: str) -> Iterator[Fault]:
    where = f"{ESTIMATOR_KEY}={name}"
    if name in SECOND_MODEL:
        problem = f"needs {SECOND_MODEL[name]}, which isn't built."
        yield Fault(where, problem, f"Use {', '.join(ESTIMATORS)}.")
    else:
        yield from _known(ESTIMATOR_KEY, name, ESTIMATORS)


def _known(key: str, name: str, table: Mapping[str, object]) -> Iterator[Fault]:
    """A fault of a name that is neither in the table nor a user's file and function."""
    if name in table or own_function(name) is not None:
        return
    near = nearest(name, table)
    way_out = f"Did you mean {near}?" if near else f"Use {', '.join(table)}, or file.py/function."
    yield Fault(f"{key}={name}", "is not known.", way_out)


def _format(name: str) -> Iterator[Fault]:
    """A fault of a format of calls that doesn't exist."""
    way_out = problem_of_name(name)
    if way_out is not None:
        yield Fault(f"{FORMAT_KEY}={name}", "is not known.", way_out)


def _clip_notes(actor: ActorConfig) -> Iterator[str]:
    """Notes on clips that suit token ratios, given to a loss whose ratios vary much less."""
    mode = actor.policy_loss.loss_mode
    clip = LOSSES[mode].published_clip if mode in LOSSES else None
    # A note and no fault: somebody may mean it.
    if clip is not None and actor.clip_ratio_high > MOST_TIMES_PUBLISHED * clip.high:
        yield (
            f"actor.clip_ratio_low, _high are {actor.clip_ratio_low:g} and "
            f"{actor.clip_ratio_high:g}: {mode}'s ratios are of whole sequences and stay near 1; "
            f"its paper clips at {clip.low:g} and {clip.high:g}. Wider ones clip next to nothing."
        )


def _aggregation(config: RLConfig) -> Iterator[Fault]:
    """A fault of a loss that is combined with another mean than it was published with."""
    actor = config.actor_rollout_ref.actor
    mode = actor.policy_loss.loss_mode
    published = LOSSES[mode].aggregation if mode in LOSSES else None
    if published and actor.loss_agg_mode not in (None, published):
        yield Fault(
            f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode}",
            f"isn't {mode}: as published, its tokens are averaged by {published}.",
            f"Leave it out, or use policy_loss.loss_mode=vanilla with {actor.loss_agg_mode}.",
        )


def _mini_batches(config: RLConfig) -> Iterator[Fault]:
    """Faults of steps that don't divide into whole mini-batches, and of micro-batches without a
    size.
    """
    actor = config.actor_rollout_ref.actor
    prompts = config.data.train_batch_size
    mini = actor.ppo_mini_batch_size
    where = f"{_ARR}.actor.ppo_mini_batch_size={mini}"
    if mini > prompts:
        problem = f"is more prompts than data.train_batch_size={prompts}."
        yield Fault(where, problem, f"Use at most {prompts}.")
    elif prompts % mini:
        divisors = [n for n in range(1, prompts + 1) if prompts % n == 0]
        nearest_two = sorted(divisors, key=lambda n: abs(n - mini))[:2]
        way_out = f"Use {' or '.join(map(str, sorted(nearest_two)))}."
        yield Fault(where, f"does not divide data.train_batch_size={prompts}.", way_out)
    if not actor.use_dynamic_bsz and actor.ppo_micro_batch_size_per_gpu is None:
        yield Fault(
            f"{_ARR}.actor.use_dynamic_bsz=false",
            f"needs {_ARR}.actor.ppo_micro_batch_size_per_gpu.",
            "Give it, or use use_dynamic_bsz=true.",
        )


def _sampling(config: RLConfig) -> Iterator[Fault]:
    """Faults of settings with which there are no samples, or nothing can be learnt from them."""
    rollout = config.actor_rollout_ref.rollout
    name = config.algorithm.adv_estimator
    estimator = ESTIMATORS.get(name)
    alone = f"{_ARR}.rollout.n=1"
    # A group of one has an advantage of its whole score, whatever the others did: no comparison is
    # left.
    if rollout.n == 1 and estimator is not None and estimator.compares_samples:
        yield Fault(
            alone,
            f"gives {ESTIMATOR_KEY}={name} nothing to compare with.",
            "Use 2 or more, or reinforce_plus_plus.",
        )
    if rollout.n == 1 and config.algorithm.filter_groups.enable:
        problem = "leaves filter_groups no group whose scores differ."
        yield Fault(alone, problem, "Use 2 or more.")
    top_k = {"top_k": rollout.top_k, "val_kwargs.top_k": rollout.val_kwargs.top_k}
    for key, value in top_k.items():
        if value == 0:
            where = f"{_ARR}.rollout.{key}=0"
            yield Fault(where, "leaves no token to sample.", "Use -1 for all of them.")
    cool = rollout.val_kwargs.temperature
    if 0 < cool < LEAST_TEMPERATURE:
        where = f"{_ARR}.rollout.val_kwargs.temperature={cool:g}"
        way_out = f"Use 0 for the likeliest token, or {LEAST_TEMPERATURE:g} or more."
        yield Fault(where, "is so near 0 that logits become infinite.", way_out)
    if config.actor_rollout_ref.actor.clip_ratio_low >= 1:
        problem = "must be below 1: a ratio is never negative."
        yield Fault(f"{_ARR}.actor.clip_ratio_low", problem, "DAPO uses 0.2.")


def _files(config: RLConfig) -> Iterator[Fault]:
    """Faults of runs without questions."""
    if not config.data.train_files:
        way_out = "Give a .parquet or .jsonl file, a folder, a glob, or a list of these."
        yield Fault("data.train_files", "names no file.", way_out)
    if config.trainer.val_only and not config.data.val_files:
        yield Fault("trainer.val_only=true", "has nothing to validate on.", "Give data.val_files.")


def _functions(config: RLConfig) -> Iterator[Fault]:
    """Faults of a user's functions that are given in half, or twice."""
    rows = config.data.custom_cls
    if (rows.path is None) != (rows.name is None):
        way_out = "Give the Python file and the function in it, or neither."
        yield Fault("data.custom_cls", "needs both path and name.", way_out)
    reward = config.custom_reward_function
    settings = config.reward_model
    if reward.path is None and reward.name not in (None, "compute_score"):
        problem = "has a name but no path."
        yield Fault("custom_reward_function", problem, "Give the Python file too.")
    yield from several_faults(config)
    named = (settings.name or "", *settings.functions)
    is_own = reward.path is not None or any("/" in name for name in named)
    if settings.concurrent and not is_own:
        problem = "is for an async function of yours."
        way_out = "Give custom_reward_function.path, or leave it out."
        yield Fault("reward_model.concurrent=true", problem, way_out)
    if reward.path is not None and settings.name is not None:
        problem = "and custom_reward_function.path are both given."
        yield Fault("reward_model.name", problem, "Leave one of them out.")
