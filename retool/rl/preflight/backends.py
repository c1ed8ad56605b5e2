"""What is wrong with what samples in the training processes, beside retool's own engine."""

from __future__ import annotations

from collections.abc import Iterator

from retool.config import Fault
from retool.engine.backend import meaning
from retool.model.config import ModelConfig
from retool.parallel.mesh import pick_device
from retool.rl.config import RLConfig
from retool.rl.preflight.servers import filter_faults

_ROLLOUT = "actor_rollout_ref.rollout"
NATIVE = f"Use {_ROLLOUT}.name=native."


def backend_faults(config: RLConfig, model: ModelConfig | None, planning: bool) -> Iterator[Fault]:
    """`planning`: for GPUs that may be elsewhere."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.name == "vllm" and meaning("vllm") == "vllm":
        yield from _vllm_faults(config, model, planning)


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
        problem = "takes no weights of experts while it runs, as far as anybody has tried."
        yield Fault(key, problem, NATIVE)
    tp = rollout.tensor_model_parallel_size
    if model is not None and model.heads % tp:
        where = f"{_ROLLOUT}.tensor_model_parallel_size={tp}"
        problem = f"must divide the model's {model.heads} heads in vLLM."
        yield Fault(where, problem, f"Use a divisor, or {_ROLLOUT}.name=native.")
    yield from filter_faults(config, "vLLM doesn't")
