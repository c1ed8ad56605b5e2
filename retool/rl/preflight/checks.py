"""Everything wrong with an RL run before it starts, at once: configuration, processes, model,
tools, reward, and every prompt.

It reads of weights only what tells them apart, and needs no GPU. The tools are started (a sandbox
that can't be is a fault) and kept for the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from retool.config import Fault, Parsed
from retool.data.read.library import Part
from retool.data.read.names import resolve_files
from retool.data.read.user_function import load_function
from retool.data.render.rendering import Rendering
from retool.metrics import missing_extras
from retool.model.rope import too_long_to_sample
from retool.perf import GIB
from retool.preflight.checks import check_run, notes_of
from retool.preflight.model_folder import check_ids, with_model, with_renderer
from retool.preflight.plan import RECOMPUTE, Choice, attempt, choose, gpu_memory, setting_of
from retool.preflight.resume import check_checkpoint, find_checkpoint, template_date
from retool.preflight.world import box_of, check_heads, read_world
from retool.rl.agent.tools.load import RunLimits, load_tools, make_tools
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.config import RLConfig
from retool.rl.config.data import DataConfig
from retool.rl.data import PromptOptions, load_prompts
from retool.rl.objective.user_functions import find_estimator, find_loss
from retool.rl.preflight.backends import backend_faults
from retool.rl.preflight.identity import PATH, with_identity
from retool.rl.preflight.interpreters import row_file_faults, sandbox_faults
from retool.rl.preflight.keys import LOSS_KEY, contradictions, notes
from retool.rl.preflight.memory import StepMemory
from retool.rl.preflight.plan import NOTHING_HELD, Held, Questions, RLReport, uses_reference
from retool.rl.preflight.reward import (
    ESTIMATOR_KEY,
    credit_faults,
    judge_faults,
    model_faults,
    reward_key,
    wanted_reward,
)
from retool.rl.preflight.servers import server_faults
from retool.rl.preflight.tool_turns import call_format, show_tool_turn
from retool.rl.preflight.trial import try_reward
from retool.rl.preflight.world import try_environment, with_environment, with_loop
from retool.rl.reward.calling import seen_by
from retool.rl.reward.source import RewardSource

ARR = "actor_rollout_ref."


def preflight(
    parsed: Parsed[RLConfig],
    planning: bool = False,
    environment: Mapping[str, str] | None = None,
    held: Held = NOTHING_HELD,
) -> RLReport:
    """Check everything. `planning` (`--check`) allows another number of GPUs than are here. `held`:
    functions of the program that asks, in the place of those that files have.
    """
    config = parsed.config
    # What is wrong with a key by itself is told once
    known = {fault.where for fault in parsed.faults} | parsed.meant
    faults = [
        *parsed.faults,
        *(fault for fault in contradictions(config) if fault.where not in known),
    ]
    faults += missing_extras(config.trainer.logger)
    launcher = os.environ if environment is None else environment
    box = box_of(config.trainer, planning, launcher)
    world, trouble = read_world(
        config.trainer.nnodes, config.trainer.n_gpus_per_node, planning, launcher
    )
    report = find_checkpoint(RLReport(config, world, faults=tuple(faults + trouble)))
    report = with_model(report, config.actor_rollout_ref.model.path)
    # Once a machine is enough for what asks other processes: the sandbox, the reward, servers.
    first = not int(launcher.get("LOCAL_RANK", 0))
    report = check_run(report, box, launcher)
    report = report.blame(
        *_engine_faults(report),
        *backend_faults(config, report.model, planning),
        *server_faults(config, reach=first),
    )
    report = with_environment(_with_objective(_with_renderer(report)), held)
    report = with_loop(report, held)
    report = _with_functions(report, first, held)
    report = _with_prompts(report)
    report = _with_trial(report).blame(*try_environment(report)) if first else report
    # Last: what the run is must be known before a checkpoint can be compared with it.
    report = check_checkpoint(with_identity(report))
    if report.faults or report.model is None:
        return report
    report = replace(report, choice=_choice(report))
    found = (
        *notes(config),
        *_notes(report),
        *notes_of(report, box, launcher, planning=planning),
    )
    return replace(report, notes=(*report.notes, *found))


def _with_renderer(report: RLReport) -> RLReport:
    """The report with the renderer, unless the model or its template has a fault."""
    data = report.config.data
    blamed = any(fault.where.startswith((PATH, "data.chat_template")) for fault in report.faults)
    if report.folder is None or blamed:
        return report
    rendering = Rendering(
        chat_template=data.chat_template,
        template_kwargs=data.apply_chat_template_kwargs,
        template_date=template_date(data.template_date, report.then),
    )
    report, renderer = with_renderer(report, rendering)
    return replace(report, renderer=renderer)


def _engine_faults(report: RLReport) -> Iterator[Fault]:
    """Faults of tensor-parallel sizes that don't fit the processes or the model, and of lengths
    beyond the model's rope.
    """
    tp = report.config.actor_rollout_ref.rollout.tensor_model_parallel_size
    heads = report.model.heads if report.model else None
    yield from check_heads(
        f"{ARR}rollout.tensor_model_parallel_size={tp}", tp, report.world.processes, heads
    )
    data = report.config.data
    longest = data.max_prompt_length + data.max_response_length
    if report.model and (problem := too_long_to_sample(report.model, longest)):
        yield Fault("data.max_response_length", problem)
    yield from _replay_faults(report)


def _replay_faults(report: RLReport) -> Iterator[Fault]:
    """Faults of a replay of experts that the model hasn't, or that several GPUs chose together."""
    rollout = report.config.actor_rollout_ref.rollout
    if report.model is None or not rollout.enable_rollout_routing_replay:
        return
    key = f"{ARR}rollout.enable_rollout_routing_replay=true"
    tp = rollout.tensor_model_parallel_size
    if report.model.experts is None:
        problem = f"a {report.model.family} model has no experts."
        yield Fault(key, problem, "Leave the key out.")
    elif tp > 1:
        problem = f"an engine of {tp} GPUs can't tell which of them computed a token."
        yield Fault(key, problem, f"Use {ARR}rollout.tensor_model_parallel_size=1.")


def _with_objective(report: RLReport) -> RLReport:
    """The report with the advantage estimator and the policy loss. A user's own are tried on
    made-up tokens.
    """
    faults = list[Fault]()
    estimator = report.config.algorithm.adv_estimator
    loss = report.config.actor_rollout_ref.actor.policy_loss.loss_mode
    known = {fault.where for fault in report.faults}
    if f"{ESTIMATOR_KEY}={estimator}" not in known:
        found = attempt(ESTIMATOR_KEY, lambda: find_estimator(estimator), faults)
        report = replace(report, estimator=found)
    if f"{LOSS_KEY}={loss}" not in known:
        report = replace(report, loss=attempt(LOSS_KEY, lambda: find_loss(loss), faults))
    return report.blame(*faults)


def _with_functions(report: RLReport, first: bool, held: Held) -> RLReport:
    """The report with the tools, started, and the reward, found. `first`: this is the machine's
    first process.
    """
    config = report.config
    faults = list[Fault]()
    multi = config.actor_rollout_ref.rollout.multi_turn
    tools: Sequence[AnyTool] = ()
    if multi.enable:
        where = f"{ARR}rollout.multi_turn.tool_config_path"
        limits = RunLimits(
            multi.tool_workers,
            multi.tool_timeout_seconds,
            multi.tool_isolation,
            multi.tool_session,
        )
        if held.tools is None:
            load = partial(load_tools, multi.tool_config_path, limits, multi.tools or ())
            tools = attempt(where, load, faults) or ()
        else:
            tools = attempt("tools", lambda: make_tools(held.tools or (), limits), faults) or ()
    faults += sandbox_faults(tools, first)

    def find() -> RewardSource:
        source = held.reward or wanted_reward(config, in_world=report.environment is not None)
        sees.extend(seen_by(source.load()))
        return source

    sees = list[str]()
    where = held.reward.key if held.reward else reward_key(config)
    reward = attempt(where, find, faults)
    faults += credit_faults(config, report.estimator, reward)
    faults += judge_faults(config, reward)
    faults += model_faults(config, reward)
    return replace(report.blame(*faults), tools=tuple(tools), reward=reward, sees=tuple(sees))


def _with_prompts(report: RLReport) -> RLReport:
    config = report.config
    faults = list[Fault]()
    if report.renderer is None or any(
        fault.where.endswith("tool_config_path") for fault in report.faults
    ):
        return report.blame(*_file_faults(config.data))
    attempt("data.chat_template", lambda: show_tool_turn(report), faults)
    report = replace(report, calls=call_format(report, faults))
    train = _read(
        report, config.data.train_files, "data.train_files", config.data.train_max_samples, faults
    )
    val = _read(
        report, config.data.val_files or (), "data.val_files", config.data.val_max_samples, faults
    )
    report = replace(report.blame(*faults), train=train, val=val)
    report = report.blame(*_id_faults(report))
    report = report.blame(*row_file_faults(report))
    if train is not None and report.steps == 0:
        problem = (
            f"is more than the {len(train.prompts)} prompts of {config.trainer.total_epochs} "
            "epoch(s): there is no full batch."
        )
        report = report.blame(
            Fault(
                f"data.train_batch_size={config.data.train_batch_size}",
                problem,
                "Lower it, or train more epochs.",
            )
        )
    return report


def _with_trial(report: RLReport) -> RLReport:
    """The report with the faults of asking the reward once for each data source."""
    questions = [part.prompts for part in (report.train, report.val) if part is not None]
    if report.reward is None or not questions:
        return report
    prompts = [prompt for part in questions for prompt in part]
    wish = report.config.algorithm.filter_groups
    metric = wish.metric if wish.enable else None
    return report.blame(*try_reward(report.reward, report.config.reward_model, prompts, metric))


def _id_faults(report: RLReport) -> Iterator[Fault]:
    """Faults of tokens that the model's embedding has no row for: in a prompt, or possibly in a
    tool's answer.
    """
    for key, questions in (("data.train_files", report.train), ("data.val_files", report.val)):
        prompts = [] if questions is None else questions.prompts
        highest = max(prompts, key=lambda prompt: int(prompt.ids.max()), default=None)
        if highest is not None:
            yield from check_ids(
                report, int(highest.ids.max()), key, str(highest.extra_info.get("row", "a prompt"))
            )
    if report.tools and report.renderer is not None:
        yield from check_ids(
            report, max(report.renderer.tokenizer.get_vocab().values()), PATH, "the tokenizer"
        )


def _read(
    report: RLReport, files: Sequence[str], where: str, limit: int, faults: list[Fault]
) -> Questions | None:
    data = report.config.data
    renderer = report.renderer
    assert renderer is not None
    if not files:
        return None
    schemas = [tool.schema for tool in report.tools] or None
    in_a_world = report.environment is not None or report.loop is not None
    options = PromptOptions(
        prompt_key=data.prompt_key,
        answer_format=data.answer_format,
        max_length=data.max_prompt_length,
        filter_overlong=data.filter_overlong_prompts,
        truncation=data.truncation,
        max_samples=limit,
        needs_truth=report.reward is None or report.reward.needs_truth,
        keeps_rows="row" in report.sees or in_a_world,
    )

    def read() -> Questions:
        path = data.custom_cls.path
        name = data.custom_cls.name
        rows = load_function(path, name) if path is not None and name is not None else None
        found = _found(data, files, where)
        return Questions(*load_prompts(found, renderer, schemas, options, rows))

    try:
        return read()
    except (ValueError, OSError) as error:
        faults += [Fault(where, line) for line in str(error).splitlines()]
        return None


def _found(data: DataConfig, files: Sequence[str], where: str) -> list[str]:
    """The files that the names of a key mean. ValueError where one means none."""
    own = data.custom_cls.path is not None and data.custom_cls.name is not None
    part = part_of(data, where)
    return [file for entry in files for file in resolve_files(entry, own, part)]


def _file_faults(data: DataConfig) -> list[Fault]:
    """What can be said of the data without a tokenizer: its files are there, or they aren't."""
    faults = list[Fault]()
    for where, files in (
        ("data.train_files", data.train_files),
        ("data.val_files", data.val_files or ()),
    ):
        attempt(where, partial(_found, data, files, where), faults)
    return faults


def part_of(data: DataConfig, files_key: str) -> Part:
    """Which split and configuration `data.train_files` or `data.val_files` are, of several."""
    if files_key == "data.train_files":
        return Part(data.train_split, data.name, "data.train_split")
    return Part(data.val_split, data.name, "data.val_split")


def _choice(report: RLReport) -> Choice:
    """The recomputation that the update's token budget needs, and the memory that it is predicted
    to take.
    """
    config = report.config
    model = report.model
    assert model is not None
    actor = config.actor_rollout_ref.actor
    longest = config.data.max_prompt_length + config.data.max_response_length
    # A rank's share of the longest trajectory, rounded up.
    longest = -(-longest // actor.ulysses_sequence_parallel_size)
    tokens = (
        actor.ppo_max_token_len_per_gpu
        if actor.use_dynamic_bsz
        else (actor.ppo_micro_batch_size_per_gpu or 1) * longest
    )
    asked = RECOMPUTE[config.actor_rollout_ref.model.enable_gradient_checkpointing]
    offload = config.actor_rollout_ref.model.activation_offload
    memory = gpu_memory(report.options)
    # The engine wants the room
    setting = replace(setting_of(report.options, report.world), may_stay=False)
    return choose(model, setting, longest, tokens, asked, memory, offload)


def _notes(report: RLReport) -> list[str]:
    config = report.config
    model = report.model
    assert model is not None and report.choice is not None
    longest = config.data.max_prompt_length + config.data.max_response_length
    found = []
    if 0 < model.max_position < longest:
        found.append(
            f"prompt and response may have {longest} tokens, more than the {model.max_position} "
            "positions the model was made for."
        )
    if report.choice.fits is False:
        found.append(
            "the update may not fit: lower ppo_max_token_len_per_gpu, or raise "
            "ulysses_sequence_parallel_size."
        )
    memory = report.memory
    if memory.fits is False and report.choice.fits:
        found.append(_too_much(memory, longest))
    if config.actor_rollout_ref.ref.param_offload and uses_reference(config):
        found.append("ref.param_offload: the reference stays on the GPU; its shard is small.")
    return found


def _too_much(memory: StepMemory, length: int) -> str:
    """What the engine needs beside training and may not find, for sequences of `length` tokens,
    with the way out.
    """
    phase, peak = max(memory.phases.items(), key=lambda item: item[1])
    if memory.sequences < 1:
        share = f"{memory.cache / GIB:.1f} GiB, {memory.sequences:.2f} of one"
        what = f"the engine's cache may have no room for a sequence of {length:,} tokens ({share})"
    else:
        what = f"{phase} may take {peak / GIB:.1f} GiB and what CUDA takes, which don't fit"
    offload = (
        f"{ARR}actor.fsdp_config.param_offload=true {ARR}actor.fsdp_config.optimizer_offload=true"
    )
    return (
        f"{what}: try {offload}, {ARR}rollout.free_cache_engine=true, a higher "
        f"{ARR}rollout.tensor_model_parallel_size, or a lower data.max_response_length."
    )
