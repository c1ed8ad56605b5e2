"""The date that a template asks for is that of the run: the same tokens tomorrow, and in no other
way than the clock would show it.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.template.dates import (
    DIRECTIVES,
    MAY_BE_UNPADDED,
    asks_for_date,
    fix_date,
    with_date,
)
from tests.real_data import real_template

DAY = "2024-03-05"
ASKS = (
    "meta-llama-Llama-3.2-3B-Instruct",
    "ibm-granite-granite-3.3-2B-Instruct",
    "Mistral-Small-3.2-24B-Instruct-2506",
    "openai-gpt-oss-120b",
)


class Clock(datetime):
    """A clock that stands at midnight of `DAY`."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2024, 3, 5, tzinfo=timezone.utc)


def shown(tokenizer: Any, template: str) -> str:
    talk = [
        {"role": "user", "content": "What day is it?"},
        {"role": "assistant", "content": "Tuesday."},
    ]
    return tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False)


def by_the_clock(tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Clock)
        return shown(tokenizer, template)


def test_every_directive_is_shown_as_the_clock_shows_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = (
        [f"%{letter}" for letter in DIRECTIVES]
        + [f"%-{letter}" for letter in MAY_BE_UNPADDED]
        + ["%%", "100%%d %d", "%B %d, %Y"]
    )
    asked = "|".join(codes)
    template = (
        "\n  {% if strftime_now is defined %}{{ strftime_now('"
        + asked
        + "') }}{% endif %}\n{{ messages[0].content }}"
    )
    fixed = with_date(template, DAY)
    assert shown(tokenizer, fixed) == by_the_clock(
        tokenizer, template, monkeypatch
    ) and "March 05, 2024" in shown(tokenizer, fixed)


@pytest.mark.parametrize("name", ASKS)
def test_well_known_templates_show_the_day_of_the_run(
    tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = real_template(name)
    assert asks_for_date(template) and shown(tokenizer, with_date(template, DAY)) == by_the_clock(
        tokenizer, template, monkeypatch
    )


def test_the_other_templates_are_left_as_they_are(tokenizer: Any, renderer_of: Any) -> None:
    plain = tokenizer.chat_template
    assert fix_date(tokenizer, None, DAY) is None and tokenizer.chat_template is plain
    assert fix_date(tokenizer, "hermes", DAY) == "hermes" and tokenizer.chat_template is plain
    assert not renderer_of("hermes").shows_date, "so its cache is another day's, too"


def test_one_of_several_templates_may_ask(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    both = with_date({"default": asking, "tool_use": tokenizer.chat_template}, DAY)
    assert both["tool_use"] == tokenizer.chat_template and "2024" in shown(
        tokenizer, both["default"]
    )
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template)
    (tmp_path / "asks.jinja").write_text(asking)
    found = {}
    for day in (DAY, "2025-03-05"):
        renderer = Renderer(
            tokenizer, Rendering(fix_date(tokenizer, str(tmp_path / "asks.jinja"), day))
        )
        assert renderer.shows_date and renderer.text(
            [{"role": "user", "content": "Hi"}]
        ).startswith(day[:4])
        found[day] = renderer.fingerprint()
    assert len(set(found.values())) == 2, "the cache of one day isn't the other's"
