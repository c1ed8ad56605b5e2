"""A `RolloutEngine` that samples with vLLM's engine in this process.

    sync      wake up · a unit after the other, by Hugging Face's names · forget prompts' keys
    step      one forward of vLLM's; the turns that ended with it
    release   sleep: weights and cache are given back, CUDA graphs stay

[Note: ranks of an engine] With a tensor-parallel group each rank has an engine of vLLM's that
schedules for itself, and all of them compute together. They decide alike as long as they are told
alike: rank 0 sends what it was told since its last step, and the others `follow`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retool.engine.memory import EngineMemory, cache_bytes, page_bytes, useful_bytes, work_bytes
from retool.engine.requests import Request, Requests
from retool.engine.types import EngineOptions, SamplingParams, TurnDone
from retool.engine.vllm.start import PAGE_SIZE, Place, make_engine, sampling
from retool.model.config import ModelConfig
from retool.parallel.fsdp import Sharded
from retool.parallel.fsdp.layout import Layout
from retool.parallel.fsdp.whole import named, whole_units
from retool.parallel.shared_work import SharedWork

DISCARD = 2  # vLLM's level of sleep that keeps neither weights nor cache
# What rank 0 was told: a turn that is wanted, or the name of one that isn't any more
Told = Request | str


class VllmEngine:
    """One engine of vLLM's per rank, or per tensor-parallel `group`. A process can have one."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        options: EngineOptions,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Nothing is made before the first `sync`."""
        self.config = config
        self.device = device
        self.options = options
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.shared = SharedWork(self.group)
        self.vllm: Any = None
        self.requests = Requests(options.max_length or 0)
        self._told: list[Told] = []
        self._asleep = False

    @staticmethod
    def memory(
        config: ModelConfig, options: EngineOptions, dtype: torch.dtype, ranks: int, layout: Layout
    ) -> EngineMemory:
        """See `RolloutEngine`. Weights are split over the ranks."""
        heads = max(1, config.kv_heads // ranks)
        shape = config.layers, PAGE_SIZE, heads, config.head_dim
        return EngineMemory(
            weights=sum(unit.numel for unit in layout.units) * dtype.itemsize // ranks,
            work=work_bytes(options, config, dtype),
            page=page_bytes(shape, dtype),
            page_size=PAGE_SIZE,
        )

    @torch.no_grad()
    def sync(self, sharded: Sharded) -> None:
        """Hand the trainer's weights over. Collective on all ranks of the trainer.

        ValueError where vLLM has weights that the trainer hasn't.
        """
        if self.vllm is None:
            self.vllm = self._make(sharded)
        if self._asleep:
            self.vllm.wake_up(["weights"])
        taken: set[str] = set()
        # Unit by unit: a whole copy of the model beside vLLM's own would not fit.
        for layout, flat in whole_units(sharded):
            load = partial(_load, pairs=named(layout, flat))
            taken |= self.vllm.apply_model(load)[0]
        # vLLM fuses q, k and v and renames: a parameter that nothing was loaded into would stay
        # random.
        missing = self.vllm.apply_model(_names)[0] - taken
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise ValueError(
                f"rollout.name=vllm: vLLM computes with weights that the trainer hasn't ({some}). "
                "Use rollout.name=native, or another version of vLLM."
            )
        if self._asleep:
            self.vllm.wake_up(["kv_cache"])
            self._asleep = False
        # What it has computed of prompts is of the old weights
        self.vllm.reset_prefix_cache(reset_running_requests=True)

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        """See `Sampler`. Samples of a group find their prompt in the cache."""
        self._tell(self.requests.start(key, ids, params))

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        """See `Sampler`."""
        self._tell(self.requests.extend(key, ids, params))

    def drop(self, key: Hashable) -> None:
        """See `Sampler`."""
        request = self.requests.drop(key)
        self._tell(None if request is None else request.name)

    def step(self) -> list[TurnDone]:
        """See `Sampler`."""
        turns = self.requests.take_refused()
        for output in self._all_ranks(step=True):
            (answer,) = output.outputs
            if answer.finish_reason == "error":
                raise RuntimeError(f"vLLM failed on a sequence of {len(output.prompt_token_ids)}.")
            logp = list(answer.logprobs.logprobs)
            tokens = list(answer.token_ids)
            turn = self.requests.finish(output.request_id, tokens, logp, answer.finish_reason)
            if turn is not None:
                turns.append(turn)
        return turns

    def idle(self) -> bool:
        """See `Sampler`."""
        return self.requests.idle

    def follow(self) -> None:
        """Ranks of the group other than 0: do what rank 0 does until it calls `end`."""
        self.shared.follow(self._obey)

    def end(self) -> None:
        """Rank 0: let the others return from `follow`. What was dropped last is dropped."""
        self._all_ranks(step=False)
        self.shared.end()

    def release(self) -> None:
        """Sleep until the next `sync`; every sequence is forgotten."""
        self.requests.forget()
        self._told.clear()
        if self.vllm is None or self._asleep:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step that was started ahead may still run
        self.vllm.sleep(level=DISCARD)
        self._asleep = True

    def close(self) -> None:
        """Give the memory back. The process is vLLM's until it ends."""
        self.release()

    # ── with vLLM

    def _make(self, sharded: Sharded) -> Any:
        options = self.options
        if options.model_folder is None:
            raise ValueError("rollout.name=vllm needs the model's folder (options.model_folder).")
        dtype = options.dtype or sharded.param_dtype
        ranks = 1 if self.group is None else dist.get_world_size(self.group)
        needed = self.memory(self.config, options, dtype, ranks, sharded.layout)
        longest = options.max_length or self.config.max_position or PAGE_SIZE
        useful = useful_bytes(options, longest, PAGE_SIZE, needed.page)
        room = cache_bytes(
            options, self.config, dtype, self.device, self.group, useful, needed.weights
        )
        place = Place(self.device, sharded.mesh.rank, ranks)
        return make_engine(options.model_folder, options, dtype, min(room, useful), place)

    def _tell(self, told: Told | None) -> None:
        if told is not None:
            self._told.append(told)

    def _all_ranks(self, step: bool) -> list[Any]:
        """Do, on every rank of the group, what was told since the last time; and a step."""
        told = self._told
        self._told = []
        return self.shared.do(self._obey, (told, step))

    def _obey(self, message: tuple[list[Told], bool]) -> list[Any]:
        """Results of requests that ended. ValueError before the first `sync`."""
        told, step = message
        if self.vllm is None:
            if told or step:
                raise ValueError("the engine has no weights: call sync(model) first.")
            return []
        for entry in told:
            if isinstance(entry, str):
                self.vllm.abort_request([entry])
            else:
                prompt = {"type": "token", "prompt_token_ids": entry.ids}
                self.vllm.add_request(entry.name, prompt, sampling(entry.params, entry.seed))
        if not step or not self.vllm.has_unfinished_requests():
            return []
        return [output for output in self.vllm.step() if output.finished]


def _load(model: nn.Module, pairs: list[tuple[str, Tensor]]) -> set[str]:
    """vLLM's names of the weights that these are; it stacks and splits them itself."""
    loader: Any = model
    found = loader.load_weights(pairs)
    return _names(model) if found is None else set(found)  # some models don't say


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}
