"""`doctor` and `serve`, as commands."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from retool.sandbox.__main__ import main
from retool.sandbox.doctor import report, verdict
from retool.sandbox.layers import GUARANTEES, LAYERS
from retool.sandbox.probe import find

COMMAND = [sys.executable, "-m", "retool.sandbox"]
REFUSE = str(Path(__file__).with_name("refuse.py"))


def test_doctor_here() -> None:
    done = subprocess.run(
        [*COMMAND, "doctor"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (*LAYERS, *GUARANTEES):
        assert name in done.stdout
    assert (
        "every guarantee has a mechanism" in done.stdout and "numpy and sympy works" in done.stdout
    )


def test_doctor_where_namespaces_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, REFUSE, *COMMAND, "doctor"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"user_namespace +no +.*Operation not permitted", done.stdout)
    assert re.search(r"no network +seccomp\n", done.stdout) and re.search(
        r"no host files +landlock\n", done.stdout
    )
    assert (
        re.search(r"no host file names +NOTHING\n", done.stdout) and "size and dates" in done.stdout
    )
    assert "REFUSED" in done.stdout and "apparmor_restrict_unprivileged_userns=0" in done.stdout
    assert "isolation=best_effort" in done.stdout and "numpy and sympy works" in done.stdout


def test_a_guarantee_without_mechanism_is_spelt_out() -> None:
    plan = find(frozenset({"seccomp", "network_namespace", "mount_namespace", "landlock"}))
    text = report(plan) + "\n" + verdict(plan)
    assert re.search(r"no network +NOTHING", text) and "REFUSED" in text
    assert (
        "CONFIG_SECCOMP_FILTER" in text and "Linux 5.13" in text and "left out on request" in text
    )


def test_serve_answers_and_ends_on_a_signal() -> None:
    with subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--workers", "1"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+/run_code", line)
        assert address, line
        request = urllib.request.Request(
            address[0], json.dumps({"code": "6*7"}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["run_result"]["stdout"] == "42\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_serve_refuses_the_open_network_without_a_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RETOOL_SANDBOX_TOKEN", raising=False)
    assert main(["serve", "--host", "0.0.0.0", "--port", "0", "--workers", "1"]) == 1
    assert "give a token" in capsys.readouterr().err
    assert main(["serve", "--port", "99999", "--workers", "1"]) == 1
    assert "port=99999 must be from 0 to 65535" in capsys.readouterr().err


def test_serve_says_which_port_is_taken_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port} can't be listened on (Address already in use)" in said
    assert "--port" in said
