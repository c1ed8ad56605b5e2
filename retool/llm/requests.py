"""From what a user gives to requests: one prompt or several, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retool.data.tokens.bounds import failures_told
from retool.llm.sampling import SamplingParams

# A text, token ids, or either in a mapping as vLLM has them
Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """A prompt as it goes to the engine: token ids, its text where there is one, and the ids that
    end an answer of this model's.
    """

    text: str | None
    ids: list[int]
    params: SamplingParams
    ends: tuple[int, ...]


def several(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several: a list of numbers is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, Sequence) and prompts and all(type(entry) is int for entry in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Parameters for each of `count` prompts. ValueError where there are more or fewer."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(
            f"{len(params)} sampling_params were given for {count} prompts: give one for all, or one "
            "for each."
        )
    return list(params)


def make_request(
    prompt: Prompt, params: SamplingParams, tokenizer: Any, ends: tuple[int, ...]
) -> Request:
    """The request of a prompt. ValueError for what is neither text nor token ids."""
    given: Any = prompt
    if isinstance(prompt, Mapping):
        given = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(given, str):
        return Request(given, _encoded(given, tokenizer), params, ends)
    if isinstance(given, Sequence) and all(type(token) is int for token in given):
        return Request(None, list(given), params, ends)
    raise ValueError(f"a prompt is a text or a list of token ids, not {prompt!r:.80}.")


def _encoded(text: str, tokenizer: Any) -> list[int]:
    """A text's ids. ValueError for one that is no Unicode, or that the tokenizer's patterns choke on."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} of a prompt is half of a surrogate pair: {text!r:.80}"
        raise ValueError(f"{problem}. Send whole characters.") from error
    with failures_told():
        return list(tokenizer(text)["input_ids"])


def check(ids: Sequence[int], room: int, vocabulary: int, number: int) -> None:
    """ValueError for a prompt that the model can't take, or that leaves no room for a token."""
    if not ids:
        raise ValueError(f"prompt {number} is empty: it must have at least one token.")
    if len(ids) >= room:
        raise ValueError(
            f"prompt {number} has {len(ids):,} tokens, and the model takes {room:,} with its answer. "
            "Shorten it, or raise max_model_len (gpu_memory_utilization, where the cache is too "
            "small)."
        )
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise ValueError(
            f"prompt {number} has token id {wrong:,}, and the model has {vocabulary:,} of them. Use "
            "the model's own tokenizer."
        )
