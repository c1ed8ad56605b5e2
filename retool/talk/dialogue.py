"""A dialogue in the terminal: messages, answers, and what the user may say to the program itself."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import difflib
import importlib
import signal
import sys
from dataclasses import dataclass

from rich.console import Console

from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.tools.load import close_tools
from retool.rl.types import Stop
from retool.talk.agent import make_talker, open_llm, open_tools, sampling_of
from retool.talk.episodes import hold_episodes
from retool.talk.lines import read_message
from retool.talk.screen import TerminalScreen
from retool.talk.session import Session

COMMANDS = ("/reset", "/system", "/tools", "/quit", "/exit", "/help")
ENDINGS = {
    Stop.LENGTH: "(cut off: --max-tokens, or the model's own limit)",
    Stop.MAX_TURNS: "(ended: it called its tools again and again)",
    Stop.ABORTED: "(stopped)",
}


@dataclass
class Dialogue:
    """A session and where it is shown. `help` is what /help says."""

    session: Session
    screen: TerminalScreen
    loop: asyncio.AbstractEventLoop
    help: str


def hold(options: argparse.Namespace, help_text: str) -> int:
    """What `retool chat` does: its exit status. ValueError for what the user can mend."""
    sampling = sampling_of(options)
    loop = asyncio.new_event_loop()
    tools = open_tools(options.tools, options.isolation, options.session)
    try:
        with open_llm(options, max_num_seqs=1, enforce_eager=True) as llm:
            talker = make_talker(llm, tools, sampling, options.format)
            if options.environment is not None:
                return hold_episodes(talker, options, loop)
            session = Session(talker, options.system)
            hides_calls = talker.agent.options.format is HERMES and bool(tools)
            screen = TerminalScreen(Console(highlight=False), hides_calls)
            dialogue = Dialogue(session, screen, loop, help_text)
            try:
                if not sys.stdin.isatty():
                    return answer_piped(dialogue)
                names = ", ".join(tool.name for tool in tools) or "none"
                screen.note(f"{options.model} · tools: {names} · /help")
                return converse(dialogue)
            finally:
                loop.run_until_complete(session.close())
    finally:
        loop.run_until_complete(close_tools(tools))
        loop.close()


def answer_piped(dialogue: Dialogue) -> int:
    """Answer what comes through a pipe."""
    text = sys.stdin.read().strip("\n")
    if not text.strip():
        raise ValueError(
            "standard input holds no message: echo 'How much is 6*7?' | retool chat MODEL"
        )
    return 0 if _answer(dialogue, text) else 1


def converse(dialogue: Dialogue) -> int:
    """Messages and answers until the user leaves."""
    screen = dialogue.screen
    with contextlib.suppress(ImportError):  # gives `input` a history, and a paste as one text
        importlib.import_module("readline")
    while True:
        try:
            text = read_message()
        except KeyboardInterrupt:
            screen.note("\n(/quit or Ctrl-D leaves)")
            continue
        if text is None:
            screen.note("")
            return 0
        if text.startswith("/") and not text.startswith("//"):
            if not _obey(dialogue, text):
                return 0
        elif text.strip():
            # Two of them begin a message with one
            _answer(dialogue, text[1:] if text.startswith("//") else text)


def _answer(dialogue: Dialogue, text: str) -> bool:
    """Whether there is an answer; Ctrl-C stops it, and not the program."""
    loop = dialogue.loop
    screen = dialogue.screen
    answer = loop.create_task(dialogue.session.answer(text, screen))
    # Else Ctrl-C would break out of the loop in the middle of a step of the engine
    loop.add_signal_handler(signal.SIGINT, answer.cancel)
    try:
        stop, failure = loop.run_until_complete(answer)
    except ValueError as error:
        screen.note(f"error: {error}")
        return False
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    screen.new_line()
    if failure:
        screen.note(f"(a tool failed: {failure})")
    elif stop in ENDINGS:
        screen.note(ENDINGS[stop])
    return not failure


def _obey(dialogue: Dialogue, text: str) -> bool:
    """Do what a command says; whether the conversation goes on."""
    session = dialogue.session
    screen = dialogue.screen
    command, _, argument = text.partition(" ")
    argument = argument.strip()
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        dialogue.loop.run_until_complete(session.reset())
        screen.note("(a new conversation)")
    elif command == "/system":
        session.system = argument or None
        dialogue.loop.run_until_complete(session.reset())
        screen.note("(a new conversation, with this system message)" if argument else "(with none)")
    elif command == "/tools":
        for schema in session.talker.agent.schemas or [{}]:
            function = schema.get("function", {"name": "none"})
            screen.note(f"{function['name']}: {function.get('description', '')}")
    elif command == "/help":
        screen.note(dialogue.help)
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        instead = f"Did you mean {near[0]}?" if near else f"There is {', '.join(COMMANDS)}."
        screen.note(f"{command}: no such command. {instead}")
    return True
