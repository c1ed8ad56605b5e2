"""`retool chat MODEL`: talk to a model in the terminal; its tools really run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from retool.config.command import calm_threads, in_own_words
from retool.talk.options import (
    CODE,
    NO_TOOLS,
    OWN_WORDS,
    add_environment,
    add_episode,
    add_options,
    require_effect,
)

EPILOG = """in the conversation:
  /reset          forget what was said
  /system TEXT    begin anew with this system message; without TEXT, with none
  /tools          the tools that the model may call
  /quit           leave, as the end of the input does (Ctrl-D)
  Ctrl-C          stop the answer; what was said of it stays
Several lines: paste them, or put them between \"\"\" and \"\"\". // begins a message with /.
What comes through a pipe is one message: echo 'How much is 6*7?' | retool chat MODEL

in an environment:
  Enter           another episode
  /row N          with another row
  /play           you make the turns; again: the model does
  /quit, Ctrl-D   leave; Ctrl-C ends an episode"""


def parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        program,
        description="Talk to a model. Its tools run in the sandbox; calls and results are shown.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(top, tools=None, max_tokens=4096)
    top.add_argument("--system", help="the system message (default: the template's own, if any)")
    add_episode(add_environment(top))
    return top


def main(words: Sequence[str], program: str = "python -m retool chat") -> int:
    """Exit status: 0 done, 1 something is wrong and was said."""
    options = parser(program).parse_args(words)
    if options.tools is None:
        options.tools = CODE if options.environment is None else NO_TOOLS
    calm_threads()
    # Heavy imports come late: `--help` doesn't wait for torch.
    from retool.talk.dialogue import hold

    try:
        require_effect(options)
        return hold(options, EPILOG)
    except (ValueError, OSError) as error:
        print(f"error: {in_own_words(error, OWN_WORDS)}", file=sys.stderr)
        return 1
