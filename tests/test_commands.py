"""`retool COMMAND …`: the commands there are, found by their names, and how they end."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from retool import __version__
from retool.__main__ import COMMANDS, OTHER_NAMES, main
from retool.config.command import calm_threads, calm_while_loading, exit_status, topics_of
from retool.parallel.launch import split

PACKAGE = Path(__file__).resolve().parents[1] / "retool"


def test_every_command_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """And a room that can be run (`python -m retool.sft`) is a command."""
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("usage: retool COMMAND")
    assert all(f"  retool {name} " in listed for name in COMMANDS)
    runnable = {path.parent.name for path in PACKAGE.glob("*/**/__main__.py")}
    assert runnable <= set(COMMANDS) and "sft" in runnable
    assert set(OTHER_NAMES.values()) <= set(COMMANDS) and not set(OTHER_NAMES) & set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([name, "--help"]))
    said = capsys.readouterr().out
    assert ended.value.code == 0 and len(said.splitlines()) > 4
    assert said.startswith(f"usage: retool {name} ")


def test_the_list_needs_nothing_heavy() -> None:
    program = (
        "import sys; from retool.__main__ import main; main([]); main(['--version']); "
        "from retool.config import command;"
        "print(sorted({'torch', 'numpy', 'rich', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    run = [sys.executable, "-c", program]
    said = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert said[-2:] == [f"retool {__version__}", "[]"]


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["stf"], "Did you mean retool sft?"),
        (["repotr", "run"], "Did you mean retool report?"),
        (["train", "x=1"], "Did you mean retool sft?"),
        (["GRPO"], "Did you mean retool rl?"),
        (["merge", "folder"], "Did you mean retool checkpoint?"),
        (["data.train_files=a.parquet"], "A command comes first: retool sft key=value …"),
        (["xyzzy"], "There is sft, rl, data, checkpoint,"),
    ],
)
def test_an_unknown_command(
    words: list[str], way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"retool {words[0]}: no such command.") and way_out in said.err
    assert not said.out


def test_the_long_name_and_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "sft"]) == 0
    assert capsys.readouterr().out.startswith("usage: retool sft ")
    assert main(["retool.sft", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: retool sft ")


def test_ctrl_c_ends_a_command_without_a_traceback() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_status(interrupted) == 130
    assert exit_status(lambda: 3) == 3


def test_a_reader_that_goes_away_ends_a_command_quietly() -> None:
    """`retool … | head`: what was written into the broken pipe is nobody's any more."""
    program = (
        "import sys; from retool.config.command import calm_threads, exit_status, topics_of;"
        "sys.exit(exit_status(lambda: [print('x' * 100) for _ in range(5000)] and 0))"
    )
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write_end, stderr=subprocess.PIPE, text=True
    )
    os.close(write_end)
    assert done.returncode == 141 and done.stderr == ""


def test_a_terminal_of_few_characters_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", output)
    assert exit_status(lambda: print("é …") or 0) == 0
    assert output.buffer.getvalue() == "é ?\n".encode("latin-1")


def test_another_broken_pipe_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise BrokenPipeError("a server's")

    with open(os.devnull, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError, match="server"):
            exit_status(broken)


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        ({"OMP_NUM_THREADS": "8"}, {}),
        ({"LOCAL_WORLD_SIZE": "1"}, {"OMP_WAIT_POLICY": "PASSIVE"}),
        ({"LOCAL_WORLD_SIZE": "2"}, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_threads_are_as_the_user_says_and_else_calm(
    given: dict[str, str], added: dict[str, str]
) -> None:
    environment = dict(given)
    calm_threads(environment)
    assert environment == {**given, **added}


def test_a_program_that_loads_torch_through_us_keeps_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    with calm_while_loading():  # torch is here already: nothing to be had
        assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delitem(sys.modules, "torch")
    before = dict(os.environ)
    with calm_while_loading():
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert dict(os.environ) == before


def test_topics_are_the_words_beside_help() -> None:
    assert topics_of(["--help", "data", "optim.lr"]) == ["data", "optim.lr"]
    assert topics_of(["data.max_length=3", "--check", "-h"]) == []


# --- several processes ---


def test_options_of_torchrun_are_told_from_keys() -> None:
    words = (
        "--nproc_per_node=2 --standalone --nnodes 1 data.max_length=3 --check --master-port 1 x=2"
    )
    assert split(words.split()) == (
        ["--nproc_per_node=2", "--standalone", "--nnodes", "1", "--master-port", "1"],
        ["data.max_length=3", "--check", "x=2"],
    )


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (-9, 137, "error: rank 0 was ended by SIGKILL.\n"),
        (signal.SIGINT, 130, ""),
    ],
)
def test_a_launcher_that_ends_without_a_traceback(
    end: int | signal.Signals | None,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def run(arguments: Any) -> None:
        asked.append(arguments)
        logging.getLogger("torch.distributed.elastic").error("failed (exitcode: 1)")
        if isinstance(end, signal.Signals):
            raise SignalException("ended", end)
        if end is not None:
            failure = ProcessFailure(0, 99, end, "no file")
            raise ChildFailedError("retool.sft", {0: failure})

    monkeypatch.setattr("torch.distributed.run.run", run)
    assert main(["sft", "--nproc_per_node=2", "data.train_files=x", "--check"]) == status
    (arguments,) = asked
    assert (arguments.nproc_per_node, arguments.standalone, arguments.module) == ("2", True, True)
    assert arguments.training_script == "retool.sft"
    assert arguments.training_script_args == ["data.train_files=x", "--check"]
    assert capfd.readouterr().err == said
    assert logging.root.manager.disable == logging.NOTSET


def test_options_that_torchrun_refuses_are_named_in_a_line(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["sft", "--nproc_per_node=many", "data.train_files=x"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: the launcher ended (ValueError: ") and "value: many" in line
    assert line.endswith("Check torchrun's options: --nproc_per_node=many")


def test_a_port_that_is_taken_is_told_with_the_way_out(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["sft", "--nproc_per_node=1", f"--master_port={port}"]) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: MASTER_PORT={port}: is taken by another process") and (
        "Choose another --master_port" in said
    )


@pytest.mark.slow
def test_a_fault_of_two_ranks_is_all_that_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "retool", "sft", "--nproc_per_node=2", "optim.learning_rate=1"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == "3 faults, nothing started" and len(lines) == 4
    assert "Did you mean optim.lr?" in lines[1]
