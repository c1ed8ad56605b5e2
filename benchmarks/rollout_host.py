"""What sampling with a tool costs the host: a rank's round of answers, with the GPU's work replaced
by the time that it takes.

    python benchmarks/rollout_host.py [--model FOLDER] [--sequences 640] [--rate 0,1000,300] [--json out.json]
    python benchmarks/rollout_host.py --engine qwen2.5-0.5b        the same round on this GPU
    … --interpreter                                                calls run in this machine's sandbox

Scheduler, pipeline, agent loop, tokenizer and the reading of calls are a run's own; what turns say
was written before. A decode step takes `--step-ms` and `--row-us` for each row, chunks `--step-ms`
and `--token-us` for each token: by default about what Qwen2.5-0.5B takes on an H200 with a few
hundred tokens before each row. A launch keeps the host waiting for `--launch-us` besides. FOLDER has
a tokenizer with a chat template; without it a small one is trained.

The tool takes `--tool-ms` and begins at most as many calls a second as `--rate` says (0: any
number). Time is the thread's CPU time and what it waits, which is passed over: as on a machine that
has nothing else to do. With a real engine or interpreter it is the clock's.

*s*: a round; *first*: the one before those, in which graphs are recorded. *device*: the part in which
the device had work, the baseline: a host that costs nothing takes as long. *tools* and *loop*:
`timing_s/tools` and `timing_s/loop`. *host*: CPU milliseconds of a turn, steps included.
`--profile N` prints the functions that took most.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import math
import pstats
import selectors
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from agent_loop import InstantJudge
from rl_step import write_model
from sft import SHAPES, random_weights
from table import arguments, hardware, head, row, save
from torch import Tensor

from retool.data.render.renderer import Renderer
from retool.data.tokens.load import load_tokenizer
from retool.engine import Engine
from retool.engine.chunks import Chunks
from retool.engine.decode import DecodeLoop
from retool.engine.pipeline import Pipeline
from retool.engine.runner import Flight
from retool.engine.schedule.batch import Batch, Change
from retool.engine.schedule.pages import PagePool
from retool.engine.schedule.scheduler import Scheduler
from retool.engine.types import EngineOptions, SamplingParams, Stats, TurnDone
from retool.model.build import ModelOptions, build_decoder
from retool.parallel.mesh import make_mesh
from retool.perf import GIB
from retool.rl.agent.options import AgentOptions
from retool.rl.agent.rollout import RolloutParts, RolloutTimes, Sampling, roll_out
from retool.rl.agent.tools.interpreter import SCHEMA, CodeInterpreter
from retool.rl.agent.tools.protocol import AnyTool, ToolResult
from retool.rl.types import Prompt

SAMPLES = 16  # of each prompt
COLUMNS = [
    "tool",
    "first",
    "s",
    "device",
    "tools",
    "loop",
    "steps",
    "tokens/s",
    "queue, s a call",
    "host, ms a turn",
]
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

    def flight(self, seconds: float, rows: int) -> Flight:
        """Work that takes so long, and draws for so many rows."""
        self.clock.wait(self.launch_us / 1e6)
        self.free_at = max(self.free_at, self.clock.now()) + seconds
        self.busy += seconds
        drawn = torch.zeros(3, rows)
        arrived: Any = Arrival(self.clock, self.free_at)
        return Flight(drawn, arrived, drawn)

    def decode(self, rows: int) -> Flight:
        return self.flight(self.step_ms / 1e3 + rows * self.row_us / 1e6, rows)

    def chunks(self, tokens: int, rows: int) -> Flight:
        return self.flight(self.step_ms / 1e3 + tokens * self.token_us / 1e6, rows)


@dataclass(frozen=True)
class Arrival:
    """Stands for the event of a flight."""

    clock: Clock
    at: float

    def synchronize(self) -> None:
        self.clock.wait(self.at - self.clock.now())


class TimedLoop(DecodeLoop):
    """The decode loop, whose steps draw nothing in particular."""

    device: Device

    def _run(self) -> Flight:
        self.positions[: self.rows].add_(1)
        return self.device.decode(self.rows)


class TimedChunks(Chunks):
    """Chunks likewise."""

    device: Device

    def run(self, batch: Batch) -> Flight:
        shape = self.shape(len(batch.tokens), len(batch.counts), int(batch.counts.max()))
        tokens, items, _ = shape
        self._fill(batch, tokens, items)
        return self.device.chunks(tokens, len(batch.rows))


class TimedWorker:
    """What a pipeline needs of a worker."""

    def __init__(self, device: Device, options: EngineOptions) -> None:
        width = LONGEST // PAGE_SIZE
        cache = SimpleNamespace(data=torch.zeros(1), page_size=PAGE_SIZE, copy=lambda copies: None)
        plan = SimpleNamespace(sp=1)
        model: Any = SimpleNamespace(cache=cache, plan=plan, experts=None, group=None)
        rows = options.max_num_seqs
        self.model = model
        self.loop = TimedLoop(model, rows, width, None, fixed=False)
        self.chunks = TimedChunks(model, options.max_batch_tokens, rows, width, None)
        self.loop.device = device
        self.chunks.device = device
        self._drawn: Tensor | None = None

    def run(self, kind: str, work: Batch | Change) -> Flight | None:
        if isinstance(work, Change):
            return self.loop.again(work, self._drawn)
        if kind == "start":
            return self.loop.start(work)
        flight = self.chunks.run(work)
        self._drawn = flight.on_device
        return flight


class TimedEngine:
    """The engine over such a device: scheduler and pipeline are the real ones."""

    def __init__(self, device: Device, options: EngineOptions) -> None:
        rows = options.max_num_seqs
        pool = PagePool(rows * LONGEST // PAGE_SIZE + 1, PAGE_SIZE)
        self.scheduler = Scheduler(pool, rows, options.max_batch_tokens, LONGEST)
        worker: Any = TimedWorker(device, options)
        self.pipeline = Pipeline(self.scheduler, worker, options)
        self.extend = self.scheduler.extend
        self.drop = self.scheduler.drop
        self.step = self.pipeline.step

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        self.scheduler.start(key, list(ids), params, group)

    def idle(self) -> bool:
        s = self.scheduler
        return not (s.running or s.waiting or s.refused)

    @property
    def stats(self) -> Stats:
        return self.scheduler.stats


@dataclass
class Scripted:
    """An engine whose turns are as long as those written before, and then say what they say."""

    engine: Any
    turns: Callable[[Hashable], list[list[int]]]
    left: dict[Hashable, list[list[int]]] = field(default_factory=dict)

    def start(
        self,
        key: Hashable,
        ids: Sequence[int],
        params: SamplingParams,
        group: Hashable | None = None,
    ) -> None:
        self.left[key] = self.turns(key)
        self.engine.start(key, ids, self._as_long(key, params), group)

    def extend(self, key: Hashable, ids: Sequence[int], params: SamplingParams) -> None:
        self.engine.extend(key, ids, self._as_long(key, params))

    def _as_long(self, key: Hashable, params: SamplingParams) -> SamplingParams:
        return replace(params, max_tokens=len(self.left[key][0]), stop_ids=())

    def drop(self, key: Hashable) -> None:
        self.engine.drop(key)

    def idle(self) -> bool:
        return self.engine.idle()

    def step(self) -> list[TurnDone]:
        done = []
        for turn in self.engine.step():
            tokens = self.left[turn.key].pop(0)
            done.append(replace(turn, tokens=tokens, reason="stop"))
        return done


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


def real_engine(shape: str, vocab: int, options: EngineOptions, device: str) -> Engine:
    """retool's engine with random weights."""
    config = SHAPES[shape]
    config = replace(config, vocab=max(config.vocab, -(-vocab // 64) * 64))
    mesh = make_mesh(device=device)
    model = build_decoder(config, mesh, ModelOptions(fp32_residual=True))
    random_weights(model)
    engine = Engine(config, mesh.device, options)
    engine.sync(model)
    return engine


def make_prompts(renderer: Renderer, args: Namespace) -> list[tuple[Prompt, int]]:
    requests = []
    for index in range(-(-args.sequences // SAMPLES)):
        text = " ".join(f"What is {index} times {n}?" for n in range(args.prompt // 8))
        messages = [{"role": "user", "content": text}]
        ids = np.asarray(renderer.render_prompt(messages, [SCHEMA]), np.int32)
        prompt = Prompt(index, messages, [SCHEMA], ids, "numbers", "42")
        requests += [(prompt, sample) for sample in range(SAMPLES)]
    return requests[: args.sequences]


@dataclass(frozen=True)
class Stage:
    """What a line is measured with; `device` where the engine has a timed one."""

    engine: Any
    device: Device | None
    tool: AnyTool
    clock: Clock


def play(
    stage: Stage, renderer: Renderer, args: Namespace, profile: cProfile.Profile
) -> dict[str, float]:
    """One round."""
    agent = AgentOptions(max_response_length=LONGEST - 1024, max_assistant_turns=100)
    engine = Scripted(stage.engine, written_turns(renderer, args))
    parts = RolloutParts(engine, InstantJudge(), {stage.tool.name: stage.tool}, renderer, agent)
    requests = make_prompts(renderer, args)
    times = RolloutTimes()
    loop = event_loop(stage.clock)
    steps = stage.engine.stats.steps
    busy = stage.device.busy if stage.device else math.nan
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
        "device": stage.device.busy - busy if stage.device else math.nan,
        "tools": times.tools,
        "loop": times.loop,
        "steps": stage.engine.stats.steps - steps,
        "tokens": sum(trajectory.sampled for trajectory in trajectories),
        "queue_s": queued / max(calls, 1),
        "host_ms": 1e3 * cpu / (calls + len(trajectories)),
    }


def measure(stage: Stage, renderer: Renderer, args: Namespace) -> dict[str, list[float]]:
    """The rounds of a line, after the first one."""
    profile = cProfile.Profile()
    first = play(stage, renderer, args, cProfile.Profile())
    rounds = [play(stage, renderer, args, profile) for _ in range(args.repeats)]
    if args.profile:
        pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(args.profile)
    found = {name: [each[name] for each in rounds] for name in rounds[0]}
    return {"first": [first["seconds"]], **found}


def cells(line: dict[str, Any]) -> list[str]:
    m = {name: statistics.median(each) for name, each in line.items() if name != "name"}
    return [
        line["name"],
        f"{m['first']:.2f}",
        f"{m['seconds']:.2f}",
        f"{m['device']:.2f}",
        f"{m['tools']:.2f}",
        f"{m['loop']:.2f}",
        f"{m['steps']:,.0f}",
        f"{m['tokens'] / m['seconds']:,.0f}",
        f"{m['queue_s']:.3f}",
        f"{m['host_ms']:.2f}",
    ]


def make_stages(renderer: Renderer, args: Namespace) -> Iterator[tuple[str, Stage]]:
    real = args.interpreter or args.engine is not None
    clock = Clock(real)
    options = EngineOptions(
        max_num_seqs=args.sequences,
        max_batch_tokens=max(8192, args.sequences),
        max_length=LONGEST,
        kv_bytes=int(args.kv_gib * GIB),
    )
    device = None
    if args.engine:
        engine: Any = real_engine(args.engine, len(renderer.tokenizer), options, args.device)
    else:
        device = Device(clock, args.step_ms, args.row_us, args.token_us, args.launch_us)
        engine = TimedEngine(device, options)
    if args.interpreter:
        yield "the sandbox", Stage(engine, device, CodeInterpreter(), clock)
        return
    for rate in map(float, args.rate.split(",")):
        name = f"{rate:,.0f} calls/s" if rate else "any number of calls"
        yield name, Stage(engine, device, TimedTool(clock, args.tool_ms / 1e3, rate), clock)


def parse() -> Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--model", type=Path, help="folder with a tokenizer and chat template")
    parser.add_argument("--engine", choices=list(SHAPES), help="the real one, of this shape")
    parser.add_argument("--kv-gib", type=float, default=24.0)
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
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    device = torch.device(args.device if args.engine else "cpu")
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or Path(folder)
        if args.model is None:
            write_model(model, "tiny")
        renderer = Renderer(load_tokenizer(str(model)), None)
    title = f"{hardware(device)}; {args.sequences} answers of {args.calls:g} calls"
    head(title, COLUMNS)
    for name, stage in make_stages(renderer, args):
        line = {"name": name, **measure(stage, renderer, args)}
        lines.append(line)
        row(cells(line))
        save(args.json, device, lines)
        asyncio.run(stage.tool.close())


if __name__ == "__main__":
    main()
