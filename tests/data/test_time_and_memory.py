"""Templates that never end, or make more text than there is memory for: refused, soon, and with
everything put back.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.template import time_and_memory
from retool.data.template.time_and_memory import OutOfBounds, bounded, check_source

SHOWN = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
HOSTILE = {
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" * 9,
        "computes for more than",
    ),
    "one huge string": ("{{ 'x' * 20000000000 }}", "more text than there is memory for"),
    "many pieces": (
        "{% set x = 'y' * 1000000 %}{% for a in range(30000) %}{{ x }}{% endfor %}",
        "more text than there is memory for",
    ),
    "padding": ("{{ 'a'|center(20000000000) }}", "more text than there is memory for"),
    "a macro of itself": (
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "calls itself without end",
    ),
    "brackets": ("{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}", "calls itself without end"),
    "powers": ("{{ 7 ** (10 ** 10) }}", "takes powers"),
    "length": ("{# " + "x" * 5_000_000 + " #}", "characters: that is no template"),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_and_memory, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(time_and_memory, "TICK_S", 0.05)
    monkeypatch.setattr(time_and_memory, "MOST_BYTES", 1 << 30)


def state() -> tuple[Any, ...]:
    return (
        resource.getrlimit(resource.RLIMIT_DATA),
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_VIRTUAL),
    )


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("own", [False, True])
def test_a_hostile_template_is_refused_soon(
    tmp_path: Path, tokenizer: Any, monkeypatch: Any, quick: None, name: str, own: bool
) -> None:
    body, expected = HOSTILE[name]
    before = state()
    began = time.thread_time()
    (tmp_path / "own.jinja").write_text(body + SHOWN)
    if own:
        monkeypatch.setattr(tokenizer, "chat_template", body + SHOWN)
    with pytest.raises(ValueError, match=r"data\.chat_template") as refusal:
        Renderer(tokenizer, Rendering(None if own else str(tmp_path / "own.jinja")))
    assert expected in str(refusal.value) and len(str(refusal.value)) < 500
    assert time.thread_time() - began < 4 and state() == before


def test_what_only_some_rows_do_is_refused_there(
    tmp_path: Path, tokenizer: Any, quick: None
) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% if messages[0].content == 'now' %}" + HOSTILE["loops"][0] + "{% endif %}" + SHOWN
    )
    renderer = Renderer(tokenizer, Rendering(str(tmp_path / "own.jinja")))
    assert renderer.text([{"role": "user", "content": "not now"}]) == "not now<|im_end|>\n"
    with pytest.raises(ValueError, match=r"was stopped: it computes for more than 0\.2 seconds"):
        renderer.text([{"role": "user", "content": "now"}])


def test_bounds_inside_bounds_are_the_outer_ones_and_all_is_put_back(quick: None) -> None:
    before = state()
    with bounded():
        inside = state()
        with bounded():
            assert state()[:2] == inside[:2] != before[:2]
        assert state()[:2] == inside[:2]
    assert state() == before
    with pytest.raises(OutOfBounds), bounded():
        while True:
            pass
    assert state() == before
    with bounded():
        pass
    assert state() == before


def test_other_threads_go_without(quick: None) -> None:
    before = state()
    found = []

    def compute() -> None:
        with bounded():
            found.append(state())

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert found == [before]


def test_mappings_spread_over_arguments_are_no_powers() -> None:
    check_source(
        "{{ dict(**x) }}{{ dict(a=1, **x) }}{# 2 ** 3 #} 2 ** 3 {% raw %}{{ 2 ** 3 }}{% endraw %}"
    )
    check_source("{{ broken")
