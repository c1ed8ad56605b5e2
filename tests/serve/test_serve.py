"""`retool serve`: OpenAI's own client gets what `retool.LLM` answers; strangers, crowds and people who
leave do no harm.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from retool import LLM, SamplingParams
from retool.rl.server.dialects import mark_of
from retool.serve import app
from retool.serve.__main__ import main
from retool.serve.completions import CompletionForm
from retool.serve.engine_thread import MOST_WAITING, Origin, Piece, Ticket
from retool.serve.shape import About
from tests import warm
from tests.llm.models import write_model
from tests.serve.server import Served, serving

MESSAGES = [{"role": "user", "content": "What does <|im_end|> mean?"}]
TEXTS = ["How much is 3 + 4?", "One apple", "Add them up: 12, 7 and 9. Then stop."]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    openai = pytest.importorskip("openai", reason="the client of OpenAI isn't installed")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def expected(llm: LLM, prompt: Any, **params: Any) -> Any:
    (output,) = llm.generate(prompt, SamplingParams(**{**GREEDY, **params}))
    return output


def test_completions_are_the_llms(server: Served, llm: LLM, client: Any) -> None:
    """Texts and ids, alone and together, streamed and not; log-probabilities and usage too."""
    wanted = [expected(llm, text, logprobs=2) for text in TEXTS]
    whole = client.completions.create(model="tiny", prompt=TEXTS, logprobs=2, **GREEDY)
    for choice, output in zip(whole.choices, wanted, strict=True):
        answer = output.outputs[0]
        assert (choice.text, choice.finish_reason) == (answer.text, answer.finish_reason)
        assert len(choice.logprobs.tokens) == len(answer.token_ids)
        assert sum(choice.logprobs.token_logprobs) == pytest.approx(answer.cumulative_logprob)
        for top, entries in zip(choice.logprobs.top_logprobs, answer.logprobs, strict=True):
            texts = [entry.decoded_token for entry in entries.values()]
            if len(set(texts)) < len(texts):  # parts of characters
                texts = [f"token_id:{token}" for token in entries]
            logp = [entry.logprob for entry in entries.values()]
            assert top == pytest.approx(dict(zip(texts, logp, strict=True)))
    ids = [output.prompt_token_ids for output in wanted]
    assert whole.usage.prompt_tokens == sum(map(len, ids))
    assert whole.usage.completion_tokens == sum(len(o.outputs[0].token_ids) for o in wanted)

    more = {"return_token_ids": True}
    by_ids = client.completions.create(model="tiny", prompt=ids, extra_body=more, **GREEDY)
    for choice, output in zip(by_ids.choices, wanted, strict=True):
        assert choice.token_ids == output.outputs[0].token_ids
        assert choice.prompt_token_ids == output.prompt_token_ids

    events = list(
        client.completions.create(
            model="tiny",
            prompt=TEXTS,
            stream=True,
            logprobs=0,
            extra_body=more,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert events[-1].usage == whole.usage
    for number, output in enumerate(wanted):
        mine = [event.choices[0] for event in events[:-1] if event.choices[0].index == number]
        assert len(mine) > 1, "it came at once"
        assert "".join(choice.text for choice in mine) == output.outputs[0].text
        tokens = [token for choice in mine for token in choice.token_ids]
        assert tokens == output.outputs[0].token_ids
        prompts = [choice.prompt_token_ids for choice in mine]
        assert [prompt for prompt in prompts if prompt] == [output.prompt_token_ids]
        offsets = [offset for choice in mine for offset in choice.logprobs.text_offset]
        assert offsets == sorted(offsets) and offsets[0] == 0


def test_a_streams_prompt_comes_once(llm: LLM) -> None:
    """With the first event of an answer, although that has no text yet."""
    request = llm.text_request(TEXTS[0], SamplingParams())
    origin = Origin("weights")
    form = CompletionForm([request], llm.tokenizer, About("tiny", origin), True, False)
    events = [form.grown(Piece(0, [5], [-1.0], text, None, origin)) for text in ("", "", "a")]
    prompts = [event["choices"][0]["prompt_token_ids"] for event in events]
    assert prompts == [request.ids, None, None]


def test_what_a_client_doesnt_read_becomes_one_piece() -> None:
    """Each has all of the text so far: thousands of them took gigabytes."""
    origin = Origin("weights")

    async def read() -> tuple[list[Piece], Piece | None]:
        ticket = Ticket([], streams=True)
        pieces = []
        for count in range(1, 500):
            for number in (0, 1):
                ticket.grow(Piece(number, [count], [-count], "a" * count, None, origin))
            if count == 300:
                pieces += [await ticket.next() for _ in range(40)]
        pieces += [await ticket.next() for _ in range(ticket._waiting.qsize())]
        ticket.fail()
        return pieces, await ticket.next()

    pieces, end = asyncio.run(read())
    assert len(pieces) <= MOST_WAITING + 40 and end is None
    for number in (0, 1):
        mine = [piece for piece in pieces if piece.number == number]
        tokens = [token for piece in mine for token in piece.ids]
        assert tokens == [*range(1, 500)] and [-x for piece in mine for x in piece.logp] == tokens
        assert [len(piece.text) for piece in mine] == [piece.ids[-1] for piece in mine]


def test_chat_is_the_llms(llm: LLM, client: Any) -> None:
    (output,) = llm.chat(MESSAGES, SamplingParams(logprobs=0, **GREEDY))
    answer = output.outputs[0]
    asked = {"model": "tiny", "messages": MESSAGES, "logprobs": True, **GREEDY}
    whole = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", answer.text)
    assert choice.finish_reason == answer.finish_reason
    assert choice.token_ids == answer.token_ids
    assert whole.prompt_token_ids == output.prompt_token_ids
    values = [entry.logprob for entry in choice.logprobs.content]
    assert sum(values) == pytest.approx(answer.cumulative_logprob)

    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    none = {"logprobs": False, "top_logprobs": 0}  # as clients of vLLM say that they want none
    streamed = {**asked, **none, "messages": parts, "stream": True}
    events = list(client.chat.completions.create(**streamed))
    deltas = [event.choices[0].delta for event in events]
    assert deltas[0].role == "assistant" and len(deltas) > 2
    assert "".join(delta.content or "" for delta in deltas) == answer.text
    assert events[-1].choices[0].finish_reason == answer.finish_reason


def test_n_seed_and_stop(llm: LLM, client: Any) -> None:
    asked = {"model": "tiny", "prompt": TEXTS[1], "max_tokens": 8}
    shared = llm.engine.stats.shared_tokens
    drawn = client.completions.create(**asked, n=3, seed=5, temperature=1.5, top_p=0.9)
    assert llm.engine.stats.shared_tokens > shared, "each sample computed the prompt"
    want = expected(llm, TEXTS[1], n=3, seed=5, temperature=1.5, top_p=0.9, max_tokens=8)
    assert [choice.text for choice in drawn.choices] == [o.text for o in want.outputs]
    assert len({choice.text for choice in drawn.choices}) > 1
    # As many as there is room for
    crowd = client.completions.create(**{**asked, "n": 64, "max_tokens": 1})
    assert len(crowd.choices) == 64
    free = [client.completions.create(**asked).choices[0].text for _ in range(2)]
    assert free[0] != free[1]

    text = expected(llm, TEXTS[0]).outputs[0].text
    stop = text[2:4]
    cut = {**asked, "prompt": TEXTS[0], **GREEDY, "stop": [stop, "never"]}
    whole = client.completions.create(**cut).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    assert whole.stop_reason == stop
    streamed = client.completions.create(**cut, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == whole.text


def test_sglangs_generate(server: Served, llm: LLM) -> None:
    output = expected(llm, TEXTS[0], logprobs=0)
    answer = output.outputs[0]
    body = {
        "input_ids": output.prompt_token_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": 12},
        "return_logprob": True,
    }
    found = server.post("/generate", body).json()
    assert (found["text"], found["output_ids"]) == (answer.text, answer.token_ids)
    pairs = found["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in pairs] == answer.token_ids
    assert sum(logp for logp, _, _ in pairs) == pytest.approx(answer.cumulative_logprob)
    assert found["meta_info"]["finish_reason"]["type"] == answer.finish_reason
    seeded = {"sampling_seed": 5, "n": 2, "max_new_tokens": 8}
    drawn = server.post("/generate", {"text": TEXTS[0], "sampling_params": seeded}).json()
    want = expected(llm, TEXTS[0], n=2, seed=5, temperature=1, max_tokens=8)
    assert [entry["output_ids"] for entry in drawn] == [one.token_ids for one in want.outputs]
    several = server.post("/generate", {**body, "input_ids": [body["input_ids"]] * 2}).json()
    assert [entry["output_ids"] for entry in several] == [answer.token_ids] * 2


def test_requests_share_the_engines_steps(server: Served, llm: LLM) -> None:
    """Eight at once take about the steps of one."""

    def ask(text: str) -> str:
        body = {"prompt": text, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
        return server.post("/v1/completions", body).json()["choices"][0]["text"]

    alone = llm.engine.stats.steps
    want = ask(TEXTS[0])
    alone = llm.engine.stats.steps - alone
    together = llm.engine.stats.steps
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, [TEXTS[0]] * 8))
    together = llm.engine.stats.steps - together
    assert texts == [want] * 8
    assert together < 4 * alone


def test_who_leaves_takes_no_more_room(
    server: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the answer, and in the middle of a stream."""
    step = llm.engine.step
    # All of an answer takes 5 seconds: it isn't over by itself before it is noticed who left
    monkeypatch.setattr(llm.engine, "step", lambda: time.sleep(0.01) or step())
    sampled = llm.engine.stats.sampled_tokens
    asked = {"prompt": TEXTS[0], "max_tokens": 500, "ignore_eos": True}
    before = server.site.engine.counts.abandoned
    body = json.dumps({**asked, "n": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as left:
        left.sendall(head.encode() + body)
        wait_until(lambda: server.site.engine.under_way == 4)
    wait_until(lambda: not llm.engine.scheduler.sequences)
    assert llm.engine.stats.sampled_tokens - sampled < 4 * 500
    sampled = llm.engine.stats.sampled_tokens
    with httpx.stream("POST", server.url + "/v1/completions", json={**asked, "stream": True}) as r:
        next(r.iter_lines())
    wait_until(lambda: not llm.engine.scheduler.sequences)
    assert llm.engine.stats.sampled_tokens - sampled < 500
    assert server.site.engine.under_way == 0
    assert server.site.engine.counts.abandoned == before + 2


def wait_until(happened: Any) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {}, 400, "prompt is missing"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "'gpt' isn't served here"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400, "must be a number"),
        ("/v1/completions", {"prompt": "a", "temperature": 1e-7}, 400, "below 1e-06 use 0"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature=-1.0"),
        ("/v1/completions", {"prompt": "a", "n": True}, 400, "n must be a whole number"),
        ("/v1/completions", {"prompt": "a", "max_token": 3}, 400, "did you mean max_tokens?"),
        ("/v1/completions", {"prompt": "a", "presence_penalty": 1}, 400, "isn't supported"),
        ("/v1/completions", {"prompt": "a", "logprobs": 2, "stream": True}, 400, "can't stream"),
        ("/v1/completions", {"prompt": "a", "top_k": 2**70}, 400, "no vocabulary is so large"),
        ("/v1/completions", {"prompt": "a", "top_k": -(2**70)}, 400, "no vocabulary is so large"),
        ("/v1/completions", {"prompt": "a", "temperature": 1e-38}, 400, "use 0, the likeliest"),
        ("/v1/completions", {"prompt": "a", "temperature": 1e300}, 400, "at most 1e+06"),
        (
            "/v1/completions",
            {"prompt": "a", "temperature": 10**400},
            400,
            "temperature is too large",
        ),
        ("/v1/completions", {"prompt": [1] * 700}, 400, "has 700 tokens"),
        ("/v1/completions", {"prompt": [10**6]}, 400, "token id 1,000,000"),
        ("/v1/completions", {"prompt": "a", "n": 65, "max_tokens": 1}, 429, "room for 64"),
        ("/v1/completions", {"prompt": "a", "n": 2000}, 400, "at most 1,024"),
        ("/v1/completions", {"prompt": "a", "stop": ["x"] * 65}, 400, "may have 64"),
        ("/v1/chat/completions", {}, 400, "messages is missing"),
        ("/v1/chat/completions", {"messages": [3]}, 400, "a message must be an object"),
        ("/v1/chat/completions", {"messages": [{"role": "x"}]}, 400, "message 0"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 0}]}, 400, "not text"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "'image_url' isn't supported",
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "required"}, 400, "auto"),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": [5]}, 400, "a list of objects"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "tools": [{"name": "f", "parameters": {"required": 5}}]},
            400,
            "parameters.required",
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, 400, "logprobs: true"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_completion_tokens": 0},
            400,
            "max_tokens=0",
        ),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2},
            400,
            "give one",
        ),
        ("/generate", {"text": "a", "stream": True}, 400, "use /v1/completions"),
        ("/generate", {"text": "a", "top_logprobs_num": 3}, 400, "top_logprobs_num must be 0"),
        ("/generate", {"text": "a", "sampling_params": {"max_tokens": 1}}, 400, "max_new_tokens?"),
        ("/collective_rpc", {"method": "eval"}, 400, "there is reload_weights"),
        ("/update_weights_from_disk", {"model_path": "/nowhere"}, 400, "/nowhere"),
        ("/v1/embeddings", {}, 404, "Not Found"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    server: Served, path: str, body: Any, status: int, said: str
) -> None:
    response = server.post(path, body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert said in error["message"] and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000])
def test_a_body_that_is_no_json(server: Served, body: bytes) -> None:
    response = httpx.post(server.url + "/v1/completions", content=body)
    assert response.status_code == 400 and "not JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [rb'{"prompt": "a\ud800"}', rb'{"prompt": "a", "\ud800": 1}'])
def test_a_body_of_half_characters(server: Served, body: bytes) -> None:
    response = httpx.post(server.url + "/v1/completions", content=body)
    assert response.status_code == 400 and "ud800" in response.text


def test_a_text_that_the_tokenizer_gives_up_at(
    server: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its panic is no Exception: the connection was closed without a word."""

    class PanicException(BaseException):
        pass

    def give_up(*_: object, **__: object) -> None:
        raise PanicException("Onig: Regex search error: retry-limit-in-match over")

    with monkeypatch.context() as patch:
        patch.setattr(type(llm.tokenizer), "__call__", give_up)
        response = server.post("/v1/completions", {"prompt": "a"})
    assert response.status_code == 400 and "gives up at this text" in response.text


def test_a_long_text_keeps_nobody_waiting(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are made beside the event loop."""
    entered = threading.Event()
    others_done = threading.Event()

    def slow(*_: object) -> None:
        entered.set()
        assert others_done.wait(30)
        raise ValueError("read at last")

    monkeypatch.setattr(app, "read_completion", slow)
    monkeypatch.setattr(app, "LARGE_BODY_BYTES", 10)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.post, "/v1/completions", {"prompt": "a long text"})
        assert entered.wait(30)
        assert httpx.get(server.url + "/health", timeout=10).status_code == 200
        others_done.set()
        assert "read at last" in long.result(30).text


def test_a_body_that_is_too_large_is_refused_with_the_limit(
    server: Served, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 30}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as asking:
        asking.sendall(head.encode())  # and nothing of the body: it isn't waited for
        said = asking.recv(4096).decode()
    assert " 413 " in said.splitlines()[0]
    assert "more than 64 MiB" in said

    # One that doesn't say how large it is; and one that is too large beside others
    monkeypatch.setattr(app, "MOST_BODY_BYTES", 1000)
    with serving(llm) as small:
        body = json.dumps({"prompt": "a" * 2000}).encode()
        response = small.client.post("/generate", content=iter([body]))
        assert response.status_code == 413
        assert "64 MiB" in response.json()["error"]["message"]
        monkeypatch.setattr(app, "LARGE_BODY_BYTES", 100)
        monkeypatch.setattr(app, "MOST_READING_BYTES", 400)
        response = small.post("/v1/completions", {"prompt": "a" * 500})
        assert response.status_code == 429 and "Retry-After" in response.headers
        packed = gzip.compress(body)  # as large as it may be, for all that is known
        assert len(packed) < 100
        zipped = {"Content-Encoding": "gzip"}
        response = small.client.post("/v1/completions", content=packed, headers=zipped)
        assert response.status_code == 429
        response = small.post("/v1/completions", {"prompt": "a" * 200, **GREEDY})
        assert response.status_code == 200
        assert small.site.reading_bytes == 0


def test_a_server_that_stops_takes_no_more(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.site, "stopping", True)
    response = server.post("/v1/completions", {"prompt": "a"})
    assert response.status_code == 503 and response.headers["Retry-After"] == "1"
    assert server.get("/health").status_code == 503
    assert server.get("/metrics").status_code == 200  # who watches sees it come to its end


def test_a_server_whose_engine_failed_says_so(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.site.engine, "failure", RuntimeError("out of memory"))
    for response in (server.get("/health"), server.post("/v1/completions", {"prompt": "a"})):
        assert response.status_code == 503 and "out of memory" in response.text


def test_models_health_and_metrics(server: Served) -> None:
    (model,) = server.get("/v1/models").json()["data"]
    assert (model["id"], model["owned_by"], model["max_model_len"]) == ("tiny", "retool", 640)
    assert server.get("/v1/models/tiny").json() == model
    assert server.get("/health").json() == {"status": "ok"}
    lines = server.get("/metrics").text.splitlines()
    values = dict(line.split() for line in lines if not line.startswith("#"))
    assert int(values["retool_requests_total"]) >= 1
    assert values["retool_answers_under_way"] == "0"


def marks_of_a_stream(server: Served, reload: dict[str, Any]) -> list[str]:
    """The weights that a stream's events name, while others are loaded in the middle of it."""
    asked = {"prompt": TEXTS[0], "max_tokens": 200, "ignore_eos": True, "stream": True}
    commands = server.site.engine._commands
    asked_for = threading.Event()

    def hold() -> None:
        assert asked_for.wait(30)

    with (
        server.client.stream("POST", "/v1/completions", json=asked) as response,
        ThreadPoolExecutor(1) as other,
    ):
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        events = [json.loads(next(lines))]
        # The answer waits until the other request's command is there: it can't end before
        commands.put(hold)
        wait_until(commands.empty)
        answer = other.submit(httpx.post, server.url + "/collective_rpc", json=reload)
        wait_until(lambda: not commands.empty())
        asked_for.set()
        assert answer.result().status_code == 200
        events += [json.loads(line) for line in lines if line != "[DONE]"]
    return list(dict.fromkeys(event["system_fingerprint"] for event in events))


def mark_of_an_answer(server: Served, reload: dict[str, Any]) -> str:
    """The weights that a whole answer names, while others are loaded in the middle of it."""
    engine = server.site.engine
    stands = threading.Event()
    goes_on = threading.Event()

    def hold() -> None:
        stands.set()
        assert goes_on.wait(30)

    engine._commands.put(hold)
    assert stands.wait(30)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post, "/v1/completions", {"prompt": TEXTS[0], **GREEDY})
        wait_until(lambda: engine._commands.qsize() == 1)
        loaded = pool.submit(server.post, "/collective_rpc", reload)
        wait_until(lambda: engine._commands.qsize() == 2)
        goes_on.set()
        assert loaded.result().status_code == 200
        return answer.result().json()["system_fingerprint"]


def test_new_weights_and_who_may_bring_them(llm: LLM, folder: Path, tmp_path: Path) -> None:
    """Both dialects load a folder, after which its answers come."""
    other = write_model(tmp_path / "other", seed=1)
    with LLM(other, device="cpu", max_model_len=640) as reference:
        new = expected(reference, TEXTS[0]).outputs[0].text
    old = expected(llm, TEXTS[0]).outputs[0].text
    assert old != new
    asked = {"prompt": TEXTS[0], **GREEDY}
    rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(other)}}
    with serving(llm) as open_server:
        assert open_server.post("/collective_rpc", rpc).json() == {"results": [None]}
        answer = open_server.post("/v1/completions", asked).json()
        assert answer["choices"][0]["text"] == new
        assert answer["system_fingerprint"] == mark_of(str(other))
        back = {"model_path": str(folder), "weight_version": "seven"}
        assert open_server.post("/update_weights_from_disk", back).json()["success"] is True
        found = open_server.post("/generate", {"text": TEXTS[0]}).json()
        assert found["meta_info"]["weight_version"] == "seven"
        answer = open_server.post("/v1/completions", asked).json()
        assert answer["choices"][0]["text"] == old
        assert answer["system_fingerprint"] == mark_of(str(folder))
        marks = marks_of_a_stream(open_server, rpc)
        both = f"{mark_of(str(folder))}+{mark_of(str(other))}"
        assert marks == [mark_of(str(folder)), both]
        assert open_server.post("/update_weights_from_disk", back).status_code == 200
        assert mark_of_an_answer(open_server, rpc) == both
        assert open_server.post("/update_weights_from_disk", back).status_code == 200
    with serving(llm, may_change=False) as closed_server:
        response = closed_server.post("/collective_rpc", rpc)
        assert response.status_code == 403
        assert "--allow-weight-updates" in response.json()["error"]["message"]


def test_a_key(llm: LLM) -> None:
    with serving(llm, key="geheim") as served:
        assert served.get("/health").status_code == 200
        assert served.get("/v1/models").status_code == 401
        wrong = {"Authorization": "Bearer other"}
        body = {"prompt": "a"}
        assert served.post("/v1/completions", body, headers=wrong).status_code == 401
        no_text = {"Authorization": b"Bearer \xff"}
        assert served.post("/v1/completions", body, headers=no_text).status_code == 401
        right = {"Authorization": "Bearer geheim"}
        assert served.post("/v1/completions", body, headers=right).status_code == 200


def test_an_engine_that_fails_is_said_and_ends_the_server(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def step() -> Any:
        ended.wait(30)
        raise RuntimeError("out of memory")

    with serving(llm) as served, ThreadPoolExecutor() as pool:
        monkeypatch.setattr(llm.engine, "step", step)
        asked = {"prompt": "a"}
        whole = pool.submit(served.post, "/v1/completions", asked)
        streamed = pool.submit(served.post, "/v1/completions", {**asked, "stream": True})
        wait_until(lambda: served.site.engine.under_way == 2)
        ended.set()
        response = whole.result()
        assert response.status_code == 500 and "failed" in response.json()["error"]["message"]
        # All of it that can still be said once a stream has begun
        lines = streamed.result().text.split("\n\n")
        assert "failed" in json.loads(lines[0].removeprefix("data: "))["error"]["message"]
        assert lines[1:] == [""]
        wait_until(lambda: served.site.engine.failure is not None)
    monkeypatch.undo()
    for key in list(llm.engine.scheduler.sequences):
        llm.engine.drop(key)


@pytest.mark.slow  # 12 seconds: a process that loads a model
def test_the_command_answers_until_it_is_told_to_stop(folder: Path) -> None:
    """SIGTERM in the middle of an answer: it is finished first; new ones are refused."""
    words = [sys.executable, "-m", "retool.serve", str(folder), "--device", "cpu", "--port", "0"]
    words += ["--served-model-name", "tiny", "--max-num-seqs", "2"]
    process = warm.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        assert said.startswith("serving tiny at http://127.0.0.1:"), said + process.stderr.read()
        url = said.split()[-1]
        asked = {"prompt": TEXTS[0], "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url + "/completions", json=asked, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "stopping: 1 requests are being answered\n"
            refused = httpx.post(url + "/completions", json=asked)
            assert refused.status_code == 503 and "stopping" in refused.text
            last = [line for line in lines if line][-2:]
        assert '"finish_reason":"length"' in last[0] and last[1] == "data: [DONE]"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/nowhere"], "/nowhere"),
        (["{folder}", "--host", "0.0.0.0"], "RETOOL_API_KEY"),
        (["--port", "{taken}", "/nowhere"], "can't be used: [Errno"),
        (["--port", "99999", "/nowhere"], "must be 0-65535. Use another port"),
        (["--max-queue", "-1", "/nowhere"], "at least 0"),
        (["{folder}", "--chat-template", "no.jinja"], "error: --chat-template=no.jinja: there is"),
    ],
)
def test_the_command_says_what_is_wrong(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = [word.format(folder=folder, taken=port) for word in words]
        assert main(["--port", "0", *words, "--device", "cpu"], "retool serve") == 1
    assert said in capsys.readouterr().err
