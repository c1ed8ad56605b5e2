"""Somebody's functions, sync or async, called without holding up the event loop."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any


async def call_anywhere(
    function: Callable[..., Any],
    *arguments: Any,
    orphaned: Callable[[Any], None] | None = None,
) -> Any:
    """What `function` returns: an async one is awaited, another runs on a thread of its own, and
    what it gives to await is awaited. `orphaned`: see `on_thread`.
    """
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    value = await on_thread(partial(function, *arguments), orphaned)
    return await value if inspect.isawaitable(value) else value


async def on_thread(call: Callable[[], Any], orphaned: Callable[[Any], None] | None = None) -> Any:
    """`call()`, on a thread that ends with the program: a call may hang.

    `orphaned` is given, on another thread, what comes when nobody waits for it any more.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def orphan(value: Any) -> None:
        if orphaned is not None:
            threading.Thread(target=orphaned, args=(value,), daemon=True).start()

    def deliver(value: Any, error: BaseException | None) -> None:
        if answer.done() and error is None:  # given up
            orphan(value)
        settle(answer, value, error)

    def work() -> None:
        value, failure = outcome_of(call)
        try:
            loop.call_soon_threadsafe(deliver, value, failure)
        except RuntimeError:  # the loop is closed: the program is about to end
            if failure is None:
                orphan(value)

    threading.Thread(target=work, name="retool-tool", daemon=True).start()
    try:
        return await answer
    except asyncio.CancelledError:
        # It may have come between the answer and this line
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            orphan(answer.result())
        raise


def outcome_of(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What `call` gives, or what it raises."""
    try:
        return call(), None
    except BaseException as error:
        return None, error


def settle(answer: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    """Give what came of a call to `answer`, unless nobody waits for it any more."""
    if answer.done():
        return
    if error is None:
        answer.set_result(value)
    elif isinstance(error, (StopIteration, KeyboardInterrupt)):
        # A future can't hold the one. The other is no Ctrl-C, which only the main thread hears of,
        # and would end the event loop of whoever waits.
        answer.set_exception(RuntimeError(type(error).__name__))
    else:
        answer.set_exception(error)
