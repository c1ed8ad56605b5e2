"""Requests to an OpenAI-compatible server: a limited number at once, repeated if it is busy or
away, and within a budget.

On httpx, which is a dependency anyway: the `openai` package would do the same retries, but it hides
how many there were, and can't stop at a budget in between.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from retool.rl.config.judge import LLMJudgeConfig

# Of statuses that say "later"; and every 5xx
BUSY = (408, 409, 425, 429)
NO_REPLY = (
    httpx.TransportError,
    asyncio.TimeoutError,
    ValueError,
    LookupError,
    TypeError,
)  # raised where nobody is there, or a reply is late, cut short, or none of such a server
FIRST_WAIT_S = 0.5  # before the first new try; each further one waits twice as long
LONGEST_WAIT_S = 60.0  # whatever the server asks for
MAX_SHOWN = 500  # characters of a refusal
HIDDEN = "<redacted>"


class ServerAway(Exception):
    """The server didn't answer, after all tries."""


class ServerRefused(Exception):
    """The server won't answer this request, however often it is asked."""


class BudgetSpent(Exception):
    """The run's calls or tokens are used up."""


@dataclass(frozen=True)
class Reply:
    """What the server said, and the tokens that it counted: prompt and reply."""

    text: str
    tokens: int


class Server:
    """An address for chat completions. `spent` counts calls, retries and tokens of all requests."""

    def __init__(
        self,
        settings: LLMJudgeConfig,
        secret: str = "",
    ) -> None:
        self._settings = settings
        self._secret = secret
        self._url = f"{(settings.base_url or '').rstrip('/')}/chat/completions"
        self._loop: asyncio.AbstractEventLoop | None = None
        self.spent: Counter[str] = Counter()

    async def ask(
        self,
        body: Mapping[str, Any],
        counts: Counter[str],
    ) -> Reply:
        """The reply to a request; what it took is added to `counts`, whatever becomes of it.

        Raises ServerAway, ServerRefused and BudgetSpent.
        """
        reason = ""
        for attempt in range(self._settings.retries + 1):
            if attempt:
                self._count(counts, "retries", 1)
            try:
                reply, reason, wait = await self._attempt(body, counts)
            except NO_REPLY as error:
                reply = None
                reason = self._hide(f"{type(error).__name__}: {error}")
                wait = 0.0
            if reply is not None:
                self._count(counts, "tokens", reply.tokens)
                return reply
            if attempt < self._settings.retries:
                await asyncio.sleep(max(wait, backoff(attempt)))
        tries = self._settings.retries + 1
        raise ServerAway(f"the judge at {self._url} gave no answer in {tries} tries: {reason}")

    async def _attempt(
        self,
        body: Mapping[str, Any],
        counts: Counter[str],
    ) -> tuple[Reply | None, str, float]:
        """(the reply, or None; why there is none; seconds that the server asks to wait)."""
        client, gate = self._here()
        # The wait before a retry is outside: a request that sleeps takes no place from others.
        async with gate:
            # Inside the gate, where a request is about to go out: those that queue must see what
            # the others spent.
            self._require_budget()
            self._count(counts, "calls", 1)
            response = await asyncio.wait_for(
                client.post(self._url, json=body),
                self._settings.timeout_seconds,
            )
        status = response.status_code
        if status == 200:
            return read_reply(response.json()), "", 0.0
        reason = self._hide(f"{status} {response.text[:MAX_SHOWN]}")
        if status in BUSY or status >= 500:
            return None, reason, asked_to_wait(response.headers.get("retry-after"))
        raise ServerRefused(f"the judge at {self._url} refuses: {reason}")

    def _require_budget(self) -> None:
        settings = self._settings
        for name, most in (("calls", settings.max_calls), ("tokens", settings.max_total_tokens)):
            if most is not None and self.spent[name] >= most:
                key = "max_calls" if name == "calls" else "max_total_tokens"
                raise BudgetSpent(
                    f"the judge's budget is spent: {self.spent[name]:,} {name} "
                    f"in this process, of reward_model.judge.{key}"
                )

    def _count(
        self,
        counts: Counter[str],
        name: str,
        number: int,
    ) -> None:
        counts[name] += number
        self.spent[name] += number

    def _hide(self, text: str) -> str:
        """Text without the key: servers repeat one that they refuse."""
        return text.replace(self._secret, HIDDEN) if self._secret else text

    def _here(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """The connections and the turns for this event loop: they belong to one, and another needs
        new ones.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
            # The time limit is on the whole call: a server may trickle
            self._client = httpx.AsyncClient(headers=headers, timeout=None)
            self._gate = asyncio.Semaphore(self._settings.max_concurrent)
        return self._client, self._gate

    def close(self) -> None:
        """Close the connections, where their event loop can still do so."""
        loop = self._loop
        if loop is not None and not loop.is_closed() and not loop.is_running():
            loop.run_until_complete(self._client.aclose())


def read_reply(answer: Any) -> Reply:
    """What a chat completion says. ValueError, LookupError or TypeError where it is none."""
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError(f"the judge's message is a {type(text).__name__}, not text")
    usage = answer.get("usage") or {}
    return Reply(text, int(usage.get("total_tokens") or 0))


def backoff(attempt: int) -> float:
    """Seconds before try `attempt` + 1: doubled each time, and spread, so that many don't come back
    at once.
    """
    longest = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
    return longest * random.uniform(0.5, 1.0)


def asked_to_wait(header: str | None) -> float:
    """Seconds that a Retry-After asks for, as a number or a date; 0 for none that can be read."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_S)
