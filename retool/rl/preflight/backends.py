"""Faults of the backends that sample in the training processes, other than retool's own engine."""

from __future__ import annotations

from collections.abc import Iterator

from retool.config import Fault
from retool.engine.backend import meaning
from retool.engine.hf.trial import cant_batch
from retool.model.borrowed.config import BorrowedConfig
from retool.model.catalogue.families import FAMILIES
from retool.model.config import ModelConfig
from retool.parallel.mesh import pick_device
from retool.rl.config import RLConfig
from retool.rl.preflight.memory import SERVER
from retool.rl.preflight.servers import filter_faults

_ROLLOUT = "actor_rollout_ref.rollout"
NATIVE = f"Use {_ROLLOUT}.name=native."


def backend_faults(config: RLConfig, model: ModelConfig | None, planning: bool) -> Iterator[Fault]:
    """`planning`: for GPUs that may be elsewhere."""
    name = config.actor_rollout_ref.rollout.name
    if name == SERVER:
        return
    kind = meaning(name, model)
    if kind == "vllm":
        yield from _vllm_faults(config, model, planning)
    elif kind == "hf":
        assert isinstance(model, BorrowedConfig)
        yield from _hf_faults(config, model)
    elif isinstance(model, BorrowedConfig):
        yield _cant_sample(name, model)
    if isinstance(model, BorrowedConfig):
        yield from _too_long(config, model)


def _too_long(config: RLConfig, model: BorrowedConfig) -> Iterator[Fault]:
    """Faults of sequences that are longer than the model's module computes rightly."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    if not 0 < model.longest < longest:
        return
    problem = (
        f"makes sequences of up to {longest:,} tokens with data.max_prompt_length, and model_type "
        f"{model.family} is limited by {model.because}."
    )
    where = f"data.max_response_length={config.data.max_response_length}"
    yield Fault(where, problem, f"Use {model.longest:,} for both together, at most.")


def _cant_sample(name: str, model: BorrowedConfig) -> Fault:
    """The fault of a model that retool's engine can't sample from: it computes with retool's
    decoder only.
    """
    way_out = f"Use {_ROLLOUT}.name=hf, or vllm where it is installed, or server."
    if model.family in FAMILIES:
        way_out = f"Use actor_rollout_ref.model.impl=auto, or {_ROLLOUT}.name=hf."
    return Fault(
        f"{_ROLLOUT}.name={name}",
        f"model_type {model.family} runs as transformers' module, from which retool's engine can't "
        "sample.",
        way_out,
    )


def _hf_faults(config: RLConfig, model: BorrowedConfig) -> Iterator[Fault]:
    """What transformers' batching can't do, or doesn't tell."""
    rollout = config.actor_rollout_ref.rollout
    if reason := cant_batch(model):
        problem = f"can't sample from model_type {model.family} ({reason})."
        way_out = f"Use {_ROLLOUT}.name=vllm where it is installed, or server."
        yield Fault(f"{_ROLLOUT}.name=hf", problem, way_out)
    tp = rollout.tensor_model_parallel_size
    if tp > 1:
        where = f"{_ROLLOUT}.tensor_model_parallel_size={tp}"
        problem = "is more than rollout.name=hf has: an engine on each GPU."
        yield Fault(where, problem, "Leave it out.")
    if config.trainer.deterministic:
        problem = (
            "isn't promised by transformers' batching: a token's numbers depend on its neighbours."
        )
        yield Fault("trainer.deterministic=true", problem, "Leave it out.")
    if rollout.dtype != "auto":
        problem = "isn't possible with rollout.name=hf: the weights are the trainer's."
        yield Fault(f"{_ROLLOUT}.dtype={rollout.dtype}", problem, "Leave it out.")
    yield from filter_faults(config, "transformers doesn't")


def _vllm_faults(config: RLConfig, model: ModelConfig | None, planning: bool) -> Iterator[Fault]:
    """What vLLM can't do here, or doesn't tell."""
    rollout = config.actor_rollout_ref.rollout
    key = f"{_ROLLOUT}.name=vllm"
    if not planning and pick_device(config.trainer.device).type != "cuda":
        yield Fault(key, "needs a GPU, and the run is on the CPU.", NATIVE)
    if config.trainer.deterministic:
        problem = "isn't promised by vLLM: a token's numbers depend on its neighbours there."
        yield Fault("trainer.deterministic=true", problem, NATIVE)
    if rollout.enable_rollout_routing_replay:
        where = f"{_ROLLOUT}.enable_rollout_routing_replay=true"
        yield Fault(where, "needs the experts' choices, which vLLM isn't asked for.", NATIVE)
    elif model is not None and model.experts is not None:
        problem = "takes no new weights of experts while it runs, as far as was tried."
        yield Fault(key, problem, NATIVE)
    tp = rollout.tensor_model_parallel_size
    if model is not None and model.heads % tp:
        where = f"{_ROLLOUT}.tensor_model_parallel_size={tp}"
        problem = f"must divide the model's {model.heads} heads in vLLM."
        yield Fault(where, problem, f"Use a divisor, or {_ROLLOUT}.name=native.")
    yield from filter_faults(config, "vLLM doesn't")
