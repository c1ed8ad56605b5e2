"""Client of a SandboxFusion server: same `run` as the embedded sandbox, over HTTP."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import httpx

from .embedded import strip_fence
from .fusion_types import RunRequest, result_from_json
from .result import Result

# That a request may take beyond its program's: where many ask, a server's queue is long
QUEUE_SECONDS = 600.0
CONNECT_SECONDS = 10.0
RETRIED = frozenset({429, 502, 503, 504})  # answers of a server that is busy, or on its way up
MAX_CONNECTIONS = 256  # where the rate has no limit of its own


def unreachable(url: str, timeout: float = 2.0) -> str | None:
    """Why nothing at `url` takes a connection within `timeout` seconds; None where something does."""
    try:
        parts = httpx.URL(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.host, port), timeout).close()
    except (OSError, UnicodeError, httpx.InvalidURL) as error:
        return str(error) or type(error).__name__
    return None


class SandboxFusion:
    """Runs programs on the SandboxFusion server whose `POST` address is `url`.

    At most `rate_limit` requests are under way at a time (None: no bound of its own), over one pool
    of connections. Connection errors, half answers, 429 and 502-504 are tried again up to `retries`
    times, waiting `backoff`·2ⁿ seconds, half of it at random; a server that still fails gives
    `sandbox_error` (`Result.infrastructure`) with the reason, never an exception. A result's
    `queue_seconds` are all those that its program didn't run: at the gate, at the server, on the
    way. `token` goes along as a bearer token (None: the environment's RETOOL_SANDBOX_TOKEN, if
    set).
    """

    def __init__(
        self,
        url: str,
        rate_limit: int | None = None,
        timeout: float = 30.0,
        memory_mb: int | None = None,
        *,
        retries: int = 5,
        backoff: float = 0.5,
        token: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(
                f"sandbox_fusion_url={url!r} must be an http address, such as "
                "http://localhost:8080/run_code."
            )
        if rate_limit is not None and rate_limit < 1:
            raise ValueError(f"rate_limit={rate_limit} must be at least 1.")
        self.url = url
        self._rate_limit = rate_limit
        self._timeout = timeout
        self._memory_mb = memory_mb
        self._retries = retries
        self._backoff = backoff
        token = token or os.environ.get("RETOOL_SANDBOX_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(
        self,
        code: str,
        stdin: str = "",
        timeout: float | None = None,
        *,
        memory_mb: int | None = None,
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
    ) -> Result:
        """As `Sandbox.run`.

        `timeout` is the program's, in seconds; the request may take `QUEUE_SECONDS` more.
        """
        request = RunRequest(
            strip_fence(code),
            stdin,
            timeout or self._timeout,
            memory_mb or self._memory_mb,
            files,
            fetch,
        )
        client, gate = self._connections()
        reason = ""
        begun = time.monotonic()
        for attempt in range(self._retries + 1):
            if attempt:
                seconds = self._backoff * 2 ** (attempt - 1)
                await asyncio.sleep(seconds * (0.5 + random.random() / 2))
            async with gate:
                result, reason = await self._once(client, request)
            if result is not None:
                waited = time.monotonic() - begun - result.execution_time
                return replace(result, queue_seconds=max(0.0, waited))
        return Result("sandbox_error", reason=f"{self.url}: {reason}, {self._retries + 1} times")

    async def _once(
        self, client: httpx.AsyncClient, request: RunRequest
    ) -> tuple[Result | None, str]:
        """One attempt: a result, or what went wrong that another attempt may cure."""
        seconds = request.timeout + QUEUE_SECONDS
        limit = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        try:
            response = await client.post(
                self.url, json=request.to_json(), headers=self._headers, timeout=limit
            )
        except (httpx.ReadTimeout, httpx.WriteTimeout):
            reason = f"{self.url} gave no answer within {seconds:g} s"
            return Result("sandbox_error", reason=reason), ""
        except httpx.TransportError as error:
            return None, str(error) or type(error).__name__
        code = response.status_code
        if code in RETRIED:
            return None, f"HTTP {code}"
        if code != 200:
            reason = f"{self.url} answers HTTP {code}: {response.text[:300]}"
            return Result("sandbox_error", reason=reason), ""
        try:
            return result_from_json(response.json()), ""
        except ValueError as error:  # json's own errors are ValueErrors too
            return None, f"unreadable answer ({error})"

    def _connections(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        """The pool and the gate; both belong to one event loop, so another loop starts new ones."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop = loop
            most = self._rate_limit or MAX_CONNECTIONS
            self._client = httpx.AsyncClient(
                limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
                trust_env=False,
            )
            self._gate = asyncio.Semaphore(most)
        return self._client, self._gate

    async def close(self) -> None:
        """Close the connections; a later `run` opens new ones."""
        if self._loop is asyncio.get_running_loop():
            await self._client.aclose()
        self._loop = None
