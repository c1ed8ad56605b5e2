"""A language model as judge, behind a real server on this machine that does all that servers do."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from retool.rl.config.judge import LLMJudgeConfig
from retool.rl.config.reward import RewardConfig
from retool.rl.failures import require_scores
from retool.rl.metrics import judge_metrics
from retool.rl.objective.filter import UnusableSamples
from retool.rl.preflight.trial import try_reward
from retool.rl.reward.calling import Asked
from retool.rl.reward.judges import open_judges, shared_out
from retool.rl.reward.llm_judge import server as asking
from retool.rl.reward.llm_judge.judge import LLMJudge, filled, pattern_of, prompt_of, read_score
from retool.rl.reward.llm_judge.server import LONGEST_WAIT_S, asked_to_wait
from retool.rl.reward.protocol import BUDGET_SPENT, JUDGES_LOST, Judged
from retool.rl.reward.source import RewardSource, find_reward, find_several
from retool.rl.types import Scored
from tests.rl.conftest import judged_by as as_in_rollouts
from tests.rl.conftest import make_prompt, make_trajectory
from tests.rl.reward.test_calling import SAID, seen_trajectory
from tests.rl.test_preflight import check, said

SECRET = "sk-very-secret"
LATE_S = 10.0  # at most; it ends with the test


class World:
    """A server, and what it was asked: `seen` has the bodies, `most` how many at once."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.times: dict[str, int] = {}
        self.here = 0
        self.most = 0
        self.lock = threading.Lock()
        self.over = threading.Event()

    def settings(self, **more: Any) -> LLMJudgeConfig:
        known = {"base_url": self.address, "model": "m", "timeout_seconds": 1.0, "retries": 3}
        return LLMJudgeConfig(**{**known, **more})


class Patient(http.server.ThreadingHTTPServer):
    """With room for all connections at once: one that is dropped is made again a second later."""

    request_queue_size = 64


def handler_of(world: World) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = body["messages"][0]["content"].partition("[Answer]\n")[2].partition("\n")[0]
            with world.lock:
                world.seen.append(body)
                world.keys.add(self.headers.get("Authorization"))
                world.times[answer] = world.times.get(answer, 0) + 1
                world.here += 1
                world.most = max(world.most, world.here)
            try:
                self.answer(answer, world.times[answer])
            finally:
                with world.lock:
                    world.here -= 1

        def answer(self, answer: str, time_asked: int) -> None:
            is_first = time_asked == 1
            if answer == "away":
                self.give(503, {"error": "later"})
            elif answer == "refused":
                self.give(401, {"error": f"no such key: {SECRET}"})
            elif answer == "busy" and is_first:
                self.give(429, {"error": "slowly"}, {"Retry-After": "0.3"})
            elif answer == "cut" and is_first:
                self.give(200, {"choices": []}, cut=True)
            elif answer == "odd" and is_first:
                self.give(200, {"choices": []})
            elif answer == "garbage" or (answer == "unsure" and is_first):
                self.give(200, self.completion("I can't say. Score: eleven"))
            else:
                if answer == "late" and is_first:
                    world.over.wait(LATE_S)
                if answer == "slowly":
                    time.sleep(0.05)
                self.give(200, self.completion(f"Fine. Score: 3\nScore: {min(len(answer), 10)}"))

        @staticmethod
        def completion(text: str) -> dict[str, Any]:
            message = {"role": "assistant", "content": text}
            return {"choices": [{"message": message}], "usage": {"total_tokens": 10}}

        def give(
            self,
            status: int,
            content: dict[str, Any],
            headers: dict[str, str] | None = None,
            cut: bool = False,
        ) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + 5 * cut))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.close_connection = cut
            with suppress(OSError):  # whoever asked has given up
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    found = World("")
    with Patient(("127.0.0.1", 0), handler_of(found)) as server:
        server.daemon_threads = True
        found.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        found.over.set()
        server.shutdown()
        thread.join()


def judged_by(
    settings: LLMJudgeConfig, answers: Sequence[str], at_once: bool = True
) -> list[Judged]:
    judge = LLMJudge(settings, floor=-2.0)

    async def ask() -> list[Judged]:
        calls = [
            as_in_rollouts(judge, replace(seen_trajectory(), assistant_text=text))
            for text in answers
        ]
        if at_once:
            return list(await asyncio.gather(*calls))
        return [await call for call in calls]

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(ask())
    finally:
        judge.close()
        loop.close()


def test_every_way_a_server_answers(world: World) -> None:
    begin = time.monotonic()
    answers = ["fine", "busy", "late", "cut", "odd", "unsure", "garbage", "away", "refused"]
    found = dict(zip(answers, judged_by(world.settings(), answers), strict=True))
    assert 0.3 < time.monotonic() - begin < LATE_S, "it waits as long as it is asked to"
    for answer in answers[:6]:  # on a scale of 0 to 10; the last match counts
        assert found[answer].failure is None, answer
        assert found[answer].score == pytest.approx(len(answer) / 10)
    calls = {answer: judged.info["llm_judge/calls"] for answer, judged in found.items()}
    assert calls == {
        **dict.fromkeys(["busy", "late", "cut", "odd", "unsure", "garbage"], 2),
        "fine": 1,
        "away": 4,
        "refused": 1,
    }
    assert [found[answer].info.get("llm_judge/retries", 0) for answer in answers] == [
        *[0, 1, 1, 1, 1],
        *[0, 0, 3, 0],
    ]
    # No score: the floor. Nobody there: it isn't trained. A refusal isn't repeated.
    assert (found["garbage"].failure, found["garbage"].score) == ("exception", -2.0)
    assert (
        "its reply" in found["garbage"].reason and found["garbage"].info["llm_judge/garbage"] == 2
    )
    assert found["away"].failure == JUDGES_LOST
    assert "gave no answer in 4 tries: 503" in found["away"].reason
    assert found["refused"].failure == "exception" and "refuses: 401" in found["refused"].reason


def test_so_many_at_once_and_what_it_took(world: World) -> None:
    settings = world.settings(max_concurrent=3, timeout_seconds=5.0)
    found = judged_by(settings, ["slowly"] * 9)
    assert world.most == 3 and len(world.seen) == 9
    members = [Scored(make_trajectory(), 0.0, 0.0, judged.info) for judged in found]
    assert judge_metrics(members) == {
        "llm_judge/calls": 9.0,
        "llm_judge/cached": 0.0,
        "llm_judge/garbage": 0.0,
        "llm_judge/over_budget": 0.0,
        "llm_judge/retries": 0.0,
        "llm_judge/tokens": 90.0,
    }
    assert judge_metrics([Scored(make_trajectory(), 0.0, 0.0)]) == {}


def test_what_was_said_is_kept_by_all_that_matters(world: World, tmp_path: Path) -> None:
    settings = world.settings(cache=str(tmp_path / "kept"))
    judged_by(settings, ["one", "three", "garbage"])
    asked = len(world.seen)
    found = judged_by(settings, ["one", "three", "garbage"])
    assert [judged.score for judged in found[:2]] == [0.3, 0.5]
    assert [judged.info.get("llm_judge/cached") for judged in found] == [1, 1, None]
    assert len(world.seen) == asked + 2, "only what had no score is asked again"
    before = 0
    others = [
        {"model": "other"},
        {"temperature": 0.5},
        {"max_tokens": 9},
        {"prompt": "\n[Answer]\n{answer}\n"},
        {"base_url": f"{world.address}/"},
    ]
    for more in others:
        before = len(world.seen)
        judged_by(replace(settings, **more), ["one"])
        assert len(world.seen) == before + 1, more
    # Another pattern reads the same reply; one that finds nothing in it asks again
    (read,) = judged_by(replace(settings, pattern=r"Score: (\d)", highest=5.0), ["one"])
    assert (read.score, len(world.seen)) == (0.6, before + 1)
    for file in (tmp_path / "kept").rglob("*.json"):
        file.write_text("{")
    judged_by(settings, ["one"])
    assert len(world.seen) == before + 2, "a damaged file is asked about again"


@pytest.mark.parametrize("budget", [{"max_calls": 3}, {"max_total_tokens": 30}])
def test_a_budget_ends_the_run_or_leaves_answers_out(world: World, budget: dict[str, int]) -> None:
    settings = world.settings(**budget)
    answers = ["a", "b", "c", "d"]
    *_, last = judged_by(settings, answers, at_once=False)
    assert last.failure == BUDGET_SPENT and len(world.seen) == 3
    members = [Scored(make_trajectory(), 0.0, 0.0, last.info, last.failure)]
    with pytest.raises(UnusableSamples, match=r"budget is spent: 30? (calls|tokens)") as ended:
        require_scores([*members, *[Scored(make_trajectory(), 1.0, 1.0)] * 9], 0.5, "step 3")
    assert "when_spent=mask" in str(ended.value)
    *_, last = judged_by(replace(settings, when_spent="mask"), answers, at_once=False)
    assert last.failure == JUDGES_LOST and last.info["llm_judge/over_budget"] == 1
    shared = shared_out(RewardConfig(judge=settings), 2).judge
    assert (shared.max_calls, shared.max_total_tokens) == (
        budget.get("max_calls") and 2,
        budget.get("max_total_tokens") and 15,
    )


def test_the_key_is_in_the_request_and_nowhere_else(
    world: World, monkeypatch: pytest.MonkeyPatch, work: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    settings = world.settings(key_variable="JUDGE_API_KEY")
    fine, refused = judged_by(settings, ["fine", "refused"])
    assert world.keys == {f"Bearer {SECRET}"}
    told = repr((settings, fine, refused))
    assert SECRET not in told and "no such key: <redacted>" in refused.reason
    report = checked(work, tmp_path, world, "reward_model.judge.key_variable=JUDGE_API_KEY")
    assert not report.faults and SECRET not in repr(report.config)
    assert SECRET not in repr(report.identity) and "m (" in repr(report.identity)
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(ValueError, match="key_variable=JUDGE_API_KEY isn't set"):
        LLMJudge(settings, 0.0)


def checked(work: Path, tmp_path: Path, world: World, *more: str) -> Any:
    judge = [f"reward_model.judge.base_url={world.address}", "reward_model.judge.model=m"]
    words = ["trainer.device=cpu", "reward_model.name=judge", *judge, *more]
    return check(work, tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"base_url": None}, "needs reward_model.judge.base_url and .model"),
        ({"base_url": "localhost:80"}, "needs reward_model.judge.base_url and .model"),
        ({"model": None}, "needs reward_model.judge.base_url and .model"),
        ({"prompt": "nowhere.txt"}, "prompt=nowhere.txt can't be read"),
        ({"prompt": "Is {question} good?"}, "shows the judge no answer"),
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": r"\d+"}, "has no group"),
        ({"highest": 0.0}, "isn't above lowest=0"),
    ],
)
def test_what_can_not_be_asked_is_told_before_the_run(more: dict[str, Any], says: str) -> None:
    known = {"base_url": "http://x/v1", "model": "m"}
    settings = RewardConfig(judge=LLMJudgeConfig(**{**known, **more}))
    (fault,) = try_reward(RewardSource("judge"), settings, [make_prompt()])
    assert says in fault.problem


def test_a_run_is_told_of_its_judge_and_asks_it_once(
    world: World, work: Path, tmp_path: Path
) -> None:
    # A judge has its own time limits, whatever those of functions are
    slow = "reward_model.timeout_seconds=0.0001"
    assert not checked(work, tmp_path, world, slow).faults
    assert len(world.seen) == 1 and "The answer is" in str(world.seen[0])
    gone = [
        "reward_model.judge.base_url=http://127.0.0.1:9/v1",
        "reward_model.judge.retries=0",
    ]
    text = said(checked(work, tmp_path, world, *gone))
    assert "gave no answer in 1 tries" in text and "reward_model.network" not in text
    untried = [*gone, "reward_model.trial_answer=null", "reward_model.judge.pattern=none"]
    assert "has no group" in said(checked(work, tmp_path, world, *untried))


def test_beside_other_rewards_it_is_weighed_and_counted(world: World) -> None:
    source = find_several(("math", "judge"), (1.0, 0.5))
    assert source.asks_a_judge and source.needs_truth
    assert not find_reward("judge", None, None).needs_truth
    settings = RewardConfig(judge=world.settings(), num_workers=1, timeout_seconds=20.0)
    judges = open_judges(source, settings)
    trajectory = replace(seen_trajectory(), assistant_text="\\boxed{391}")

    async def ask() -> list[Judged]:
        away = replace(trajectory, assistant_text="away")
        return [await as_in_rollouts(judges, trajectory), await as_in_rollouts(judges, away)]

    try:
        found, lost = asyncio.run(ask())
    finally:
        judges.close()
    assert (lost.failure, lost.info["llm_judge/calls"]) == (JUDGES_LOST, 4)
    assert found.score == pytest.approx(1.0 + 0.5 * 1.0)
    assert found.info["rewards/judge"] == found.info["rewards/math"] == 1.0
    assert found.info["llm_judge/calls"] == 1 and found.info["acc"] == 1.0


def test_the_prompt_is_filled_once_and_the_scale_holds() -> None:
    question = [{"role": "user", "content": "Why {answer}?"}]
    asked = Asked("s", "{ground_truth}", "", {}, {"messages": [*question, *SAID], "response": SAID})
    settings = LLMJudgeConfig(prompt="{question}|{answer}|{ground_truth}|{other}\n{conversation}")
    text = filled(prompt_of(settings), asked)
    assert text.startswith("Why {answer}?|{ground_truth}|(none)|{other}\nuser: Why {answer}?\n\n")
    assert text.endswith("tool: 391\n\nassistant: It is 391.")
    scale = LLMJudgeConfig(lowest=-1.0, highest=1.0)
    pattern = pattern_of(scale)
    cases = {"Score: -1": 0.0, "score = 0.5": 0.75, "Score: 2": None, "none": None, "": None}
    assert {said: read_score(said, pattern, scale) for said in cases} == cases


def test_how_long_a_server_asks_to_wait() -> None:
    assert asked_to_wait("2.5") == 2.5 and asked_to_wait(None) == asked_to_wait("soon") == 0.0
    assert asked_to_wait("-3") == 0.0 and asked_to_wait("86400") == LONGEST_WAIT_S
    assert 0.0 < asked_to_wait(formatdate(time.time() + 10, usegmt=True)) <= 10.0
