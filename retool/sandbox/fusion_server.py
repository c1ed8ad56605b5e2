"""SandboxFusion's API in front of the embedded sandbox, so that several nodes, or existing clients,
can share one.

Built on the standard library's HTTP server: the API is one POST and one GET with small bodies, the
work is done elsewhere, and everything a web framework would add is one more thing that untrusted
requests can reach. A server that runs code is a target for any web page open in a browser on this
machine, hence: JSON only (a form can't send it without asking), no cross-origin requests, the Host
header must be this server's (against DNS rebinding), and beyond loopback a token.
"""

from __future__ import annotations

import hmac
import http.server
import ipaddress
import json
import re
import socket
import threading
from typing import Any

from .embedded import Sandbox
from .fusion_types import RunRequest, result_to_json
from .result import Result

LARGEST_BODY = 16 << 20
MOST_CONNECTIONS = 1024
LONGEST_RUN = 600.0


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Server(http.server.ThreadingHTTPServer):
    """Serves `sandbox` at `host`:`port` (0: any free port) until `shutdown`.

    Refuses with `ValueError` to listen beyond loopback without a `token`.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, sandbox: Sandbox, host: str = "127.0.0.1", port: int = 8080, token: str | None = None
    ) -> None:
        if not is_loopback(host) and not token:
            raise ValueError(
                f"host={host} lets other machines run programs here: give a token (--token, or "
                "RETOOL_SANDBOX_TOKEN)."
            )
        if not 0 <= port < 1 << 16:
            raise ValueError(f"port={port} must be from 0 to 65535; 0 is any free one.")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sandbox = sandbox
        self.token = token
        self.host = host
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        try:
            super().__init__((host.strip("[]"), port), Handler)
        except OSError as error:
            raise OSError(
                f"{host}:{port} can't be listened on ({error.strerror or error}): end what holds "
                "it, or take another address (--host) or port (--port; 0 is any free one)."
            ) from error

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self._connections:
            super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away mid-sentence is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    server_version = "retool-sandbox"
    sys_version = ""
    timeout = 60  # seconds a silent client may hold a connection
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        refusal = self._refusal(needs_token=False)
        if refusal is not None:
            self._reply(*refusal)
        elif self.path == "/v1/ping":
            self._reply(200, "pong")
        else:
            self._reply(
                404, {"detail": f"{self.path} isn't served here; /run_code and /v1/ping are."}
            )

    def do_POST(self) -> None:
        refusal = self._refusal(needs_token=True) or self._body_refusal()
        if refusal is not None:
            self.close_connection = True  # its body wasn't read
            self._reply(*refusal)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            result = self._run(RunRequest.from_json(json.loads(body)))
        except (ValueError, RecursionError) as error:
            self._reply(422, {"detail": str(error)})
            return
        self._reply(200, result_to_json(result))

    def _run(self, request: RunRequest) -> Result:
        limits = self.server.sandbox.limits
        return self.server.sandbox.run_blocking(
            request.code,
            request.stdin,
            min(request.timeout, LONGEST_RUN),
            memory_mb=min(request.memory_mb or limits.memory_mb, limits.memory_mb),
            files=request.files,
            fetch=request.fetch,
        )

    def _refusal(self, needs_token: bool) -> tuple[int, dict[str, str]] | None:
        """Why this request isn't served, whatever it asks for."""
        host = re.sub(r":\d+\Z", "", self.headers.get("Host") or "")
        if is_loopback(self.server.host) and not is_loopback(host):
            return 403, {"detail": f"Host {host!r} isn't this server; use localhost or 127.0.0.1."}
        if "Origin" in self.headers:
            return 403, {"detail": "requests from web pages aren't served."}
        if needs_token and self.server.token:
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
                return 401, {"detail": "this server needs its token: Authorization: Bearer …"}
        return None

    def _body_refusal(self) -> tuple[int, dict[str, str]] | None:
        if self.path.rstrip("/") != "/run_code":
            return 404, {"detail": f"{self.path} isn't served here; /run_code and /v1/ping are."}
        if self.headers.get_content_type() != "application/json":
            return 415, {"detail": "the body must be application/json."}
        length = self.headers.get("Content-Length") or ""
        if not length.isascii() or not length.isdigit():
            return 411, {"detail": "a Content-Length is needed."}
        if int(length) > LARGEST_BODY:
            return 413, {"detail": f"a body may have {LARGEST_BODY >> 20} MB."}
        return None

    def _reply(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode("ascii")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: one line per call would drown a rollout's log."""
