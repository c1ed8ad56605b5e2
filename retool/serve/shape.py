"""What every form of answer shares: a question that was read, and how its answers are written."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from retool.llm.answer import Answer
from retool.llm.likeliest import Likeliest
from retool.llm.requests import Request
from retool.serve.engine_thread import Origin, Piece

Found = Mapping[int, Sequence[Likeliest]]  # by an answer's number


class Form(Protocol):
    """How one question's answers are written. Answers are numbered over all of its prompts."""

    def whole(self, answers: Sequence[Answer], found: Found) -> Any:
        """The response to a question that doesn't stream."""
        ...

    def first(self) -> list[dict[str, Any]]:
        """Events before anything was sampled."""
        ...

    def grown(self, piece: Piece) -> dict[str, Any] | None:
        """The event for what an answer grew by; None where there is nothing to say yet."""
        ...

    def last(self, usage: Mapping[str, int]) -> list[dict[str, Any]]:
        """Events when all is done."""
        ...


@dataclass
class About:
    """What answers say of where they come from: the model's name, and the weights that sampled them,
    which are known once they have.
    """

    model: str
    origin: Origin


@dataclass(frozen=True)
class Question:
    """What was asked: prompts, whether the answer streams, its form, and what that says of itself."""

    requests: list[Request]
    streams: bool
    form: Form
    about: About


@dataclass(frozen=True)
class Envelope:
    """What stands around the choices of OpenAI's responses and events."""

    kind: str
    about: About
    prefix: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or an event."""
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": self.kind,
            "created": self.created,
            "model": self.about.model,
            "system_fingerprint": self.about.origin.mark,
            "choices": choices,
            **more,
        }


def usage_of(requests: Sequence[Request], sampled: int) -> dict[str, int]:
    """How many tokens went in and came out."""
    prompts = sum(len(request.ids) for request in requests)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": sampled,
        "total_tokens": prompts + sampled,
    }
