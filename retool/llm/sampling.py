"""How answers are sampled: `SamplingParams`, with the names and defaults of vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retool.rl.config.rollout import LEAST_TEMPERATURE, MOST_TEMPERATURE

MOST_TOP_K = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the answers to a prompt are sampled.

    `n` answers. `temperature` 0 takes the likeliest token; `top_k` ≤ 0 and `top_p` 1 filter
    nothing. An answer has at most `max_tokens` tokens (None: as many as the model has room for).

    It ends before a text of `stop` (after it, with `include_stop_str_in_output`), with a token of
    `stop_token_ids`, or with one that the model ends a text with, unless `ignore_eos`.

    `seed` None: every prompt of every call draws otherwise, and a program draws the same each time
    it runs. A number: the same prompt gets the same answers wherever it stands.

    `logprobs` k: of each token its log-probability and those of the k likeliest, from
    softmax(logits / temperature) over the whole vocabulary; 0: its own alone; None: none.

    Raises ValueError for values that mean nothing.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n}: a prompt has at least one answer.")
        if not 0 <= self.temperature <= MOST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature}: it must be at least 0, and at most {MOST_TEMPERATURE:g}."
            )
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature}: below {LEAST_TEMPERATURE:g} use 0, the likeliest token."
            )
        # The engine's batches hold it in 64 bits, and what they can't hold would end all requests
        if abs(self.top_k) > MOST_TOP_K:
            raise ValueError(f"top_k={self.top_k}: no vocabulary is so large. -1 filters nothing.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must be above 0 and at most 1.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"max_tokens={self.max_tokens}: an answer has at least one token. None: as many as "
                "the model has room for."
            )
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs={self.logprobs}: it must be at least 0, or None.")
        if not all(self.stop_texts):
            raise ValueError(
                "stop holds an empty text, which would match everywhere. Leave it out."
            )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop`, as several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
