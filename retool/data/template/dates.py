"""The date that a chat template asks for (`strftime_now`), fixed for a whole run.

The tokens of a run's rows must not change overnight. transformers gives templates the clock. A macro
of the same name at a template's beginning takes its place there.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timezone
from typing import Any

from retool.data.template.choose import read_template

ASKED = "strftime_now"
DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRSTuUVwWxXyYzZ"
MAY_BE_UNPADDED = "deHIjklmMSuUVWyY"  # as in %-d


def today() -> str:
    """The day in UTC, so that machines in different time zones agree."""
    return datetime.now(timezone.utc).date().isoformat()


def asks_for_date(template: str | Mapping[str, str] | None) -> bool:
    """Whether a chat template, or one of several by name, may show the date."""
    if isinstance(template, Mapping):
        return any(ASKED in text for text in template.values())
    return ASKED in (template or "")


def with_date(template: Any, day: str) -> Any:
    """The template with `day` (YYYY-MM-DD, at midnight) in place of the clock.

    Of several by name, each.
    """
    if isinstance(template, Mapping):
        return {name: with_date(text, day) for name, text in template.items()}
    if not asks_for_date(template):
        return template
    return _macro(date.fromisoformat(day)) + template


def fix_date(tokenizer: Any, chat_template: str | None, day: str) -> str | None:
    """Make a chat template show `day` where it asks for the date.

    It is the tokenizer's, or `chat_template` (as `data.chat_template` names it); the tokenizer has
    it then. Returns what to give `Renderer` as its template. Where none asks for the date, nothing
    is changed.
    """
    template = tokenizer.chat_template if chat_template is None else read_template(chat_template)
    if not asks_for_date(template):
        return chat_template
    tokenizer.chat_template = with_date(template, day)
    return None


def _macro(day: date) -> str:
    """`strftime_now(format)` in Jinja: each directive replaced by what it says of `day`.

    It shows nothing by itself, and leaves the text after it as it is (`+%}`).
    """
    midnight = datetime(day.year, day.month, day.day, tzinfo=timezone.utc)
    unpadded = [f"%-{letter}" for letter in MAY_BE_UNPADDED]
    padded = [f"%{letter}" for letter in DIRECTIVES]
    # A doubled percent sign is a plain one: out of the way first, so that what follows it isn't
    # taken for a directive.
    shown = "format.replace('%%', '\\x00')"
    for code in unpadded + padded:
        shown += f".replace({code!r}, {midnight.strftime(code)!r})"
    shown += ".replace('\\x00', '%')"
    return f"{{%- macro {ASKED}(format) -%}}{{{{- {shown} -}}}}{{%- endmacro +%}}"
