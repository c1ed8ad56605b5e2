"""What goes into the engine and what comes out: plain values."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

Reason = Literal["stop", "length", "capacity"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one turn is sampled.

    `temperature` 0 takes the most likely token. `top_k` ≤ 0 and `top_p` 1 filter nothing; with
    both, `top_p` is a share of what `top_k` left. The turn ends with a token of `stop_ids` (it is
    part of the turn) or after `max_tokens`. The draws are a function of `seed` and of the token's
    position in the sequence, and of nothing else.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_ids: Collection[int] = ()
    seed: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}: temperature must be at least 0 and "
                "top_p in (0, 1]."
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: a turn has at least one token.")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine runs.

    `max_num_seqs` sequences decode at once. A forward has at most `max_batch_tokens` tokens; longer
    prompts take several.

    The KV cache takes `kv_bytes`, or `kv_share` of the GPU memory that is free when it is made.
    `page_size` tokens share a page of it (None: 256 on a GPU, which all kernels take, else 16).
    `max_length` bounds a sequence (None: the model's maximum position, or the cache).

    `dtype` None: that of the weights that come. `run_ahead` starts a decode step before the one
    before it was looked at ("auto": with fused kernels on a GPU); CUDA graphs need it. Models with
    experts run without CUDA graphs.

    `deterministic`: a token's numbers depend, to the last bit, only on the tokens before it: not on
    its neighbours, on chunks or on preemption. To that end every forward has exactly `max_num_seqs`
    rows, and every token attends as a sequence of its own. With experts the last bit may depend on
    neighbours all the same: on how many of them chose the same expert.

    `return_experts`: a turn tells which experts computed its tokens. Needs a model with experts, and
    an engine of one GPU. `model_folder` has the model's config.json, for engines that read it.
    """

    max_num_seqs: int = 256
    page_size: int | None = None
    kv_bytes: int | None = None
    kv_share: float = 0.9
    max_batch_tokens: int = 8192
    max_length: int | None = None
    dtype: torch.dtype | None = None
    use_cuda_graphs: bool = True
    use_compile: bool | Literal["auto"] = "auto"
    run_ahead: bool | Literal["auto"] = "auto"
    deterministic: bool = False
    return_experts: bool = False
    model_folder: Path | None = None

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ValueError(f"max_num_seqs={self.max_num_seqs} must be at least 1.")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} is less than "
                f"max_num_seqs={self.max_num_seqs}: every sequence decodes one token a step. Use at "
                f"least {self.max_num_seqs}."
            )


@dataclass(frozen=True)
class TurnDone:
    """A finished turn.

    Per sampled token: its id; `logp` = log softmax(logits / temperature) over the whole vocabulary;
    and `logp_behaviour`, the same after top-k and top-p. With temperature 0 `logp` is that of
    temperature 1, and `logp_behaviour` 0.

    `reason`: "stop" a stop token, "length" `max_tokens`, "capacity" the sequence doesn't fit the
    cache (or `max_length`) even alone.

    `experts` int8 or int16 [n, layers, k], with `return_experts`: which experts computed the n tokens
    that follow those of the last turn's `experts`, as they were when this turn was sampled. The
    turn's last token isn't among them: nothing was computed from it yet.
    """

    key: Hashable
    tokens: list[int]
    logp: list[float]
    logp_behaviour: list[float]
    reason: Reason
    experts: np.ndarray | None = None


@dataclass
class Stats:
    """Counted since the engine was made.

    `prefill_tokens` went through the model as given (prompts, tool text) or again after their KV
    was given up; `decode_tokens` are sampled tokens fed back in the same turn. `shared_tokens` were
    not computed because a group's first sample had. `preempted` sequences lost their place and KV
    while decoding, `evicted` ones their KV while they waited.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    sampled_tokens: int = 0
    shared_tokens: int = 0
    preempted: int = 0
    evicted: int = 0
