"""A Python function → the schema by which a model knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

EXAMPLE = '''
    def weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: Its name.
        """'''


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function that a model may call, from its type hints and its docstring.

    The docstring's text describes it, and its `Args:` each parameter; parameters without a default
    are required. What it returns isn't part of it: models' templates have no place for that.

    Raises ValueError, with an example, for a function that lacks one of these.
    """
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    name = getattr(function, "__name__", "")
    if not name.isidentifier():
        raise ValueError(
            f"the tool {function!r} has no name that a model could call. Write a function with def."
        )
    try:
        schema = get_json_schema(function)
    # NameError: a hint that is text, of a type that isn't there
    except (DocstringParsingException, TypeHintParsingException, NameError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the tool {name} has no schema: {reason}. Give it type hints, and a docstring like this "
            f"one's:\n{EXAMPLE}"
        ) from error
    schema["function"].pop("return", None)
    return schema
