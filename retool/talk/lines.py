"""What the user types: a line, several pasted at once, or a block between \"\"\" and \"\"\"."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable

PROMPT = "> "
MORE = "… "
BLOCK = '"""'
PASTE_SECONDS = 0.03  # in which the next line of a paste is there; nobody types so fast


def read_message(read_line: Callable[[str], str] = input) -> str | None:
    """The next message; None at the end of the input. KeyboardInterrupt goes through."""
    try:
        lines = [read_line(PROMPT)]
        while _is_block(lines) or _more_is_there():
            lines.append(read_line(MORE if _is_block(lines) else ""))
    except EOFError:
        return None
    text = "\n".join(lines)
    if text.strip().startswith(BLOCK):
        text = text.strip().removeprefix(BLOCK).removesuffix(BLOCK)
    return text.strip("\n")


def _is_block(lines: list[str]) -> bool:
    """Whether a block was opened and isn't closed yet."""
    text = "\n".join(lines).strip()
    if not text.startswith(BLOCK):
        return False
    return not (text.endswith(BLOCK) and len(text) >= 2 * len(BLOCK))


def _more_is_there() -> bool:
    """Whether the terminal holds another line already: several were pasted."""
    return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
