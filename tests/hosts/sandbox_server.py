"""`python -m tests.hosts.sandbox_server PORT`: a machine's sandbox, on its own loopback."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer

from tests.reliability.rl_faults import SandboxServer

if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), SandboxServer).serve_forever()
