"""The thread that sends requests to servers: many at once, repeated, and moved to another server if
theirs is lost.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from math import isfinite
from queue import Empty, SimpleQueue
from typing import Any

import aiohttp

from retool.engine import SamplingParams
from retool.rl.server.dialects import MARK, Sampled
from retool.rl.server.fleet import Fleet, Server, ServerOptions, ServerRefused

CONNECT_SECONDS = 10.0
FIRST_WAIT_SECONDS = 0.1  # before the first try again; each next wait is twice as long
LONGEST_WAIT_SECONDS = 10.0
BUSY = 429
SHOWN_CHARACTERS = 300  # of what a server says
OTHER_WEIGHTS = (
    "it answers with other weights than it was given: it was started again, or another run uses it"
)


@dataclass(eq=False)
class Ticket:
    """A turn that is wanted."""

    key: Hashable
    group: Hashable
    ids: list[int]
    params: SamplingParams
    seed: int
    task: asyncio.Task[None] | None = None
    cancelled: bool = False


class _Lost(Exception):
    """A server doesn't answer any more; why."""


class Sender:
    """Asks the servers of a fleet, on a thread of its own. `close` it."""

    def __init__(self, fleet: Fleet, options: ServerOptions) -> None:
        self.fleet = fleet
        self.options = options
        self._results: SimpleQueue[tuple[Ticket, Sampled | Exception]] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._places: dict[str, asyncio.Semaphore] = {}
        self._session: aiohttp.ClientSession | None = None
        self._thread = threading.Thread(target=self._run, name="servers", daemon=True)
        self._thread.start()

    def send(self, ticket: Ticket) -> None:
        """Have a turn sampled; `take` hands it out."""
        self._loop.call_soon_threadsafe(self._begin, ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants it any more: its connection is closed, which tells the server."""
        ticket.cancelled = True
        self._loop.call_soon_threadsafe(self._end, ticket)

    def take(self, seconds: float) -> list[tuple[Ticket, Sampled | Exception]]:
        """What has come; waits so long for the first."""
        found = []
        try:
            found.append(self._results.get(timeout=seconds))
            while True:
                found.append(self._results.get_nowait())
        except Empty:
            return found

    def close(self) -> None:
        """End the thread and its connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # ── on the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._finish())
        self._loop.close()

    async def _finish(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _begin(self, ticket: Ticket) -> None:
        if not ticket.cancelled:
            ticket.task = self._loop.create_task(self._answer(ticket))

    def _end(self, ticket: Ticket) -> None:
        if ticket.task is not None:
            ticket.task.cancel()

    async def _answer(self, ticket: Ticket) -> None:
        """Whatever happens, there is a result."""
        outcome: Sampled | Exception
        try:
            outcome = await self._sampled(ticket)
        except Exception as error:
            outcome = error
        self._results.put((ticket, outcome))

    async def _sampled(self, ticket: Ticket) -> Sampled:
        """From the first server that answers. ServersGone where none does."""
        while True:
            server = self.fleet.choose(ticket.group)
            server.under_way += 1
            try:
                return await self._ask(server, ticket)
            # The turn isn't lost with its server: with its own seed another one draws it anew.
            except _Lost as error:
                self.fleet.leave_out(server, str(error))
            finally:
                server.under_way -= 1

    async def _ask(self, server: Server, ticket: Ticket) -> Sampled:
        """A server's answer, after some tries. ServerRefused where it finds the request wrong."""
        assert server.dialect is not None, "a server is asked that was never met"
        call = server.dialect.ask(server.model, ticket.ids, ticket.params, ticket.seed)
        places = self._places.setdefault(server.url, asyncio.Semaphore(self.options.at_once))
        failures = 0
        wait = FIRST_WAIT_SECONDS
        busy_until = self._loop.time() + self.options.timeout_s
        while True:
            async with places:
                if server.lost:  # others have found out, while this one waited
                    raise _Lost(server.lost)
                status, text = await self._post(server.url + call.path, call.body)
            if status == 200:
                return _read(server, text)
            # "Busy" is no failure: it is waited for as long as a request may take.
            if status != BUSY:
                failures += 1
            if failures > self.options.retries or self._loop.time() > busy_until:
                raise _Lost(text or f"it answered {status}")
            if status is not None and status < 500 and status != BUSY:
                raise ServerRefused(f"{server.url}{call.path} answered {status}: {text}")
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    async def _post(self, url: str, body: Any) -> tuple[int | None, str]:
        """(status, what was said); None and the reason, where no answer came. _Lost after a timeout."""
        if self._session is None:
            limits = aiohttp.ClientTimeout(self.options.timeout_s, sock_connect=CONNECT_SECONDS)
            connections = aiohttp.TCPConnector(limit=0)  # `places` are the limit
            self._session = aiohttp.ClientSession(
                timeout=limits, connector=connections, headers=self.options.headers
            )
        try:
            async with self._session.post(url, json=body) as response:
                text = await response.text()
                return response.status, text if response.ok else text[:SHOWN_CHARACTERS]
        except aiohttp.ServerTimeoutError:
            return None, f"no connection within {CONNECT_SECONDS:g} seconds"
        except asyncio.TimeoutError as error:
            raise _Lost(f"it took more than {self.options.timeout_s:g} seconds") from error
        except aiohttp.ClientError as error:
            return None, f"{type(error).__name__}: {error}"


def _require_own_weights(server: Server, mark: str) -> None:
    """_Lost where a turn was sampled with other weights than this server was given last."""
    if mark == server.mark:
        server.tells = True
    # Others may mean something else by this field: only what is like a mark, or has been one, counts
    elif mark.startswith(MARK) or (mark and server.tells):
        raise _Lost(OTHER_WEIGHTS)


def _read(server: Server, text: str) -> Sampled:
    """A turn, with as many log-probabilities as tokens. ServerRefused for anything else, _Lost where
    it was sampled with other weights than this run's.
    """
    assert server.dialect is not None
    try:
        sampled = server.dialect.read(json.loads(text))
        _require_own_weights(server, sampled.mark)
        numbers = all(isfinite(value) for value in sampled.logp)
        if numbers and len(sampled.logp) == len(sampled.tokens):
            return sampled
        problem = "its log-probabilities aren't those of its tokens"
    except (ValueError, LookupError, TypeError) as error:
        problem = f"it can't be read ({type(error).__name__}: {error})"
    raise ServerRefused(
        f"{server.url} gave an answer of another form: {problem}. Name its kind in "
        "rollout.server.dialect, and see docs/serve.md for the versions that are known."
    )
