"""From a question to its response: submitted to the engine, sent as it grows or when it is whole.

A client that goes away cancels the handler, and its answers leave the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from aiohttp import web

from retool.llm.answer import Answer
from retool.llm.likeliest import likeliest
from retool.llm.llm import STREAMED_TOKENS
from retool.serve.engine_thread import EngineThread, Piece, Ticket
from retool.serve.errors import Refusal
from retool.serve.shape import Found, Question, usage_of

ENGINE_FAILED = "the engine failed while it answered: ask again when the server has been restarted."


async def respond(
    request: web.Request, engine: EngineThread, asked: Question
) -> web.StreamResponse:
    """The response to `asked`. Refusal where the engine can't answer."""
    try:
        ticket = engine.submit(asked.requests, STREAMED_TOKENS if asked.streams else None)
    except ValueError as error:
        code = "context_length_exceeded" if "tokens" in str(error) else None
        raise Refusal(400, str(error), "prompt", code) from error
    try:
        if asked.streams:
            return await _stream(request, ticket, asked)
        return await _whole(engine, ticket, asked)
    finally:
        engine.release(ticket)


async def _whole(engine: EngineThread, ticket: Ticket, asked: Question) -> web.Response:
    while ticket.open:
        await _next(ticket)
    found = await _looked_up(engine, ticket.answers)
    asked.about.origin = ticket.origin
    return web.json_response(asked.form.whole(ticket.answers, found), dumps=as_json)


async def _next(ticket: Ticket) -> Piece:
    piece = await ticket.next()
    if piece is None:
        raise Refusal(500, ENGINE_FAILED)
    return piece


async def _looked_up(engine: EngineThread, answers: Sequence[Answer]) -> Found:
    """The likeliest tokens at each place, of answers that want them."""
    asking = {number: answer for number, answer in enumerate(answers) if answer.params.logprobs}
    if not asking:
        return {}
    found = await engine.call(partial(likeliest, engine.llm.engine, list(asking.values())))
    return dict(zip(asking, found, strict=True))


async def _stream(request: web.Request, ticket: Ticket, asked: Question) -> web.StreamResponse:
    """Server-sent events."""
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    await response.prepare(request)

    async def send(events: Sequence[Any]) -> None:
        text = "".join(f"data: {as_json(event)}\n\n" for event in events)
        await response.write(text.encode())

    sampled = 0
    began = False
    open_answers = len(ticket.answers)
    while open_answers:
        try:
            piece = await _next(ticket)
        except Refusal as failure:  # the status has been sent: this is what is left to say it with
            await send([failure.as_dict()])
            return response
        sampled += len(piece.ids)
        open_answers -= piece.answer is not None
        asked.about.origin = piece.origin
        if not began:
            # Only now: before the first token it isn't known which weights answer
            await send(asked.form.first())
            began = True
        event = asked.form.grown(piece)
        if event is not None:
            await send([event])
    await send(asked.form.last(usage_of(asked.requests, sampled)))
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def as_json(value: Any) -> str:
    """Compact, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
