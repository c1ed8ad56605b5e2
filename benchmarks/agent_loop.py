"""What the agent loop itself costs: CPU time per trajectory of the one thread that feeds the
engine.

    python benchmarks/agent_loop.py [--model FOLDER] [--trajectories 8192] [--turns 3] [--json out.json]

The engine answers at once with turns that were made before, and so do tool and reward: what is left
is parsing calls, writing the glue, tokenising, bookkeeping and the event loop. The engine stands
still meanwhile. Long answers are tokenised on another thread, whose time isn't counted.

A turn is a call of `--code` characters, a tool's answer has each of the lengths in `--answers`.
FOLDER has a tokenizer with a chat template (Qwen2.5's, say); without it a small one is trained, and
used with our own template.

Baseline: after every turn the whole conversation goes through the chat template and the tokenizer
again, as loops do that keep messages, not tokens; the loop around it is the same.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rl_step import write_model
from table import arguments, hardware, head, row, save, spread

from retool.data.render.renderer import Renderer
from retool.data.tokens.load import load_tokenizer
from retool.engine.types import SamplingParams, TurnDone
from retool.rl.agent.options import AgentOptions
from retool.rl.agent.rollout import RolloutParts, Sampling, roll_out
from retool.rl.agent.tools.interpreter import SCHEMA
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.agent.work_thread import WorkThread
from retool.rl.reward.calling import Asked
from retool.rl.reward.protocol import Judged
from retool.rl.types import Prompt

SAMPLES = 8  # of each prompt


@dataclass
class InstantEngine:
    """Finishes every turn that is under way in one step, with tokens that were made before: the
    last turn has no call.
    """

    call: list[int]
    answer: list[int]
    turns: int
    done: dict[Hashable, int] = field(default_factory=dict)
    queue: deque[Hashable] = field(default_factory=deque)

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        self.done[key] = 0
        self.queue.append(key)

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        self.queue.append(key)

    def drop(self, key: Hashable) -> None:
        del self.done[key]

    def idle(self) -> bool:
        return not self.queue

    def step(self) -> list[TurnDone]:
        finished = []
        while self.queue:
            key = self.queue.popleft()
            self.done[key] += 1
            tokens = self.answer if self.done[key] == self.turns else self.call
            zeros = [0.0] * len(tokens)
            finished.append(TurnDone(key, list(tokens), zeros, list(zeros), "stop"))
        return finished


class InstantTool:
    """Answers the same text to everything."""

    schema = SCHEMA
    name = "code_interpreter"

    def __init__(self, text: str) -> None:
        self.text = text

    async def call(self, arguments: Any) -> ToolResult:
        return ToolResult(self.text, "success", 1e-3)

    async def close(self) -> None:
        pass


class InstantJudge:
    """Gives everything 1."""

    seen = ()

    async def score(self, asked: Asked) -> Judged:
        return Judged(1.0, {}, None)


class RenderedAnew(Renderer):
    """The baseline: the glue is what a render of the whole conversation has behind the turn, all of
    it tokenised.
    """

    def render_tool_turn(
        self,
        messages: Sequence[Any],
        responses: Sequence[Any],
        tools: Sequence[Any] | None = None,
        enable_thinking: bool | None = None,
        ended: bool = True,
        generation_prompt: bool = True,
    ) -> list[int]:
        before = self.text(messages, tools, enable_thinking)
        whole = self.text([*messages, *responses], tools, enable_thinking, generation_prompt)
        ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        return ids[len(self.tokenizer(before, add_special_tokens=False)["input_ids"]) :]


def make_parts(
    renderer: Renderer, args: Namespace, answer: int, texts: WorkThread | None
) -> RolloutParts:
    code = "x = 1\n" * max(1, args.code // 6)
    call = f"<tool_call>\n{json.dumps({'name': 'code_interpreter', 'arguments': {'code': code}})}\n</tool_call>"
    end = renderer.ends.known[0]
    _, calls, answers = renderer.encode(["", call + end, "The answer is \\boxed{42}." + end])
    engine = InstantEngine(calls, answers, args.turns)
    lines = "".join(f"row {i}: value={i * 7919 % 1000 / 8}\n" for i in range(1 + answer // 16))
    tool = InstantTool(lines[:answer])
    options = AgentOptions(max_response_length=1 << 20, max_assistant_turns=args.turns + 1)
    tools = {tool.name: tool}
    return RolloutParts(engine, InstantJudge(), tools, renderer, options, texts=texts)


def make_prompts(renderer: Renderer, count: int) -> list[tuple[Prompt, int]]:
    requests = []
    for index in range(-(-count // SAMPLES)):
        messages = [{"role": "user", "content": f"What is {index} times 17?"}]
        ids = np.asarray(renderer.render_prompt(messages, [SCHEMA]), np.int32)
        prompt = Prompt(index, messages, [SCHEMA], ids, "numbers", "42")
        requests += [(prompt, sample) for sample in range(SAMPLES)]
    return requests[:count]


def measure(
    make: Callable[[], Renderer], args: Namespace, answer: int, count: int
) -> dict[str, Any]:
    """Milliseconds per trajectory of each repeat, after one that warms up."""
    renderer = make()
    # The baseline does all of it where loops do that keep messages
    texts = None if isinstance(renderer, RenderedAnew) else WorkThread()
    parts = make_parts(renderer, args, answer, texts)
    requests = make_prompts(renderer, count)
    ms = []
    for _ in range(args.repeats + 1):
        begin = time.thread_time()
        found = asyncio.run(roll_out(parts, requests, Sampling(), 0))
        ms.append(1e3 * (time.thread_time() - begin) / len(requests))
        assert found is not None and all(
            scored.trajectory.tool_calls == args.turns - 1 for scored in found
        )
    return {"ms": ms[1:], "trajectories": count}


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer and chat template")
    parser.add_argument("--trajectories", type=int, default=8192)
    parser.add_argument(
        "--turns", type=int, default=3, help="turns of the model; all but the last call the tool"
    )
    parser.add_argument("--code", type=int, default=300, help="characters of a call's code")
    parser.add_argument(
        "--answers", default="40,400", help="characters of a tool's answer, one row each"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        template = None
        if args.model is None:
            write_model(model, "tiny")
        tokenizer = load_tokenizer(str(model))
        print(f"{hardware(cpu)}; {args.turns} turns, calls of {args.code} characters")
        head(
            "Agent loop",
            ["way", "answer", "trajectories", "ms per trajectory (median, lowest … highest)"],
        )
        ways = {
            "everything rendered anew (baseline)": (
                partial(RenderedAnew, tokenizer, template),
                max(8, args.trajectories // 8),
            ),
            "retool": (partial(Renderer, tokenizer, template), args.trajectories),
        }
        for answer in map(int, args.answers.split(",")):
            for name, (make, count) in ways.items():
                line = {"name": name, "answer": answer, **measure(make, args, answer, count)}
                lines.append(line)
                row([name, f"{answer:,}", f"{count:,}", spread(line["ms"])])
                save(args.json, cpu, lines)


if __name__ == "__main__":
    main()
