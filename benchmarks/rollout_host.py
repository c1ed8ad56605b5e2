"""What sampling with a tool costs the host: a rank's round of answers, with the GPU's work replaced
by the time that it takes.

    python benchmarks/rollout_host.py [--model FOLDER] [--sequences 640] [--rate 0,1000,300] [--json out.json]
    python benchmarks/rollout_host.py --interpreter       calls run in this machine's sandbox, in real time

Scheduler, pipeline, agent loop, tokenizer and the reading of calls are a run's own; what a forward
draws was written before. A decode step takes `--step-ms` and `--row-us` for each row, chunks
`--step-ms` and `--token-us` for each token: by default about what Qwen2.5-0.5B takes on an H200 with
a few hundred tokens before each row. `--launch-us` is what a launch keeps the host waiting besides.
FOLDER has a tokenizer with a chat template; without it a small one is trained.

The tool takes `--tool-ms` and begins at most as many calls a second as `--rate` says (0: any
number). Time is the thread's CPU time and what it waits, which is passed over: as on a machine that
has nothing else to do.

*s*: a round. *device*: the part in which the device had work, the baseline: as long takes a host
that costs nothing. *tools*: `timing_s/tools`. *host*: CPU milliseconds of a turn, all told; fewer
rows in a step make it more. `--profile N` prints the functions that took most.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import pstats
import selectors
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from agent_loop import InstantJudge
from rl_step import write_model
from table import arguments, hardware, head, row, save
from torch import Tensor

from retool.data.render.renderer import Renderer
from retool.data.tokens.load import load_tokenizer
from retool.engine.chunks import Chunks
from retool.engine.decode import DecodeLoop
from retool.engine.pipeline import Pipeline
from retool.engine.runner import Flight
from retool.engine.schedule.batch import Batch, Change
from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.types import EngineOptions, SamplingParams, TurnDone
from retool.rl.agent.options import AgentOptions
from retool.rl.agent.rollout import RolloutParts, RolloutTimes, Sampling, roll_out
from retool.rl.agent.tools.interpreter import SCHEMA, CodeInterpreter
from retool.rl.agent.tools.protocol import AnyTool, ToolResult
from retool.rl.types import Prompt

SAMPLES = 16  # of each prompt
LONGEST = 4096  # tokens of an answer with its prompt
PAGE_SIZE = 256


class Clock:
    """The time of a machine that has nothing else to do: this thread's CPU time, and what it waited,
    which is passed over. `real`: the machine's own time, in which it does wait.
    """

    def __init__(self, real: bool) -> None:
        self.real = real
        self._passed = 0.0

    def now(self) -> float:
        return time.perf_counter() if self.real else time.thread_time() + self._passed

    def wait(self, seconds: float) -> None:
        if self.real:
            time.sleep(max(0.0, seconds))
        else:
            self._passed += max(0.0, seconds)


class PassingSelector(selectors.DefaultSelector):
    """Waits on a clock for whatever comes next."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self._clock.wait(timeout)
        return ready


def event_loop(clock: Clock) -> asyncio.AbstractEventLoop:
    if clock.real:
        return asyncio.new_event_loop()
    loop = asyncio.SelectorEventLoop(PassingSelector(clock))
    loop.time = clock.now  # type: ignore[method-assign]
    return loop


@dataclass
class Device:
    """A GPU that only takes time: work begins when it is there and what came before is over."""

    clock: Clock
    step_ms: float
    row_us: float
    token_us: float
    launch_us: float
    free_at: float = 0.0
    busy: float = 0.0
    steps: int = 0

    def enqueue(self, seconds: float) -> float:
        """When this work will be over."""
        self.clock.wait(self.launch_us / 1e6)
        self.free_at = max(self.free_at, self.clock.now()) + seconds
        self.busy += seconds
        self.steps += 1
        return self.free_at

    def decode(self, rows: int) -> float:
        return self.enqueue(self.step_ms / 1e3 + rows * self.row_us / 1e6)

    def chunks(self, tokens: int) -> float:
        return self.enqueue(self.step_ms / 1e3 + tokens * self.token_us / 1e6)


@dataclass(frozen=True)
class Arrival:
    """Stands for the event of a flight."""

    clock: Clock
    at: float

    def synchronize(self) -> None:
        self.clock.wait(self.at - self.clock.now())


class Script:
    """What sequences draw: a token for each of their places."""

    def __init__(self, sequences: int) -> None:
        self.tokens = np.zeros((sequences, LONGEST), np.int64)

    def drawn(self, keys: np.ndarray, places: np.ndarray) -> Tensor:
        """[3, R], as a step draws; a key is the number of its sequence."""
        out = np.zeros((3, len(keys)), np.float32)
        out[0] = self.tokens[keys, np.minimum(places, LONGEST - 1)]
        return torch.from_numpy(out)


class ScriptedLoop(DecodeLoop):
    """The decode loop with steps that only draw."""

    device: Device
    script: Script

    def _run(self) -> Flight:
        rows = self.rows
        over = self.device.decode(rows)
        self.positions[:rows].add_(1)
        out = self.script.drawn(self.keys[:rows].numpy(), self.positions[:rows].numpy())
        self.tokens[:rows].copy_(out[0])
        return Flight(out, Arrival(self.device.clock, over), out)  # type: ignore[arg-type]


class ScriptedChunks(Chunks):
    """Likewise of chunks."""

    device: Device
    script: Script

    def run(self, batch: Batch) -> Flight:
        tokens, items, _ = self.shape(len(batch.tokens), len(batch.counts), int(batch.counts.max()))
        self._fill(batch, tokens, items)
        over = self.device.chunks(tokens)
        out = self.script.drawn(batch.keys, batch.positions[batch.rows] + 1)
        return Flight(out, Arrival(self.device.clock, over), out)  # type: ignore[arg-type]


class ScriptedWorker:
    """A worker's part towards the pipeline."""

    def __init__(self, device: Device, script: Script, options: EngineOptions) -> None:
        width = LONGEST // PAGE_SIZE
        cache = SimpleNamespace(data=torch.zeros(1), page_size=PAGE_SIZE, copy=lambda copies: None)
        model: Any = SimpleNamespace(
            cache=cache, plan=SimpleNamespace(sp=1), experts=None, group=None, kernels="triton"
        )
        self.model = model
        self.loop = ScriptedLoop(model, options.max_num_seqs, width, None, fixed=False)
        self.chunks = ScriptedChunks(
            model, options.max_batch_tokens, options.max_num_seqs, width, None
        )
        for part in (self.loop, self.chunks):
            part.device = device
            part.script = script
        self._drawn: Tensor | None = None

    def run(self, kind: str, work: Batch | Change) -> Flight | None:
        if isinstance(work, Change):
            return self.loop.again(work, self._drawn)
        if kind == "chunks":
            flight = self.chunks.run(work)
            self._drawn = flight.on_device
            return flight
        return self.loop.start(work)


@dataclass
class ScriptedEngine:
    """The engine of a rank, whose sequences say `turns` of tokens, one after the other."""

    turns: Callable[[Hashable], list[list[int]]]
    scheduler: Scheduler
    pipeline: Pipeline
    script: Script
    left: dict[Hashable, list[list[int]]] = field(default_factory=dict)
    numbers: dict[Hashable, int] = field(default_factory=dict)

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        self.left[key] = self.turns(key)
        self.numbers[key] = len(self.numbers)
        self.scheduler.start(key, list(ids), params, group)
        self._write(key)

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        self.scheduler.extend(key, list(ids), params)
        self._write(key)

    def _write(self, key: Hashable) -> None:
        sequence = self.scheduler.sequences[key]
        number = self.numbers[key]
        sequence.draw_key = number
        begin = len(sequence.tokens)
        turn = self.left[key].pop(0)
        self.script.tokens[number, begin : begin + len(turn)] = turn

    def drop(self, key: Hashable) -> None:
        self.scheduler.drop(key)

    def idle(self) -> bool:
        s = self.scheduler
        return not (s.running or s.waiting or s.refused)

    def step(self) -> list[TurnDone]:
        return self.pipeline.step()


@dataclass
class TimedTool:
    """Answers after its time, at most `rate` calls a second."""

    clock: Clock
    seconds: float
    rate: float
    free_at: float = 0.0
    schema: dict[str, Any] = field(default_factory=lambda: SCHEMA)
    name: str = "code_interpreter"

    async def call(self, arguments: Any) -> ToolResult:
        now = self.clock.now()
        begins = now
        if self.rate:
            begins = max(now, self.free_at)
            self.free_at = begins + 1 / self.rate
        await asyncio.sleep(begins + self.seconds - now)
        return ToolResult("42", "success", self.seconds, begins - now)

    async def close(self) -> None:
        pass


def written_turns(renderer: Renderer, args: Namespace) -> Callable[[Hashable], list[list[int]]]:
    """What a sequence says: 0 to 2 × `--calls` calls, of as many tokens as are asked for, each a
    little longer or shorter, and an answer.
    """
    end = renderer.ends.known[0]

    def of_length(begin: str, line: str, close: str, tokens: int) -> list[int]:
        empty = len(renderer.encode(["", begin + close + end])[1])
        one = max(1, len(renderer.encode(["", begin + 8 * line + close + end])[1]) - empty) / 8
        lines = max(1, round((tokens - empty) / one))
        return list(renderer.encode(["", begin + lines * line + close + end])[1])

    name = json.dumps("code_interpreter")
    opens = f'<tool_call>\n{{"name": {name}, "arguments": {{"code": "'
    sizes = [round(args.tokens * share) for share in (0.6, 0.8, 1.0, 1.2, 1.4)]
    calls = [of_length(opens, "x = 1\\n", 'print(6 * 7)"}}\n</tool_call>', n) for n in sizes]
    answers = [of_length("So", " it is", " \\boxed{42}.", n) for n in sizes]

    def turns(key: Hashable) -> list[list[int]]:
        random = np.random.default_rng(abs(hash(key)))
        count = int(random.integers(0, round(2 * args.calls) + 1))
        chosen = [calls[i] for i in random.integers(0, len(calls), count)]
        return [*chosen, answers[int(random.integers(0, len(answers)))]]

    return turns


def make_engine(renderer: Renderer, clock: Clock, args: Namespace) -> tuple[ScriptedEngine, Device]:
    options = EngineOptions(max_num_seqs=args.sequences, max_batch_tokens=max(8192, args.sequences))
    device = Device(clock, args.step_ms, args.row_us, args.token_us, args.launch_us)
    script = Script(args.sequences)
    pool = PagePool(args.sequences * LONGEST // PAGE_SIZE + 1, PAGE_SIZE)
    scheduler = Scheduler(pool, options.max_num_seqs, options.max_batch_tokens, LONGEST)
    worker: Any = ScriptedWorker(device, script, options)
    pipeline = Pipeline(scheduler, worker, options)
    return ScriptedEngine(written_turns(renderer, args), scheduler, pipeline, script), device


def make_prompts(renderer: Renderer, args: Namespace) -> list[tuple[Prompt, int]]:
    requests = []
    for index in range(-(-args.sequences // SAMPLES)):
        text = " ".join(f"What is {index} times {n}?" for n in range(args.prompt // 8))
        messages = [{"role": "user", "content": text}]
        ids = np.asarray(renderer.render_prompt(messages, [SCHEMA]), np.int32)
        prompt = Prompt(index, messages, [SCHEMA], ids, "numbers", "42")
        requests += [(prompt, sample) for sample in range(SAMPLES)]
    return requests[: args.sequences]


def play(
    renderer: Renderer, clock: Clock, tool: AnyTool, args: Namespace, profile: cProfile.Profile
) -> dict[str, float]:
    """One round."""
    options = AgentOptions(max_response_length=LONGEST - 1024, max_assistant_turns=100)
    engine, device = make_engine(renderer, clock, args)
    parts = RolloutParts(engine, InstantJudge(), {tool.name: tool}, renderer, options)
    requests = make_prompts(renderer, args)
    times = RolloutTimes()
    loop = event_loop(clock)
    before = time.thread_time()
    if args.profile:
        profile.enable()
    found = loop.run_until_complete(roll_out(parts, requests, Sampling(), 0, times))
    profile.disable()
    cpu = time.thread_time() - before
    loop.close()
    parts.let_go()
    assert found is not None
    trajectories = [scored.trajectory for scored in found]
    calls = sum(trajectory.tool_calls for trajectory in trajectories)
    queued = sum(trajectory.tool_queue_seconds for trajectory in trajectories)
    return {
        "seconds": times.total,
        "device": device.busy,
        "tools": times.tools,
        "steps": device.steps,
        "tokens": sum(trajectory.sampled for trajectory in trajectories),
        "calls": calls,
        "queue_s": queued / max(calls, 1),
        "host_ms": 1e3 * cpu / (calls + len(trajectories)),
    }


def measure(
    renderer: Renderer, clock: Clock, tool: AnyTool, args: Namespace
) -> dict[str, list[float]]:
    """The rounds of a line, after one that warms up."""
    play(renderer, clock, tool, args, cProfile.Profile())
    profile = cProfile.Profile()
    rounds = [play(renderer, clock, tool, args, profile) for _ in range(args.repeats)]
    if args.profile:
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(args.profile)
    return {name: [each[name] for each in rounds] for name in rounds[0]}


def cells(line: dict[str, Any]) -> list[str]:
    m = {name: statistics.median(each) for name, each in line.items() if name != "name"}
    return [
        line["name"],
        f"{m['seconds']:.2f}",
        f"{m['device']:.2f}",
        f"{m['tools']:.2f}",
        f"{m['steps']:,.0f}",
        f"{m['tokens'] / m['seconds']:,.0f}",
        f"{m['queue_s']:.3f}",
        f"{m['host_ms']:.2f}",
    ]


def make_tools(clock: Clock, args: Namespace) -> dict[str, AnyTool]:
    if args.interpreter:
        return {"the sandbox": CodeInterpreter()}
    tools: dict[str, AnyTool] = {}
    for rate in map(float, args.rate.split(",")):
        name = f"{rate:,.0f} calls/s" if rate else "any number of calls"
        tools[name] = TimedTool(clock, args.tool_ms / 1e3, rate)
    return tools


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer and chat template")
    parser.add_argument("--sequences", type=int, default=640)
    parser.add_argument("--prompt", type=int, default=240, help="tokens, about")
    parser.add_argument("--calls", type=float, default=3.4, help="of an answer, on average")
    parser.add_argument("--tokens", type=int, default=44, help="of a turn, on average")
    parser.add_argument("--step-ms", type=float, default=0.9)
    parser.add_argument("--row-us", type=float, default=4.0)
    parser.add_argument("--token-us", type=float, default=1.6)
    parser.add_argument("--launch-us", type=float, default=150.0)
    parser.add_argument("--tool-ms", type=float, default=6.0)
    parser.add_argument("--rate", default="0,1000,300", help="calls a second, one row each")
    parser.add_argument("--interpreter", action="store_true")
    parser.add_argument("--profile", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    clock = Clock(real=args.interpreter)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if args.model is None:
            write_model(model, "tiny")
        renderer = Renderer(load_tokenizer(str(model)), None)
        head(
            f"{hardware(cpu)}; {args.sequences} answers of {args.calls:g} calls",
            [
                "tool",
                "s",
                "device",
                "tools",
                "steps",
                "tokens/s",
                "queue, s a call",
                "host, ms a turn",
            ],
        )
        for name, tool in make_tools(clock, args).items():
            line = {"name": name, **measure(renderer, clock, tool, args)}
            lines.append(line)
            row(cells(line))
            save(args.json, cpu, lines)
            asyncio.run(tool.close())


if __name__ == "__main__":
    main()
