"""Questions of your own from CSV: any function (path) -> rows will do.

data.train_files=sums.csv data.custom_cls.path=examples/custom_data.py data.custom_cls.name=read_csv
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any


def read_csv(path: str) -> Iterator[dict[str, Any]]:
    """Rows in the general schema from a CSV with the columns question, answer and (optionally)
    topic.
    """
    with open(path, newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            yield {
                "data_source": row.get("topic") or "csv",
                "ability": "math",
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": row["question"]},
                ],
                "reward_model": {"ground_truth": row["answer"]},
                "extra_info": {"topic": row.get("topic")},
            }
