"""Signs that an RL run learns nothing any more, from the numbers of its steps.

The console tells them while the run goes on, the report's page afterwards: by the same rules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool.metrics.jsonl import read_jsonl

LASTING = 5  # steps in a row that show a sign before it is told: one alone is a hard batch
REPEATED = 100  # steps after which one that lasts, or is back, is told again
FIRST = 5  # steps whose mean is how a run began
ENTROPY = 0.1  # share of the first steps' below which the policy repeats itself
NO_ADVANTAGE = 1e-6  # what equal scores leave is rounding
CLIPPED = 0.5  # share of tokens; PPO's stays below 0.05, GSPO's near 0.15
CUT_OFF = 0.95  # share of answers
DISAGREEMENT = 0.2  # nats per token between sampler and trainer; bf16 has 0.001 to 0.02
GAP_GROWTH = 10.0  # times the first steps' gap; only where it is above MIN_GAP, too
MIN_GAP = 0.05
Values = Mapping[str, float]


@dataclass(frozen=True)
class Sign:
    """`shows(now, first)`: whether a step with the numbers `now` shows it, in a run whose first steps
    had `first` on average; None where the step lacks these numbers.

    `metric` is told beside the words, `steps` in a row are needed.
    """

    metric: str
    shows: Callable[[Values, Values], bool | None]
    says: str
    ways_out: str
    steps: int = LASTING


@dataclass
class _Course:
    """A sign in a run: the steps in a row that showed it, and when it was told."""

    since: int = 0
    last: int = 0
    steps: int = 0
    told: int | None = None
    told_since: int = 0
    told_last: int = 0
    text: str = ""


class Signs:
    """What a run's steps show, one after the other."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._courses = {sign.says: _Course() for sign in SIGNS}

    def see(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Take in a step's metrics, or a validation's, which show nothing. What is to be told now."""
        now = {name: metrics[name] for name in READ if _is_finite(metrics.get(name))}
        for name, value in now.items():
            values = self._first.setdefault(name, [])
            if len(values) < FIRST:
                values.append(value)
        first = {name: sum(values) / len(values) for name, values in self._first.items()}
        found = (self._follow(sign, step, now, first) for sign in SIGNS)
        return [text for text in found if text]

    def _follow(self, sign: Sign, step: int, now: Values, first: Values) -> str:
        """What is to be told of this sign now; "" for nothing."""
        course = self._courses[sign.says]
        shown = sign.shows(now, first)
        if shown is None:
            return ""
        if not shown:
            course.steps = 0
            return ""
        if not course.steps:
            course.since = step
        course.steps += 1
        course.last = step
        if course.steps < sign.steps:
            return ""
        course.told_since = course.since
        course.told_last = step
        if course.told is not None and step - course.told < REPEATED:
            return ""
        course.told = step
        course.text = _text(sign, now, first)
        return f"step {step}: since step {course.since} {course.text}."

    def summary(self) -> list[str]:
        """A line for each sign that was told: its last stretch of steps."""
        return [
            f"steps {course.told_since} to {course.told_last}: {course.text}"
            for course in self._courses.values()
            if course.told is not None
        ]


def signs_before(folder: Path, step: int) -> Signs:
    """What a run that goes on after `step` had seen until then, from its metrics.jsonl."""
    signs = Signs()
    file = folder / "metrics.jsonl"
    if step and file.is_file():
        for entry in read_jsonl(file):
            if entry["step"] <= step:
                signs.see(entry["step"], entry)
    return signs


def _text(sign: Sign, now: Values, first: Values) -> str:
    value = now.get(sign.metric)
    number = "" if value is None else f" {value:.3g}, at first {first[sign.metric]:.3g}"
    return f"{sign.says} ({sign.metric}{number}). {sign.ways_out}"


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


# --- the signs ---


def _entropy_fell(now: Values, first: Values) -> bool | None:
    name = "actor/entropy"
    return now[name] < ENTROPY * first[name] if name in now else None


def _no_signal(now: Values, first: Values) -> bool | None:
    del first
    ends = [now.get(f"critic/advantages/{end}") for end in ("min", "max")]
    known = [abs(end) for end in ends if end is not None]
    if known:
        return max(known) < NO_ADVANTAGE
    # A step of dynamic sampling that found no group trains nothing and has no advantages
    sampled = now.get("filter/groups_sampled")
    return now.get("filter/groups_no_signal") == sampled if sampled else None


def _clipped(now: Values, first: Values) -> bool | None:
    del first
    share = now.get("actor/pg_clipfrac")
    return None if share is None else share > CLIPPED


def _cut_off(now: Values, first: Values) -> bool | None:
    del first
    share = now.get("response_length/clip_ratio")
    return None if share is None else share >= CUT_OFF


def _gap_grew(now: Values, first: Values) -> bool | None:
    name = "training/rollout_logp_diff_mean"
    if name not in now:
        return None
    return MIN_GAP < now[name] <= DISAGREEMENT and now[name] > GAP_GROWTH * first[name]


def _disagree(now: Values, first: Values) -> bool | None:
    del first
    gap = now.get("training/rollout_logp_diff_mean")
    return None if gap is None else gap > DISAGREEMENT


SIGNS = (
    Sign(
        "actor/entropy",
        _entropy_fell,
        f"the entropy is below {ENTROPY:.0%} of the first steps': the answers to a question are "
        "nearly the same",
        "Try an earlier checkpoint with a lower actor_rollout_ref.actor.optim.lr, "
        "actor_rollout_ref.actor.clip_ratio_high=0.28, or algorithm.filter_groups.enable=true",
    ),
    Sign(
        "critic/advantages/max",
        _no_signal,
        "no group has a signal, as the answers to a question all score alike: nothing is learnt",
        "Read some answers in the report. Use questions that are neither too easy nor too hard, a "
        "larger actor_rollout_ref.rollout.n, or a reward that tells answers apart",
    ),
    Sign(
        "actor/pg_clipfrac",
        _clipped,
        "most tokens are clipped: the updates of a step move the policy too far",
        "Lower actor_rollout_ref.actor.optim.lr or actor_rollout_ref.actor.ppo_epochs, or raise "
        "actor_rollout_ref.actor.ppo_mini_batch_size",
    ),
    Sign(
        "response_length/clip_ratio",
        _cut_off,
        "nearly all answers are cut off: their ends are neither seen nor judged",
        "Raise data.max_response_length, see in the report whether answers repeat themselves, or use "
        "reward_model.overlong_buffer.enable=true",
    ),
    Sign(
        "training/rollout_logp_diff_mean",
        _gap_grew,
        "sampler and trainer drift apart: their log-probabilities of sampled tokens differ more than "
        f"{GAP_GROWTH:.0f} times as much as in the first steps",
        "Try actor_rollout_ref.actor.fsdp_config.param_dtype=fp16, "
        "algorithm.rollout_correction.rollout_is=token, or a lower "
        "actor_rollout_ref.actor.optim.lr from an earlier checkpoint",
    ),
    Sign(
        "training/rollout_logp_diff_mean",
        _disagree,
        "sampler and trainer disagree on the log-probabilities of sampled tokens: one of their "
        "kernels computes wrongly here, and the policy gradient means little",
        "Try actor_rollout_ref.model.attn=reference, or do without flash-attn",
        steps=1,
    ),
)
READ = (
    *dict.fromkeys(sign.metric for sign in SIGNS),
    "critic/advantages/min",
    "filter/groups_sampled",
    "filter/groups_no_signal",
)
