"""The fields of a request's body: each of its kind, and none that would be ignored in silence; and
how answers are drawn, which all of our APIs say alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from retool.llm.sampling import SamplingParams
from retool.serve.errors import Refusal

T = TypeVar("T")

MAX_ANSWERS = 1024  # of one prompt
MAX_STOPS = 64

# They change no answer: who asks, and where it is written down
WITHOUT_EFFECT = (
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "request_id rid priority"
).split()
# What we don't do, and the values that don't ask for it
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "detokenize": (True,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
WORDS = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
}


class Fields:
    """A body that is read field by field. null is as good as nothing there.

    Refusal (400) for a value of another kind; `finish` refuses what nobody asked for.
    """

    def __init__(self, body: Any, where: str = "") -> None:
        if not isinstance(body, Mapping):
            raise Refusal(400, f"{where or 'the body'} must be a JSON object.", where or None)
        self._body = body
        self._where = f"{where}." if where else ""
        self._read: set[str] = set()

    def take(self, name: str, kind: type[T], default: T) -> T:
        """The value of a field, `default` where there is none."""
        value = self.optional(name, kind)
        return default if value is None else value

    def optional(self, name: str, kind: type[T]) -> T | None:
        """The value of a field, None where there is none."""
        value = self.raw(name)
        if value is None:
            return None
        # JSON writes 1.0 as 1
        if kind is float and type(value) is int:
            try:
                return kind(value)  # type: ignore[call-arg]
            except OverflowError as error:
                raise self.refusal(name, f"is too large: {value!r:.60}") from error
        is_kind = isinstance(value, kind)
        # To Python, true is a whole number
        if not is_kind or (isinstance(value, bool) and kind is not bool):
            raise self.refusal(name, f"must be {WORDS[kind]}, not {value!r:.60}")
        return value

    def raw(self, name: str) -> Any:
        """Whatever is there."""
        self._read.add(name)
        return self._body.get(name)

    def whole_numbers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers, () where there is none."""
        values = self.take(name, list, [])
        if not all(type(value) is int for value in values):
            raise self.refusal(name, "must be a list of whole numbers")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        """A text or a list of texts, () where there is none."""
        value = self.raw(name)
        if value is None:
            return ()
        several: Sequence[Any] = [value] if isinstance(value, str) else value
        if not isinstance(several, list) or not all(isinstance(text, str) for text in several):
            raise self.refusal(name, "must be a text or a list of texts")
        return tuple(several)

    def refusal(self, name: str, what: str) -> Refusal:
        """A refusal that names the field."""
        full = self._where + name
        return Refusal(400, f"{full} {what}.", full)

    def finish(self) -> None:
        """Refuse fields that nobody has read, unless they ask for nothing."""
        for name, value in self._body.items():
            if name in self._read or name in WITHOUT_EFFECT or value is None:
                continue
            if name not in NEUTRAL:
                near = get_close_matches(name, self._read, n=1)
                hint = f"did you mean {near[0]}?" if near else "leave it out."
                full = self._where + name
                raise Refusal(400, f"{full} is unknown here: {hint}", full)
            # Not passed over: an answer would look as if it had been heeded
            if value not in NEUTRAL[name]:
                raise self.refusal(name, f"{value!r:.60} isn't supported: leave it out")


def sampling_of(
    fields: Fields,
    max_tokens: int | None,
    logprobs: int | None,
    with_special_tokens: bool = False,
) -> SamplingParams:
    """The parameters of a request. `max_tokens` and `logprobs` are called otherwise in each API.

    Refusal (400) for values that mean nothing.
    """
    skip = fields.take("skip_special_tokens", bool, True)
    n = fields.take("n", int, 1)
    stops = fields.texts("stop")
    if n > MAX_ANSWERS:
        raise fields.refusal("n", f"is {n:,}, and a request has at most {MAX_ANSWERS:,} answers")
    if len(stops) > MAX_STOPS:
        raise fields.refusal("stop", f"has {len(stops)} texts, and may have {MAX_STOPS}")
    try:
        return SamplingParams(
            n=n,
            temperature=fields.take("temperature", float, 1.0),
            top_p=fields.take("top_p", float, 1.0),
            top_k=fields.take("top_k", int, -1),
            max_tokens=max_tokens,
            stop=stops,
            stop_token_ids=fields.whole_numbers("stop_token_ids"),
            seed=fields.optional("seed", int),
            logprobs=logprobs,
            ignore_eos=fields.take("ignore_eos", bool, False),
            include_stop_str_in_output=fields.take("include_stop_str_in_output", bool, False),
            skip_special_tokens=skip and not with_special_tokens,
        )
    except ValueError as error:
        raise Refusal(400, str(error)) from error
