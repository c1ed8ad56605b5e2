"""The results: plain values with vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retool.llm.answer import Answer, FinishReason
from retool.llm.likeliest import Likeliest
from retool.llm.requests import Request

Found = Mapping[tuple[int, int, int], list[Likeliest]]  # by an answer's key
NOT_LOOKED_UP = Likeliest([], [], None)


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability in nats, its place among all of them (1 is the likeliest; None: it
    wasn't looked up), and its text.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    `text` is without what ended it (but for a token of `stop_token_ids` that isn't special), `token_ids`
    are with it. `logprobs` has a mapping from token id
    for each of these. `finish_reason` is "stop" or "length" (None: it goes on); `stop_reason` is
    the text or token id of the parameters that ended it, None where the model did.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt with its `n` answers; `prompt` is None where it was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


def make_output(
    request: Request, answers: Sequence[Answer], found: Found, tokenizer: Any
) -> RequestOutput:
    """What there is of the answers to a request. `found`: likeliest tokens, where they were asked
    for and looked up.
    """
    outputs = [
        CompletionOutput(
            index=answer.key[2],
            text=answer.text,
            token_ids=list(answer.ids),
            cumulative_logprob=sum(answer.logp),
            logprobs=_logprobs(answer, found.get(answer.key), tokenizer),
            finish_reason=answer.finish_reason,
            stop_reason=answer.stop_reason,
        )
        for answer in answers
    ]
    finished = all(answer.finish_reason for answer in answers)
    call, number, _ = answers[0].key
    return RequestOutput(f"{call}-{number}", request.text, request.ids, outputs, finished)


def _logprobs(
    answer: Answer, found: Sequence[Likeliest] | None, tokenizer: Any
) -> list[dict[int, Logprob]] | None:
    """Of every token: its own entry first, as the engine has it, then the likeliest."""
    if answer.params.logprobs is None:
        return None

    def entry(token: int, logp: float, rank: int | None) -> Logprob:
        return Logprob(logp, rank, str(tokenizer.decode([token], skip_special_tokens=False)))

    entries: list[dict[int, Logprob]] = []
    places = found or [NOT_LOOKED_UP] * len(answer.ids)
    for token, logp, place in zip(answer.ids, answer.logp, places, strict=True):
        of_token = {token: entry(token, logp, place.rank)}
        for rank, (other, value) in enumerate(zip(place.ids, place.logp, strict=True), 1):
            if other != token:
                of_token[other] = entry(other, value, rank)
        entries.append(of_token)
    return entries
