"""What can happen to an RL run: what happens to any, and to its judges, its tools and its sampler."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.reliability.faults import FAULTS, Fault, Scene, ask_for
from tests.reliability.processes import Process, below

ARR = "actor_rollout_ref."
SHARED = (
    "nothing",
    "killed at a random instant",
    "killed in a save",
    "one of two ranks killed",
    "one of two ranks stopped",
    "SIGTERM",
    "SIGUSR1",
    "Ctrl-C",
    "metrics can't be written",
    "run folder renamed",
    "run folder renamed, two ranks",
    "metrics.jsonl removed",
    "data cut short in mid-run",
    "clock going backwards",
    "remote store fails midway",
    "folder in use",
    "port in use",
    "checkpoint damaged",
    "tracker damaged",
    "tracker names no step",
    "metrics.jsonl torn",
)


# --- processes that a run has started ---


def kill_one(scene: Scene, choose: Callable[[Sequence[Process]], Sequence[Process]]) -> None:
    """Kill one of a run's processes in the middle of it."""
    scene.wait_for_a_save()
    time.sleep(scene.chance.random() * scene.lasts_s / 6)
    ranks = [process.pid for process in scene.processes if process.pid is not None]
    found = choose(below(ranks))
    if found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(scene.chance.choice(list(found)).pid, signal.SIGKILL)


def judges_server(processes: Sequence[Process]) -> list[Process]:
    """What the processes that judge are forked from."""
    servers = [p for p in processes if "multiprocessing.forkserver" in p.command]
    pids = {process.pid for process in servers}
    return [process for process in servers if process.parent not in pids]


def judges(processes: Sequence[Process]) -> list[Process]:
    servers = {process.pid for process in judges_server(processes)}
    return [process for process in processes if process.parent in servers]


def supervisors(processes: Sequence[Process]) -> list[Process]:
    return [p for p in processes if "from sandbox import supervisor" in p.command]


def fork_servers(processes: Sequence[Process]) -> list[Process]:
    """What programs are forked from, and all below the supervisor."""
    above = {process.pid for process in supervisors(processes)}
    return [process for process in processes if process.parent in above]


# --- a reward that breaks, a tool that hangs ---


def break_reward(scene: Scene) -> None:
    scene.wait_for_a_save()
    scene.reward.with_name("broken").touch()


def mend_reward(scene: Scene) -> None:
    scene.reward.with_name("broken").unlink(missing_ok=True)


def change_reward(scene: Scene) -> None:
    scene.reward.write_text(scene.reward.read_text().replace("acc", "accuracy"))


def hang_tool() -> None:
    from tests.reliability import commands

    commands.PROGRAM = "import time\ntime.sleep(1000)"


class SandboxServer(BaseHTTPRequestHandler):
    """Another machine's sandbox, which answers as SandboxFusion does."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        ran = {"status": "Finished", "stdout": "42\n", "stderr": "", "return_code": 0}
        body = json.dumps({"status": "Success", "run_result": {**ran, "execution_time": 0.01}})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


def start_sandbox_server(scene: Scene) -> None:
    place = next((held for held in scene.held if isinstance(held, int)), 0)
    server = ThreadingHTTPServer(("127.0.0.1", place), SandboxServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scene.held += [server, server.server_port]
    config = {"sandbox_fusion_url": f"http://127.0.0.1:{server.server_port}/run_code"}
    tool = {"class_name": "retool.rl.agent.tools.CodeInterpreter", "config": config}
    file = scene.out.with_name("tools.yaml")
    file.write_text(json.dumps({"tools": [tool]}))
    ask_for(scene, **{f"{ARR}rollout.multi_turn.tool_config_path": file})
    ask_for(scene, **{f"{ARR}rollout.max_lost_steps": 1})


def stop_sandbox_server(scene: Scene) -> None:
    scene.wait_for_a_save()
    let_sandbox_server_go(scene)


def let_sandbox_server_go(scene: Scene) -> None:
    for held in scene.held:
        if isinstance(held, ThreadingHTTPServer):
            held.shutdown()
            held.server_close()


def tiny_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


HOOKS: dict[str, Callable[[], None]] = {"hanging tool": hang_tool, "tiny disk": tiny_disk}


def _of_any_run() -> tuple[Fault, ...]:
    named = {fault.name: fault for fault in FAULTS}
    return tuple(named[name] for name in SHARED)


RL_FAULTS = (
    *_of_any_run(),
    replace(
        next(fault for fault in FAULTS if fault.name == "a save that never ends"),
        # Its steps are slower than those of SFT
        before=lambda s: ask_for(s, trainer__watchdog_s=15),
    ),
    Fault("disk full in every save", inside="tiny disk", first=(1,), told="could not be saved"),
    Fault("a judging process killed", during=lambda s: kill_one(s, judges), exact=False),
    Fault("the judges' server killed", during=lambda s: kill_one(s, judges_server)),
    Fault("the sandbox killed", during=lambda s: kill_one(s, supervisors)),
    Fault("the sandbox's fork server killed", during=lambda s: kill_one(s, fork_servers)),
    Fault(
        "the reward breaks in mid-run",
        during=break_reward,
        after=mend_reward,
        first=(0, 1),
        told="no judge today",
        traceback=True,
    ),
    Fault(
        "a tool that hangs",
        before=lambda s: ask_for(s, **{f"{ARR}rollout.multi_turn.tool_timeout_seconds": 1}),
        inside="hanging tool",
        inside_then="hanging tool",
        exact=False,
    ),
    Fault(
        "another machine's sandbox goes away",
        before=start_sandbox_server,
        during=stop_sandbox_server,
        after=start_sandbox_server,
        first=(0, 1),
        told="were lost",
        exact=False,
    ),
    Fault(
        "another reward",
        after=change_reward,
        second=1,
        told_then="reward",
        exact=False,
    ),
    Fault(
        "another seed",
        after=lambda s: ask_for(s, trainer__seed=7, trainer__total_training_steps=6),
        second=1,
        told_then="data.seed: then 1, now 7",
        exact=False,
    ),
    Fault(
        "a value of the wrong type",
        before=lambda s: ask_for(s, **{f"{ARR}rollout.n": "many"}),
        after=lambda s: s.keys.clear(),
        first=(1,),
        told="rollout.n",
    ),
)
