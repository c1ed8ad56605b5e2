"""Judges behind an address: refused with what to set, let through when asked, or awaited in the
run's own process.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from retool.rl.config.reward import RewardConfig
from retool.rl.preflight.trial import failed_trial, try_reward
from retool.rl.reward.async_judge import AsyncJudge
from retool.rl.reward.calling import Asked
from retool.rl.reward.judges import open_judges
from retool.rl.reward.protocol import JUDGES_LOST, Judged, Judges, Raised
from retool.rl.reward.source import RewardSource
from tests.rl.conftest import make_prompt
from tests.rl.test_lost import quickly
from tests.rl.test_preflight import check, said

HERE = str(Path(__file__).with_name("reward_functions.py"))
BY_HTTP = RewardSource("over_http", HERE)
SETTINGS = RewardConfig(num_workers=1, timeout_seconds=10.0, floor=-2.0)


@pytest.fixture
def address() -> Iterator[str]:
    """A judge that gives the length of an answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"score": len(asked["answer"])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def score_all(
    judges: Judges, answers: list[str], extra: dict[str, Any] | None = None
) -> list[Judged]:
    async def run() -> list[Judged]:
        return list(
            await asyncio.gather(
                *(judges.score(Asked("x", answer, "", extra or {})) for answer in answers)
            )
        )

    try:
        return asyncio.run(run())
    finally:
        judges.close()


@pytest.mark.parametrize("more", [{"network": True}, {"concurrent": True}])
def test_a_judge_whose_server_is_away_loses_the_answer_and_is_no_floor(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, bool]
) -> None:
    quickly(monkeypatch)
    (found,) = score_all(
        open_judges(BY_HTTP, replace(SETTINGS, **more)),
        ["four"],
        {"address": "http://127.0.0.1:9/"},
    )
    assert found.failure == JUDGES_LOST and found.reason.startswith("ConnectError")


def test_what_says_that_a_server_is_away() -> None:
    import urllib.error

    class APIConnectionError(Exception):
        """openai's."""

    away = [
        ConnectionResetError(),
        httpx.ReadTimeout(""),
        urllib.error.URLError("x"),
        APIConnectionError(),
    ]
    # type: ignore[arg-type]
    there = [
        urllib.error.HTTPError("u", 400, "bad", None, None),
        ValueError(),
        KeyError("ConnectionError"),
        PermissionError(),
    ]
    assert [Raised.by(error).away for error in [*away, *there]] == [True] * 4 + [False] * 4


def test_a_judge_behind_an_address_is_refused_with_what_to_set(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch)
    prompt = make_prompt(extra={"address": address})
    (fault,) = try_reward(BY_HTTP, SETTINGS, [prompt])
    assert "ConnectError" in fault.problem
    assert (
        "reward_model.network=true" in fault.remedy
        and "reward_model.concurrent=true" in fault.remedy
    )
    for settings in (replace(SETTINGS, network=True), replace(SETTINGS, concurrent=True)):
        assert not list(try_reward(BY_HTTP, settings, [prompt])), settings


def test_with_the_network_a_worker_still_has_no_secret_but_those_named(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "mine")
    monkeypatch.setenv("WANDB_API_KEY", "geheim")
    judges = open_judges(BY_HTTP, replace(SETTINGS, network=True, environment=("JUDGE_API_KEY",)))
    # The second over the first one's connection
    found = score_all(judges, ["four", "three"], {"address": address})
    assert [(one.score, one.info) for one in found] == [
        (4.0, {"key": "mine", "other": ""}),
        (5.0, {"key": "mine", "other": ""}),
    ]
    (told,) = try_reward(BY_HTTP, replace(SETTINGS, environment=("NOT_SET",)), [make_prompt()])
    assert (
        "reward_model.environment names NOT_SET, which the run's environment lacks" in told.problem
    )


@pytest.mark.parametrize(("key", "told"), [("JUDGE_KEY", True), ("special", False)])
def test_a_variable_is_asked_for_where_one_lacks(key: str, told: bool) -> None:
    failed = Judged(-1.0, trace=f"Traceback …\nKeyError: '{key}'", failure="exception")
    fault = failed_trial("custom_reward_function", failed, make_prompt(), SETTINGS)
    assert ("reward_model.environment=[NAME]" in fault.remedy) == told


def test_an_async_function_judges_many_answers_at_once_in_the_runs_own_process() -> None:
    settings = replace(SETTINGS, concurrent=True, max_concurrent=10, timeout_seconds=1.0)
    begin = time.perf_counter()
    found = score_all(
        open_judges(RewardSource("every_way", HERE), settings),
        ["4"] * 20 + ["exit", "cancel", "nan"],
    )
    assert time.perf_counter() - begin < 1.0, "one after the other they take longer"
    assert [one.score for one in found] == [1.0] * 20 + [-2.0] * 3
    assert [one.reason.partition(":")[0] for one in found[20:]] == [
        "SystemExit",
        "CancelledError",
        "ValueError",
    ]
    assert "every_way" in found[20].trace
    (hanging, fine) = score_all(
        AsyncJudge(RewardSource("every_way", HERE), 2, 0.2, -2.0), ["hang", "4"]
    )
    assert (hanging.failure, hanging.score, fine.score) == ("timeout", -2.0, 1.0)


def test_what_can_not_be_awaited_is_refused(work: Path, tmp_path: Path) -> None:
    more = ["reward_model.concurrent=true", "trainer.device=cpu"]
    assert "reward_model.concurrent=true: is for an async function of yours" in said(
        check(work, tmp_path / "out", *more)
    )
    text = said(check(work, tmp_path / "out", *more, f"reward_model.name={HERE}/digits"))
    assert (
        "digits is none: write 'async def digits'" in text and "reward_model.network=true" in text
    )
    assert not check(work, tmp_path / "out", *more, f"reward_model.name={HERE}/asynchronous").faults
