"""A connection to a server that fails when it is told to: cut, silent, or answered with errors."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal

How = Literal["sound", "cut", "silent", "error"]
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class WeakLink:
    """Passes on what clients and the server at `port` send each other, until it fails.

    `fail` says how, and after how many more bytes in either direction; `mend` ends it.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._open = list[socket.socket]()
        self._how: How = "sound"
        self._left = 0
        self.failures = 0  # connections that were refused or broke
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, how: How, after_bytes: int = 0) -> None:
        self._how = how
        self._left = after_bytes

    def mend(self) -> None:
        self._how = "sound"
        with self._lock:
            for connection in self._open:  # what hung goes on with an error
                connection.close()
            self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.mend()

    def _fails(self, size: int = 0) -> bool:
        """Whether it fails now, `size` bytes further on."""
        if self._how == "sound":
            return False
        with self._lock:
            self._left -= size
            return self._left < 0 or (self._left == 0 and size == 0)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._fails():
            self._break(client)
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._server))
        except OSError:
            client.close()
            return
        with self._lock:
            self._open += [client, server]
        for here, there in ((client, server), (server, client)):
            threading.Thread(target=self._pass_on, args=(here, there), daemon=True).start()

    def _pass_on(self, here: socket.socket, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := here.recv(4096):
                if self._fails(len(data)):
                    self._break(here, there)
                    return
                there.sendall(data)
            there.shutdown(socket.SHUT_WR)

    def _break(self, *connections: socket.socket) -> None:
        self.failures += 1
        if self._how == "silent":
            with self._lock:
                self._open += connections
            return
        if self._how == "error" and len(connections) == 1:
            with contextlib.suppress(OSError):
                connections[0].recv(1 << 16)
                connections[0].sendall(ERROR)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
