"""The formats by their names, and a user's own at `file.py/name`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from retool.rl.agent.formats.code import CODE_BLOCK, RETOOL
from retool.rl.agent.formats.deepseek import DEEPSEEK
from retool.rl.agent.formats.glm import GLM
from retool.rl.agent.formats.gpt_oss import GPT_OSS
from retool.rl.agent.formats.granite import GRANITE
from retool.rl.agent.formats.hermes import HERMES
from retool.rl.agent.formats.llama3_json import LLAMA3_JSON
from retool.rl.agent.formats.mistral import MISTRAL
from retool.rl.agent.formats.pythonic import PYTHONIC
from retool.rl.agent.formats.qwen3_coder import QWEN3_CODER
from retool.rl.agent.reading.call import Call, Schemas
from retool.rl.agent.reading.form import Format, Found, Mark, without_thoughts
from retool.rl.reward.foreign import words_of

AUTO = "auto"  # the one that the chat template wants
SIGNATURE = "(text, tools) -> list of Call"


class FormatFailure(Exception):
    """A user's format that raised, or gave what isn't a list of calls: not the model's doing."""


def own_format(name: str) -> tuple[str, str] | None:
    """(file, function) of `file.py/function`; None for any other name."""
    path, _, function = name.rpartition("/")
    return (path, function) if path.endswith(".py") and function else None


def problem_of_name(name: str) -> str | None:
    """What to use instead of a name that is none; None for one that is."""
    if name == AUTO or name in FORMATS or own_format(name) is not None:
        return None
    near = difflib.get_close_matches(name, [AUTO, *FORMATS], n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Use {AUTO}, {', '.join(FORMATS)}, or file.py/function."


def find_format(name: str) -> Format:
    """The format of this name, or a user's function as one.

    ValueError where there is none, or it fails on a turn without calls.
    """
    own = own_format(name)
    if own is None:
        if name not in FORMATS:
            raise ValueError(f"format={name} is not known. {problem_of_name(name)}")
        return FORMATS[name]
    # Not above: it loads what reads tables, and `--help` lists these names
    from retool.data.read.user_function import load_function

    function = load_function(*own, SIGNATURE)
    try:
        _asked(function, name, "A turn without a call.", ())
    except FormatFailure as error:
        raise ValueError(f"{error} Mend the function: def {own[1]}{SIGNATURE}.") from error
    return _of_function(function, name)


def _of_function(
    function: Callable[..., Any],
    name: str,
) -> Format:
    """A format that gives a whole turn, without what it only thinks, to a user's function."""

    def read(
        text: str,
        mark: Mark,
        schemas: Schemas,
    ) -> Found:
        del mark  # all of the turn
        return _asked(function, name, without_thoughts(text), schemas), len(text)

    return Format(r"\A(?s:.*)", read, in_thoughts=True)


def _asked(
    function: Callable[..., Any],
    name: str,
    text: str,
    schemas: Schemas,
) -> list[Call]:
    try:
        calls = list(function(text, [dict(schema) for schema in schemas]))
    except Exception as error:  # whatever the user's function raises
        raise FormatFailure(f"{name} raises {words_of(error)}.") from error
    other = next((call for call in calls if not isinstance(call, Call)), None)
    if other is not None:
        raise FormatFailure(f"{name} gives a {type(other).__name__}, not a Call.")
    return calls


FORMATS: dict[str, Format] = {
    "hermes": HERMES,
    "qwen3_coder": QWEN3_CODER,
    "llama3_json": LLAMA3_JSON,
    "mistral": MISTRAL,
    "granite": GRANITE,
    "pythonic": PYTHONIC,
    "deepseek": DEEPSEEK,
    "gpt_oss": GPT_OSS,
    "glm": GLM,
    "code_block": CODE_BLOCK,
    "retool": RETOOL,
}
