"""`python -m retool.sandbox doctor` says what isolates here; `… serve` answers SandboxFusion's API."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading

from . import doctor
from .embedded import Sandbox
from .fusion_server import Server
from .result import Limits

PROGRAM = "python -m retool.sandbox"


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog=program, description="The sandbox for programs that a model wrote."
    )
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor", help="which isolation layers this machine has, and why not the others"
    )
    serve = commands.add_parser(
        "serve", help="answer SandboxFusion's API from the embedded sandbox"
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s); beyond loopback a token is required",
    )
    serve.add_argument(
        "--port", type=int, default=8080, help="default: %(default)s; 0: any free port, printed"
    )
    serve.add_argument(
        "--token",
        default=os.environ.get("RETOOL_SANDBOX_TOKEN"),
        help="bearer token to demand (default: what RETOOL_SANDBOX_TOKEN holds)",
    )
    serve.add_argument(
        "--workers",
        type=int,
        default=None,
        help="programs at once (default: as many as cores, at least 4)",
    )
    serve.add_argument(
        "--memory-mb",
        type=int,
        default=Limits.memory_mb,
        help="memory of one call, and the most a request may ask for (default: %(default)s)",
    )
    serve.add_argument(
        "--isolation",
        choices=("strict", "best_effort"),
        default="strict",
        help="strict: no program runs where a guarantee can't be given; best_effort: it does, with a warning "
        "(default: %(default)s)",
    )
    return top


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command; returns the exit code."""
    options = parser(program).parse_args(arguments)
    if options.command == "doctor":
        return doctor.main()
    try:
        return serve(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def serve(options: argparse.Namespace) -> int:
    """Answer requests until a signal ends it."""
    sandbox = Sandbox(Limits(memory_mb=options.memory_mb), options.workers, options.isolation)
    try:
        server = Server(sandbox, options.host, options.port, options.token)
    except BaseException:
        sandbox.close()
        raise
    ended, end = os.pipe()
    for kind in (signal.SIGINT, signal.SIGTERM):
        # A handler may come in the middle of a thread's start, whose locks it must not ask for
        signal.signal(kind, lambda *_: os.write(end, b"."))
    print(
        f"serving http://{options.host}:{server.port}/run_code with {sandbox.workers} workers",
        flush=True,
    )
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    try:
        os.read(ended, 1)
        server.shutdown()
    finally:
        server.server_close()
        sandbox.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
