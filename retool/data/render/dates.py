"""The date that a chat template asks for (`strftime_now`), fixed for a whole run: the tokens of a
run's rows must not change overnight.

transformers gives templates the clock. A macro of the same name at a template's beginning takes its
place there.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timezone
from typing import Any

from retool.data.render.renderer import Renderer
from retool.data.render.templates import read_template

ASKED = "strftime_now"
DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRSTuUVwWxXyYzZ"
PADDED = "deHIjklmMSuUVWyY"  # may be written without padding: %-d


def today() -> str:
    """The day in UTC, so that machines in different time zones agree."""
    return datetime.now(timezone.utc).date().isoformat()


def asks_for_date(template: str | Mapping[str, str] | None) -> bool:
    """Whether a chat template, or one of several by name, may show the date."""
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return any(ASKED in text for text in texts)


def with_date(template: Any, day: str) -> Any:
    """The template, or each of several by name, with `day` (YYYY-MM-DD, at midnight) in place of
    the clock.
    """
    if isinstance(template, Mapping):
        return {name: with_date(text, day) for name, text in template.items()}
    return _macro(date.fromisoformat(day)) + template if asks_for_date(template) else template


def fix_date(tokenizer: Any, chat_template: str | None, day: str) -> str | None:
    """Make a tokenizer's chat template (or `chat_template`, as `data.chat_template` names it) show
    `day` where it asks for the date.

    Returns what to give `Renderer` as its template. Where none asks for the date, nothing is
    changed.
    """
    template = tokenizer.chat_template if chat_template is None else read_template(chat_template)
    if not asks_for_date(template):
        return chat_template
    tokenizer.chat_template = with_date(template, day)
    return None


def shows_date(renderer: Renderer) -> bool:
    """Whether a renderer's template asks for the date."""
    return asks_for_date(renderer.template or renderer.tokenizer.chat_template)


def _macro(day: date) -> str:
    """`strftime_now(format)` in Jinja: each directive of the format replaced by what it says of
    `day`. It shows nothing by itself, and leaves the text after it as it is (`+%}`).
    """
    midnight = datetime(day.year, day.month, day.day, tzinfo=timezone.utc)
    codes = [f"%-{letter}" for letter in PADDED] + [f"%{letter}" for letter in DIRECTIVES]
    replaced = "".join(f".replace({code!r}, {midnight.strftime(code)!r})" for code in codes)
    # A doubled percent sign is a plain one: out of the way first, so that what follows it isn't
    # taken for a directive.
    shown = f"format.replace('%%', '\\x00'){replaced}.replace('\\x00', '%')"
    return f"{{%- macro {ASKED}(format) -%}}{{{{- {shown} -}}}}{{%- endmacro +%}}"
