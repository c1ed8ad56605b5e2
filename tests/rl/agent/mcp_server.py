"""An MCP server written with the package's own class: `python mcp_server.py`, or with a port."""

from __future__ import annotations

import os
import sys
import time

from mcp.server import MCPServer


def make() -> MCPServer:
    server = MCPServer("numbers")
    kept: list[int] = []

    @server.tool()
    def add(first: int, second: int) -> str:
        """Adds two numbers."""
        return str(first + second)

    @server.tool()
    def keep(number: int) -> str:
        """Keeps a number, and says which ones it has."""
        kept.append(number)
        return " ".join(map(str, kept))

    @server.tool()
    def fail(reason: str) -> str:
        """Fails."""
        raise ValueError(reason)

    @server.tool()
    def die() -> str:
        """Ends the server."""
        os._exit(3)

    @server.tool()
    def sleep(seconds: float) -> str:
        """Sleeps."""
        time.sleep(seconds)
        return "slept"

    return server


if __name__ == "__main__":
    if len(sys.argv) > 1:
        make().run("streamable-http", port=int(sys.argv[1]))
    else:
        make().run("stdio")
