"""SandboxFusion: client and server against each other over HTTP, and each against a partner that
misbehaves.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from retool.sandbox import Limits, Result, Sandbox
from retool.sandbox.fusion_client import SandboxFusion
from retool.sandbox.fusion_server import Server
from retool.sandbox.fusion_types import RunRequest, result_from_json, result_to_json

GOOD = {
    "status": "Success",
    "message": "",
    "compile_result": None,
    "executor_pod_name": None,
    "files": {},
    "run_result": {
        "status": "Finished",
        "execution_time": 0.5,
        "return_code": 0,
        "stdout": "2\n",
        "stderr": "",
    },
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Sandbox(Limits(wall_seconds=20, memory_mb=256, flood_mb=4), workers=2) as sandbox:
        opened = Server(sandbox, port=0)
        thread = threading.Thread(target=opened.serve_forever)
        thread.start()
        yield opened
        opened.shutdown()
        opened.server_close()
        thread.join()


def ask(
    server: Server, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request(
        method,
        path,
        body,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content)


def post(server: Server, **fields: object) -> tuple[int, dict]:
    status, answer = ask(
        server, "POST", "/run_code", json.dumps(fields).encode(), Content_Type="application/json"
    )
    assert isinstance(answer, dict)
    return status, answer


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}/run_code"


def run(url: str, code: str, **options: object) -> Result:
    async def main() -> Result:
        client = SandboxFusion(url, retries=3, backoff=0.01)
        try:
            return await client.run(code, **options)  # type: ignore[arg-type]
        finally:
            await client.close()

    return asyncio.run(main())


def test_ping(server: Server) -> None:
    assert ask(server, "GET", "/v1/ping") == (200, "pong")


def test_a_run_as_the_api_has_it(server: Server) -> None:
    status, answer = post(
        server,
        code="print(1 + 1)",
        language="python",
        compile_timeout=10,
        run_timeout=10,
        memory_limit_MB=-1,
        stdin=None,
        files={},
        fetch_files=[],
    )
    assert status == 200
    seconds = answer["run_result"].pop("execution_time")
    assert 0 < seconds < 10
    assert answer == {
        **GOOD,
        "run_result": {"status": "Finished", "return_code": 0, "stdout": "2\n", "stderr": ""},
    }


def test_failed_and_timed_out(server: Server) -> None:
    failed = post(server, code="1/0", language="python")[1]
    assert (
        failed["status"],
        failed["run_result"]["status"],
        failed["run_result"]["return_code"],
    ) == ("Failed", "Finished", 1)
    assert "ZeroDivisionError" in failed["run_result"]["stderr"]
    late = post(server, code="print('x')\nwhile True: pass", run_timeout=0.5)[1]
    assert (late["status"], late["run_result"]["status"], late["run_result"]["stdout"]) == (
        "Failed",
        "TimeLimitExceeded",
        "x\n",
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"code": 1}, "code must be a string"),
        ({}, "code must be a string"),
        ({"code": "1", "language": "bash"}, "only python"),
        ({"code": "1", "run_timeout": -1}, "run_timeout"),
        ({"code": "1", "run_timeout": "soon"}, "run_timeout"),
        ({"code": "1", "memory_limit_MB": 1.5}, "memory_limit_MB"),
        ({"code": "1", "files": {"../x": ""}}, "work folder"),
        ({"code": "1", "files": {"x": "not base64!"}}, "base64"),
        ({"code": "1", "files": {"a": "", "a/b": ""}}, "can't lie in"),
        ({"code": "1", "fetch_files": ["/etc/passwd"]}, "work folder"),
        ({"code": "1", "fetch_files": "x"}, "list"),
    ],
)
def test_requests_that_are_wrong(server: Server, fields: dict, named: str) -> None:
    status, answer = post(server, **fields)
    assert status == 422 and named in answer["detail"]


def test_requests_from_where_they_should_not_come(server: Server) -> None:
    body = json.dumps({"code": "1"}).encode()
    jsonish = {"Content_Type": "application/json"}
    # What a web page's form can send
    assert ask(server, "POST", "/run_code", body, Content_Type="text/plain")[0] == 415
    assert ask(server, "POST", "/run_code", body)[0] == 415
    # DNS rebinding
    assert ask(server, "POST", "/run_code", body, **jsonish, Host="evil.example")[0] == 403
    assert ask(server, "GET", "/v1/ping", Host=f"evil.example:{server.port}")[0] == 403
    assert ask(server, "POST", "/run_code", body, **jsonish, Origin="http://evil.example")[0] == 403
    assert (
        ask(server, "POST", "/run_code", body, **jsonish, Host=f"localhost:{server.port}")[0] == 200
    )
    assert ask(server, "POST", "/elsewhere", body, **jsonish)[0] == 404
    assert ask(server, "GET", "/run_code")[0] == 404
    assert ask(server, "POST", "/run_code", b"{", **jsonish)[0] == 422
    assert ask(server, "POST", "/run_code", b"[" * 100_000, **jsonish)[0] == 422
    assert ask(server, "POST", "/run_code", b"", **jsonish, Content_Length=str(17 << 20))[0] == 413
    assert ask(server, "POST", "/run_code", b"", **jsonish, Content_Length="-5")[0] == 411


def test_beyond_loopback_a_token_is_required() -> None:
    with Sandbox(workers=1) as sandbox:
        with pytest.raises(ValueError, match="give a token"):
            Server(sandbox, "0.0.0.0", 0)
        opened = Server(sandbox, "0.0.0.0", 0, token="s3cret")
        thread = threading.Thread(target=opened.serve_forever)
        thread.start()
        try:
            body = json.dumps({"code": "1"}).encode()
            assert ask(opened, "POST", "/run_code", body, Content_Type="application/json")[0] == 401
            assert (
                ask(
                    opened,
                    "POST",
                    "/run_code",
                    body,
                    Content_Type="application/json",
                    Authorization="Bearer wrong",
                )[0]
                == 401
            )
            assert (
                ask(
                    opened,
                    "POST",
                    "/run_code",
                    body,
                    Content_Type="application/json",
                    Authorization="Bearer s3cret",
                )[0]
                == 200
            )
            refused = run(address(opened), "1")
            assert refused.status == "sandbox_error" and "401" in refused.reason

            async def main() -> Result:
                return await SandboxFusion(address(opened), token="s3cret").run("print(5)")

            assert asyncio.run(main()).stdout == "5\n"
        finally:
            opened.shutdown()
            opened.server_close()
            thread.join()


@pytest.mark.parametrize(
    ("code", "status", "named"),
    [
        ("print('hi')", "success", ""),
        ("```python\n1+1\n```", "success", ""),
        ("import sys\nsys.exit(4)", "error", ""),
        ("while True: pass", "timeout", "longer than 1 s"),
        ("bytearray(1 << 33)", "memory_limit", "256 MB"),
        ("while True: print('x' * 10000)", "output_limit", "4 MB"),
    ],
)
def test_every_outcome_survives_the_way(server: Server, code: str, status: str, named: str) -> None:
    over_http = run(address(server), code, timeout=1.0)
    directly = server.sandbox.run_blocking(code, timeout=1.0)
    assert over_http.status == directly.status == status
    assert named in over_http.reason and over_http.reason == directly.reason
    assert over_http.return_code == directly.return_code
    assert status == "output_limit" or (over_http.stdout, over_http.stderr) == (
        directly.stdout,
        directly.stderr,
    )


def test_files_travel(server: Server) -> None:
    result = run(
        address(server),
        "open('b', 'wb').write(open('d/a', 'rb').read() * 2)",
        files={"d/a": b"\x00\xff"},
        fetch=["b", "none"],
    )
    assert result.files == {"b": b"\x00\xff\x00\xff"}


@pytest.mark.parametrize("calls", [40, pytest.param(256, marks=pytest.mark.slow)])
def test_many_at_once(server: Server, calls: int) -> None:
    async def main() -> list[Result]:
        client = SandboxFusion(address(server), rate_limit=32)
        try:
            return await asyncio.gather(*(client.run(f"print({i})") for i in range(calls)))
        finally:
            await client.close()

    assert [result.stdout for result in asyncio.run(main())] == [f"{i}\n" for i in range(calls)]


def test_answers_of_other_servers() -> None:
    assert result_from_json(GOOD).status == "success"
    pod = {**GOOD, "executor_pod_name": "pod", "message": None, "files": None}
    assert result_from_json(pod).stdout == "2\n"
    crashed = {**GOOD, "status": "SandboxError", "message": "no container", "run_result": None}
    assert result_from_json(crashed).reason == "no container"
    for garbage in (
        {},
        [],
        "text",
        None,
        {"status": "Success"},
        {"status": "Success", "run_result": 3},
    ):
        with pytest.raises(ValueError, match="not a SandboxFusion answer"):
            result_from_json(garbage)


def test_requests_survive_json() -> None:
    request = RunRequest("code", "stdin", 3.0, 77, {"a": b"\xff"}, ["b"])
    assert RunRequest.from_json(json.loads(json.dumps(request.to_json()))) == request
    result = Result("memory_limit", "out", "err", None, 0.5, "too much", 3, 3, {"f": b"\x00"})
    assert result_from_json(json.loads(json.dumps(result_to_json(result)))) == result


# -- a server with faults
# ---------------------------------------------------------------------------------------------------------


class Faulty:
    """A listener on loopback whose n-th connection is treated as `script[n]` says; the last entry
    repeats.
    """

    def __init__(self, *script: Callable[[socket.socket], None]) -> None:
        self.script = script
        self.seen = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.1)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/run_code"
        self.ended = False
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.ended:
            try:
                connection = self.listener.accept()[0]
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(5)
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                head, _, body = request.partition(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                while len(body) < length:
                    body += connection.recv(65536)
                step = self.script[min(self.seen, len(self.script) - 1)]
                self.seen += 1
                step(connection)

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.thread.join()
        self.listener.close()


def answers(
    status: int, body: bytes, declared: int | None = None
) -> Callable[[socket.socket], None]:
    def step(connection: socket.socket) -> None:
        length = len(body) if declared is None else declared
        connection.sendall(
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
            % (status, length, body)
        )

    return step


def resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")


good = answers(200, json.dumps(GOOD).encode())
FAULTS = {
    "reset": resets,
    "429": answers(429, b"{}"),
    "502": answers(502, b"bad gateway"),
    "503": answers(503, b""),
    "504": answers(504, b""),
    "garbage": answers(200, b"<html>"),
    "wrong json": answers(200, b'{"a": 1}'),
    "half": answers(200, json.dumps(GOOD).encode()[:40], 400),
    "nothing": lambda connection: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_retried_until_it_passes(fault: str) -> None:
    with Faulty(FAULTS[fault], FAULTS[fault], good) as server:
        assert run(server.url, "1+1").stdout == "2\n"
        assert server.seen == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_named(fault: str) -> None:
    with Faulty(FAULTS[fault]) as server:
        result = run(server.url, "1+1")
        assert (
            result.status == "sandbox_error"
            and "4 times" in result.reason
            and server.url in result.reason
        )
        assert server.seen == 4


def test_a_refused_connection_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    result = run(f"http://127.0.0.1:{port}/run_code", "1")
    assert result.status == "sandbox_error" and "4 times" in result.reason


def test_other_errors_are_not_retried() -> None:
    with Faulty(answers(400, b"no such thing")) as server:
        result = run(server.url, "1")
        assert (
            result.status == "sandbox_error"
            and "HTTP 400: no such thing" in result.reason
            and server.seen == 1
        )


def test_a_long_queue_at_the_server_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty programs of three seconds at two workers: the last one's answer comes after a minute."""
    waited: list[float] = []

    async def post(
        self: object, url: str, *, timeout: httpx.Timeout, **_: object
    ) -> httpx.Response:
        waited.append(timeout.read or 0.0)
        return httpx.Response(400)

    monkeypatch.setattr(httpx.AsyncClient, "post", post)
    run("http://127.0.0.1:1/run_code", "1", timeout=3)
    assert waited[0] > 60 + 3


def test_a_slow_server_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()

    def slow(connection: socket.socket) -> None:
        assert given_up.wait(60)

    monkeypatch.setattr("retool.sandbox.fusion_client.QUEUE_SECONDS", 0.2)
    with Faulty(slow) as server:
        result = run(server.url, "1", timeout=0.3)
        given_up.set()
        assert result.status == "sandbox_error" and "no answer within" in result.reason
        assert server.seen == 1


def test_the_rate_limit_holds() -> None:
    most = under_way = 0
    lock = threading.Lock()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        nonlocal most, under_way
        with connection:
            connection.recv(65536)
            with lock:
                under_way += 1
                most = max(most, under_way)
            time.sleep(0.05)
            with lock:
                under_way -= 1
            good(connection)

    def accept() -> None:
        for _ in range(12):
            threading.Thread(target=serve, args=(listener.accept()[0],)).start()

    thread = threading.Thread(target=accept)
    thread.start()

    async def main() -> list[Result]:
        client = SandboxFusion(
            f"http://127.0.0.1:{listener.getsockname()[1]}/run_code", rate_limit=3
        )
        return await asyncio.gather(*(client.run("1") for _ in range(12)))

    assert all(result.ok for result in asyncio.run(main()))
    thread.join()
    listener.close()
    assert most == 3


def test_bad_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="http address"):
        SandboxFusion("localhost:8080")
    with pytest.raises(ValueError, match="rate_limit"):
        SandboxFusion("http://localhost:8080", rate_limit=0)


def test_the_published_client_works(server: Server) -> None:
    sandbox_fusion = pytest.importorskip(
        "sandbox_fusion", reason="the sandbox-fusion client package isn't installed"
    )
    sandbox_fusion.set_sandbox_endpoint(f"http://127.0.0.1:{server.port}")
    answer = sandbox_fusion.run_code(
        sandbox_fusion.RunCodeRequest(code="print(6 * 7)", language="python")
    )
    assert answer.status.value == "Success" and answer.run_result.stdout == "42\n"
