"""transformers' continuous batching, a forward at a time.

Its manager would run in a thread of its own. Here whoever asks for a step computes it: so errors
come out where they belong, and the draws depend on the order of the requests alone. Written for
transformers 5.17 to 5.24, whose settings differ a little.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch

from retool.engine.kernels.attention import TRUSTED, paged_error
from retool.engine.requests import Request
from retool.model.attention.dispatch import kernel_error
from retool.model.config import ModelConfig

HALF = (torch.bfloat16, torch.float16)
SWITCH = "auto_switch_to_flash"  # a setting of newer versions


@dataclass(frozen=True)
class Sampling:
    """What all requests of a batch have in common; `temperature` 0 takes the likeliest token."""

    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True)
class Room:
    """Of the cache: `pages` of `page_size` tokens; `tokens` and `sequences` of one forward."""

    page_size: int
    pages: int
    tokens: int
    sequences: int


@dataclass(frozen=True)
class Ended:
    """A request that ended, with its tokens and the log-probabilities of what they were drawn from."""

    name: str
    tokens: list[int]
    logp: list[float]


class Batching:
    """Requests of one rollout. Its cache lasts as long as the object.

    `flash`: transformers may take flash-attn's kernels.
    """

    def __init__(self, causal: Any, sampling: Sampling, room: Room, seed: int, flash: bool) -> None:
        self.sampling = sampling
        self._causal = causal
        settings = _settings(room, seed, flash)
        if not flash and not hasattr(settings, SWITCH):
            # Older versions take them wherever they find them, unless told what else to take
            causal.set_attn_implementation("paged|sdpa")
        self._manager = causal.init_continuous_batching(
            generation_config=_generation(sampling),
            continuous_batching_config=settings,
        )
        self._manager.warmup()  # makes the cache; nothing is recorded

    def add(self, request: Request) -> None:
        """Sample this turn, too."""
        self._manager.add_request(
            request.ids,
            request_id=request.name,
            max_new_tokens=request.params.max_tokens,
            eos_token_id=list(request.params.stop_ids) or -1,
        )

    def cancel(self, name: str) -> None:
        """Stop sampling this turn: nobody wants it any more."""
        self._manager.cancel_request(name)

    def step(self) -> list[Ended]:
        """One forward, and the requests that ended with it. RuntimeError where one failed."""
        processor = self._manager.batch_processor
        if processor.prepare_next_batch():
            processor._generation_step(self._causal)
            processor.update_batch()
        ended: list[Ended] = []
        while (result := self._manager.get_result(timeout=0)) is not None:
            if result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
            if result.is_finished():
                done = Ended(result.request_id, result.generated_tokens, result.logprobs)
                ended.append(done)
        return ended


def flash_is_right(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, page_size: int
) -> bool:
    """Whether flash-attn may sample: it takes half precision on a GPU, and a build of it may be
    without a head dimension, or without windows, and compute something else.

    Where it isn't installed, what transformers finds in its place isn't ours to try.
    """
    if device.type != "cuda" or dtype not in HALF:
        return False
    if find_spec("flash_attn") is None:
        return True
    error = paged_error("flash", device, dtype, config.head_dim, page_size)
    # Not the larger of both: one that isn't a number is no larger
    if error <= TRUSTED and config.windowed:
        error = kernel_error("flash", device, dtype, config.head_dim, windowed=True)
    if error <= TRUSTED:
        return True
    warnings.warn(
        f"flash-attn computes wrongly on this device with this model's heads of {config.head_dim} "
        f"(relative error {error:.2g}): torch's attention samples, slower.",
        stacklevel=2,
    )
    return False


def _generation(sampling: Sampling) -> Any:
    """What is processed of the logits: nothing but what `sampling` says."""
    from transformers import GenerationConfig

    draws = sampling.temperature > 0
    return GenerationConfig(
        do_sample=draws,
        temperature=sampling.temperature if draws else 1.0,
        top_p=sampling.top_p if draws else 1.0,
        top_k=max(sampling.top_k, 0) if draws else 0,
        eos_token_id=-1,
    )


def _settings(room: Room, seed: int, flash: bool) -> Any:
    from transformers import ContinuousBatchingConfig

    known = {field.name for field in fields(ContinuousBatchingConfig)}
    page_size = "page_size" if "page_size" in known else "block_size"
    values: dict[str, Any] = {
        page_size: room.page_size,
        "num_blocks": room.pages,
        "max_batch_tokens": room.tokens,
        "max_requests_per_batch": room.sequences,
        "return_logprobs": True,
        "seed": seed,
        # Both would be made anew in every rollout
        "use_cuda_graph": False,
        "use_async_batching": False,
    }
    if SWITCH in known:
        values[SWITCH] = flash
    return ContinuousBatchingConfig(**values)
