"""One engine for all requests: a thread steps it, and requests come and go between two steps.

The engine belongs to the thread. The event loop gives it commands, and gets back what answers grew
by: values that nobody changes any more.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from retool.engine import TurnDone
from retool.llm.answer import Answer
from retool.llm.llm import LLM
from retool.llm.requests import Request
from retool.llm.sampling import SamplingParams
from retool.rl.agent.tools.on_thread import outcome_of, settle
from retool.rl.server.dialects import mark_of
from retool.serve.errors import Refusal

T = TypeVar("T")
Command = Callable[[], None]
MOST_WAITING = 64  # pieces of a request, before those of an answer become one


@dataclass(frozen=True)
class Origin:
    """Which weights sample: their `mark`, and the `version` that whoever brought them calls them."""

    mark: str
    version: str = "0"


@dataclass(frozen=True)
class Piece:
    """What an answer grew by: the ticket's answer `number`, the new `ids` with their `logp`, and all
    of its `text` so far. `answer` is there when it is done. `origin`: what sampled it until now.
    """

    number: int
    ids: list[int]
    logp: list[float]
    text: str
    answer: Answer | None
    origin: Origin


@dataclass(eq=False)
class Ticket:
    """A request's answers while they are sampled. `streams`: pieces come as they grow, and not only
    the last ones. `origins`: the weights that sampled, in order; the thread's alone until all answers
    are done.
    """

    answers: list[Answer]
    streams: bool
    open: int = 0  # answers that aren't done
    origins: list[Origin] = field(default_factory=list)
    _waiting: asyncio.Queue[list[Piece]] = field(default_factory=asyncio.Queue)
    _last: dict[int, list[Piece]] = field(default_factory=dict)  # that waits of each answer

    def grow(self, piece: Piece) -> None:
        """Have a piece wait. Where a client doesn't read, those of an answer become one: each has all
        of its text.
        """
        last = self._last.get(piece.number)
        if not last or self._waiting.qsize() < MOST_WAITING:
            self._last[piece.number] = [piece]
            self._waiting.put_nowait(self._last[piece.number])
            return
        before = last[0]
        last[0] = replace(piece, ids=before.ids + piece.ids, logp=before.logp + piece.logp)

    def fail(self) -> None:
        """No more pieces come."""
        self._waiting.put_nowait([])

    async def next(self) -> Piece | None:
        """What an answer grew by; None: the engine failed."""
        waiting = await self._waiting.get()
        # Taken out, so that nothing more is added to it
        return waiting.pop() if waiting else None

    @property
    def origin(self) -> Origin:
        """What sampled it. Answers that went on with other weights name all of them."""
        if len(self.origins) == 1:
            return self.origins[0]
        marks = "+".join(origin.mark for origin in self.origins)
        return Origin(marks, "+".join(origin.version for origin in self.origins))


@dataclass
class Counts:
    """Since the server began."""

    requests: int = 0
    refused: int = 0  # for want of room
    abandoned: int = 0  # their clients went away
    prompt_tokens: int = 0
    sampled_tokens: int = 0


class EngineThread:
    """The engine of `llm`, for at most `most` answers at once, those that wait included.

    Made and used on an event loop. `on_failure` is called there when the engine fails, after which
    it answers nothing.
    """

    def __init__(self, llm: LLM, most: int, on_failure: Command) -> None:
        self.llm = llm
        self.origin = Origin(mark_of(str(llm.folder)))  # changed on the thread alone
        self.most = most
        self.counts = Counts()
        self.tickets: set[Ticket] = set()
        self.failure: BaseException | None = None
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._owners: dict[Hashable, tuple[Ticket, int]] = {}  # the thread's alone
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # The first use of a tokenizer may change it; later ones, on two threads, don't
        llm.text_request("a", SamplingParams())
        self._thread.start()

    @property
    def under_way(self) -> int:
        """Answers that aren't done."""
        return sum(ticket.open for ticket in self.tickets)

    def submit(self, requests: Sequence[Request], piece: int | None) -> Ticket:
        """Have answers sampled; `piece` tokens at a time, where they stream. `release` it in the end.

        Refusal where there is no room, or the engine failed. ValueError for a prompt that the model
        can't take.
        """
        self.require_alive()
        # Refused at the door: a request that waits for minutes has a client that has given up.
        wanted = sum(request.params.n for request in requests)
        if self.under_way + wanted > self.most:
            self.counts.refused += 1
            raise Refusal(
                429,
                f"{self.under_way:,} answers are under way, and there is room for {self.most:,}: ask "
                "again later, or start the server with a larger --max-queue.",
                code="queue_full",
            )
        answers = self.llm.begin(requests, piece)
        ticket = Ticket(answers, piece is not None, open=len(answers))
        self.tickets.add(ticket)
        self.counts.requests += 1
        self.counts.prompt_tokens += sum(len(request.ids) for request in requests)
        self._commands.put(partial(self._start, ticket))
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Forget a ticket; what of it isn't done takes no more room in the engine."""
        self.tickets.discard(ticket)
        if ticket.open and self.failure is None:
            self.counts.abandoned += 1
            self._commands.put(partial(self._drop, ticket))

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns, called on the engine's thread between two steps."""
        self.require_alive()
        answer: asyncio.Future[T] = self._loop.create_future()

        def run() -> None:
            outcome = outcome_of(function)
            # A future belongs to its loop: the thread may not settle it by itself.
            self._loop.call_soon_threadsafe(settle, answer, *outcome)

        self._commands.put(run)
        return await answer

    async def load(self, load: Callable[[], Origin]) -> None:
        """Have `load` bring other weights, which it says, between two steps."""

        def run() -> None:
            self.origin = load()
            # Answers under way go on with them
            for ticket in {ticket for ticket, _ in self._owners.values()}:
                ticket.origins.append(self.origin)

        await self.call(run)

    def require_alive(self) -> None:
        """Refusal (503) where the engine failed."""
        if self.failure is not None:
            raise Refusal(503, f"the engine failed ({self.failure}): start the server again.")

    async def close(self) -> None:
        """End the thread. What it was sampling is given up."""
        self._commands.put(None)
        # Polled: joining would stop the loop that the thread's last pieces go to.
        while self._thread.is_alive():
            await asyncio.sleep(0.01)

    # ── on the thread

    def _run(self) -> None:
        engine = self.llm.engine
        try:
            while True:
                # It steps for answers of its own alone: a program may use the engine between them
                for command in self._waiting_commands(wait=not self._owners):
                    if command is None:
                        for key in self._owners:
                            engine.drop(key)
                        return
                    command()
                if self._owners:
                    self._advance(engine.step())
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _waiting_commands(self, wait: bool) -> Iterator[Command | None]:
        """All commands that are there; `wait`: at least one."""
        if wait:
            # Nothing to sample: the thread sleeps here until somebody asks.
            yield self._commands.get()
        while True:
            try:
                yield self._commands.get_nowait()
            except Empty:
                return

    def _start(self, ticket: Ticket) -> None:
        ticket.origins.append(self.origin)
        for number, answer in enumerate(ticket.answers):
            self._owners[answer.key] = (ticket, number)
            group = answer.key[:2]  # samples of one prompt
            self.llm.engine.start(answer.key, answer.prompt, answer.turn(), group=group)

    def _drop(self, ticket: Ticket) -> None:
        for answer in ticket.answers:
            # It may have ended between the request for this and now
            if self._owners.pop(answer.key, None) is not None:
                self.llm.engine.drop(answer.key)

    def _advance(self, turns: Sequence[TurnDone]) -> None:
        """Take turns that ended: an answer goes on, or is done."""
        grown: list[tuple[Ticket, Piece]] = []
        for turn in turns:
            ticket, number = self._owners[turn.key]
            answer = ticket.answers[number]
            before = len(answer.ids)
            answer.take(turn)
            done = answer.finish_reason is not None
            if done:
                del self._owners[turn.key]
                self.llm.engine.drop(turn.key)
            else:
                self.llm.engine.extend(turn.key, [], answer.turn())
            if done or ticket.streams:
                ids = answer.ids[before:]
                logp = answer.logp[before:]
                whole = answer if done else None
                piece = Piece(number, ids, logp, answer.text, whole, ticket.origin)
                grown.append((ticket, piece))
        if grown:
            # All of a step's pieces in one call: waking the loop costs more than handing over.
            self._loop.call_soon_threadsafe(self._deliver, grown)

    # ── on the loop again

    def _deliver(self, grown: Sequence[tuple[Ticket, Piece]]) -> None:
        for ticket, piece in grown:
            if piece.answer is not None:
                ticket.open -= 1
                self.counts.sampled_tokens += len(piece.answer.ids)
            ticket.grow(piece)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for ticket in self.tickets:
            ticket.fail()
        self._on_failure()
