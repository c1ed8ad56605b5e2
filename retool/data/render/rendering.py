"""How conversations become tokens: the choices of data.*, in one type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HISTORIES = ("error", "last", "split")
INLINE_OUTPUTS = ("error", "mask", "train")


@dataclass(frozen=True)
class Rendering:
    """How a conversation becomes tokens and a mask; each field is a key below `data`.

    `chat_template`: `hermes` (ours) or a Jinja file; None: the tokenizer's own. `template_kwargs`
    are passed to it, and `template_date` is the day that it shows (None: today, where it asks).
    `drop_reasoning` leaves out what assistants think; `reasoning_in_content` writes it as
    <think>…</think> at the beginning of the content. `history` says what becomes of a conversation
    whose template shows earlier turns otherwise once later ones exist: an error, only the turns
    that stay are trained (`last`), or every turn is a sample of its own (`split`).
    `inline_outputs` says whether what programs print in the middle of an assistant's text
    (<interpreter>…</interpreter>) is an error, context (`mask`), or the assistant's (`train`).

    Raises ValueError for an unknown `history` or `inline_outputs`.
    """

    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_date: str | None = None
    drop_reasoning: bool = False
    reasoning_in_content: bool = False
    history: str = "error"
    inline_outputs: str = "error"

    def __post_init__(self) -> None:
        if self.history not in HISTORIES:
            raise ValueError(
                f"data.multiturn.history={self.history} is unknown: use {', '.join(HISTORIES)}."
            )
        if self.inline_outputs not in INLINE_OUTPUTS:
            raise ValueError(
                f"data.multiturn.inline_outputs={self.inline_outputs} is unknown: use "
                f"{', '.join(INLINE_OUTPUTS)}."
            )
