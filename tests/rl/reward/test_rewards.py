"""Rewards by hand-checked numbers and published cases; the pool against everything a reward
function can do.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from retool.parallel.mesh import make_mesh
from retool.rl.build import require_judges
from retool.rl.config import RewardConfig
from retool.rl.metrics import judge_metrics, score_metrics
from retool.rl.preflight.trial import try_reward
from retool.rl.reward import pool as reward_pool
from retool.rl.reward import protocol
from retool.rl.reward.builtin import (
    boxed_score,
    default_name,
    last_boxed,
    math_equal,
    math_score,
    overlong_penalty,
    retool_score,
)
from retool.rl.reward.calling import Asked
from retool.rl.reward.pool import RewardPool
from retool.rl.reward.protocol import JUDGES_LOST
from retool.rl.reward.score import check_score, score_answer
from retool.rl.reward.source import RewardSource, find_reward
from retool.rl.types import Scored, Stop
from tests.ranks import run_ranks
from tests.real_data import real
from tests.rl.conftest import judged_by, make_prompt, make_trajectory

HERE = str(Path(__file__).with_name("reward_functions.py"))


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("so \\boxed{42}.", "42"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{7} and \\boxed{8", "7"),
        ("{ \\boxed{9} } }", "9"),
        ("\\boxed{a \\boxed{b}}", "b"),
        ("\\boxed{}", ""),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_the_last_balanced_box(text, inside) -> None:
    assert last_boxed(text) == inside


def test_boxes_of_a_hostile_text_are_found_in_linear_time() -> None:
    begin = time.process_time()
    assert last_boxed("\\boxed{" * 200_000) is None
    assert time.process_time() - begin < 1.0


@pytest.mark.parametrize(
    ("solution", "turns", "recipe", "lenient"),
    [
        ("\\boxed{4}", 2, 1.0, 1.0),
        ("\\boxed{4} " + "." * 90, 2, 1.0, 1.0),
        ("\\boxed{5}", 2, -1.0, -1.0),
        ("\\boxed{5}", 4, -0.9, -0.9),
        ("nothing", 8, -0.7, -0.7),
        ("", 10, -0.6, -0.6),
        ("", 40, -0.6, -0.6),
        ("\\boxed{4.0}", 6, -0.8, -0.8),
        ("\\boxed{ 4 }", 2, -1.0, 1.0),  # white space counts
        ("\\boxed{4} " + "." * 100, 2, -1.0, 1.0),  # only the last 100 characters are searched
        ("\\boxed{4} or \\boxed{5", 2, -1.0, 1.0),  # the last box must be closed
        ("\\boxed{\\boxed{4}", 2, 1.0, 1.0),
        ("{ \\boxed{4} }}", 2, 1.0, 1.0),
    ],
)
def test_retool_by_hand(solution, turns, recipe, lenient) -> None:
    """`retool` is the published recipe's, `boxed` the more lenient one."""
    for function, score in ((retool_score, recipe), (boxed_score, lenient)):
        result = function("", solution, "4", {"num_turns": turns})
        assert result["score"] == pytest.approx(score, abs=1e-12) and result["acc"] == float(
            score == 1.0
        )


def test_math_agrees_with_the_published_cases() -> None:
    cases = [
        json.loads(line)
        for line in real("goldens/math_verify_cases.jsonl").read_text().splitlines()
    ]
    assert len(cases) == 140
    wrong = []
    for case in cases:
        options = {key: value for key, value in case["extra"].items() if key != "precision"}
        if "precision" in case["extra"]:
            options["float_rounding"] = case["extra"]["precision"]
        got = math_equal(
            case["gold"], case["pred"], tuple(case["match_types"] or ("latex", "expr")), **options
        )
        if got != bool(case["expected"]):
            wrong.append(case["gold"])
    # A Python f-string that the extraction left unevaluated
    assert wrong == ["f'{math.sqrt(17):.15f}'"]


def test_math_judges_the_last_box() -> None:
    assert math_score("", "first \\boxed{1}, no: \\boxed{\\frac{1}{2}}", "0.5", {}) == {
        "score": 1.0,
        "acc": 1.0,
        "pred": "\\frac{1}{2}",
    }
    assert math_score("", "\\boxed{336}", "336^\\circ", {})["score"] == 1.0
    assert (
        math_score("", "\\boxed{x+1}", "1+x", {})["acc"] == 1.0
        and math_score("", "I don't know", "3", {})["score"] == 0.0
    )


def test_overlong_by_hand() -> None:
    lengths = (0, 80, 81, 90, 100)
    assert [overlong_penalty(n, 100, 20, 1.0) for n in lengths] == pytest.approx(
        [0, 0, -0.05, -0.5, -1.0]
    )
    assert overlong_penalty(110, 100, 20, 2.0) == pytest.approx(-3.0) and str(
        overlong_penalty(80, 100, 20, 1.0)
    ) in ("0.0", "-0.0")


def test_where_a_reward_comes_from() -> None:
    assert (
        find_reward(None, None, None) == RewardSource("default")
        and default_name("AIME-2024") == "retool"
    )
    assert (
        default_name("openai/gsm8k") == "math"
        and find_reward("retool", None, None).load() is retool_score
    )
    assert find_reward(None, HERE, None) == RewardSource("compute_score", HERE)
    assert find_reward(f"{HERE}/asynchronous", None, None) == RewardSource("asynchronous", HERE)
    assert score_answer(
        find_reward(f"{HERE}/asynchronous", None, None).load(), Asked("", "", "", {})
    ) == (
        0.25,
        {},
    )
    for name, said in (("maths", "reward_model.name=maths is not known"),):
        with pytest.raises(ValueError, match=said):
            find_reward(name, None, None)
    for source, said in (
        (RewardSource("nothing", HERE), "has no 'nothing'"),
        (RewardSource("Judge", HERE), "give a function"),
        (
            RewardSource("too_many", HERE),
            r"missing.*def too_many\(data_source, solution_str",
        ),
        (RewardSource("f", "nowhere.py"), "doesn't exist"),
    ):
        with pytest.raises(ValueError, match=said):
            RewardPool(source)


def judge_all(pool, texts):
    async def run():
        prompt = make_prompt(truth="4", extra={"index": 3})
        return await asyncio.gather(
            *(
                judged_by(pool, make_trajectory(prompt, text=t, num_turns=4, stop=Stop.LENGTH))
                for t in texts
            )
        )

    return asyncio.run(run())


def test_everything_a_reward_function_can_do(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "geheim")
    texts = [
        "hang",
        "raise",
        "4",
        "die",
        "eat",
        "nan",
        "inf",
        "text",
        "none",
        "noscore",
        "bool",
        "connect",
        "environment",
        "5",
        "acc nan",
        "acc inf",
    ]
    with RewardPool(
        RewardSource("compute_score", HERE), workers=2, timeout=1.0, floor=-2.0
    ) as pool:
        begin = time.perf_counter()
        judged = dict(zip(texts, judge_all(pool, texts), strict=True))
        assert time.perf_counter() - begin < 20
        assert judge_all(pool, ["4"])[0].score == 0.5  # the pool goes on
    assert (
        judged["4"].score == 0.5
        and judged["4"].info == {"acc": 1.0, "turns": 4, "stop": "length"}
        and judged["5"].info["acc"] == 0.0
    )
    for text, failure in (
        ("hang", "timeout"),
        ("raise", "exception"),
        ("die", "killed"),
        ("eat", "exception"),
        ("nan", "exception"),
        ("inf", "exception"),
        ("text", "exception"),
        ("none", "exception"),
        ("noscore", "exception"),
        ("acc nan", "exception"),
        ("acc inf", "exception"),
    ):
        assert (judged[text].score, judged[text].failure) == (-2.0, failure), text
    assert (
        "KeyError" in judged["raise"].reason
        and "MemoryError" in judged["eat"].reason
        and "nan" in judged["nan"].reason
        and "acc=nan" in judged["acc nan"].reason
    )
    assert judged["bool"].score == 1.0
    assert judged["connect"].info == {"why": "refused"}
    assert judged["environment"].score == 0.0 and os.environ["WANDB_API_KEY"] == "geheim"


def test_what_a_reward_function_raises_is_its_own_failure_with_the_reason() -> None:
    """SystemExit, Ctrl-C and cancelling would end the run if they reached it, and exceptions of the
    user's can't be pickled.
    """
    texts = ["exit", "interrupt", "cancel", "own error", "own types", "print", "fork", "fork", "4"]
    with RewardPool(RewardSource("compute_score", HERE), workers=1, floor=-2.0) as pool:
        judged = judge_all(pool, texts)
    for text, found, said in zip(
        texts,
        judged,
        ("SystemExit: 3", "KeyboardInterrupt", "CancelledError", "NotForPickle: of my own"),
        strict=False,
    ):
        assert (
            (found.score, found.failure) == (-2.0, "exception")
            and found.reason.startswith(said)
            and found.info == {"failure": found.reason}
        ), text
    own, printed, fork, again, fine = judged[4:]
    assert (
        own.info == {"pred": "seven", "acc": "yes", "long": "y" * 10_000}
        and type(own.info["pred"]) is str
    )
    assert (printed.score, fine.score) == (0.125, 0.5) and fork.score == again.score, (
        "a forked child goes on as a second worker"
    )


def test_what_a_killed_worker_had_started_ends_with_it() -> None:
    def running():
        return [
            p
            for p in Path("/proc").glob("[0-9]*")
            if (p / "cmdline").exists() and b"sleep\x00777" in (p / "cmdline").read_bytes()
        ]

    with RewardPool(RewardSource("compute_score", HERE), workers=1, timeout=0.5) as pool:
        assert judge_all(pool, ["start", "start"])[1].failure == "timeout"
    assert not running()


SECRETIVE = """
import os, sys, time
from pathlib import Path
if "API_KEY" not in os.environ:
    Path(__file__).with_name("worker").write_text(str(os.getpid()))
    {}
def compute_score(data_source, solution_str, ground_truth, extra_info): return 1.0
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('os.environ["API_KEY"]', "KeyError: 'API_KEY'"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("os._exit(3)", "process ended"),
        ("time.sleep(60)", "(isn't loaded|was ended) after 1 s"),
    ],
)
def test_a_function_that_only_the_run_itself_can_load_is_a_fault(
    tmp_path, monkeypatch, code, said
) -> None:
    monkeypatch.setenv("API_KEY", "geheim")
    if "sleep" in code:
        monkeypatch.setattr(reward_pool, "LOAD_SECONDS", 1.0)
    (file := tmp_path / "judge.py").write_text(SECRETIVE.format(code))
    with RewardPool(RewardSource("compute_score", str(file)), workers=1, timeout=1.0) as pool:
        assert re.search(
            f"judge.py loads here but not in a reward worker .*{said}.* read what it needs from a file",
            pool.problem(),
        )
        if "sleep" not in code and "_exit" not in code:
            assert judge_all(pool, ["4"])[0].failure == "exception"
    assert not Path(f"/proc/{(tmp_path / 'worker').read_text()}").exists()


def test_a_worker_that_nobody_ends_ends_itself(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("API_KEY", "geheim")
    monkeypatch.setattr(reward_pool, "LOAD_SECONDS", 0.5)
    (file := tmp_path / "judge.py").write_text(SECRETIVE.format("time.sleep(60)"))
    with RewardPool(RewardSource("compute_score", str(file)), workers=1) as pool:
        monkeypatch.setattr(reward_pool, "LOAD_SECONDS", 30.0)
        begin = time.perf_counter()
        assert "its process ended" in pool.problem() and time.perf_counter() - begin < 15


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it isn't one that nobody has waited for."""
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_busy_worker_whose_server_was_killed_does_not_outlive_the_pool() -> None:
    with RewardPool(RewardSource("compute_score", HERE), workers=1) as pool:
        assert pool.problem() == ""
        (worker,) = [int(file.name) for file in pool._leaders.iterdir()]
        os.kill(worker, signal.SIGSTOP)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        time.sleep(0.3)
    end = time.monotonic() + 30
    while is_running(worker):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_that_blocks_does_not_outlive_ctrl_c(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("API_KEY", "geheim")
    (file := tmp_path / "judge.py").write_text(SECRETIVE.format("time.sleep(60)"))
    pool = RewardPool(RewardSource("compute_score", str(file)), workers=1)
    told = tmp_path / "worker"
    while not (told.exists() and told.read_text()):
        time.sleep(0.01)
    assert Path(f"/proc/{told.read_text()}").exists()
    # A shell's background jobs are started with it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(
        0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt):
        pool.problem()
    signal.signal(signal.SIGINT, before)
    assert not Path(f"/proc/{told.read_text()}").exists()


def test_a_pool_with_a_function_has_no_problem() -> None:
    with RewardPool(RewardSource("compute_score", HERE), workers=1) as pool:
        assert pool.problem() == ""


def one_rank_without_judges() -> tuple[str, bool]:
    mesh = make_mesh()
    closed = []
    pool = (
        SimpleNamespace(problem=lambda: "no key", close=lambda: closed.append(True))
        if mesh.rank == 1
        else None
    )
    with pytest.raises(ValueError, match="no key"):
        require_judges(pool, mesh)  # type: ignore[arg-type]
    require_judges(None, mesh)
    return str(mesh.rank), bool(closed)


def test_all_ranks_stop_where_one_has_no_judges() -> None:
    assert run_ranks(one_rank_without_judges, 2) == [("0", False), ("1", True)]


@pytest.mark.slow
def test_a_pool_whose_server_was_killed_answers_what_it_had_and_goes_on() -> None:
    async def run(pool):
        flying = [
            asyncio.create_task(
                judged_by(pool, make_trajectory(make_prompt(truth="4"), text="hang"))
            )
            for _ in range(3)
        ]
        await asyncio.sleep(0.5)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
        return await asyncio.wait_for(asyncio.gather(*flying), 60)

    with RewardPool(RewardSource("compute_score", HERE), workers=1, timeout=2.0) as pool:
        assert all(judged.failure in ("killed", "timeout") for judged in asyncio.run(run(pool)))
        assert [judged.failure for judged in judge_all(pool, ["4", "die", "4"])] == [
            None,
            "killed",
            None,
        ]


def test_a_full_shared_memory_is_told_with_the_way_out(tmp_path, monkeypatch) -> None:
    """At the start, and in a run that has to start its processes anew: there the sample is lost."""

    def refuse(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with monkeypatch.context() as full:
        full.setattr(reward_pool, "ProcessPool", refuse)
        with pytest.raises(OSError, match=r"No space left on device.*/dev/shm.*--shm-size"):
            RewardPool(RewardSource("math"))
        assert not list(tmp_path.glob("retool-judges-*"))
        (fault,) = try_reward(RewardSource("math"), RewardConfig(), [])
        assert "/dev/shm" in str(fault)
    asked = Asked("gsm8k", "\\boxed{4}", "4", {})
    with RewardPool(RewardSource("math"), workers=1, timeout=20) as pool:
        assert pool.problem() == ""
        pool._pool.stop()
        pool._pool.join()
        monkeypatch.setattr(protocol, "RETRIES", 0)
        with monkeypatch.context() as full:
            full.setattr(reward_pool, "ProcessPool", refuse)
            judged = asyncio.run(pool.score(asked))
            assert judged.failure == JUDGES_LOST and "/dev/shm" in judged.reason
        assert asyncio.run(pool.score(asked)).score == 1.0


def test_a_tower_of_powers_is_stopped() -> None:
    with RewardPool(RewardSource("math"), workers=1, timeout=1.0) as pool:
        begin = time.perf_counter()
        tower, fine = judge_all(pool, ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{4}"])
        assert time.perf_counter() - begin < 15
    assert tower.score in (-1.0, 0.0) and fine.score == 1.0


def test_a_score_may_be_a_number_of_anybody_s() -> None:
    for value in (
        0.5,
        np.float32(0.5),
        np.array([0.5]),
        torch.tensor(0.5),
        {"score": np.float16(0.5)},
    ):
        assert check_score(value) == (0.5, {})
    assert check_score(True) == check_score(np.bool_(True)) == (1.0, {})
    # No float holds it: it would end the run where it is averaged
    assert check_score({"score": 1, "acc": 10**400, "left": 10**400}) == (1.0, {})
    for value in (None, "1", [1.0], 10**400, torch.ones(2), float("nan"), {"acc": 1.0}):
        with pytest.raises(ValueError, match="the reward function returned "):
            check_score(value)


def test_what_a_function_tells_under_a_name_of_ours_is_no_failure_and_breaks_nothing() -> None:
    ours = {
        "failure": "wrong form",
        "tool_failure": 0,
        "rewards/form": "bad",
        "llm_judge/calls": "?",
    }
    score, info = check_score({"score": 0.75, **ours, "rewards/length": 2})
    assert info["failure_"] == "wrong form" and info["tool_failure_"] == 0
    member = Scored(make_trajectory(), score, score, info)
    assert member.accuracy == 0.75
    metrics = score_metrics([member]) | judge_metrics([member])
    assert metrics["rewards/length/mean"] == 2 and "rewards/form/mean" not in metrics
