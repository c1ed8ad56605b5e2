"""A reward of your own: right answers, with a little for numbers that come close, and nothing for
endless text.

    custom_reward_function.path=examples/custom_reward.py custom_reward_function.name=compute_score

It runs in a process of its own with 2 seconds, 2 GB and no network (`docs/rewards.md` says how to
change that). An answer on which it raises gets the floor; a step on whose answers it mostly raises
ends the run with the traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retool.rl.reward.builtin import last_boxed


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """`score` is trained on; `acc` and `pred` make validation's accuracy and majority votes;
    anything else is only shown.
    """
    del data_source
    answer = (last_boxed(solution_str) or "").strip()
    right = answer == ground_truth.strip()
    score = 1.0 if right else 0.3 * closeness(answer, ground_truth)
    if extra_info["stop_reason"] == "length":
        score -= 0.5
    return {"score": score, "acc": float(right), "pred": answer}


def closeness(answer: str, truth: str) -> float:
    """1 for the same number, 0 for one that is off by its own size or more, or for no number."""
    try:
        off = abs(float(answer) - float(truth)) / max(abs(float(truth)), 1e-9)
    except ValueError:
        return 0.0
    return max(0.0, 1.0 - off)
