"""transformers' continuous batching, a forward at a time.

Its manager would run in a thread of its own. Here whoever asks for a step computes it: so errors
come out where they belong, and the draws depend on the order of the requests alone. Written for
transformers 5.17 to 5.24, whose settings differ a little.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from retool.engine.requests import Request

HALF = (torch.bfloat16, torch.float16)


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
    """Requests of one rollout. Its cache lasts as long as the object."""

    def __init__(self, causal: Any, sampling: Sampling, room: Room, seed: int) -> None:
        self.sampling = sampling
        self._causal = causal
        self._manager = causal.init_continuous_batching(
            generation_config=_generation(sampling),
            continuous_batching_config=_settings(room, seed, causal.dtype in HALF),
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
        """Nobody wants it any more."""
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


def _settings(room: Room, seed: int, half: bool) -> Any:
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
    if "auto_switch_to_flash" in known:
        values["auto_switch_to_flash"] = half
    return ContinuousBatchingConfig(**values)
