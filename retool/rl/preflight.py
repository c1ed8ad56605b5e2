"""Everything wrong with an RL run before it starts, at once: configuration, processes, model, tools, reward, and every prompt.

It reads no weights and needs no GPU. The tools are started (a sandbox that can't be is a fault) and kept for the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from retool.config import Fault, Parsed
from retool.data.chat import Renderer, load_tokenizer
from retool.data.files import load_function, resolve_files
from retool.memory import Choice, Recompute, Setting, choose
from retool.metrics import missing_extras
from retool.model.config import ModelConfig
from retool.model.hub import find_model
from retool.preflight import (
    World,
    attempt,
    check_device,
    check_mesh,
    check_model,
    check_output,
    check_tokenizer,
    device_memory_gib,
    read_world,
)
from retool.rl.config import RLConfig
from retool.rl.data import PromptOptions, PromptReport, load_prompts
from retool.rl.keys import contradictions, notes
from retool.rl.rewards import RewardSource, find_reward
from retool.rl.tools import Tool, load_tools
from retool.rl.types import Prompt

ARR = "actor_rollout_ref."
PATH = ARR + "model.path"
RECOMPUTE: dict[bool | str, Recompute | None] = {True: "full", False: "none", "selective": "selective", "auto": None}


@dataclass(frozen=True)
class Questions:
    """The prompts of training or validation, and what became of the rows."""

    prompts: list[Prompt]
    said: PromptReport


@dataclass(frozen=True)
class Report:
    """What preflight found. Without faults everything but `val` is there."""

    config: RLConfig
    world: World
    folder: Path | None = None
    model: ModelConfig | None = None
    renderer: Renderer | None = None
    tools: tuple[Tool, ...] = ()
    reward: RewardSource | None = None
    train: Questions | None = None
    val: Questions | None = None
    choice: Choice | None = None
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()

    def blame(self, *faults: Fault) -> Report:
        """With more faults."""
        return replace(self, faults=(*self.faults, *faults))

    @property
    def steps(self) -> int:
        """Training steps of the whole run."""
        if self.config.trainer.total_training_steps is not None:
            return self.config.trainer.total_training_steps
        prompts = len(self.train.prompts) if self.train else 0
        return prompts * self.config.trainer.total_epochs // self.config.data.train_batch_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a full step."""
        actor = self.config.actor_rollout_ref.actor
        return -(-self.config.data.train_batch_size // actor.ppo_mini_batch_size) * actor.ppo_epochs


def preflight(parsed: Parsed[RLConfig], planning: bool = False, environment: Mapping[str, str] | None = None) -> Report:
    """Check everything. `planning` (`--check`) allows another number of GPUs than are here."""
    config = parsed.config
    faults = [*parsed.faults, *contradictions(config), *missing_extras(config.trainer.logger)]
    launcher = os.environ if environment is None else environment
    world, trouble = read_world(config.trainer.nnodes, config.trainer.n_gpus_per_node, planning, launcher)
    report = _with_model(Report(config, world, faults=tuple(faults + trouble)))
    report = report.blame(*_layout_faults(report, planning), *check_output(Path(config.trainer.default_local_dir), 0))
    report = _with_functions(report)
    report = _with_prompts(report)
    if report.model is not None and not report.faults:
        report = replace(report, choice=_choice(report))
    said = () if report.faults else (*notes(config), *_notes(report))
    return replace(report, faults=tuple(dict.fromkeys(report.faults)), notes=said)


def _with_model(report: Report) -> Report:
    config, faults = report.config, list[Fault]()
    name, template = config.actor_rollout_ref.model.path, config.data.chat_template
    folder = attempt(PATH, lambda: find_model(name), faults) if name else None
    if folder is None:
        return report.blame(*faults)
    model, faults = check_model(folder, PATH)
    trouble = list(check_tokenizer(folder, template, PATH))
    report = replace(report.blame(*faults, *trouble), folder=folder, model=model)
    if faults or trouble:
        return report
    remote = config.actor_rollout_ref.model.trust_remote_code

    def make() -> Renderer:
        return Renderer(load_tokenizer(str(folder), remote), template, config.data.apply_chat_template_kwargs)

    renderer = attempt(PATH, make, faults)
    return replace(report.blame(*faults), renderer=renderer)


def _layout_faults(report: Report, planning: bool) -> list[Fault]:
    """Sizes that don't fit the processes or the model, with the nearest that do."""
    actor, tp = report.config.actor_rollout_ref.actor, report.config.actor_rollout_ref.rollout.tensor_model_parallel_size
    heads, processes = report.model.heads if report.model else None, report.world.processes
    found = check_mesh(processes, actor.ulysses_sequence_parallel_size, actor.fsdp_config.fsdp_size, heads)
    renamed = [replace(f, where=ARR + "actor." + f.where.removeprefix("model."), remedy=f.remedy) for f in found]
    legal = [n for n in range(1, processes + 1) if processes % n == 0 and (heads is None or n <= heads)]
    where = f"{ARR}rollout.tensor_model_parallel_size={tp}"
    if processes % tp:
        remedy = f"Use {' or '.join(map(str, legal))}."
        renamed.append(Fault(where, f"does not fit {processes} processes: it must divide the world size.", remedy))
    elif heads is not None and tp > heads:
        renamed.append(Fault(where, f"exceeds the model's {heads} query heads.", f"Use {' or '.join(map(str, legal))}."))
    attn = report.config.actor_rollout_ref.model.attn
    return [*renamed, *check_device(report.config.trainer.device, report.world.per_node, attn, planning)]


def _with_functions(report: Report) -> Report:
    """Tools started, the reward found."""
    config, faults = report.config, list[Fault]()
    multi, custom = config.actor_rollout_ref.rollout.multi_turn, config.custom_reward_function
    tools: Sequence[Tool] = ()
    if multi.enable:
        where = f"{ARR}rollout.multi_turn.tool_config_path"
        tools = attempt(where, lambda: load_tools(multi.tool_config_path), faults) or ()

    def find() -> RewardSource:
        source = find_reward(config.reward_model.name, custom.path, custom.name)
        source.load()
        return source

    reward = attempt("custom_reward_function" if custom.path else "reward_model.name", find, faults)
    return replace(report.blame(*faults), tools=tuple(tools), reward=reward)


def _with_prompts(report: Report) -> Report:
    config, faults = report.config, list[Fault]()
    if report.renderer is None or any(fault.where.endswith("tool_config_path") for fault in report.faults):
        return report
    train = _read(report, config.data.train_files, "data.train_files", config.data.train_max_samples, faults)
    val = _read(report, config.data.val_files or (), "data.val_files", config.data.val_max_samples, faults)
    report = replace(report.blame(*faults), train=train, val=val)
    if train is not None and report.steps == 0:
        problem = f"is more than the {len(train.prompts)} prompts of {config.trainer.total_epochs} epoch(s): there is no full batch."
        report = report.blame(Fault(f"data.train_batch_size={config.data.train_batch_size}", problem, "Lower it, or train more epochs."))
    return report


def _read(report: Report, files: Sequence[str], where: str, limit: int, faults: list[Fault]) -> Questions | None:
    data, renderer = report.config.data, report.renderer
    assert renderer is not None
    if not files:
        return None
    schemas = [tool.schema for tool in report.tools] or None
    options = PromptOptions(
        data.prompt_key, data.answer_format, data.max_prompt_length, data.filter_overlong_prompts, data.truncation, limit
    )

    def read() -> Questions:
        path, name = data.custom_cls.path, data.custom_cls.name
        rows = load_function(path, name) if path is not None and name is not None else None
        found = [file for entry in files for file in resolve_files(entry, any_suffix=rows is not None)]
        return Questions(*load_prompts(found, renderer, schemas, options, rows))

    return attempt(where, read, faults)


def setting_of(config: RLConfig, world: World) -> Setting:
    """What of the configuration decides the memory of the update."""
    actor = config.actor_rollout_ref.actor
    fsdp = actor.fsdp_config
    cuda = config.trainer.device != "cpu" and (torch.cuda.is_available() or config.trainer.device_memory_gb is not None)
    compute = ("bf16" if cuda else fsdp.model_dtype) if fsdp.param_dtype == "auto" else fsdp.param_dtype
    return Setting(
        shards=world.processes if fsdp.fsdp_size < 1 else fsdp.fsdp_size, sp=actor.ulysses_sequence_parallel_size,
        master=fsdp.model_dtype, compute=compute, reduce=fsdp.reduce_dtype, param_offload=fsdp.param_offload,
        optimizer_offload=fsdp.optimizer_offload, reshard=fsdp.reshard_after_forward,
    )  # fmt: skip


def _choice(report: Report) -> Choice:
    """The recomputation that the update's token budget needs, and the memory it is predicted to take."""
    config, model = report.config, report.model
    assert model is not None
    actor, longest = config.actor_rollout_ref.actor, config.data.max_prompt_length + config.data.max_response_length
    longest = -(-longest // actor.ulysses_sequence_parallel_size)
    tokens = actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else (actor.ppo_micro_batch_size_per_gpu or 1) * longest
    memory = device_memory_gib(config.trainer.device_memory_gb, config.trainer.device)
    asked = RECOMPUTE[config.actor_rollout_ref.model.enable_gradient_checkpointing]
    return choose(model, setting_of(config, report.world), longest, tokens, asked, memory)


def _notes(report: Report) -> list[str]:
    config, model = report.config, report.model
    assert model is not None and report.choice is not None
    longest, found = config.data.max_prompt_length + config.data.max_response_length, []
    if 0 < model.max_position < longest:
        found.append(f"prompt and response may have {longest} tokens, more than the {model.max_position} positions the model was made for.")
    if report.choice.fits is False:
        found.append("the update may not fit: lower ppo_max_token_len_per_gpu, or raise ulysses_sequence_parallel_size.")
    if config.actor_rollout_ref.ref.param_offload and uses_reference(config):
        found.append("ref.param_offload: the reference stays on the GPU; its shard is small.")
    return found


def uses_reference(config: RLConfig) -> bool:
    """Whether a reference policy is needed."""
    return config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
