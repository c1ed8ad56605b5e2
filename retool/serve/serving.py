"""A server's life: the model is loaded, requests are answered, a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from contextlib import suppress

from aiohttp import web

from retool.llm.llm import LLM
from retool.rl.agent.formats.choose import choose_format
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.reading.form import Format
from retool.serve.app import Site
from retool.serve.chat import ChatOptions
from retool.serve.engine_thread import EngineThread
from retool.serve.weights import Weights
from retool.talk.agent import open_llm

KEY = "RETOOL_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SECONDS_BETWEEN_LOOKS = 0.05  # at whether all is answered


def serve(options: argparse.Namespace) -> int:
    """Exit status: 0 stopped as asked, 1 the engine failed. ValueError for what the user can mend."""
    key = os.environ.get(KEY) or None
    if key is None and options.host not in LOOPBACK:
        raise ValueError(
            f"--host {options.host} lets others in: set the environment's {KEY} to a key that they "
            "must send, or serve on 127.0.0.1."
        )
    if options.max_queue < 0:
        raise ValueError(f"--max-queue {options.max_queue}: it must be at least 0.")
    asyncio.run(_require_free(options.host, options.port))
    with open_llm(options, options.max_num_seqs, options.enforce_eager) as llm:
        return asyncio.run(_serve(llm, key, options))


async def _require_free(host: str, port: int) -> None:
    """ValueError where nobody can listen there: told before the model is loaded, which takes minutes."""
    try:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
    except (OSError, OverflowError) as error:
        why = str(error).rstrip(".")
        raise ValueError(
            f"--host {host} --port {port} can't be used: {why}. Use another port; 0 takes a free one."
        ) from error
    server.close()


async def _serve(llm: LLM, key: str | None, options: argparse.Namespace) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    engine = EngineThread(llm, options.max_num_seqs + options.max_queue, stop.set)
    try:
        site = _site(engine, key, options)
        # A client that goes away ends its handler, so that nothing is sampled for nobody
        runner = web.AppRunner(
            site.app(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0
        )
        await runner.setup()
        try:
            where = web.TCPSite(runner, options.host, options.port)
            await where.start()
            port = runner.addresses[0][1]
            print(f"serving {site.model} at http://{_named(options.host)}:{port}/v1", flush=True)
            await stop.wait()
            site.stopping = True
            # From now on a second signal ends the process as it would any other
            for number in signals:
                loop.remove_signal_handler(number)
            await _finish(engine, options.grace)
        finally:
            await runner.cleanup()
    finally:
        await engine.close()
    if engine.failure is None:
        return 0
    print(f"error: the engine failed: {engine.failure!r}", file=sys.stderr)
    return 1


def _site(engine: EngineThread, key: str | None, options: argparse.Namespace) -> Site:
    splits = options.reasoning == "split"
    model = options.served_model_name or options.model
    weights = Weights(engine, options.allow_weight_updates)
    return Site(engine, weights, model, ChatOptions(_form(engine.llm, options.format), splits), key)


def _form(llm: LLM, name: str) -> Format:
    """How calls are written; any way will do for a model without a chat template, which can't chat."""
    try:
        renderer = llm.renderer
    except ValueError:
        return HERMES
    return choose_format(name, renderer)[1]


async def _finish(engine: EngineThread, seconds: float) -> None:
    """Let what is under way be answered, for so long."""
    if engine.failure is None and engine.tickets:
        print(f"stopping: {len(engine.tickets)} requests are being answered", flush=True)

    async def all_answered() -> None:
        while engine.tickets and engine.failure is None:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(all_answered(), seconds)


def _named(host: str) -> str:
    return f"[{host}]" if ":" in host else host
