"""One conversation with a supervisor: calls go out, results come back, and its end is an answer to
every call that still waits.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from . import wire
from .result import Result

START_SECONDS = 180.0  # a supervisor that has said nothing by then hangs
GONE = "the sandbox's supervisor is gone"


class Asked(NamedTuple):
    """A call whose result hasn't come, and when it was sent."""

    future: concurrent.futures.Future[Result]
    at: float


class Connection:
    """The caller's end of a socket to a supervisor.

    `hello` is the supervisor's first message: what it found, or that it refuses.

    `OSError` where the supervisor ends, or hangs, before it is ready. Calls may be submitted from
    any thread. `lost` is called, on a thread of the connection's own, when the supervisor has gone
    unasked.
    """

    def __init__(self, ours: socket.socket, lost: Callable[[], None] | None = None) -> None:
        self._socket = ours
        self._frames = wire.Frames()
        self._pending: dict[int, Asked] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._reason = GONE
        self._lost = lost
        self.alive = True
        self.hello = self._greet()
        threading.Thread(target=self._read, name="sandbox", daemon=True).start()

    def _greet(self) -> dict[str, Any]:
        self._socket.settimeout(START_SECONDS)
        messages: list[dict[str, Any]] = []
        while not messages:
            data = self._receive(1 << 16)
            if not data:
                self._socket.close()
                raise OSError(
                    "the sandbox's supervisor ended or hung before it was ready; "
                    "its stderr says why."
                )
            messages = self._frames.feed(data)
        self._socket.settimeout(None)
        return messages[0]

    def _receive(self, most: int) -> bytes:
        """What has arrived; b"" where nothing will any more."""
        try:
            return self._socket.recv(most)
        except OSError:
            return b""

    def submit(self, message: dict[str, Any]) -> tuple[int, concurrent.futures.Future[Result]]:
        """Send a call; returns its number, for `cancel`, and the future of its result."""
        number = next(self._numbers)
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        # Before it is sent: the result may be back before `_send` returns
        self._pending[number] = Asked(future, time.monotonic())
        self._send({**message, "id": number})
        if not self.alive:
            self._fail()  # the reader may have ended before this call was there to be failed
        return number, future

    def cancel(self, number: int) -> None:
        """End a call that nobody waits for any more."""
        self._send({"cancel": number})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            # Threads share the socket, and a message that another cuts in two is read as neither
            with self._lock:
                self._socket.sendall(wire.encode(message))
        except OSError:
            self._fail()

    def _read(self) -> None:
        """The reader's thread: it hands results over until the supervisor has gone.

        However it ends, every call that still waits is answered.
        """
        try:
            while data := self._receive(1 << 20):
                for message in self._frames.feed(data):
                    self._settle(message["id"], Result.from_json(message["result"]))
        except (ValueError, KeyError, TypeError) as error:
            self._reason = (
                f"the sandbox's supervisor isn't of this process's version of retool ({error}): "
                "start all processes of the run with the same version; if retool was installed anew "
                "meanwhile, start the run again"
            )
        self._fail()
        # After a hang-up nobody asks for it, and another version's supervisor would fail again
        if self._reason == GONE and self._lost is not None:
            self._lost()

    def _settle(self, number: int, result: Result) -> None:
        asked = self._pending.pop(number, None)
        if asked is None or not asked.future.set_running_or_notify_cancel():
            return
        # A supervisor that is too busy to read calls makes them wait as a queue does. What the
        # caller takes to look at the result isn't counted.
        waited = time.monotonic() - asked.at - result.execution_time
        asked.future.set_result(replace(result, queue_seconds=max(0.0, waited)))

    def _fail(self) -> None:
        """Answer every call that waits: the supervisor won't."""
        self.alive = False
        while self._pending:
            # The reader and a caller may both be here, and the last call can be the other's
            with contextlib.suppress(KeyError):
                future = self._pending.popitem()[1].future
                if future.set_running_or_notify_cancel():
                    future.set_result(Result("sandbox_error", reason=self._reason))

    def hang_up(self) -> None:
        """Tell the supervisor that nobody will call any more; to the owner's supervisor that means
        to end.
        """
        self._reason = "the sandbox is closed"
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._socket.close()
        self._fail()
