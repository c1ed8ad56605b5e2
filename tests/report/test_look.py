"""What pages have in common, without a browser: how numbers read, and whether their colours can be
told apart.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from retool.data.audit.page import SCRIPTS
from retool.files.html import LOOK
from retool.report.headline import how_it_trains, what_it_is
from retool.report.page import ASSETS, OWN
from retool.report.runs import read_run, required_keys
from tests.report.conftest import rl_run, sft_run

Colour = tuple[float, float, float]

# What a red, a green and a blue eye's cones leave of linear RGB (Machado, Oliveira, Fernandes 2009)
EYES = {
    "all three": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "no green": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "no blue": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}
CONES = ((0.4122, 0.5363, 0.0514), (0.2119, 0.6807, 0.1074), (0.0883, 0.2817, 0.6300))
OKLAB = ((0.2105, 0.7936, -0.0041), (1.9780, -2.4286, 0.4506), (0.0259, 0.7828, -0.8087))


def colours(theme: int, *names: str) -> list[Colour]:
    """Named colours of the style sheets, as linear RGB: theme 0 is light, 1 dark."""
    text = "".join(path.read_text() for path in (LOOK / "look.css", ASSETS / "report.css"))
    pairs = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", text)
    known = {name: both[theme] for name, *both in pairs}
    return [_linear(known[name]) for name in names]


def _linear(text: str) -> Colour:
    red, green, blue = (int(text[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return _channel(red), _channel(green), _channel(blue)


def _channel(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _times(matrix: Any, vector: Any) -> Colour:
    first, second, third = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)
    return first, second, third


def contrast(one: Colour, other: Colour) -> float:
    """As WCAG counts it."""
    light, dark = sorted(
        (
            sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))
            for rgb in (one, other)
        ),
        reverse=True,
    )
    return (light + 0.05) / (dark + 0.05)


def apart(one: Colour, other: Colour) -> float:
    """The distance in Oklab for the eyes that tell the two worst."""
    return min(
        math.dist(
            *(
                _times(OKLAB, [max(c, 0) ** (1 / 3) for c in _times(CONES, _times(eye, rgb))])
                for rgb in (one, other)
            )
        )
        for eye in EYES.values()
    )


@pytest.mark.parametrize("theme", [0, 1])
def test_lines_and_words_can_be_seen_and_told_apart(theme: int) -> None:
    (card,) = colours(theme, "card")
    lines = colours(theme, *(f"s{i}" for i in range(8)))
    assert min(contrast(line, card) for line in lines) > 3
    solid = lines[:4]
    dashed = lines[4:]
    assert min(apart(*pair) for pair in itertools.combinations(solid, 2)) > 0.09
    assert min(apart(*pair) for pair in itertools.combinations(dashed, 2)) > 0.025
    for ground in colours(theme, "card", "bg", "grid"):
        for words in colours(theme, "ink", "soft", "good", "bad"):
            assert contrast(words, ground) > 4.5
    (field,) = colours(theme, "field")
    assert contrast(field, card) > 3, "a field's edge is seen"


NUMBERS = {
    "show(0)": "0",
    "show(40)": "40",
    "show(0.6)": "0.6000",
    "show(0.6076)": "0.6076",
    "show(-0.44274)": "−0.4427",
    "show(22.1)": "22.10",
    "show(2344.4)": "2,344",
    "show(16000)": "16,000",
    "show(319556)": "319,556",
    "show(1.2e9)": "1.20B",
    "show(65536000)": "65.5M",
    "show(0.00001)": "1e-5",
    "show(0.000025)": "2.5e-5",
    "show(null)": "–",
    "percent(0.5)": "50.0 %",
    "duration(76.1)": "76.1 s",
    "duration(240)": "4.00 min",
    "duration(10584)": "2.94 h",
    "duration(1080000)": "12.5 days",
    "ticks([8000, 10000, 12000])": ["8,000", "10,000", "12,000"],
    "ticks([0.2, 0.225, 0.25])": ["0.200", "0.225", "0.250"],
    "ticks([-0.5, 0, 0.5])": ["−0.5", "0.0", "0.5"],
    "ticks([0.2, 0.4], 'share')": ["20 %", "40 %"],
    "ticks([500000, 1000000, null])": ["0.5M", "1.0M", ""],
    "ticks([0, 0.00005, 0.0001])": ["0", "5e-5", "1e-4"],
    "date(Date.UTC(2026, 10, 29, 9, 5) / 1000)": "2026-11-29 09:05",
    "columnDecimals([240, 22, 0.1])": 1,
}


def test_numbers_read_the_same_everywhere() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node.js")
    source = (LOOK / "numbers.js").read_text()
    asked = f"console.log(JSON.stringify([{', '.join(NUMBERS)}]))"
    done = subprocess.run(
        [node, "-e", f"{source}\n{asked}"],
        capture_output=True,
        text=True,
        check=True,
        env={"TZ": "UTC"},
        timeout=60,
    )
    assert dict(zip(NUMBERS, json.loads(done.stdout), strict=True)) == NUMBERS


def test_no_page_writes_a_number_or_a_date_in_its_own_way() -> None:
    for path in (*OWN, *SCRIPTS):
        if path.name != "numbers.js":
            own = re.findall(r"toLocale\w+|toFixed|toPrecision|toExponential", path.read_text())
            assert not own, f"{path.name}: {own}"


def test_the_top_of_the_page_has_model_and_data(tmp_path: Path) -> None:
    sft = read_run(sft_run(tmp_path / "sft", steps=1), "sft").config
    assert dict(what_it_is(sft)) == {
        "model": "Qwen2.5-0.5B-Instruct",
        "trained on": "train.parquet",
    }
    assert dict(how_it_trains(sft)) == {
        "batch": "256",
        "learning rate": "1e-5",
        "longest sample": "16,384",
    }
    rl = read_run(rl_run(tmp_path / "rl", steps=1), "rl").config
    assert dict(what_it_is(rl)) == {
        "model": "sft/global_step_62/huggingface",
        "trained on": "questions.parquet",
        "validated on": "aime_2024.parquet",
    }
    assert dict(how_it_trains(rl))["answers to each"] == "16"
    shared = dict(how_it_trains({**sft, "ulysses_sequence_parallel_size": "4"}))
    assert shared["GPUs a sequence"] == "4"
    assert what_it_is({"model.partial_pretrain": "???", "data.val_files": "null"}) == []


def test_keys_without_a_default_are_told_from_unchanged_ones(tmp_path: Path) -> None:
    run = read_run(sft_run(tmp_path / "sft", steps=1), "r")
    assert set(required_keys(run.config)) == {"data.train_files", "model.partial_pretrain"}
