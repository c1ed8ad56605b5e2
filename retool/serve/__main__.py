"""`retool serve MODEL`: a model behind OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from retool.config.command import calm_threads, exit_status, in_own_words
from retool.rl.agent.formats.table import AUTO, FORMATS
from retool.talk.options import OWN_WORDS, add_loading_options, add_max_num_seqs, add_model

EPILOG = """Routes: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics; and what RL asks of a
server, in vLLM's words and in SGLang's: /collective_rpc, /generate, /update_weights_from_disk.

examples:
  retool serve runs/dapo
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "How much is 6*7?"}]}'"""


def parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        program,
        description="Serve a model over HTTP, as OpenAI's API has it. All requests share one batch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(top)
    where = top.add_argument_group("where")
    where.add_argument(
        "--host",
        default="127.0.0.1",
        help="beyond this machine RETOOL_API_KEY must be set (default: %(default)s)",
    )
    where.add_argument(
        "--port", type=int, default=8000, help="0: any free one, printed (default: %(default)s)"
    )
    where.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="after SIGTERM, for what is being answered (default: %(default)s)",
    )
    what = top.add_argument_group("what it answers")
    what.add_argument(
        "--served-model-name", metavar="NAME", help="its name in requests (default: MODEL)"
    )
    what.add_argument(
        "--format",
        default=AUTO,
        metavar="NAME",
        help=f"how the model writes calls: {', '.join(FORMATS)}, or FILE.py/NAME (default: what its "
        "chat template wants)",
    )
    what.add_argument(
        "--reasoning",
        choices=("keep", "split"),
        default="keep",
        help="split: thoughts come in reasoning_content, not in content (default: %(default)s)",
    )
    what.add_argument("--seed", type=int, default=0, help="of requests without one of their own")
    what.add_argument(
        "--allow-weight-updates",
        action="store_true",
        help="let requests load other weights from this machine's disk, as RL does",
    )
    size = top.add_argument_group("how much at once")
    add_max_num_seqs(size)
    size.add_argument(
        "--max-queue",
        type=int,
        default=1024,
        help="answers that wait; more are refused with 429 (default: %(default)s)",
    )
    size.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    add_loading_options(top)
    return top


def main(words: Sequence[str], program: str = "python -m retool.serve") -> int:
    """Exit status: 0 stopped as asked, 1 something is wrong and was said."""
    options = parser(program).parse_args(words)
    calm_threads()
    # Heavy imports come late: `--help` doesn't wait for torch.
    from retool.serve.serving import serve

    try:
        return serve(options)
    except (ValueError, OSError) as error:
        print(f"error: {in_own_words(error, OWN_WORDS)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
