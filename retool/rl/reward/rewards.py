"""Scores of answers: two built in, the user's own by path and name, and DAPO's length shaping.

No torch: reward workers import this.

A reward function is `compute_score(data_source, solution_str, ground_truth, extra_info) -> float |
{"score": float, …}`, sync or async. `solution_str` is what the model wrote, never a tool's output.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

RewardFunction = Callable[..., Any]
BOXED = "\\boxed{"
EXACT = re.compile(r"aime|dapo|deepscaler", re.IGNORECASE)  # sources whose answers are integers
FAR = 1000  # characters at the end that are searched where there is no box
LONGEST = 10_000  # characters of a text that a reward function tells; the rest is cut
RECIPE_WINDOW = (
    100  # characters at the end of an answer that ReTool's published reward searches for the box
)


def last_boxed(text: str) -> str | None:
    """What is inside the last `\\boxed{…}` whose braces balance; None without one.

    Linear in the text.
    """
    open_at: list[int] = []
    found: tuple[int, str] | None = None
    for match in re.finditer(r"\\boxed\{|[{}]", text):
        if match.group() != "}":
            open_at.append(match.start())
        elif open_at:
            start = open_at.pop()
            if text.startswith(BOXED, start) and (found is None or start > found[0]):
                found = start, text[start + len(BOXED) : match.start()]
    return None if found is None else found[1]


def closing_box(text: str) -> str | None:
    """What is inside the last `\\boxed{` of the last 100 characters; None where there is none
    there, or it isn't closed.
    """
    _, box, rest = text[-RECIPE_WINDOW:].rpartition(BOXED)
    depth = 1 if box else 0
    for at, character in enumerate(rest if box else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:at]
    return None


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
    pred = closing_box(solution_str)
    return _right_or_turns(pred, pred == ground_truth, extra_info)


def boxed_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """As `retool_score`, but the last balanced box counts wherever it is, and white space around
    answer and truth doesn't.
    """
    del data_source
    pred = last_boxed(solution_str)
    right = pred is not None and pred.strip() == ground_truth.strip()
    return _right_or_turns(pred, right, extra_info)


def _right_or_turns(pred: str | None, right: bool, extra_info: Mapping[str, Any]) -> dict[str, Any]:
    """+1 for a right answer; a wrong one loses less the more turns it took, so that calling the
    tool is worth a try.
    """
    turns = int(extra_info.get("num_turns") or 2)
    score = 1.0 if right else min(-0.6, -1.0 + 0.1 * (turns - 2) / 2)
    return {"score": score, "acc": float(right), "pred": "" if pred is None else pred}


def math_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """1 where the answer is mathematically equivalent to the truth (math-verify), else 0."""
    del data_source, extra_info
    pred = last_boxed(solution_str)
    right = math_equal(
        ground_truth, f"\\boxed{{{pred}}}" if pred is not None else solution_str[-FAR:]
    )
    return {"score": float(right), "acc": float(right), "pred": "" if pred is None else pred}


def math_equal(
    truth: str, answer: str, kinds: tuple[str, ...] = ("latex", "expr"), **options: Any
) -> bool:
    """Whether math-verify holds `answer` for `truth`; `options` go to its `verify`. It has no time
    limit of its own here: its alarm only works in a main thread, and the reward pool kills what
    takes too long.
    """
    import math_verify

    for name in ("math_verify.parser", "math_verify.grader"):
        # They warn of the missing time limit, each time
        logging.getLogger(name).setLevel(logging.ERROR)
    known = {"latex": math_verify.LatexExtractionConfig, "expr": math_verify.ExprExtractionConfig}
    targets = [known[kind]() for kind in kinds]
    # None: pebble's pool has a limit of its own, and theirs works in the main thread only.
    parse = partial(math_verify.parse, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    # A bare \frac{1}{2} is only taken for LaTeX inside a box.
    gold = [*parse(truth, targets), *parse(f"\\boxed{{{truth}}}", targets)]
    said = parse(answer, targets)
    return bool(math_verify.verify(gold, said, timeout_seconds=None, **options))


def default_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """`retool` for sources with integer answers, `math` for the others."""
    return BUILT_IN[default_name(data_source)](data_source, solution_str, ground_truth, extra_info)


def default_name(data_source: str) -> str:
    """The built-in reward that a data source gets where none is configured."""
    return "retool" if EXACT.search(data_source) else "math"


# By name, of every reward function
ARGUMENTS = (
    "data_source",
    "solution_str",
    "ground_truth",
    "extra_info",
)


@dataclass(frozen=True)
class RewardSource:
    """Where the reward function is: a built-in `name`, or a function `name` in the file `path`."""

    name: str
    path: str | None = None

    def load(self) -> RewardFunction:
        """The function. ValueError when it isn't there, or can't take what it is called with."""
        if self.path is None:
            if self.name not in BUILT_IN:
                raise ValueError(
                    f"reward_model.name={self.name} is not known: use {', '.join(BUILT_IN)}, or "
                    "file.py/function."
                )
            return BUILT_IN[self.name]
        from retool.data.read.files import load_function

        function = load_function(self.path, self.name, f"({', '.join(ARGUMENTS)}) -> score")
        try:
            inspect.signature(function).bind(**dict.fromkeys(ARGUMENTS))
        except TypeError as error:
            wanted = f"def {self.name}({', '.join(ARGUMENTS)})"
            raise ValueError(
                f"{self.name!r} in {self.path} can't be called ({error}): write {wanted}."
            ) from error
        return function


def find_reward(name: str | None, custom_path: str | None, custom_name: str | None) -> RewardSource:
    """What `reward_model.name` and `custom_reward_function` mean together.

    ValueError for a name that is neither.
    """
    if custom_path is not None:
        return RewardSource(custom_name or "compute_score", custom_path)
    if name is None:
        return RewardSource("default")
    path, _, function = name.rpartition("/")
    if path.endswith(".py") and function:
        return RewardSource(function, path)
    source = RewardSource(name)
    source.load()
    return source


def judge(
    function: RewardFunction, data_source: str, solution: str, truth: str, extra: Mapping[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Call a reward function and check what it gives: (score, everything else it told).

    Raises what it raises, and ValueError.
    """
    result = function(
        data_source=data_source, solution_str=solution, ground_truth=truth, extra_info=dict(extra)
    )
    return checked(
        _loop().run_until_complete(_await(result)) if inspect.isawaitable(result) else result
    )


def checked(result: Any) -> tuple[float, dict[str, Any]]:
    """(score, everything else it told) of what a reward function returned.

    ValueError where that is no score.
    """
    info: dict[str, Any] = {}
    if isinstance(result, Mapping):
        if "score" not in result:
            raise ValueError(
                f"the reward function returned {sorted(map(str, result))} without 'score'"
            )
        info = {
            str(key): entry
            for key, value in result.items()
            if (entry := _scalar(value)) is not None and key != "score"
        }
        result = result["score"]
    score = _scalar(result)
    if not isinstance(score, (int, float)):
        raise ValueError(f"the reward function returned {type(result).__name__}, not a number")
    if not math.isfinite(score):
        raise ValueError(f"the reward function returned {score}")
    if isinstance(accuracy := info.get("acc"), float) and not math.isfinite(accuracy):
        raise ValueError(f"the reward function returned acc={accuracy}")
    return float(score), info


@lru_cache
def _loop() -> asyncio.AbstractEventLoop:
    """One event loop for all calls: what an async function keeps between them, connections say,
    belongs to it.
    """
    return asyncio.new_event_loop()


async def _await(result: Any) -> Any:
    return await result


def _scalar(value: Any) -> float | int | str | None:
    """A plain number (of booleans, numpy's and classes of the user's own too) or text; None for
    anything else.
    """
    if hasattr(value, "item") and callable(value.item) and getattr(value, "size", 1) == 1:
        value = value.item()
    if isinstance(value, str):
        return str(value)[:LONGEST]
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, (bool, float)) else None


def overlong_penalty(length: int, longest: int, buffer: int, factor: float) -> float:
    """DAPO's soft punishment, arXiv 2503.14476 eq.

    13: 0 up to `longest - buffer` tokens, then linear down to -factor at `longest`.
    """
    return min(-(length - (longest - buffer)) / buffer * factor, 0.0)


BUILT_IN: dict[str, RewardFunction] = {
    "retool": retool_score,
    "boxed": boxed_score,
    "math": math_score,
    "default": default_score,
}
