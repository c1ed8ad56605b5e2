"""The routes of the server."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from retool.serve.answering import respond
from retool.serve.chat import ChatOptions, read_chat
from retool.serve.completions import read_completion, require_model
from retool.serve.engine_thread import EngineThread
from retool.serve.errors import Refusal
from retool.serve.generate import read_generate
from retool.serve.shape import About
from retool.serve.weights import Weights

MOST_BODY_BYTES = 64 << 20
LARGE_BODY_BYTES = 64 << 10
MOST_READING_BYTES = 4 * MOST_BODY_BYTES  # of requests that aren't tokenised yet
TOO_LARGE = (
    f"the body has more than {MOST_BODY_BYTES >> 20} MiB, the most that a request may have: send its "
    "prompts in several requests."
)
T = TypeVar("T")
OPEN = ("/health", "/ping")  # for whoever watches over the server, without a key
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Site:
    """What answers requests. `stopping`: no new ones."""

    engine: EngineThread
    weights: Weights
    model: str
    chat: ChatOptions
    key: str | None
    stopping: bool = False
    reading_bytes: int = 0
    began: float = field(default_factory=time.time)

    def app(self) -> web.Application:
        """The application with all routes."""
        app = web.Application(client_max_size=MOST_BODY_BYTES, middlewares=[self.guard])
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.models),
                web.get("/v1/models/{name:.+}", self.models),
                web.post("/v1/completions", self.completions),
                web.post("/v1/chat/completions", self.chat_completions),
                web.post("/generate", self.generate),
                web.post("/collective_rpc", self.collective_rpc),
                web.post("/update_weights_from_disk", self.update_weights),
                web.post("/reset_prefix_cache", self.no_cache),
                web.post("/flush_cache", self.no_cache),
            ]
        )
        return app

    # ── what stands before every route

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let in who has the key, and say what is wrong in the shape of OpenAI's errors."""
        try:
            self._require_key(request)
            if self.stopping and request.method == "POST":
                raise Refusal(503, "the server is stopping: ask another one.")
            return await handler(request)
        except Refusal as refusal:
            return _refused(refusal)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            if error.status == 413:
                return _refused(Refusal(413, TOO_LARGE))
            what = f"{request.method} {request.path}: {error.reason}."
            return _refused(Refusal(error.status, what))

    def _require_key(self, request: web.Request) -> None:
        if self.key is None or request.path in OPEN:
            return
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        # What isn't UTF-8 arrives as surrogates
        mine, theirs = (key.encode("utf-8", "surrogateescape") for key in (self.key, given))
        if not hmac.compare_digest(mine, theirs):
            raise Refusal(
                401,
                "the key is missing or wrong: send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
            )

    @contextmanager
    def room_for(self, request: web.Request) -> Iterator[None]:
        """Holds a place for a body while it is read and tokenised. Refusal (413) for one that is too
        large by itself, (429) where it is so beside others.
        """
        size = request.content_length
        if size is None or "Content-Encoding" in request.headers:
            size = MOST_BODY_BYTES  # it may be as large
        if size > MOST_BODY_BYTES:
            raise Refusal(413, TOO_LARGE)
        if size > LARGE_BODY_BYTES and self.reading_bytes + size > MOST_READING_BYTES:
            raise Refusal(
                429,
                f"the large requests that are being read have {self.reading_bytes >> 20:,} MiB, and "
                f"there is room for {MOST_READING_BYTES >> 20:,} MiB: ask again later.",
                code="queue_full",
            )
        self.reading_bytes += size
        try:
            yield
        finally:
            self.reading_bytes -= size

    # ── answers

    @property
    def about(self) -> About:
        """What answers say of their origin."""
        return About(self.model, self.engine.origin)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        with self.room_for(request):
            body = await _body(request)
            require_model(body, self.model)
            asked = await _read(request, lambda: read_completion(body, self.engine.llm, self.about))
        return await respond(request, self.engine, asked)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        with self.room_for(request):
            body = await _body(request)
            require_model(body, self.model)
            asked = await _read(
                request, lambda: read_chat(body, self.engine.llm, self.about, self.chat)
            )
        return await respond(request, self.engine, asked)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        with self.room_for(request):
            body = await _body(request)
            asked = await _read(request, lambda: read_generate(body, self.engine.llm, self.about))
        return await respond(request, self.engine, asked)

    # ── weights

    async def collective_rpc(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(await self.weights.collective_rpc(await _body(request)))

    async def update_weights(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(await self.weights.from_disk(await _body(request)))

    async def no_cache(self, request: web.Request) -> web.StreamResponse:
        """Nothing outlives its requests here, so there is nothing to flush."""
        return web.json_response({"success": True})

    # ── what is served, and how it does

    async def models(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info.get("name")
        entry = {
            "id": self.model,
            "object": "model",
            "created": int(self.began),
            "owned_by": "retool",
            "root": str(self.engine.llm.folder),
            "max_model_len": self.engine.llm.max_model_len,
        }
        if name is None:
            return web.json_response({"object": "list", "data": [entry]})
        require_model({"model": name}, self.model)
        return web.json_response(entry)

    async def health(self, request: web.Request) -> web.StreamResponse:
        self.engine.require_alive()
        status = 503 if self.stopping else 200
        return web.json_response({"status": "stopping" if self.stopping else "ok"}, status=status)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """In Prometheus' text form."""
        counts = self.engine.counts
        lines = []
        for name, kind, what, value in (
            (
                "answers_under_way",
                "gauge",
                "Answers being sampled, or waiting.",
                self.engine.under_way,
            ),
            ("requests_total", "counter", "Requests taken.", counts.requests),
            ("refused_total", "counter", "Requests refused for want of room.", counts.refused),
            ("abandoned_total", "counter", "Requests whose client left.", counts.abandoned),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", counts.prompt_tokens),
            ("sampled_tokens_total", "counter", "Tokens of answers.", counts.sampled_tokens),
            ("weight_updates_total", "counter", "Weights loaded.", self.weights.changes),
        ):
            lines.append(f"# HELP retool_{name} {what}")
            lines.append(f"# TYPE retool_{name} {kind}")
            lines.append(f"retool_{name} {value}")
        return web.Response(text="\n".join(lines) + "\n")


async def _body(request: web.Request) -> Any:
    """The JSON of a request. Refusal (400) for what is none."""
    data = await request.read()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}.") from error


async def _read(request: web.Request, read: Callable[[], T]) -> T:
    """What `read` reads. What it finds wrong with the values is a Refusal (400)."""
    try:
        if len(await request.read()) > LARGE_BODY_BYTES:
            # Tokens of a long text take seconds, in which nobody else would be answered
            return await asyncio.to_thread(read)
        return read()
    except ValueError as error:
        raise Refusal(400, str(error)) from error


def _refused(refusal: Refusal) -> web.Response:
    headers = {"Retry-After": "1"} if refusal.status in (429, 503) else None
    # In ASCII: what was sent may hold what isn't Unicode, and a refusal quotes it
    return web.json_response(refusal.as_dict(), status=refusal.status, headers=headers)
