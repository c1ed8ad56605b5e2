"""What an RL run has besides its session: reference, engine, judges and tools, made from the
configuration.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from retool import checkpoint
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.data.packing import Budget
from retool.engine import RolloutEngine, make_engine
from retool.model.build import ModelOptions
from retool.model.costs import quadratic_length
from retool.model.hub import eos_ids
from retool.parallel.collectives import gather_objects
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh
from retool.parallel.network import own_place
from retool.rl.agent.environments.play import Worlds
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.loops.play import OwnLoop
from retool.rl.agent.options import AgentOptions, ends_of_calls, ends_of_inline
from retool.rl.agent.rollout import Overlong, RolloutParts, Sampling
from retool.rl.config import RLConfig
from retool.rl.data import prompts_at
from retool.rl.objective.experience import ExperienceOptions
from retool.rl.objective.losses import Clip
from retool.rl.objective.policy import LossSpec
from retool.rl.preflight.memory import SERVER, engine_options
from retool.rl.preflight.plan import RLReport, uses_reference
from retool.rl.reward.judges import open_judges, shared_out
from retool.rl.reward.protocol import Judges
from retool.rl.samplers import Samplers
from retool.rl.server.engine import ServerEngine
from retool.rl.server.fleet import SERVER_KEY, ServerOptions
from retool.rl.state import TrainState, restored
from retool.rl.types import Prompt
from retool.run.caller import COMMAND, Caller
from retool.run.resume import resume
from retool.run.session import Session, load_model, model_options, open_session


@dataclass(frozen=True)
class Run:
    """What an RL run has besides its session. Nothing in it is replaced during the run.

    `engines` share the processes; `rollout` and `judges` are None on ranks that follow another
    one's engine. `loop` is one for the whole run: tools keep their connections.
    """

    session: Session[RLReport]
    reference: Sharded | None
    engine: RolloutEngine
    engines: int
    rollout: RolloutParts | None
    judges: Judges | None
    loop: asyncio.AbstractEventLoop
    samplers: Samplers
    host: str = ""

    @property
    def engine_rank(self) -> int:
        """The number of the engine that this rank works for."""
        mesh = self.session.mesh
        return mesh.rank // (mesh.world // self.engines)


def build_run(report: RLReport, mesh: Mesh, caller: Caller = COMMAND) -> tuple[Run, TrainState]:
    """Load the models, resume if there is something to resume from, open the session, make what
    samples and judges. Collective.
    """
    config = report.config
    assert report.model is not None and report.folder is not None and report.reward is not None, (
        "train needs a report without faults"
    )
    ranks_per_engine = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    engines = mesh.world // ranks_per_engine
    leads = mesh.rank % ranks_per_engine == 0
    # First, so that their processes start while the weights are read.
    settings = shared_out(config.reward_model, engines)
    judges = open_judges(report.reward, settings, device=str(mesh.device)) if leads else None
    model, optimizer = load_model(report, mesh)
    reference = None
    if uses_reference(config):
        reference = load_pretrained(report.folder, mesh, reference_options(report, mesh))
    state = initial_state(report, resume(report, mesh, model, optimizer))
    require_judges(judges, mesh)
    engine = open_engine(report, mesh, engines)
    session = open_session(
        report, mesh, model, optimizer, step=state.step, caller=caller, leads=leads
    )
    rollout = rollout_parts(session, engine, judges) if judges is not None else None
    # Not asyncio.run, which closes its loop: connections that a tool opened in one step are used in
    # the next.
    loop = asyncio.new_event_loop()
    run = Run(
        session,
        reference,
        engine,
        engines,
        rollout,
        judges,
        loop,
        Samplers(engines),
        own_place(os.environ).host,
    )
    return run, state


def open_engine(report: RLReport, mesh: Mesh, engines: int) -> RolloutEngine:
    """The engine that `rollout.name` names. Collective."""
    config = report.config
    rollout = config.actor_rollout_ref.rollout
    assert report.model is not None and report.folder is not None
    # Servers hold the weights on machines of their own: no memory here, no group, and weights
    # travel through a folder.
    if rollout.name != SERVER:
        options = replace(engine_options(config), model_folder=report.folder)
        group = engine_group(mesh, engines)
        return make_engine(rollout.name, report.model, mesh.device, options, group)
    wanted = rollout.server
    options = ServerOptions(
        urls=wanted.urls,
        dialect=wanted.dialect,
        timeout_s=wanted.timeout_s,
        retries=wanted.retries,
        at_once=rollout.max_num_seqs,
        max_length=config.data.max_prompt_length + config.data.max_response_length,
        temperature=rollout.temperature,
        key=os.environ.get(SERVER_KEY) or None,
    )
    folder = Path(wanted.weights_dir or config.trainer.default_local_dir).absolute()
    return ServerEngine(options, folder, report.folder)


def initial_state(report: RLReport, loaded: checkpoint.Loaded | None) -> TrainState:
    """Step 0, or where the checkpoint that was loaded left off."""
    coef = report.config.algorithm.kl_ctrl.kl_coef
    if loaded is None:
        return TrainState(coef)
    return restored(
        loaded.step, loaded.data_state, coef, lambda position: stream(report, position, 1)[0]
    )


def reference_options(report: RLReport, mesh: Mesh) -> ModelOptions:
    """How the reference is held: as the policy, but without gradients and with no more precision
    than it computes in.
    """
    policy = model_options(report, mesh.device)
    assert policy.param_dtype is not None
    return replace(policy, master_dtype=policy.param_dtype, recompute="none", trained=False)


def require_judges(judges: Judges | None, mesh: Mesh) -> None:
    """ValueError on every rank where one has workers that can't load the reward function.

    Collective.
    """
    problems = gather_objects(judges.problem() if judges is not None else "", mesh.world_group)
    if any(problems):
        if judges is not None:
            judges.close()
        raise ValueError(next(filter(None, problems)))


def engine_group(mesh: Mesh, engines: int) -> dist.ProcessGroup | None:
    """The group of this rank's tensor-parallel engine: consecutive ranks; None where it is alone.

    Collective.
    """
    size = mesh.world // engines
    mine = None
    # Every rank makes every group, its own or not: new_group is collective over the whole world.
    for first in range(0, mesh.world, size) if size > 1 else ():
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks)
        if mesh.rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    return mine


def rollout_parts(
    session: Session[RLReport], engine: RolloutEngine, judges: Judges
) -> RolloutParts:
    """Everything that this rank's rollouts are made of."""
    report = session.report
    config = report.config
    multi = config.actor_rollout_ref.rollout.multi_turn
    shaping = config.reward_model.overlong_buffer
    assert report.renderer is not None
    # Where no calls are read, the agent's options still need a format.
    form = HERMES if report.calls is None else report.calls[1]
    agent = AgentOptions(
        max_response_length=config.data.max_response_length,
        max_assistant_turns=multi.max_assistant_turns,
        max_user_turns=multi.max_user_turns,
        format=form,
        max_tool_response_length=multi.max_tool_response_length,
        truncate_side=multi.tool_response_truncate_side,
        max_parallel_calls=multi.max_parallel_calls,
        tool_timeout_seconds=multi.tool_timeout_seconds,
        eos_ids=eos_ids(report.folder) if report.folder is not None else (),
        call_end_ids=ends_of_calls(report.renderer, form) if report.calls is not None else (),
        inline_ids=ends_of_inline(report.renderer, form) if report.tools else (),
    )
    overlong = Overlong(shaping.len, shaping.penalty_factor) if shaping.enable else None
    tools = {tool.name: tool for tool in report.tools}

    def stopped() -> bool:
        session.watchdog.beat()  # it is asked between two steps of the engine
        return session.stop.received is not None

    return RolloutParts(
        engine,
        judges,
        tools,
        report.renderer,
        agent,
        overlong,
        _worlds(report),
        _own_loop(report),
        stopped,
    )


def _worlds(report: RLReport) -> Worlds | None:
    """How trajectories get their environments, where the run has any."""
    if report.environment is None:
        return None
    config = report.config
    seconds = config.actor_rollout_ref.rollout.multi_turn.environment.timeout_seconds
    return Worlds(report.environment.load(), seconds, config.data.max_prompt_length)


def _own_loop(report: RLReport) -> OwnLoop | None:
    """The loop that plays trajectories in the place of the run's own."""
    source = report.loop
    if source is None:
        return None
    data = report.config.data
    seconds = report.config.actor_rollout_ref.rollout.agent.timeout_seconds
    most_tokens = data.max_prompt_length + data.max_response_length
    return OwnLoop(source.load(), source.name, seconds, most_tokens)


def training_sampling(config: RLConfig) -> Sampling:
    rollout = config.actor_rollout_ref.rollout
    # The last number keeps the random streams of training (0) and validation (1) apart.
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


def experience_options(report: RLReport, state: TrainState, one_update: bool) -> ExperienceOptions:
    """How this step's experience is made; `one_update`: a single optimizer step will see it."""
    assert report.estimator is not None and report.reward is not None
    credited = report.config.algorithm.credit_turns
    turn_weight = report.reward.turn_weight if credited else 0.0
    return ExperienceOptions(
        algorithm=report.config.algorithm,
        estimator=report.estimator,
        temperature=report.config.actor_rollout_ref.rollout.temperature,
        budget=logprob_budget(report),
        step=state.step,
        kl_coef=state.kl_coef,
        one_update=one_update,
        turn_weight=turn_weight,
    )


def loss_spec(report: RLReport) -> LossSpec:
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


def update_budget(report: RLReport) -> Budget:
    assert report.model is not None
    actor = report.config.actor_rollout_ref.actor
    quadratic = quadratic_length(report.model)
    if actor.use_dynamic_bsz:
        return Budget(actor.ppo_max_token_len_per_gpu, None, quadratic)
    return Budget(None, actor.ppo_micro_batch_size_per_gpu, quadratic)


def logprob_budget(report: RLReport) -> Budget:
    assert report.model is not None
    wanted = report.config.actor_rollout_ref
    # A forward without gradients keeps no activations, so it may be given more tokens than the
    # update.
    tokens = wanted.ref.log_prob_max_token_len_per_gpu or wanted.actor.ppo_max_token_len_per_gpu
    return Budget(tokens, None, quadratic_length(report.model))


def stream(report: RLReport, position: int, count: int) -> list[Prompt]:
    """Training prompts from `position` on."""
    data = report.config.data
    assert report.train is not None
    return prompts_at(report.train.prompts, position, count, data.seed, data.shuffle)
