"""What an RL run is made of: model, optimizer, engine, judges, loggers, put together from a
preflight report.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from retool import checkpoint
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.config import to_dict
from retool.data.packing import Budget
from retool.engine import RolloutEngine, make_engine
from retool.files.own_folder import OwnFolder
from retool.metrics import Loggers, RunInfo, open_loggers
from retool.model.build import DTYPES, ModelOptions
from retool.optim import AdamW, AdamWOptions
from retool.parallel.collectives import gather_objects
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh
from retool.perf import quadratic_length
from retool.preflight.resume import load_checkpoint
from retool.rl.agent.options import AgentOptions
from retool.rl.agent.rollout import Overlong, RolloutParts, Sampling
from retool.rl.config import RLConfig
from retool.rl.data import prompts_at
from retool.rl.eos import eos_ids
from retool.rl.objective.experience import ExperienceOptions
from retool.rl.objective.losses import Clip
from retool.rl.objective.policy import LossSpec
from retool.rl.preflight.memory import engine_options
from retool.rl.preflight.plan import Report, uses_reference
from retool.rl.reward.judges import open_judges
from retool.rl.reward.protocol import Judges
from retool.rl.state import TrainState, restored
from retool.rl.types import Prompt
from retool.run.folder import make_run_folder, say
from retool.run.preemption import StopRequest
from retool.run.saving import model_state, restore_optimizer, save_options
from retool.run.watchdog import Watchdog


@dataclass(frozen=True)
class Run:
    """Nothing in it is replaced while a run lasts.

    `rollout` is None on ranks that follow another one's engine.
    """

    config: RLConfig
    report: Report
    mesh: Mesh
    folder: Path
    model: Sharded
    reference: Sharded | None
    optimizer: AdamW
    engine: RolloutEngine
    engines: int
    rollout: RolloutParts | None
    pool: Judges | None
    loop: asyncio.AbstractEventLoop
    stop: StopRequest
    watchdog: Watchdog
    loggers: Loggers
    save_options: checkpoint.SaveOptions
    staging: checkpoint.Staging

    @property
    def engine_rank(self) -> int:
        """Which of the engines this rank works for."""
        return self.mesh.rank // (self.mesh.world // self.engines)


def build_run(report: Report, mesh: Mesh) -> tuple[Run, TrainState]:
    """Load the model, make everything, resume if there is something to resume from. Collective."""
    config = report.config
    wanted = report.config.actor_rollout_ref
    assert report.model is not None and report.folder is not None and report.reward is not None, (
        "train needs a report without faults"
    )
    engines = mesh.world // wanted.rollout.tensor_model_parallel_size
    leads = mesh.rank % wanted.rollout.tensor_model_parallel_size == 0
    pool = open_judges(report.reward, config.reward_model) if leads else None
    model = load_pretrained(report.folder, mesh, model_options(report))
    sharding = wanted.actor.fsdp_config
    optim = wanted.actor.optim
    adamw = AdamWOptions(optim.betas, optim.weight_decay, wanted.actor.grad_clip)
    optimizer = AdamW(model, adamw, sharding.optimizer_offload, sharding.param_offload)
    reference = (
        load_pretrained(report.folder, mesh, model_options(report, frozen=True))
        if uses_reference(config)
        else None
    )
    state = resume(report, mesh, model, optimizer)
    require_judges(pool, mesh)
    # From here on nothing is refused: a run that is leaves its folder as it was.
    anew = config.trainer.resume_mode == "disable" and not config.trainer.val_only
    folder = make_run_folder(config.trainer.default_local_dir, config, mesh, anew)
    engine = make_engine(
        wanted.rollout.name,
        report.model,
        mesh.device,
        engine_options(config),
        engine_group(mesh, engines),
    )
    staging = checkpoint.Staging(mesh, folder=OwnFolder(folder) if mesh.rank == 0 else None)
    stop = StopRequest(staging.problem)
    trainer = config.trainer
    # A follower can't tell its engine's work from waiting
    silence = trainer.watchdog_s and (trainer.watchdog_s if leads else math.inf)
    watchdog = Watchdog(folder, mesh.rank, mesh.world, silence)
    parts = rollout_parts(report, engine, pool, stop, watchdog) if pool is not None else None
    info = RunInfo(
        folder,
        trainer.project_name,
        trainer.experiment_name,
        to_dict(config),
        state.step,
        report.steps,
    )
    loggers = open_loggers(trainer.logger, info) if mesh.rank == 0 else Loggers()
    options = save_options(
        report.options, mesh, report.folder, config.data.chat_template, subfolder="actor"
    )
    loop = asyncio.new_event_loop()  # one for the whole run: tools keep their connections
    if not trainer.val_only:
        staging.prepare(model_state(model, optimizer), mesh, options)
    run = Run(
        config,
        report,
        mesh,
        folder,
        model,
        reference,
        optimizer,
        engine,
        engines,
        parts,
        pool,
        loop,
        stop,
        watchdog,
        loggers,
        options,
        staging,
    )
    return run, state


def require_judges(pool: Judges | None, mesh: Mesh) -> None:
    """ValueError on every rank where one has workers that can't load the reward function.

    Collective.
    """
    problems = gather_objects(pool.problem() if pool is not None else "", mesh.world_group)
    if any(problems):
        if pool is not None:
            pool.close()
        raise ValueError(next(filter(None, problems)))


def model_options(report: Report, frozen: bool = False) -> ModelOptions:
    """How the policy is held; `frozen`: the reference, without gradients and master weights of its
    own precision.
    """
    config = report.config
    choice = report.choice
    sharding = config.actor_rollout_ref.actor.fsdp_config
    wanted = config.actor_rollout_ref.model
    cuda = config.trainer.device != "cpu" and torch.cuda.is_available()
    master = DTYPES[sharding.model_dtype]
    compute = (
        (torch.bfloat16 if cuda else master)
        if sharding.param_dtype == "auto"
        else DTYPES[sharding.param_dtype]
    )
    assert choice is not None
    return ModelOptions(
        param_dtype=compute,
        master_dtype=compute if frozen else master,
        reduce_dtype=DTYPES["fp64" if sharding.model_dtype == "fp64" else sharding.reduce_dtype],
        attn=wanted.attn,
        recompute="none" if frozen else choice.recompute,
        parked=choice.parked,
        use_compile=wanted.use_compile,
        fp32_residual=report.options.fp32_residual,
        trained=not frozen,
        keep_copy=choice.keep_copy,
        reshard_after_forward=sharding.reshard_after_forward,
        forward_prefetch=sharding.forward_prefetch,
    )


def engine_group(mesh: Mesh, engines: int) -> dist.ProcessGroup | None:
    """The group of this rank's tensor-parallel engine: consecutive ranks; None where it is alone.

    Collective.
    """
    size = mesh.world // engines
    mine = None
    for first in range(0, mesh.world, size) if size > 1 else ():
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if mesh.rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    return mine


def rollout_parts(
    report: Report, engine: RolloutEngine, pool: Judges, stop: StopRequest, watchdog: Watchdog
) -> RolloutParts:
    """What every rollout of this rank is made of."""
    config = report.config
    multi = report.config.actor_rollout_ref.rollout.multi_turn
    shaping = report.config.reward_model.overlong_buffer
    agent = AgentOptions(
        max_response_length=config.data.max_response_length,
        max_assistant_turns=multi.max_assistant_turns,
        max_user_turns=multi.max_user_turns,
        format=multi.format,
        max_tool_response_length=multi.max_tool_response_length,
        truncate_side=multi.tool_response_truncate_side,
        max_parallel_calls=multi.max_parallel_calls,
        tool_timeout_seconds=multi.tool_timeout_seconds,
        eos_ids=eos_ids(report.folder) if report.folder is not None else (),
    )
    overlong = Overlong(shaping.len, shaping.penalty_factor) if shaping.enable else None
    assert report.renderer is not None
    tools = {tool.name: tool for tool in report.tools}

    def stopped() -> bool:
        watchdog.beat()  # it is asked between two steps of the engine
        return stop.received is not None

    return RolloutParts(engine, pool, tools, report.renderer, agent, overlong, stopped)


def training_sampling(config: RLConfig) -> Sampling:
    rollout = config.actor_rollout_ref.rollout
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, config.trainer.seed, 0)


def validation_sampling(config: RLConfig) -> Sampling:
    wanted = config.actor_rollout_ref.rollout.val_kwargs
    return Sampling(
        wanted.temperature if wanted.do_sample else 0.0,
        wanted.top_p,
        wanted.top_k,
        config.trainer.seed,
        1,
    )


def experience_options(report: Report, state: TrainState, one_update: bool) -> ExperienceOptions:
    """How this step's experience is made; `one_update`: a single optimizer step will see it."""
    assert report.estimator is not None
    return ExperienceOptions(
        algorithm=report.config.algorithm,
        estimator=report.estimator,
        temperature=report.config.actor_rollout_ref.rollout.temperature,
        budget=logprob_budget(report),
        step=state.step,
        kl_coef=state.kl_coef,
        one_update=one_update,
    )


def loss_spec(report: Report) -> LossSpec:
    assert report.loss is not None
    actor = report.config.actor_rollout_ref.actor
    return LossSpec(
        loss=report.loss,
        clip=Clip(actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c),
        temperature=report.config.actor_rollout_ref.rollout.temperature,
        entropy_coeff=actor.entropy_coeff,
        kl_coef=actor.kl_loss_coef,
        kl_kind=actor.kl_loss_type,
        use_kl=actor.use_kl_loss,
    )


def update_budget(report: Report) -> Budget:
    assert report.model is not None
    actor = report.config.actor_rollout_ref.actor
    quadratic = quadratic_length(report.model)
    if actor.use_dynamic_bsz:
        return Budget(actor.ppo_max_token_len_per_gpu, None, quadratic)
    return Budget(None, actor.ppo_micro_batch_size_per_gpu, quadratic)


def logprob_budget(report: Report) -> Budget:
    assert report.model is not None
    wanted = report.config.actor_rollout_ref
    tokens = wanted.ref.log_prob_max_token_len_per_gpu or wanted.actor.ppo_max_token_len_per_gpu
    return Budget(tokens, None, quadratic_length(report.model))


def resume(report: Report, mesh: Mesh, model: Sharded, optimizer: AdamW) -> TrainState:
    """The state to start from: step 0, or that of the checkpoint which preflight found to be this
    run's.
    """
    coef = report.config.algorithm.kl_ctrl.kl_coef
    if report.resume is None:
        return TrainState(coef)
    found, loaded = load_checkpoint(report, mesh, model_state(model, optimizer))
    restore_optimizer(optimizer, loaded)
    model.refresh()
    say(mesh, f"resumed from {found} (step {loaded.step}).")
    return restored(
        loaded.step, loaded.data_state, coef, lambda position: stream(report, position, 1)[0]
    )


def stream(report: Report, position: int, count: int) -> list[Prompt]:
    """Training prompts from `position` on."""
    data = report.config.data
    assert report.train is not None
    return prompts_at(report.train.prompts, position, count, data.seed, data.shuffle)
