"""A run that learns nothing any more is told: once, with the step it began at and a way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retool.metrics.collapse import FIRST, LASTING, READ, REPEATED, SIGNS, Signs, signs_before
from retool.report.runs import read_run

HEALTHY = {
    "actor/entropy": 0.5,
    "critic/advantages/max": 1.2,
    "critic/advantages/min": -0.8,
    "actor/pg_clipfrac": 0.02,
    "response_length/clip_ratio": 0.1,
    "training/rollout_logp_diff_mean": 0.004,
}
BROKEN = {
    "the entropy is below": {"actor/entropy": 0.04},
    "no group has a signal": {"critic/advantages/max": 1e-12, "critic/advantages/min": -1e-12},
    "most tokens are clipped": {"actor/pg_clipfrac": 0.7},
    "are cut off": {"response_length/clip_ratio": 1.0},
    "drift apart": {"training/rollout_logp_diff_mean": 0.06},
}
NO_GROUP = {"filter/groups_sampled": 8.0, "filter/groups_no_signal": 8.0}


def told(signs: Signs, start: int, steps: int, values: dict[str, float]) -> list[str]:
    return [line for step in range(start, start + steps) for line in signs.see(step, values)]


@pytest.mark.parametrize("what", BROKEN)
def test_a_sign_that_lasts_is_told_once_with_its_first_step(what: str) -> None:
    signs = Signs()
    broken = {**HEALTHY, **BROKEN[what]}
    assert not told(signs, 1, 20, HEALTHY)
    # One step less than it takes, validations in between: a hard batch is no collapse
    assert not told(signs, 21, LASTING - 1, broken)
    assert not signs.see(24, {"val-core/a/acc/mean@1": 0.5})
    assert not signs.see(25, HEALTHY)
    lines = told(signs, 26, REPEATED + LASTING, broken)
    assert len(lines) == 2, lines
    for line, step in zip(lines, (30, 130), strict=True):
        assert line.startswith(f"step {step}: since step 26 ") and what in line
    (summary,) = signs.summary()
    assert summary.startswith(f"steps 26 to {25 + REPEATED + LASTING}: ") and what in summary


def test_a_sampler_that_is_wrong_is_told_at_once() -> None:
    signs = Signs()
    (line,) = signs.see(1, {**HEALTHY, "training/rollout_logp_diff_mean": 0.5})
    assert "step 1: since step 1 sampler and trainer disagree" in line
    assert not told(signs, 2, 20, {**HEALTHY, "training/rollout_logp_diff_mean": 0.5})


def test_steps_of_dynamic_sampling_without_a_group_are_told_too() -> None:
    assert "no group has a signal" in told(Signs(), 1, LASTING, NO_GROUP)[0]
    # Groups kept from the step before are trained on, and have advantages
    assert not told(Signs(), 1, 20, {**HEALTHY, **NO_GROUP})


def test_numbers_that_are_none_show_nothing() -> None:
    signs = Signs()
    for value in (None, float("nan"), float("inf"), 10**400, True, "0.1"):
        for step in range(1, 20):
            assert not signs.see(step, dict.fromkeys(READ, value))
    assert not signs.summary()


def test_a_run_that_goes_on_knows_how_it_began_and_what_it_told(tmp_path: Path) -> None:
    broken = {**HEALTHY, "actor/entropy": 0.04}
    steps = [HEALTHY] * FIRST + [broken] * 3 + [HEALTHY] * 9
    entries = [{"step": step, **values} for step, values in enumerate(steps, 1)]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert len(told(signs_before(tmp_path, 8), 9, LASTING - 3, broken)) == 1
    assert not told(signs_before(tmp_path, 8), 9, LASTING - 4, broken)
    assert not told(signs_before(tmp_path, 0), 1, 20, broken), "the first steps were like this"


def test_the_page_says_what_the_console_says(tmp_path: Path) -> None:
    broken = {**HEALTHY, "actor/pg_clipfrac": 0.7}
    entries = [{"step": step, **(broken if step > 10 else HEALTHY)} for step in range(1, 21)]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "metrics.jsonl").write_text(lines)
    (note,) = read_run(tmp_path, "run").notes
    (line,) = told(signs_before(tmp_path, 10), 11, 10, broken)
    assert note.startswith("steps 11 to 20: ")
    assert line == f"step 15: since step 11 {note.removeprefix('steps 11 to 20: ')}."


def test_ways_out_name_keys_that_there_are() -> None:
    from retool.config import leaves
    from retool.rl.config import RLConfig

    keys = {leaf.key for leaf in leaves(RLConfig)}
    for sign in SIGNS:
        words = [word.strip(".,") for word in sign.ways_out.split()]
        named = {word.split("=")[0] for word in words if "." in word}
        assert named <= keys, named - keys
