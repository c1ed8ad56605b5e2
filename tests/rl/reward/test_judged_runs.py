"""Whole runs on two processes, judged by a language model's server that misbehaves."""

from __future__ import annotations

import http.server
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.rl.reward.test_llm_judge import Patient
from tests.rl.test_command import REWARDS, TORCHRUN, steps, words

# Far enough from each other that no answer meets both
GARBAGE = (11, 41)
LATE_SECONDS = 3


class Handler(http.server.BaseHTTPRequestHandler):
    """Every few requests it is busy, late, cuts its reply short, or says nothing of use."""

    protocol_version = "HTTP/1.1"
    number = itertools.count(1)  # of all requests

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = body["messages"][0]["content"].partition("[Answer]\n")[2].partition("\nFrom 0")[0]
        number = next(self.number)
        digits = min(sum(character.isdigit() for character in answer), 10)
        if number % 5 == 0:
            self.give(429, {"error": "slowly"}, Retry_After="0.1")
        elif number % 7 == 0:
            self.give(200, {"choices": []}, cut=1)
        elif number % 13 == 0:
            time.sleep(LATE_SECONDS)
            self.give(200, completion("Score: 0"))
        elif number in GARBAGE:
            self.give(200, completion("Who knows."))
        else:
            self.give(200, completion(f"Score: {digits}"))

    def give(self, status: int, content: dict[str, Any], cut: int = 0, **headers: str) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) + cut))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = bool(cut)

    def log_message(self, format: str, *args: object) -> None:
        pass


def completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message}], "usage": {"total_tokens": 3}}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.number = itertools.count(1)
    with Patient(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


def judged(work: Path, out: Path, address: str, *more: str) -> list[str]:
    own = "custom_reward_function"
    return [
        *TORCHRUN,
        *(word for word in words(work, out) if not word.startswith(own)),
        f"reward_model.functions=[{REWARDS}/digits,judge]",
        "reward_model.weights=[1,0.5]",
        f"reward_model.judge.base_url={address}",
        "reward_model.judge.model=m",
        "trainer.total_training_steps=2",
        "trainer.device=cpu",
        *more,
    ]


@pytest.mark.slow
def test_a_judge_that_misbehaves_costs_no_run_and_all_of_it_is_counted(
    work: Path, tmp_path: Path, address: str
) -> None:
    out = tmp_path / "run"
    cache = f"reward_model.judge.cache={tmp_path}/kept"
    patience = "reward_model.judge.timeout_seconds=1"
    done = warm.run(judged(work, out, address, cache, patience))
    assert done.returncode == 0, done.stderr[-3000:]
    for entry in steps(out):
        answers = 16
        assert entry["stop/infrastructure"] == entry["reward/exceptions"] == 0
        assert entry["llm_judge/retries"] > 0
        scored = entry["llm_judge/calls"] - entry["llm_judge/retries"] - entry["llm_judge/garbage"]
        assert scored + entry["llm_judge/cached"] == answers
        mean = entry["rewards/digits/mean"] + 0.5 * entry["rewards/judge/mean"]
        assert entry["critic/score/mean"] == pytest.approx(mean)
    assert sum(entry["llm_judge/garbage"] for entry in steps(out)) > 0


@pytest.mark.slow
def test_a_budget_that_is_spent_ends_the_run_with_its_last_step_saved(
    work: Path, tmp_path: Path, address: str
) -> None:
    out = tmp_path / "run"
    # Enough for the first step; both processes end in the second
    done = warm.run(judged(work, out, address, "reward_model.judge.max_calls=50"))
    assert done.returncode != 0
    assert "the judge's budget is spent" in done.stderr + done.stdout
    assert "when_spent=mask" in done.stderr + done.stdout
    assert (out / "global_step_1").is_dir() and not (out / "global_step_2").exists()
