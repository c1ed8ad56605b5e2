"""Where the assistant's turns lie in a rendered conversation.

They are found by what inference would show, never by markers or guesses.

[Note: spans] A turn is what the model would have written, so its edges are defined by two renders
of the conversation up to it: `prompt`, without the turn but with the generation prompt (what a
server would feed the model), and `own`, with the turn as its last message. Where `own` begins with
`prompt`, what follows, up to and including the end-of-turn token, is the turn's `body`. In a longer
render the turn is where it should be exactly when that render begins with `prompt + body`. If it
doesn't, the template rewrites history (Qwen3 drops earlier thoughts, say), and what the longer
render shows in that place was never a model's output in that context: it must not be trained there.

[Note: other beginnings] Some templates show a finished turn in another way than its prompt
announces: they move the system message (Mistral), close a tool's result otherwise (Hermes 3), or
leave out the thought that their generation prompt opens (R1, QwQ). The prompt is then still what
inference shows. The body is what `own` has after its own header, which is found by a render with a
placeholder in the turn's stead; a thought that the prompt opens and `own` lacks comes from the row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retool.data.read.rows import Conversation
from retool.data.template.completeness import check_said, fault, shows_thoughts
from retool.data.template.thoughts import (
    OpenThought,
    closes_thought,
    is_empty_thought,
    open_thought,
    think,
    thoughts,
    without_thoughts,
)

PLACEHOLDER = "TheTurnGoesHere"
# (messages, with generation prompt) -> text
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]


@dataclass(frozen=True)
class Turn:
    """One assistant turn.

    `message` is its index, `prompt` the text that inference shows before it, `body` the text that
    the model writes.
    """

    message: int
    prompt: str
    body: str
    rest: str  # what the template adds after the end of the turn, when it is the last

    @property
    def whole(self) -> str:
        """The conversation that ends with this turn."""
        return self.prompt + self.body + self.rest

    def place(self, text: str) -> tuple[int, int] | None:
        """Where the turn is in `text`, or None where `text` shows another context or other words."""
        if text.startswith(self.prompt) and text.startswith(self.body, len(self.prompt)):
            return len(self.prompt), len(self.prompt) + len(self.body)
        return None


@dataclass(frozen=True)
class EndOfTurn:
    """The tokens that may end a turn.

    `known` are those that do, by their text, and `added` every added token of the tokenizer.
    `after_call` is the one of `known` that ends only turns of calls, if one does.
    """

    known: tuple[str, ...]
    added: frozenset[str]
    after_call: str | None = None

    def find(self, body: str) -> tuple[int, str] | None:
        """(position after it, token) of the end of the turn that closes `body`.

        White space may follow.

        Of several tokens in a row at the end it is the first known one: some templates close the
        whole text with another.
        """
        # `closing` gives the last token first: the last entry is the first of the run.
        known = [entry for entry in self.closing(body) if entry[1] in self.known]
        return known[-1] if known else None

    def closing(self, body: str) -> Iterator[tuple[int, str]]:
        """(position after it, token) of each added token in the run that closes `body`.

        The last one first.
        """
        # Longest first: <|im_end|> may end with the text of a shorter token.
        longest_first = sorted({len(token) for token in self.added}, reverse=True)

        def token_before(end: int) -> str | None:
            for size in longest_first:
                if size <= end and body[end - size : end] in self.added:
                    return body[end - size : end]
            return None

        end = len(body.rstrip())
        while token := token_before(end):
            yield end, token
            end = len(body[: end - len(token)].rstrip())


@dataclass(frozen=True)
class TurnFinder:
    """Finds the assistant's turns of one conversation.

    `header` is what the template writes before an answer that its generation prompt lacks: a role,
    where there is no generation prompt. It would be trained.
    """

    conversation: Conversation
    render: Render
    ends: EndOfTurn
    header: str = ""

    def turns(self, trained: Collection[int]) -> list[Turn]:
        """Every turn, each from the renders up to it.

        One that isn't trained and can't be found is passed over.

        Raises TemplateFault, naming the turn.
        """
        found = [self.turn(i, i in trained) for i in self.conversation.assistant_turns]
        return [turn for turn in found if turn is not None]

    def turn(self, i: int, trained: bool) -> Turn | None:
        """The turn of message `i`."""
        prompt = self.render(self.conversation.messages[:i], True)
        written = self._written(i, prompt, trained)
        if written is None:
            return None
        return self.made(i, prompt, written, trained)

    def made(self, i: int, prompt: str, written: str, trained: bool) -> Turn:
        """The turn of message `i`, once it is known what the model writes and the template adds.

        Raises RowError where that isn't what the message says.
        """
        if self.header.strip():
            raise fault(
                self.conversation,
                "the chat template has no generation prompt, so the role header would be trained",
                i,
            )
        end = self.ends.find(written)
        if end is None:
            raise fault(
                self.conversation,
                f"the end of this turn can't be found: no end-of-turn token closes {written[-30:]!r}",
                i,
            )
        turn = Turn(i, prompt, written[: end[0]], written[end[0] :])
        self._check(turn, end[1], trained)
        return turn

    def _written(self, i: int, prompt: str, trained: bool) -> str | None:
        """What the model writes after `prompt`, and what the template adds.

        None for an untrained turn that can't be found.
        """
        messages = self.conversation.messages
        message = messages[i]
        thinks = trained and bool(thoughts(message))
        opened = open_thought(prompt)
        if thinks and closes_thought(prompt):
            where, _ = thoughts(message)[0]
            field = "a thought in the content" if where == "content" else where
            why = (
                "the generation prompt closes the thought before the turn begins (thinking is off), and "
                f"the row gives {field}"
            )
            raise fault(self.conversation, why, i)
        # See [Note: spans]: if this render goes on where the prompt ended, the rest is the turn.
        own = self.render(messages[: i + 1], False)
        written = own[len(prompt) :] if own.startswith(prompt) else None
        if written is None or (thinks and opened and not shows_thoughts(message, written)):
            written = self._after_header(i, prompt, opened, thinks, own)
        if written is None and trained:
            at = _first_difference(own, prompt)
            why = f"its render differs from the generation prompt at character {at}"
            what = f"{own[at : at + 30]!r} where {prompt[at : at + 30]!r} was expected"
            raise fault(
                self.conversation, f"the start of this turn can't be found: {why} ({what})", i
            )
        if trained and written is not None and opened and opened.close not in written:
            raise fault(
                self.conversation,
                "the generation prompt opens a thought, and the row gives none for this turn",
                i,
            )
        return written

    def _after_header(
        self, i: int, prompt: str, opened: OpenThought | None, thinks: bool, own: str
    ) -> str | None:
        """What `own` has after its header, with the thought of the row where the prompt opens one."""
        before = self.conversation.messages[:i]
        message = self.conversation.messages[i]
        bare = self.render(before, False)
        generation = prompt[len(bare) :] if prompt.startswith(bare) else prompt
        stand_in = {"role": "assistant", "content": PLACEHOLDER}
        head, found, _ = self.render([*before, stand_in], False).rpartition(PLACEHOLDER)
        if not found:
            return None
        context = _first_difference(head, bare)  # headers of earlier turns lie before it
        shared, extra = _shared_header(head, generation, context)
        if not extra and not (thinks and opened):
            return own[len(shared) :] if own.startswith(shared) else None
        # The prompt goes on where the finished turn has nothing: only a thought, empty or to be
        # filled, may stand there.
        plain = self.render([*before, without_thoughts(message)], False)
        if not plain.startswith(shared):
            return None
        said = plain[len(shared) :]
        if thinks and opened and len(thoughts(message)) == 1:
            return think(thoughts(message)[0][1], opened, said)
        return said if is_empty_thought(extra) else None

    def _check(self, turn: Turn, end: str, trained: bool) -> None:
        """Everything the message says must be in the body, and the turn's end only at its end.

        Raises RowError.
        """
        content = self.conversation.messages[turn.message]["content"]
        inside = turn.body[: -len(end)]
        # The model would have stopped at the first of these: what follows could never be sampled.
        for token in (end, *self.ends.known):
            if token in inside or token in content:
                why = (
                    f"the end-of-turn token {token!r} is inside the turn; the model would have stopped "
                    "there."
                )
                raise self.conversation.error(why, turn.message)
        check_said(self.conversation, turn.message, inside, trained)


def _first_difference(text: str, other: str) -> int:
    for at, (mine, its) in enumerate(zip(text, other, strict=False)):
        if mine != its:
            return at
    return min(len(text), len(other))


def _shared_header(head: str, generation: str, context: int) -> tuple[str, str]:
    """`head` up to the end of what it shares with the generation prompt, and what that has more.

    `head` is what a finished turn has before its words: `context` characters that aren't the
    turn's, its header, and maybe markup of the template's.
    """
    whole = head.rfind(generation, context)
    if whole >= 0:
        return head[: whole + len(generation)], ""
    for size in range(len(generation), 0, -1):
        if head.endswith(generation[:size]):
            return head, generation[size:]
    return head, generation
