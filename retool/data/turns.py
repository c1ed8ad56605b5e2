"""Where the assistant's turns lie in a rendered conversation, found by what inference would show, never by markers or guesses.

[Note: spans] A turn is what the model would have written, so its edges are defined by two renders of the conversation up
to it: `prompt`, without the turn but with the generation prompt (what a server would feed the model), and `own`, with
the turn as its last message. `own` must begin with `prompt`; what follows, up to and including the end-of-turn token, is
the turn's `body`. In a longer render the turn is where it should be exactly when that render begins with
`prompt + body`. If it doesn't, the template rewrites history (Qwen3 drops earlier thoughts, say), and what the longer
render shows in that place was never a model's output in that context: it must not be trained there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .rows import Conversation

WAY_OUT = "data.chat_template=hermes replaces it with a template that does."
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]  # (messages, with generation prompt) -> text


@dataclass(frozen=True)
class Turn:
    """One assistant turn: message index, the text inference shows before it, and the text the model writes."""

    message: int
    prompt: str
    body: str
    rest: str  # what the template adds after the end of the turn, when it is the last

    def place(self, text: str) -> tuple[int, int] | None:
        """Where the turn is in `text`, or None where `text` shows another context or other words."""
        if text.startswith(self.prompt) and text.startswith(self.body, len(self.prompt)):
            return len(self.prompt), len(self.prompt) + len(self.body)
        return None


@dataclass(frozen=True)
class Piece:
    """A stretch of the render that is tokenised by itself: a whole assistant turn (`turn`: its message), or what lies between."""

    text: str
    turn: int | None = None
    trained: bool = False


@dataclass(frozen=True)
class EndOfTurn:
    """The tokens that may end a turn: `known` ones by their text, and `added`, every added token of the tokenizer."""

    known: tuple[str, ...]
    added: frozenset[str]

    def find(self, body: str) -> tuple[int, str] | None:
        """(position after it, token) of the end of the turn that closes `body`; white space may follow.

        Of several tokens in a row at the end it is the first known one: some templates close the whole text with another.
        """
        run = list(self._closing(body))
        known = [entry for entry in run if entry[1] in self.known]
        return known[-1] if known else run[0] if run else None

    def _closing(self, body: str) -> Iterator[tuple[int, str]]:
        sizes = sorted({len(token) for token in self.added}, reverse=True)
        end = len(body.rstrip())
        while token := next((body[end - n : end] for n in sizes if n <= end and body[end - n : end] in self.added), None):
            yield end, token
            end = len(body[: end - len(token)].rstrip())


def find_turns(conversation: Conversation, render: Render, ends: EndOfTurn, has_generation_prompt: bool) -> list[Turn]:
    """Every assistant turn of the conversation, each from the renders up to it. Raises RowError, naming the turn."""
    turns = []
    for i in conversation.assistant_turns:
        prompt, own = render(conversation.messages[:i], True), render(conversation.messages[: i + 1], False)
        if not own.startswith(prompt):
            at = next((k for k, (a, b) in enumerate(zip(own, prompt, strict=False)) if a != b), len(own))
            raise conversation.error(
                f"the start of this turn can't be found: its render differs from the generation prompt at character {at}"
                f" ({own[at : at + 30]!r} where {prompt[at : at + 30]!r} was expected).", i
            )  # fmt: skip
        written = own[len(prompt) :]
        if not has_generation_prompt and any(written.lstrip().startswith(token) for token in ends.added):
            raise conversation.error(f"the chat template has no generation prompt, so the role header would be trained; {WAY_OUT}", i)
        end = ends.find(written)
        if end is None:
            raise conversation.error(f"the end of this turn can't be found: no end-of-turn token closes {written[-30:]!r}.", i)
        turn = Turn(i, prompt, written[: end[0]], written[end[0] :])
        check_turn(conversation, turn, end[1], ends)
        turns.append(turn)
    return turns


def cut(text: str, turns: Sequence[Turn], trained: set[int]) -> list[Piece]:
    """Cut `text` at the edges of every turn that stands in it unchanged."""
    pieces, at = [], 0
    for turn in turns:
        place = turn.place(text)
        if place is None:
            continue
        assert place[0] >= at, "an assistant turn begins before the one ahead of it ends"
        pieces += [Piece(text[at : place[0]]), Piece(turn.body, turn.message, turn.message in trained)]
        at = place[1]
    pieces.append(Piece(text[at:]))
    return [piece for piece in pieces if piece.text]


def check_turn(conversation: Conversation, turn: Turn, end: str, ends: EndOfTurn) -> None:
    """Everything the message says must be in what is trained, and its end only at the end. Raises RowError."""
    message = conversation.messages[turn.message]
    inside = turn.body[: -len(end)]
    for token in {end, *ends.known}:
        if token in inside or token in message["content"]:
            why = f"the end-of-turn token {token!r} is inside the turn; the model would have stopped there."
            raise conversation.error(why, turn.message)
    said = message["content"].split("</think>")[-1].strip()
    if said and said not in inside:
        why = f"the chat template drops or changes the content ({said[:40]!r}…) of this turn; {WAY_OUT}"
        raise conversation.error(why, turn.message)
    needed = Counter(piece for call in message.get("tool_calls", []) for piece in _leaves(call["function"]))
    without_content = inside.replace(said, "", 1) if said else inside
    for forms, count in needed.items():
        if max(without_content.count(form) for form in forms) < count:
            why = f"the chat template drops the tool call ({forms[0][:40]!r} isn't in the render); {WAY_OUT}"
            raise conversation.error(why, turn.message)


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """The ways in which each name and each value of a call may be written."""
    if isinstance(value, dict) and set(value) == {"name", "arguments"}:
        yield (value["name"],)
        yield from _leaves(value["arguments"])
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(key)
            yield from _leaves(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, str):
        yield value.strip(), json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]
    else:
        yield json.dumps(value), str(value)


def check_tools(conversation: Conversation, with_tools: str, without_tools: str) -> None:
    """Every tool must show in the prompt, beyond what the messages themselves say. Raises RowError."""
    for tool in conversation.tools or []:
        name = tool.get("function", tool)["name"]
        if with_tools.count(name) <= without_tools.count(name):
            raise conversation.error(f"the chat template doesn't render the tools ({name!r} isn't in the prompt); {WAY_OUT}")


def check_contexts(conversation: Conversation, text: str, messages: Collection[int]) -> None:
    """What users, tools and the system say must be in the render as it is, or as JSON. Raises RowError."""
    for i in messages:
        said = conversation.messages[i]["content"].strip()
        if said and said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text and json.dumps(said)[1:-1] not in text:
            raise conversation.error(f"the chat template drops or changes the content ({said[:40]!r}…) of this message; {WAY_OUT}", i)
