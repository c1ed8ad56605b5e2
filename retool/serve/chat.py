"""`/v1/chat/completions`: a conversation in, the assistant's next turn out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retool.data.render.renderer import Renderer
from retool.llm.answer import Answer
from retool.llm.likeliest import Likeliest
from retool.llm.llm import LLM
from retool.llm.requests import Request
from retool.llm.sampling import SamplingParams
from retool.rl.agent.options import ends_of_calls
from retool.rl.agent.reading.form import Format
from retool.rl.agent.tools.protocol import function_of
from retool.serve.completions import read_logprobs, read_stream_options, token_text
from retool.serve.engine_thread import Piece
from retool.serve.errors import Refusal
from retool.serve.fields import Fields, sampling_of
from retool.serve.shape import About, Envelope, Found, Question, usage_of
from retool.serve.turn_reader import Turn, TurnReader, as_tool_calls


@dataclass(frozen=True)
class ChatOptions:
    """What the server's owner decided: how calls are written, and whether thoughts are told apart."""

    form: Format
    splits: bool


def read_chat(body: Any, llm: LLM, about: About, options: ChatOptions) -> Question:
    """The question in a request's body. Refusal (400) for what can't be answered."""
    fields = Fields(body)
    fields.raw("model")
    streams = fields.take("stream", bool, False)
    logprobs = None
    top = read_logprobs(fields, "top_logprobs", streams)
    if fields.take("logprobs", bool, False):
        logprobs = top or 0
    elif top:  # 0 is vLLM's way to say nothing
        raise fields.refusal("top_logprobs", "means nothing without logprobs: true")
    tools = _tools(fields)
    params = sampling_of(fields, _most(fields), logprobs, with_special_tokens=bool(tools))
    with_usage = read_stream_options(fields)
    with_ids = fields.take("return_token_ids", bool, False)
    splits = fields.take("separate_reasoning", bool, options.splits)
    messages = [_message(message) for message in fields.take("messages", list, [])]
    if not messages:
        raise fields.refusal("messages", "is missing: a list of messages")
    renderer = llm.renderer_for(fields.take("chat_template_kwargs", dict, {}))
    hides = fields.take("skip_special_tokens", bool, True)
    # After everything was taken: what is left over is a field that nobody here knows.
    fields.finish()

    request = _request(llm, renderer, messages, tools, params)
    if tools:
        ends = (*request.ends, *ends_of_calls(renderer, options.form))
        request = replace(request, ends=ends)
    reader = TurnReader(
        options.form if tools else None,
        tools,
        renderer.reasoning,
        splits,
        tuple(llm.tokenizer.all_special_tokens) if hides and tools else (),
    )
    form = ChatForm(request, reader, llm.tokenizer, about, with_ids, with_usage)
    return Question([request], streams, form, about)


def _request(
    llm: LLM,
    renderer: Renderer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    params: SamplingParams,
) -> Request:
    try:
        ids = llm.render_with(renderer, messages, tools)
    except ValueError as error:
        raise Refusal(400, str(error), "messages") from error
    return llm.turn_request(renderer, ids, params)


def _most(fields: Fields) -> int | None:
    """How many tokens an answer may have, under either of two names."""
    older = fields.optional("max_tokens", int)
    most = fields.optional("max_completion_tokens", int)
    if older is not None and most is not None and older != most:
        raise fields.refusal(
            "max_completion_tokens", f"is {most}, and max_tokens {older}: give one"
        )
    return older if most is None else most


def _tools(fields: Fields) -> list[dict[str, Any]]:
    """The tools that the model is shown. None where it mayn't call any."""
    tools = fields.take("tools", list, [])
    if not all(isinstance(tool, dict) for tool in tools):
        raise fields.refusal("tools", "must be a list of objects")
    for tool in tools:
        try:
            function_of(tool if "function" in tool else {"function": tool})
        except ValueError as error:
            raise Refusal(400, f"a schema among the tools is wrong: {error}", "tools") from error
    choice = fields.raw("tool_choice")
    if choice not in (None, "auto", "none"):
        raise fields.refusal(
            "tool_choice", f"{choice!r:.60} isn't supported: use auto or none, the model decides"
        )
    return [] if choice == "none" else tools


def _message(message: Any) -> dict[str, Any]:
    """A message as our renderer takes it: parts of text are joined."""
    if not isinstance(message, Mapping):
        raise Refusal(400, f"a message must be an object, not {message!r:.60}.", "messages")
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": "" if content is None else content}
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Refusal(400, f"a part of type {kind!r} isn't supported: only text.", "messages")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


@dataclass
class ChatForm:
    """The form of `/v1/chat/completions`."""

    request: Request
    reader: TurnReader
    tokenizer: Any
    about: About
    with_ids: bool
    with_usage: bool
    shown: dict[int, Turn] = field(default_factory=dict)  # of each answer, in events

    def __post_init__(self) -> None:
        self.whole_envelope = Envelope("chat.completion", self.about, "chatcmpl")
        self.envelope = Envelope("chat.completion.chunk", self.about, "chatcmpl")

    def whole(self, answers: Sequence[Answer], found: Found) -> dict[str, Any]:
        """See `Form`."""
        choices = []
        for number, answer in enumerate(answers):
            turn = self.reader.whole(answer.text)
            choice = {
                "index": number,
                "message": _as_message(turn),
                "logprobs": self._logprobs(answer.ids, answer.logp, found.get(number)),
                "finish_reason": _finish_reason(answer, turn),
                "stop_reason": answer.stop_reason,
            }
            if self.with_ids:
                choice["token_ids"] = answer.ids
            choices.append(choice)
        sampled = sum(len(answer.ids) for answer in answers)
        usage = usage_of([self.request], sampled)
        more = {"prompt_token_ids": self.request.ids} if self.with_ids else {}
        return self.whole_envelope.around(choices, usage=usage, **more)

    def first(self) -> list[dict[str, Any]]:
        """See `Form`."""
        opening = {"role": "assistant", "content": ""}
        choices = [self._event(number, opening) for number in range(self.request.params.n)]
        more = {"prompt_token_ids": self.request.ids} if self.with_ids else {}
        return [self.envelope.around([choice], **more) for choice in choices]

    def grown(self, piece: Piece) -> dict[str, Any] | None:
        """See `Form`."""
        done = piece.answer
        before = self.shown.get(piece.number, Turn(None, ""))
        # Read anew from all of the text: where a call begins may show only tokens later.
        turn = self.reader.whole(piece.text) if done else self.reader.safe(piece.text)
        self.shown[piece.number] = turn
        delta: dict[str, Any] = {}
        # An event holds what is new since the one before it.
        thought = (turn.reasoning or "")[len(before.reasoning or "") :]
        said = turn.content[len(before.content) :]
        if thought:
            delta["reasoning_content"] = thought
        if said:
            delta["content"] = said
        if turn.calls:
            calls = enumerate(as_tool_calls(turn.calls))
            delta["tool_calls"] = [{"index": place, **call} for place, call in calls]
        # Token ids and log-probabilities are told with the tokens, shown or not
        if not (delta or done or self.with_ids or self.request.params.logprobs is not None):
            return None
        choice = self._event(piece.number, delta)
        choice["logprobs"] = self._logprobs(piece.ids, piece.logp, None)
        if done:
            choice["finish_reason"] = _finish_reason(done, turn)
            choice["stop_reason"] = done.stop_reason
        if self.with_ids:
            choice["token_ids"] = piece.ids
        return self.envelope.around([choice])

    def last(self, usage: Mapping[str, int]) -> list[dict[str, Any]]:
        """See `Form`."""
        return [self.envelope.around([], usage=usage)] if self.with_usage else []

    def _event(self, number: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(
        self, ids: Sequence[int], logp: Sequence[float], found: Sequence[Likeliest] | None
    ) -> dict[str, Any] | None:
        """As OpenAI's chat has them: an entry for each token."""
        if self.request.params.logprobs is None:
            return None
        entries = []
        for place, (token, value) in enumerate(zip(ids, logp, strict=True)):
            entry = self._entry(token, value)
            likeliest = found[place] if found is not None else Likeliest([], [], None)
            pairs = zip(likeliest.ids, likeliest.logp, strict=True)
            entry["top_logprobs"] = [self._entry(*pair) for pair in pairs]
            entries.append(entry)
        return {"content": entries}

    def _entry(self, token: int, logp: float) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        return {"token": text, "logprob": logp, "bytes": list(text.encode())}


def _as_message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": turn.content}
    if turn.reasoning is not None:
        message["reasoning_content"] = turn.reasoning or None
    if turn.calls:
        message["content"] = turn.content or None
        message["tool_calls"] = as_tool_calls(turn.calls)
    return message


def _finish_reason(answer: Answer, turn: Turn) -> str | None:
    return "tool_calls" if turn.calls else answer.finish_reason
