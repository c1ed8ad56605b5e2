"""Rows for a run, made of the tasks of a verifiers taskset.

python -m retool.rl.agent.environments.verifiers.rows gsm8k-v1 --take 1000 > train.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from retool.rl.agent.environments.verifiers.house import House

NO_PROMPT = "(The environment speaks first.)"  # a row needs a prompt; this one is replaced


def rows(name: str, kwargs: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """A row for each task of the environment `name`, in the taskset's order; some never end.

    ValueError where there is no such environment.
    """
    for task in House(name, kwargs or {}).tasks():
        data = task.data
        yield {
            "data_source": f"verifiers/{name}",
            "prompt": [{"role": "user", "content": data.prompt_text or NO_PROMPT}],
            "reward_model": {"ground_truth": str(getattr(data, "answer", ""))},
            # As text: tasks differ in their fields, and a column of a table has one type
            "extra_info": {"task": data.model_dump_json(exclude_none=True)},
        }


def main(arguments: Sequence[str]) -> int:
    """Write rows to the standard output, a line each."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("name", help="a taskset, or ENVIRONMENT+TASKSET")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="not the first N tasks")
    parser.add_argument("--take", type=int, metavar="N", help="N tasks at most")
    parser.add_argument("--kwargs", type=json.loads, default={}, help="the environment's, as JSON")
    asked = parser.parse_args(arguments)
    stop = None if asked.take is None else asked.skip + asked.take
    for row in islice(rows(asked.name, asked.kwargs), asked.skip, stop):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
