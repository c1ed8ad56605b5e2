"""A server on a thread of the test's own process, over a loaded model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from aiohttp import web

from retool.llm.llm import LLM
from retool.rl.agent.formats.hermes import HERMES
from retool.serve.app import Site
from retool.serve.chat import ChatOptions
from retool.serve.engine_thread import EngineThread
from retool.serve.weights import Weights


@dataclass
class Served:
    """`url` of a server, and what stands behind it."""

    url: str
    site: Site
    client: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)


@contextmanager
def serving(
    llm: LLM,
    most: int = 64,
    key: str | None = None,
    may_change: bool = True,
    splits: bool = False,
    port: int = 0,
) -> Iterator[Served]:
    ready = threading.Event()
    served: list[Served] = []
    stop: list[Any] = []

    async def run() -> None:
        ended = asyncio.Event()
        stop.append((asyncio.get_running_loop(), ended))
        engine = EngineThread(llm, most, ended.set)
        weights = Weights(engine, may_change)
        site = Site(engine, weights, "tiny", ChatOptions(HERMES, splits), key)
        runner = web.AppRunner(
            site.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        where = web.TCPSite(runner, "127.0.0.1", port)
        await where.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        served.append(Served(url, site, httpx.Client(base_url=url, timeout=60)))
        ready.set()
        await ended.wait()
        await runner.cleanup()
        await engine.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield served[0]
    finally:
        served[0].client.close()
        loop, ended = stop[0]
        if not loop.is_closed():
            loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        assert not thread.is_alive()
