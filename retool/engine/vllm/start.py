"""Starting vLLM's engine in a process that trains: what it is told, and what it must not touch.

Written for vLLM 0.22.1. Nothing here imports it before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from retool.engine.types import EngineOptions, SamplingParams
from retool.parallel.network import choose_interface

PAGE_SIZE = 16  # tokens, as it chooses itself
# Of the GPU's memory. vLLM only checks that so much is free: the cache's size is told in bytes
SHARE_THAT_IS_FREE = 0.01
# Settings of vLLM by environment: in this process, no reports to its makers, no warnings of what is
# wanted here (its seed, kernels that are compiled), and any length that the run asks for
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


def is_installed() -> bool:
    """Whether there is a vLLM to import."""
    return importlib.util.find_spec("vllm") is not None


def version() -> str:
    """Of the vLLM that is installed."""
    return importlib.metadata.version("vllm")


def vllm() -> Any:
    """The package, imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return importlib.import_module("vllm")


@dataclass(frozen=True)
class Place:
    """Where an engine is: its device, the rank, and how many ranks share the engine."""

    device: torch.device
    rank: int
    ranks: int


def make_engine(
    folder: Path, options: EngineOptions, dtype: torch.dtype, kv_bytes: int, place: Place
) -> Any:
    """vLLM's `LLMEngine` of a model folder, with weights that mean nothing yet. Collective.

    The cache takes `kv_bytes`. ValueError where vLLM refuses the model or the settings, and where
    the process has an engine of vLLM's already.
    """
    package = vllm()
    _require_first()
    _be_in_a_group(place)
    arguments = package.EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=options.max_length,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_batch_tokens,
        enforce_eager=not options.use_cuda_graphs,
        kv_cache_memory_bytes=kv_bytes,
        gpu_memory_utilization=SHARE_THAT_IS_FREE,
        # One process for each GPU is there already
        distributed_executor_backend="external_launcher",
        tensor_parallel_size=place.ranks,
        disable_custom_all_reduce=True,
        # Log-probabilities of softmax(logits / temperature), as ours are
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=True,
        enable_sleep_mode=True,
        generation_config="vllm",
        disable_log_stats=True,
    )
    mine = [place.device] if place.device.type == "cuda" else []
    with torch.random.fork_rng(devices=mine), _steady_segments(place.device):
        return package.LLMEngine.from_engine_args(arguments)


def sampling(params: SamplingParams, seed: int) -> Any:
    """vLLM's parameters for a turn: only `stop_ids` end it, and only token ids are returned."""
    package = vllm()
    kinds: Any = importlib.import_module("vllm.sampling_params")
    return package.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        seed=seed,
        stop_token_ids=list(params.stop_ids),
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=kinds.RequestOutputKind.FINAL_ONLY,
    )


def _require_first() -> None:
    """ValueError where vLLM's allocator, of which a process has one, is in use; asleep or not."""
    module: Any = importlib.import_module("vllm.device_allocator.cumem")
    allocator = module.CuMemAllocator.instance
    if allocator is not None and allocator.get_current_usage():
        raise ValueError(
            "rollout.name=vllm: this process has had a vLLM engine, and can't have a second one. Start "
            "this run in a program of its own."
        )


def _be_in_a_group(place: Place) -> None:
    """What vLLM expects of a launcher, where there was none: a group of one process."""
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("LOCAL_RANK", str(place.device.index or 0))
    if dist.is_initialized():
        return
    choose_interface(os.environ)
    backend = "cpu:gloo,cuda:nccl" if place.device.type == "cuda" else "gloo"
    store: Any = HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


@contextmanager
def _steady_segments(device: torch.device) -> Iterator[None]:
    """Without growing segments: memory that sleeps is unmapped by vLLM's allocator, which can't
    have its pool made of them.
    """
    grows = False
    if device.type == "cuda":
        state: Any = torch.cuda.memory._snapshot()
        grows = bool(state["allocator_settings"]["expandable_segments"])
    if not grows:
        yield
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
