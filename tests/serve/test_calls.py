"""Tools and thoughts over HTTP: calls come as fields, whole and streamed, whatever the model writes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from retool.llm.llm import LLM
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.formats.table import FORMATS
from retool.serve import chat
from retool.serve.engine_thread import Origin
from retool.serve.shape import About
from retool.serve.turn_reader import TurnReader
from tests.rl.agent.test_call_formats import CODE_TOOL, WRITTEN
from tests.serve.server import serving
from tests.talk.conftest import PlayedBack

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"place": "Ulm"}}\n</tool_call>'
QUESTION = {"role": "user", "content": "The weather?"}


class Script(dict):
    """Every sequence says the same."""

    def __missing__(self, key: Any) -> list[str]:
        return self["turns"]


@pytest.fixture
def says(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server whose model says what it is told to say."""

    def make(*turns: str) -> PlayedBack:
        engine = PlayedBack(llm, Script(turns=list(turns)))
        engine.config = SimpleNamespace(vocab=llm.engine.config.vocab)
        monkeypatch.setattr(llm, "engine", engine)
        return engine

    return make


@pytest.fixture
def openai_client(llm: LLM) -> Any:
    openai = pytest.importorskip("openai", reason="the client of OpenAI isn't installed")
    return lambda served: openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0)


def test_a_call_and_its_result(says: Any, llm: LLM, openai_client: Any) -> None:
    """As agents do it: the call comes in fields, its result goes back as a message."""
    engine = says(f"I look.\n{CALL}<|im_end|>", "It rains.<|im_end|>")
    with serving(llm) as served:
        client = openai_client(served)
        ask = client.chat.completions.create
        first = ask(model="tiny", messages=[QUESTION], tools=[TOOL]).choices[0]
        assert (first.finish_reason, first.message.content) == ("tool_calls", "I look.")
        (call,) = first.message.tool_calls
        assert call.function.name == "look_up"
        assert json.loads(call.function.arguments) == {"place": "Ulm"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        said = first.message.model_dump(exclude_none=True)
        second = ask(model="tiny", messages=[QUESTION, said, result], tools=[TOOL]).choices[0]
        assert (second.finish_reason, second.message.content) == ("stop", "It rains.")
        assert second.message.tool_calls is None
    given = engine.text(list(engine.prompts)[-1])
    assert CALL in given and "rain" in given and "look_up" in given


def test_a_streamed_call(says: Any, llm: LLM, openai_client: Any) -> None:
    """What is said comes piece by piece, and nothing of the call's text."""
    prose = "I look at the weather in all of the places that there are, and then at the sea. " * 2
    says(f"{prose}{CALL}<|im_end|>")
    with serving(llm) as served:
        events = openai_client(served).chat.completions.create(
            model="tiny", messages=[QUESTION], tools=[TOOL], stream=True
        )
        choices = [event.choices[0] for event in events]
    said = [choice.delta.content for choice in choices if choice.delta.content]
    assert len(said) > 3 and "".join(said) == prose.rstrip()
    (call,) = [call for choice in choices for call in choice.delta.tool_calls or []]
    assert (call.index, call.function.name) == (0, "look_up")
    assert choices[-1].finish_reason == "tool_calls"


def test_a_call_that_cant_be_read_stays_text(says: Any, llm: LLM) -> None:
    wrong = "<tool_call>\n{look_up\n</tool_call>"
    says(f"{wrong}<|im_end|>")
    with serving(llm) as served:
        body = {"messages": [QUESTION], "tools": [TOOL]}
        (choice,) = served.post("/v1/chat/completions", body).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == wrong


def test_without_tools_a_call_is_text(says: Any, llm: LLM) -> None:
    says(f"{CALL}<|im_end|>", f"{CALL}<|im_end|>")
    with serving(llm) as served:
        for more in ({}, {"tools": [TOOL], "tool_choice": "none"}):
            body = {"messages": [QUESTION], **more}
            (choice,) = served.post("/v1/chat/completions", body).json()["choices"]
            assert choice["message"]["content"] == CALL
            assert "tool_calls" not in choice["message"]


def test_thoughts_are_told_apart_where_asked(says: Any, llm: LLM) -> None:
    turn = "<think>\nHm.\n</think>\n\nSun.<|im_end|>"
    says(turn, turn, turn)
    with serving(llm, splits=True) as served:
        ask = {"messages": [QUESTION]}
        (choice,) = served.post("/v1/chat/completions", ask).json()["choices"]
        assert choice["message"]["content"] == "Sun."
        assert choice["message"]["reasoning_content"] == "Hm.\n"
        kept = served.post("/v1/chat/completions", {**ask, "separate_reasoning": False})
        message = kept.json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": turn.removesuffix("<|im_end|>")}
        streamed = served.post("/v1/chat/completions", {**ask, "stream": True}).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm.\n"
    assert "".join(delta.get("content", "") for delta in deltas) == "Sun."


def test_tools_change_how_an_answer_is_sampled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may be written with special tokens, and end with one of its own."""
    monkeypatch.setattr(chat, "ends_of_calls", lambda *_: (7,))
    body = {"messages": [QUESTION]}

    def read(**more: Any) -> tuple[Any, Any]:
        options = chat.ChatOptions(HERMES, False)
        question = chat.read_chat({**body, **more}, llm, About("tiny", Origin("w")), options)
        return question.requests[0], question.form.reader

    plain, _ = read()
    assert plain.params.skip_special_tokens and 7 not in plain.ends
    with_tools, reader = read(tools=[TOOL])
    assert not with_tools.params.skip_special_tokens and with_tools.ends == (*plain.ends, 7)
    assert reader.whole("a<|im_end|>b").content == "ab"
    _, showing = read(tools=[TOOL], skip_special_tokens=False)
    assert showing.whole("a<|im_end|>b").content == "a<|im_end|>b"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("before", ["", "Let me see.\n", "<think>\na < b\n</think>\n\nSo:\n"])
def test_what_was_streamed_is_never_taken_back(name: str, before: str) -> None:
    """In no format, wherever the text stops growing for a moment."""
    text = before + WRITTEN[name]
    for splits in (False, True):
        reader = TurnReader(FORMATS[name], [CODE_TOOL], "tagged", splits)
        whole = reader.whole(text)
        assert whole.calls, "it isn't a call"
        for length in range(len(text)):
            safe = reader.safe(text[:length])
            assert whole.content.startswith(safe.content), text[:length]
            assert (whole.reasoning or "").startswith(safe.reasoning or ""), text[:length]


def test_thoughts_grow_without_a_step_back() -> None:
    text = "<think>\nOne <b> and </th\n</think>\n\nTwo"
    for reasoning, begin in (("tagged", 0), ("opened", 7), ("none", 0)):
        reader = TurnReader(None, (), reasoning, True)
        whole = reader.whole(text[begin:])
        assert (whole.reasoning, whole.content) == ("One <b> and </th\n", "Two")
        for length in range(len(text) - begin):
            safe = reader.safe(text[begin : begin + length])
            assert whole.content.startswith(safe.content)
            assert "One <b> and </th\n".startswith(safe.reasoning or "")
    plain = TurnReader(HERMES, (), "tagged", True).whole("no thought < here")
    assert (plain.reasoning, plain.content) == ("", "no thought < here")
