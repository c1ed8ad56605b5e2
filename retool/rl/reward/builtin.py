"""The reward functions that come with retool, and DAPO's punishment for length.

No torch: reward workers import this.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from retool.rl.reward.calling import RewardFunction

BOXED = "\\boxed{"
INTEGER_SOURCES = re.compile(r"aime|dapo|deepscaler", re.IGNORECASE)  # of questions
UNBOXED_CHARACTERS = 1000  # at the end of an answer, searched where it has no box
RECIPE_CHARACTERS = 100  # at the end of an answer, where ReTool's published reward looks for a box


def default_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """`retool` for sources with integer answers, `math` for the others."""
    function = BUILT_IN[default_name(data_source)]
    return function(data_source, solution_str, ground_truth, extra_info)


def default_name(data_source: str) -> str:
    """The built-in reward that a data source gets where none is configured."""
    return "retool" if INTEGER_SOURCES.search(data_source) else "math"


def retool_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """The reward of ReTool's published recipe (verl's `recipe/retool` over `math_dapo`, strict
    box), number for number.

    +1 where the last box within the last 100 characters is closed and holds the truth, letter for
    letter, white space included; else -1 plus 0.05 per turn after the second, at most -0.6. See
    `boxed_score` for the more lenient one.
    """
    del data_source
    prediction = closing_box(solution_str)
    return _right_or_turns(prediction, prediction == ground_truth, extra_info)


def boxed_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """As `retool_score`, but the last balanced box counts wherever it is, and white space around
    answer and truth doesn't.
    """
    del data_source
    prediction = last_boxed(solution_str)
    right = prediction is not None and prediction.strip() == ground_truth.strip()
    return _right_or_turns(prediction, right, extra_info)


def _right_or_turns(
    prediction: str | None, right: bool, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """+1 for a right answer; a wrong one loses less the more turns it took, so that calling the
    tool is worth a try.
    """
    turns = int(extra_info.get("num_turns") or 2)
    # `num_turns` is 2 without a call, and grows by 2 with each: a call is worth 0.1, up to 0.4.
    score = 1.0 if right else min(-0.6, -1.0 + 0.1 * (turns - 2) / 2)
    return {"score": score, "acc": float(right), "pred": prediction or ""}


def math_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """1 where the answer is mathematically equivalent to the truth (math-verify), else 0."""
    del data_source, extra_info
    prediction = last_boxed(solution_str)
    if prediction is not None:
        answer = f"\\boxed{{{prediction}}}"
    else:
        answer = solution_str[-UNBOXED_CHARACTERS:]
    right = float(math_equal(ground_truth, answer))
    return {"score": right, "acc": right, "pred": prediction or ""}


def environment_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any],
    turn_rewards: Sequence[float],
) -> float:
    """What the environment, or tools, gave the trajectory's turns, in all."""
    del data_source, solution_str, ground_truth, extra_info
    return float(sum(turn_rewards))


def judge_score(
    messages: Any,
    response: Any,
    solution_str: str,
) -> float:
    """Stands for the language model that `llm_judge` asks; nobody calls it."""
    raise AssertionError("a judge behind an address is asked by LLMJudge")


def model_score(
    messages: Any,
    solution_str: str,
) -> float:
    """Stands for the reward model that `model_judge` runs; nobody calls it."""
    raise AssertionError("a reward model is run by ModelJudge")


def last_boxed(text: str) -> str | None:
    """What is inside the last `\\boxed{…}` whose braces balance; None without one.

    Linear in the text.
    """
    opened_at: list[int] = []
    last: tuple[int, str] | None = None  # where it starts, and what is inside
    # One pass, whatever is in the text: a regular expression for nested braces could take
    # exponential time.
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace.group() != "}":
            opened_at.append(brace.start())
            continue
        if not opened_at:
            continue
        start = opened_at.pop()
        if text.startswith(BOXED, start) and (last is None or start > last[0]):
            last = (start, text[start + len(BOXED) : brace.start()])
    return None if last is None else last[1]


def closing_box(text: str) -> str | None:
    """What is inside the last `\\boxed{` of the last 100 characters; None where there is none
    there, or it isn't closed.
    """
    _, box, rest = text[-RECIPE_CHARACTERS:].rpartition(BOXED)
    if not box:
        return None
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    return None


def math_equal(
    truth: str, answer: str, kinds: tuple[str, ...] = ("latex", "expr"), **options: Any
) -> bool:
    """Whether math-verify holds `answer` for `truth`; `options` go to its `verify`.

    It has no time limit of its own here: its alarm only works in a main thread, and the reward
    pool kills what takes too long.
    """
    import math_verify

    for name in ("math_verify.parser", "math_verify.grader"):
        # They warn of the missing time limit, each time
        logging.getLogger(name).setLevel(logging.ERROR)
    known = {"latex": math_verify.LatexExtractionConfig, "expr": math_verify.ExprExtractionConfig}
    targets = [known[kind]() for kind in kinds]
    # math-verify's own limit is a signal, which works in a main thread only. The worker's limit is
    # enough.
    parse = partial(math_verify.parse, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    # A bare \frac{1}{2} is only taken for LaTeX inside a box
    gold = [*parse(truth, targets), *parse(f"\\boxed{{{truth}}}", targets)]
    said = parse(answer, targets)
    return bool(math_verify.verify(gold, said, timeout_seconds=None, **options))


def overlong_penalty(length: int, longest: int, buffer: int, factor: float) -> float:
    """DAPO's soft punishment, arXiv 2503.14476 equation 13: 0 up to `longest - buffer` tokens, then
    linear down to `-factor` at `longest`.
    """
    return min(-(length - (longest - buffer)) / buffer * factor, 0.0)


BUILT_IN: dict[str, RewardFunction] = {
    "retool": retool_score,
    "boxed": boxed_score,
    "math": math_score,
    "default": default_score,
    "environment": environment_score,
    "judge": judge_score,
    "model": model_score,
}
