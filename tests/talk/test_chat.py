"""`retool chat`: what is shown, what is remembered, and what the user can do meanwhile."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from rich.console import Console

from retool.__main__ import main
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.engine import TurnDone
from retool.llm.sampling import SamplingParams
from retool.rl.agent.episode import Sampled
from retool.rl.agent.reading.call import Call
from retool.rl.agent.tools import TrajectoryTool
from retool.rl.agent.tools.session import InterpreterSession
from retool.rl.types import Stop
from retool.talk import dialogue, lines
from retool.talk.agent import make_talker, to_message
from retool.talk.dialogue import Dialogue, converse
from retool.talk.lines import read_message
from retool.talk.screen import TerminalScreen
from retool.talk.session import Session
from retool.talk.session import _longer as longer
from tests.data.templates_table import small_tokenizer
from tests.real_data import real_template

CALL = '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "x = 6\\nprint(x * 7)"}}\n</tool_call>'
END = "<|im_end|>"
COUNT = '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'
SHOWN = """I multiply.
▸ code_interpreter
  │ x = 6
  │ print(x * 7)
◂ code_interpreter
  │ 42
It is 42.
"""


def screen_of(hides_calls: bool = True) -> tuple[TerminalScreen, io.StringIO]:
    output = io.StringIO()
    return TerminalScreen(Console(file=output, highlight=False, width=60), hides_calls), output


class Pieces:
    """A screen that notes what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, text: str) -> None:
        self.texts.append(text)

    def end_turn(self, calls: list[Call]) -> None:
        self.texts.append(f"[{len(calls)} calls]")

    def result(self, name: str, text: str) -> None:
        self.texts.append(f"[{name}: {text}]")


# --- the conversation ---


def test_an_answer_streams_and_its_tool_runs(talker_of) -> None:
    talker, engine = talker_of({"chat": [f"I multiply.\n{CALL}{END}", f"It is 42.{END}"]})
    session = Session(talker, system="Be brief.")
    pieces = Pieces()
    assert asyncio.run(session.answer("How much is 6*7?", pieces)) == (Stop.NO_CALL, "")
    first = pieces.texts[: pieces.texts.index("[1 calls]")]
    assert len(first) > 3 and all(b.startswith(a) for a, b in pairwise(first))
    assert pieces.texts[pieces.texts.index("[1 calls]") + 1] == "[code_interpreter: 42]"
    assert pieces.texts[-2:] == ["It is 42.", "[0 calls]"]
    assert engine.text("chat", 0).startswith("<|im_start|>system\nBe brief.")
    assert "42" in engine.text("chat", 1) and engine.dropped == ["chat"]
    # The next message is shown to it after all of this, as a template shows it
    engine.script["chat"] = [f"Yes.{END}"]
    pieces.texts.clear()
    asyncio.run(session.answer("Sure? <|im_end|>", pieces))
    assert pieces.texts[-1] == "[0 calls]" and not any("42" in text for text in pieces.texts)
    history = engine.text("chat")
    assert history.count("<tool_call>") >= 1 and "<tool_response>\n42\n</tool_response>" in history
    assert "It is 42.<|im_end|>" in history and history.endswith("<|im_start|>assistant\n")
    # … but what the user writes is text
    ends = engine.prompts["chat"][0].count(talker.llm.renderer.end_of_turn_ids[0])
    assert ends == history.count("<|im_end|>") - 1


def test_a_reset_forgets_and_keeps_the_system_message(talker_of) -> None:
    talker, engine = talker_of({"chat": [f"One.{END}", f"Two.{END}"]}, tools=False)
    session = Session(talker, system="Be brief.")
    asyncio.run(session.answer("First", Pieces()))
    asyncio.run(session.reset())
    asyncio.run(session.answer("Second", Pieces()))
    assert "First" not in engine.text("chat") and "Be brief." in engine.text("chat")


def test_a_question_that_is_asked_again_gets_another_answer(talker_of) -> None:
    """Of other draws, which are the same in each run of the program."""

    def seeds() -> list[Any]:
        talker, engine = talker_of({"chat": [f"One.{END}"] * 3}, tools=False)
        session = Session(talker)
        found = []
        for _ in range(3):
            asyncio.run(session.answer("Again", Pieces()))
            found.append(engine.seeds["chat"])
        return found

    first = seeds()
    assert len(set(first)) == 3 and seeds() == first


def test_what_a_tool_keeps_lives_as_long_as_the_conversation(talker_of) -> None:
    class Counter:
        """Counts its calls."""

        schema: ClassVar[dict[str, Any]] = {
            "type": "function",
            "function": {"name": "count", "description": "Counts.", "parameters": {}},
        }
        closed: ClassVar[list[int]] = []

        def open(self, row: dict[str, Any]) -> list[int]:
            return [0]

        def call(self, state: list[int], arguments: dict[str, Any]) -> str:
            state[0] += 1
            return f"{state[0]} so far"

        def close(self, state: list[int]) -> None:
            self.closed.append(state[0])

    turns = [f"{COUNT}{END}", f"Done.{END}"] * 3
    talker, _ = talker_of({"chat": turns}, tools=False)
    talker = make_talker(talker.llm, [TrajectoryTool(Counter())], talker.sampling)
    session = Session(talker)

    async def talk() -> list[str]:
        told = []
        for message in ("First", "Second", None, "Third"):
            if message is None:
                await session.reset()
                continue
            pieces = Pieces()
            await session.answer(message, pieces)
            told += [text for text in pieces.texts if text.startswith("[count:")]
        await session.close()
        return told

    assert asyncio.run(talk()) == ["[count: 1 so far]", "[count: 2 so far]", "[count: 1 so far]"]
    assert Counter.closed == [2, 1]


def test_the_interpreter_s_variables_live_on_over_messages(own_llm, talker_of, interpreter) -> None:
    uses = CALL.replace("x = 6\\nprint(x * 7)", "print(x + 1)")
    talker, _ = talker_of({"chat": [f"{CALL}{END}", f"42.{END}", f"{uses}{END}", f"7.{END}"]})
    keeps = InterpreterSession(interpreter)
    session = Session(make_talker(own_llm, [keeps], talker.sampling))
    pieces = Pieces()
    for message in ("How much is 6*7?", "And one more than the 6?"):
        asyncio.run(session.answer(message, pieces))
    assert "[code_interpreter: 7]" in pieces.texts


def test_thoughts_are_over_with_the_answer(talker_of) -> None:
    talker, engine = talker_of({"chat": [f"<think>\nHm.\n</think>\n\nOne.{END}", f"Two.{END}"]})
    session = Session(talker)
    asyncio.run(session.answer("First", Pieces()))
    asyncio.run(session.answer("Second", Pieces()))
    assert "Hm." not in engine.text("chat") and "One.<|im_end|>" in engine.text("chat")


def test_a_conversation_whose_answer_failed_is_as_it_was(
    talker_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker, engine = talker_of({"chat": [f"One.{END}", f"Two.{END}"]}, tools=False)
    session = Session(talker)
    asyncio.run(session.answer("First", Pieces()))
    known = list(session.messages)

    def fail(*_: object) -> None:
        raise ValueError("a format of the user's own")

    with monkeypatch.context() as patch:
        patch.setattr("retool.talk.session.calls_in", fail)
        with pytest.raises(ValueError, match="of the user's own"):
            asyncio.run(session.answer("Second", Pieces()))
    assert session.messages == known and engine.dropped == ["chat", "chat"]


def test_a_conversation_that_is_too_long_is_refused_as_it_was(talker_of) -> None:
    talker, _ = talker_of({"chat": [f"One.{END}"]}, tools=False)
    session = Session(talker)
    with pytest.raises(ValueError, match="/reset begins a new one"):
        asyncio.run(session.answer("word " * 2000, Pieces()))
    assert session.messages == []


def test_an_answer_ends_at_its_limit(talker_of) -> None:
    said = "one two three four five six seven"
    talker, engine = talker_of({"chat": [said]}, tools=False, max_tokens=6)
    pieces = Pieces()
    assert asyncio.run(Session(talker).answer("Count", pieces)) == (Stop.LENGTH, "")
    left = len(engine.left["chat"])
    assert len(talker.llm.renderer.encode(["x", said])[1]) - left == 6


def test_an_answer_that_fills_the_cache_was_cut_off() -> None:
    begun = Sampled([1], [-1.0], [-1.0], "length")
    whole = longer(begun, TurnDone("chat", [2], [-2.0], [-2.0], "capacity"))
    assert whole == Sampled([1, 2], [-1.0, -2.0], [-1.0, -2.0], "aborted")


def test_a_turn_with_a_call_that_cant_be_read_stays_text(talker_of) -> None:
    """All of it: a call beside that can be read doesn't make it go."""
    talker, _ = talker_of({})
    text = f"{CALL}\n<tool_call>\n{{bad\n</tool_call>"
    assert to_message(text, talker) == {"role": "assistant", "content": text}
    assert "tool_calls" in to_message(CALL, talker)


def test_an_answer_ends_where_the_model_has_no_more_room(talker_of) -> None:
    talker, engine = talker_of({"chat": ["one two three " * 400]}, tools=False, max_tokens=4000)
    session = Session(talker)
    assert asyncio.run(session.answer("Count", Pieces())) == (Stop.LENGTH, "")
    said = talker.llm.renderer.encode(["x", session.messages[-1]["content"]])[1]
    # As many tokens as there is room for, but for spaces at the end, which a message doesn't keep
    assert 0 <= 900 - len(engine.prompts["chat"][0]) - len(said) <= 2


# --- the terminal ---


def test_the_screen_shows_a_call_as_its_program(talker_of) -> None:
    talker, _ = talker_of({"chat": [f"I multiply.\n{CALL}{END}", f"It is 42.{END}"]})
    screen, output = screen_of()
    asyncio.run(Session(talker).answer("How much is 6*7?", screen))
    assert output.getvalue() == SHOWN


def test_the_screen_waits_for_what_may_be_a_call() -> None:
    screen, output = screen_of()
    for end in range(1, 30):
        screen.write("a < b, <tool_bar> and <tool_call"[:end])
        assert "<tool_call" not in output.getvalue()
    screen.end_turn([])
    assert output.getvalue() == "a < b, <tool_bar> and <tool_c\n"


def test_a_call_that_cannot_be_read_is_shown_as_it_is() -> None:
    screen, output = screen_of()
    screen.write("Now <tool_call>{oops}")
    screen.end_turn([Call("", {}, "it isn't valid JSON")])
    screen.result("", "Error: it isn't valid JSON")
    assert output.getvalue().startswith("Now <tool_call>{oops}\n◂ answer\n  │ Error: it isn't")


def test_what_a_model_or_a_tool_says_cannot_steer_the_terminal() -> None:
    screen, output = screen_of(hides_calls=False)
    screen.write("\x1b[2J\x1b]0;title\x07red")
    screen.end_turn([])
    screen.result("t", "\x1b[31m" + "\n".join(map(str, range(100))))
    assert "\x1b" not in output.getvalue() and "\x07" not in output.getvalue()
    assert "… 60 more lines" in output.getvalue()


def test_lines_blocks_and_pastes(monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[bool] = []
    monkeypatch.setattr(lines, "_more_is_there", lambda: bool(ready) and ready.pop(0))

    def read(*typed: str) -> list[str | None]:
        left = list(typed)

        def read_line(prompt: str) -> str:
            if not left:
                raise EOFError
            return left.pop(0)

        found = []
        while not found or found[-1] is not None:
            found.append(read_message(read_line))
        return found

    assert read("one", "two") == ["one", "two", None]
    assert read('"""', "def f():", "    return 1", '"""', "x") == [
        "def f():\n    return 1",
        "x",
        None,
    ]
    assert read('"""a"""', '"""b', 'c"""') == ["a", "b\nc", None]
    ready[:] = [True, True, False]
    assert read("one", "two", "three", "four") == ["one\ntwo\nthree", "four", None]


def test_commands_in_the_conversation(talker_of, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [f"One.{END}", f"Two.{END}", f"Three.{END}"]
    talker, engine = talker_of({"chat": turns})
    screen, output = screen_of()
    typed = iter(
        "hello|/system Be brief.|again|//slash|/tools|/rest|/help||/reset|/quit|never".split("|")
    )
    monkeypatch.setattr(dialogue, "read_message", lambda: next(typed))
    loop = asyncio.new_event_loop()
    assert converse(Dialogue(Session(talker), screen, loop, "the help")) == 0
    loop.close()
    said = output.getvalue()
    assert "One.\n" in said and "Two.\n" in said and next(typed) == "never"
    assert "code_interpreter: A tool for executing code." in said and "the help" in said
    assert "/rest: no such command. Did you mean /reset?" in said
    assert "Be brief." in engine.text("chat") and "/slash<|im_end|>" in engine.text("chat")
    assert "hello" not in engine.text("chat") and "again" in engine.text("chat")


def test_ctrl_c_stops_the_answer_and_not_the_program(
    talker_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    talker, engine = talker_of({"chat": ["one two three four five six seven" + END, f"Two.{END}"]})
    screen, output = screen_of()
    steps = 0

    def interrupt() -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), signal.SIGINT)

    engine.before_step = interrupt
    session = Session(talker)
    typed = iter(["count", "next", None])
    monkeypatch.setattr(dialogue, "read_message", lambda: next(typed))
    loop = asyncio.new_event_loop()
    assert converse(Dialogue(session, screen, loop, "")) == 0
    loop.close()
    assert "(stopped)" in output.getvalue() and "Two.\n" in output.getvalue()
    roles = [message["role"] for message in session.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    partial = session.messages[1]["content"]
    assert partial and "one two three four five six seven".startswith(partial)
    assert len(partial) < 30 and engine.dropped == ["chat", "chat"]


def test_ctrl_c_at_the_prompt_does_not_leave(talker_of, monkeypatch: pytest.MonkeyPatch) -> None:
    talker, _ = talker_of({})
    screen, output = screen_of()
    answers = iter([KeyboardInterrupt(), None])

    def typed() -> None:
        answer = next(answers)
        if answer is not None:
            raise answer

    monkeypatch.setattr(dialogue, "read_message", typed)
    assert converse(Dialogue(Session(talker), screen, asyncio.new_event_loop(), "")) == 0
    assert "/quit or Ctrl-D leaves" in output.getvalue()


# --- the command ---


def test_a_piped_question_is_answered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", str(folder), "--max-tokens", "5", "--temperature", "0", "--device", "cpu"]
    said = []
    for tools in ("code", "none", "none"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Mia has 3 boxes.\nHow many?\n"))
        assert main([*words, "--tools", tools, "--isolation", "best_effort"]) == 0
        said.append(capsys.readouterr().out)
    assert said[1] == said[2] and min(map(len, said)) > 5


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["nowhere"], "nowhere"),
        (["{folder}", "--temperature", "-1"], "temperature=-1"),
        (
            ["{folder}", "--tools", "no.yaml"],
            "--tools no.yaml: tool config file no.yaml doesn't exist",
        ),
        (["{folder}", "--chat-template", "no.jinja"], "error: --chat-template=no.jinja: there is"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    words: list[str],
    why: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    asked = [word.replace("{folder}", str(folder)) for word in words]
    none = [] if "--tools" in words else ["--tools", "none"]
    assert main(["chat", *asked, *none]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and why in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "mistralai-Mistral-Nemo-Instruct-2407",
            '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]',
        ),
        ("meta-llama-Llama-3.1-8B-Instruct", '{"name": "add", "parameters": {"a": 1}}'),
    ],
)
def test_the_next_question_shows_calls_as_their_template_does(name: str, said: str) -> None:
    """A call that was read in the template's own format is kept in its fields, with the id that
    Mistral's templates ask for.
    """
    renderer = Renderer(small_tokenizer(name, real_template(name)), Rendering())
    schema = {"type": "function", "function": {"name": "add", "description": "Adds."}}
    tool = SimpleNamespace(name="add", schema=schema)
    llm = SimpleNamespace(renderer=renderer, max_model_len=100, eos_ids=())
    talker = make_talker(llm, [tool], SamplingParams())
    message = to_message(said, talker)
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": {"a": 1}} and message["content"] == ""
    answer = {"role": "tool", "content": "2", "tool_call_id": call["id"]}
    history = [{"role": "user", "content": "Add."}, message, answer]
    again = [*history, {"role": "assistant", "content": "2"}, {"role": "user", "content": "More."}]
    text = renderer.text(again, [schema])
    assert said.removeprefix("[TOOL_CALLS][").removesuffix("}]") in text
    assert text.count(call["id"]) == (2 if name.startswith("mistral") else 0)
