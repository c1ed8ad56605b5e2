"""Functions as tools: their schema, and what is said of those that have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from retool.data.tool_schema import schema_of


def search(query: str, limit: int = 3, order: Literal["new", "old"] | None = None) -> list[object]:
    """Searches the archive.

    Args:
        query: What to look for.
        limit: At most so many.
        order: Which come first.

    Returns:
        What was found.
    """
    return [query, limit, order]


def test_hints_and_docstring_are_the_schema() -> None:
    assert schema_of(search) == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Searches the archive.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What to look for."},
                    "limit": {"type": "integer", "description": "At most so many."},
                    "order": {
                        "type": "string",
                        "enum": ["new", "old"],
                        "nullable": True,
                        "description": "Which come first.",
                    },
                },
                "required": ["query"],
            },
        },
    }


def bare(query: str) -> str:
    return query


def unhinted(query) -> str:  # type: ignore[no-untyped-def]
    """Searches.

    Args:
        query: What.
    """
    return query


def undescribed(query: str, limit: int) -> str:
    """Searches.

    Args:
        query: What.
    """
    return query * limit


def strange(query: Missing) -> str:  # type: ignore[name-defined] # noqa: F821
    """Searches.

    Args:
        query: What.
    """
    return str(query)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (bare, "the tool bare has no schema: .*docstring"),
        (unhinted, "unhinted has no schema: .*query.*type hint"),
        (undescribed, "undescribed has no schema: .*limit"),
        (strange, "strange has no schema: .*Missing"),
        (lambda query: query, "has no name that a model could call"),
    ],
)
def test_a_function_without_a_schema_is_told_what_it_lacks(
    function: Callable[..., Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        schema_of(function)
