"""Which tools a row offers, and what it gives them: verl's columns.

`extra_info.need_tools_kwargs` says that only the tools in `extra_info.tools_kwargs` are offered.
There each tool's name has `create_kwargs`, `execute_kwargs`, `calc_reward_kwargs` and
`release_kwargs`, or some of them. Without `need_tools_kwargs` every tool is offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retool.rl.agent.tools.protocol import AnyTool

KINDS = ("create_kwargs", "execute_kwargs", "calc_reward_kwargs", "release_kwargs")


def names_offered(extra_info: Mapping[str, Any]) -> set[str] | None:
    """The tools that a row asks for; None: all."""
    if not extra_info.get("need_tools_kwargs"):
        return None
    return set(extra_info.get("tools_kwargs") or {})


def schemas_offered(
    schemas: Sequence[Mapping[str, Any]] | None, extra_info: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Those of the run's `schemas` that a row offers; None: it offers no tool.

    ValueError where it names a tool that the run hasn't, or its columns have another form.
    """
    given = extra_info.get("tools_kwargs")
    if schemas and given is not None:
        _check_form(given, [str(schema["function"]["name"]) for schema in schemas])
    chosen = names_offered(extra_info)
    offered = [
        dict(schema)
        for schema in schemas or ()
        if chosen is None or schema["function"]["name"] in chosen
    ]
    return offered or None


def _check_form(given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"extra_info.tools_kwargs is a {type(given).__name__}, not a mapping.")
    for name, kwargs in given.items():
        where = f"extra_info.tools_kwargs.{name}"
        if name not in known:
            raise ValueError(
                f"{where}: the run has no such tool, only {', '.join(known)}. Add it to the run's "
                "tools, or leave it out of the row."
            )
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"{where} is a {type(kwargs).__name__}, not a mapping.")
        for kind, values in kwargs.items():
            if kind in KINDS and not isinstance(values, Mapping):
                raise ValueError(f"{where}.{kind} is a {type(values).__name__}, not a mapping.")


def tools_offered(
    tools: Mapping[str, AnyTool], extra_info: Mapping[str, Any]
) -> Mapping[str, AnyTool]:
    """Those of the run's `tools` that an answer to the row may call."""
    chosen = names_offered(extra_info)
    if chosen is None:
        return tools
    return {name: tool for name, tool in tools.items() if name in chosen}


def kwargs_of(extra_info: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    """What the row gives the tool `name`; `kind` is one of KINDS."""
    given = extra_info.get("tools_kwargs") or {}
    of_tool = given.get(name) or {}
    return dict(of_tool.get(kind) or {})
