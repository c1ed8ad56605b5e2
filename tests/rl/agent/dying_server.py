"""An MCP server that kills itself now and then: `python dying_server.py LOG EVERY`. LOG has a line
of every call, of all servers of a run, and every EVERYth of them is a server's last.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from mcp.server import MCPServer


def make(log: Path, every: int) -> MCPServer:
    server = MCPServer("dying")

    @server.tool()
    def count() -> str:
        """Counts."""
        with log.open("a") as file:
            file.write(f"call {os.getpid()}\n")
        if log.read_text().count("call") % every == 0:
            with log.open("a") as file:
                file.write(f"died {os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return "counted"

    return server


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2])).run("stdio")
