"""ReTool's data and reward as functions of yours, for `data.custom_cls` and
`custom_reward_function`.

data.custom_cls.path=examples/retool_recipe.py data.custom_cls.name=CustomRLHFDataset
custom_reward_function.path=examples/retool_recipe.py custom_reward_function.name=compute_score
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retool.data.read.files import iter_chunks
from retool.rl.reward.builtin import retool_score

ANSWER_FORMAT = "\nThe answer format must be: \\boxed{'The final answer goes here.'}"


def CustomRLHFDataset(path: str) -> Iterator[dict[str, Any]]:
    """Questions in the general schema from DAPO-Math-17k, AIME 2024 or whatever has a prompt and a
    truth, each with the format line.
    """
    for chunk in iter_chunks([path]):
        for _, row in chunk:
            if isinstance(row, ValueError):
                raise row
            yield to_question(row, Path(path).stem)


def to_question(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """One row, whichever of the two schemas it is in."""
    if "Problem" in row:
        question = row["Problem"]
        truth = row["Answer"]
    else:
        question = row["prompt"][0]["content"]
        truth = row["reward_model"]["ground_truth"]
    prompt = [{"role": "user", "content": question + ANSWER_FORMAT}]
    judged = {"ground_truth": str(truth)}
    return {
        "data_source": row.get("data_source", source),
        "prompt": prompt,
        "ability": "MATH",
        "reward_model": judged,
    }


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any]
) -> dict[str, Any]:
    """+1 for the right box; a wrong answer loses less the more turns it took, so that calling the
    tool is worth a try.
    """
    return retool_score(data_source, solution_str, ground_truth, extra_info)
