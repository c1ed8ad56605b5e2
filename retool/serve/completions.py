"""`/v1/completions`: texts or token ids in, their continuations out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from retool.llm.answer import Answer
from retool.llm.likeliest import Likeliest
from retool.llm.llm import LLM
from retool.llm.requests import Prompt, Request, several
from retool.serve.engine_thread import Piece
from retool.serve.errors import Refusal
from retool.serve.fields import Fields, sampling_of
from retool.serve.shape import About, Envelope, Found, Question, usage_of

MAX_LOGPROBS = 20
MAX_TOKENS = 16  # OpenAI's default


def read_completion(body: Any, llm: LLM, about: About) -> Question:
    """The question in a request's body. Refusal (400) for what can't be answered."""
    fields = Fields(body)
    fields.raw("model")
    streams = fields.take("stream", bool, False)
    logprobs = read_logprobs(fields, "logprobs", streams)
    max_tokens = fields.take("max_tokens", int, MAX_TOKENS)
    params = sampling_of(fields, max_tokens, logprobs)
    prompts = _prompts(fields)
    with_usage = read_stream_options(fields)
    with_ids = fields.take("return_token_ids", bool, False)
    fields.finish()
    requests = [llm.text_request(prompt, params) for prompt in prompts]
    form = CompletionForm(requests, llm.tokenizer, about, with_ids, with_usage)
    return Question(requests, streams, form, about)


def read_stream_options(fields: Fields) -> bool:
    """Whether the last event says how many tokens there were."""
    options = Fields(fields.take("stream_options", dict, {}), "stream_options")
    include = options.take("include_usage", bool, False)
    options.take("continuous_usage_stats", bool, False)
    options.take("include_obfuscation", bool, False)
    options.finish()
    return include


def read_logprobs(fields: Fields, name: str, streams: bool) -> int | None:
    """How many likeliest tokens are wanted at each place; None: no log-probabilities at all."""
    count = fields.optional(name, int)
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise fields.refusal(name, f"is {count}: it must be from 0 to {MAX_LOGPROBS}")
    if count and streams:
        # The engine keeps those of sampled tokens; others are looked up when an answer is whole
        raise fields.refusal(name, "above 0 can't stream: ask without stream, or for 0")
    return count


def _prompts(fields: Fields) -> list[Prompt]:
    prompt = fields.raw("prompt")
    if prompt is None or prompt == []:
        raise fields.refusal("prompt", "is missing: a text, token ids, or a list of either")
    if not isinstance(prompt, (str, list)):
        raise fields.refusal("prompt", "must be a text, token ids, or a list of either")
    return several(prompt)


@dataclass
class CompletionForm:
    """The form of `/v1/completions`."""

    requests: list[Request]
    tokenizer: Any
    about: About
    with_ids: bool
    with_usage: bool
    shown: dict[int, int] = field(default_factory=dict)  # characters of each answer, in events
    offsets: dict[int, int] = field(default_factory=dict)  # where the next token's text begins
    begun: set[int] = field(default_factory=set)  # answers that had an event

    def __post_init__(self) -> None:
        self.envelope = Envelope("text_completion", self.about, "cmpl")

    def whole(self, answers: Sequence[Answer], found: Found) -> dict[str, Any]:
        """See `Form`."""
        choices = []
        for number, answer in enumerate(answers):
            choice = self._choice(number, answer.text, answer)
            choice["logprobs"] = self._logprobs(number, answer.ids, answer.logp, found.get(number))
            if self.with_ids:
                choice["prompt_token_ids"] = answer.prompt
                choice["token_ids"] = answer.ids
            choices.append(choice)
        sampled = sum(len(answer.ids) for answer in answers)
        return self.envelope.around(choices, usage=usage_of(self.requests, sampled))

    def first(self) -> list[dict[str, Any]]:
        """See `Form`."""
        return []

    def grown(self, piece: Piece) -> dict[str, Any] | None:
        """See `Form`."""
        shown = self.shown.get(piece.number, 0)
        self.shown[piece.number] = max(shown, len(piece.text))
        choice = self._choice(piece.number, piece.text[shown:], piece.answer)
        choice["logprobs"] = self._logprobs(piece.number, piece.ids, piece.logp, None)
        if self.with_ids:
            choice["token_ids"] = piece.ids
            begun = piece.number in self.begun
            choice["prompt_token_ids"] = None if begun else self._request(piece.number).ids
            self.begun.add(piece.number)
        return self.envelope.around([choice])

    def last(self, usage: Mapping[str, int]) -> list[dict[str, Any]]:
        """See `Form`."""
        return [self.envelope.around([], usage=usage)] if self.with_usage else []

    def _request(self, number: int) -> Request:
        # The answers to one prompt follow each other
        return self.requests[number // self.requests[0].params.n]

    def _choice(self, number: int, text: str, done: Answer | None) -> dict[str, Any]:
        return {
            "index": number,
            "text": text,
            "logprobs": None,
            "finish_reason": done.finish_reason if done else None,
            "stop_reason": done.stop_reason if done else None,
        }

    def _logprobs(
        self,
        number: int,
        ids: Sequence[int],
        logp: Sequence[float],
        found: Sequence[Likeliest] | None,
    ) -> dict[str, Any] | None:
        """As OpenAI's completions have them: a list for each kind of value."""
        if self._request(number).params.logprobs is None:
            return None
        tokens = [token_text(self.tokenizer, token) for token in ids]
        begin = self.offsets.get(number, 0)
        ends = list(accumulate(map(len, tokens), initial=begin))
        self.offsets[number] = ends[-1]
        top = None
        if found is not None:
            top = [self._top(*place) for place in zip(ids, logp, found, strict=True)]
        return {
            "tokens": tokens,
            "token_logprobs": list(logp),
            "top_logprobs": top,
            "text_offset": ends[:-1],
        }

    def _top(self, token: int, logp: float, place: Likeliest) -> dict[str, float]:
        """Log-probabilities by the tokens' texts; by their ids, where several have one text, as parts
        of characters do.
        """
        values = {**dict(zip(place.ids, place.logp, strict=True)), token: logp}
        texts = [token_text(self.tokenizer, other) for other in values]
        if len(set(texts)) < len(texts):
            texts = [f"token_id:{other}" for other in values]
        return dict(zip(texts, values.values(), strict=True))


def token_text(tokenizer: Any, token: int) -> str:
    """What a token is written as, special ones too."""
    return str(tokenizer.decode([token], skip_special_tokens=False))


def require_model(body: Any, model: str) -> None:
    """Refusal (404) where another model is asked for than the one that is served."""
    asked = body.get("model") if isinstance(body, Mapping) else None
    if asked is not None and asked != model:
        raise Refusal(
            404,
            f"the model {asked!r} isn't served here: there is {model!r}.",
            "model",
            "model_not_found",
        )
