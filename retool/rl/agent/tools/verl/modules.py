"""A stand-in for what tools import of verl, where verl isn't installed.

Three modules, while a tool's file is loaded and its class called, and not longer:
`verl.tools.base_tool` with BaseTool, `verl.tools.schemas` with the schemas and ToolResponse, and
`verl.utils.rollout_trace` with a decorator that does nothing. What else a tool takes from verl
isn't here, and its import fails. It is written after verl's interface; none of its code is here.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar
from uuid import uuid4


class Fields:
    """Named values, read as attributes; those that `kinds` names are such objects in turn."""

    kinds: ClassVar[Mapping[str, type[Fields]]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, **values: Any) -> None:
        self._given = tuple(values)
        for name, value in {**self.defaults, **values}.items():
            setattr(self, name, self._made(name, value))

    def _made(self, name: str, value: Any) -> Any:
        kind = self.kinds.get(name)
        if kind is None or not isinstance(value, Mapping):
            return value
        if name == "properties":
            return {key: kind.model_validate(one) for key, one in value.items()}
        return kind.model_validate(value)

    @classmethod
    def model_validate(cls, values: Any) -> Any:
        return values if isinstance(values, cls) else cls(**values)

    def model_dump(
        self, exclude_unset: bool = False, exclude_none: bool = False, **_: Any
    ) -> dict[str, Any]:
        """The values as plain dicts."""
        options = {"exclude_unset": exclude_unset, "exclude_none": exclude_none}
        names = self._given if exclude_unset else [n for n in vars(self) if n != "_given"]
        found = {name: _dumped(getattr(self, name), options) for name in names}
        return {key: value for key, value in found.items() if value is not None or not exclude_none}


def _dumped(value: Any, options: Mapping[str, bool]) -> Any:
    if isinstance(value, Fields):
        return value.model_dump(options["exclude_unset"], options["exclude_none"])
    if isinstance(value, Mapping):
        return {key: _dumped(one, options) for key, one in value.items()}
    return value


class OpenAIFunctionPropertySchema(Fields):
    """An argument of a function."""

    defaults: ClassVar[Mapping[str, Any]] = {"description": None, "enum": None}


class OpenAIFunctionParametersSchema(Fields):
    """The arguments of a function."""

    kinds: ClassVar[Mapping[str, type[Fields]]] = {"properties": OpenAIFunctionPropertySchema}


class OpenAIFunctionSchema(Fields):
    """A function: its name, what it does, its arguments."""

    kinds: ClassVar[Mapping[str, type[Fields]]] = {"parameters": OpenAIFunctionParametersSchema}


class OpenAIFunctionToolSchema(Fields):
    """A tool, as OpenAI's API has it."""

    kinds: ClassVar[Mapping[str, type[Fields]]] = {"function": OpenAIFunctionSchema}


class ToolResponse(Fields):
    """What a tool answers."""

    defaults: ClassVar[Mapping[str, Any]] = {"text": None, "image": None, "video": None}


class BaseTool:
    """What a tool of verl's inherits: it keeps config, schema and name, and does nothing."""

    def __init__(self, config: dict[str, Any], tool_schema: Any) -> None:
        self.config = config
        self.tool_schema = tool_schema or self.get_openai_tool_schema()
        self.name = self.tool_schema.function.name

    def get_openai_tool_schema(self) -> Any:
        return self.tool_schema

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> Any:
        del kwargs
        return instance_id or str(uuid4()), ToolResponse()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any) -> Any:
        del instance_id, parameters, kwargs
        return ToolResponse(text=""), 0.0, {}

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        del instance_id, kwargs
        return 0.0

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Nothing is kept."""


def rollout_trace_op(function: Any) -> Any:
    """verl's traces calls; here it leaves them as they are."""
    return function


SCHEMAS = (
    OpenAIFunctionPropertySchema,
    OpenAIFunctionParametersSchema,
    OpenAIFunctionSchema,
    OpenAIFunctionToolSchema,
    ToolResponse,
)
CONTENTS: dict[str, tuple[Any, ...]] = {
    "verl": (),
    "verl.tools": (),
    "verl.tools.base_tool": (BaseTool, OpenAIFunctionToolSchema, ToolResponse),
    "verl.tools.schemas": SCHEMAS,
    "verl.utils": (),
    "verl.utils.rollout_trace": (rollout_trace_op,),
}


@contextmanager
def verl_importable() -> Iterator[None]:
    """While it lasts, `import verl` finds verl, or the stand-in."""
    if "verl" in sys.modules or importlib.util.find_spec("verl") is not None:
        yield
        return
    for name, contents in CONTENTS.items():
        module = ModuleType(name, "retool's stand-in for verl, which isn't installed.")
        module.__path__ = []
        for one in contents:
            setattr(module, one.__name__, one)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in CONTENTS:
            sys.modules.pop(name, None)


def schema_for_verl(schema: Mapping[str, Any] | None) -> Any:
    """A schema as verl's tools are given it: attributes, not keys. Inside `verl_importable`."""
    if schema is None:
        return None
    schemas = importlib.import_module("verl.tools.schemas")
    return schemas.OpenAIFunctionToolSchema.model_validate(dict(schema))
