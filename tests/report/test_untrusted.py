"""Run folders of unknown origin, and very long runs: a page, or a fault, in bounded time and
memory.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from retool.files.html import write_page
from retool.files.untrusted import read_lines
from retool.report.__main__ import main
from retool.report.page import make_page
from retool.report.runs import _fitting, read_run
from retool.report.series import MOST_NAMES, MOST_STEPS, Series
from tests.bounded import bounded
from tests.report.conftest import write_metrics

DEEP = "[" * 100_000 + "]" * 100_000
NESTED = "[" * 900 + "]" * 900  # what the JSON reader takes, and a recursive writer doesn't


def page_of(folder: Path) -> Any:
    """What the command does, in a process with limits: (exit status, the page's data)."""

    def write() -> tuple[int, Any]:
        status = main([str(folder)])
        html = (folder / "report.html").read_text() if status == 0 else ""
        found = re.findall(
            r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL
        )
        return status, json.loads(found[0]) if found else None

    outcome = bounded(write, seconds=10)
    assert not outcome.error, outcome
    return outcome.value


def aliases(levels: int) -> str:
    """Each list is ten times the one before it."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (aliases(12), "no configuration: it has more than 20000 parts"),
        (merges(12), "isn't readable YAML"),
        ("a: &a [*a]", "no configuration: it is nested more than 20 levels deep"),
        (f"a: {DEEP[:20_000]}", "isn't readable YAML"),
        ("a: !!timestamp x", "isn't readable YAML"),
        ("a: 0x" + "f" * 10_000, "no configuration: it holds a number of hundreds of digits"),
        ("a: " + "9" * 10_000, "isn't readable YAML"),
        ("a: b\n" * 100_000, "more than 262144 bytes"),
    ],
    ids=range(8),
)
def test_a_configuration_that_is_a_bomb(tmp_path: Path, text: str, note: str) -> None:
    write_metrics(tmp_path, [{"step": 1, "train/loss": 1.0}])
    (tmp_path / "config.yaml").write_text(text)
    status, data = page_of(tmp_path)
    (run,) = data["runs"]
    assert status == 0 and run["config"] == {} and any(note in said for said in run["notes"]), run[
        "notes"
    ]
    assert run["metrics"] == {"train/loss": [1.0]}


def test_a_bad_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "trainer: {experiment_name: 2026-99-99}\nday: 2026-01-02\n"
    )
    notes: list[str] = []
    assert (
        read_run(tmp_path, "r").config
        == {"trainer.experiment_name": "2026-99-99", "day": "2026-01-02"}
        and not notes
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "report/train.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pipes_and_folders_are_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "report").mkdir()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    status, data = page_of(tmp_path)
    told = [*data["runs"][0]["notes"], "1 transcript" if data["torn"] else ""]
    assert status == 0 and any(
        word in note for note in told for word in ("is no file", "expected", "1 transcript")
    ), told


def test_metrics_that_are_none_are_counted(tmp_path: Path) -> None:
    lines = [
        DEEP,
        NESTED,
        '{"step": true, "a": 1}',
        '{"step": -1}',
        '{"step": 1e3}',
        f'{{"step": {10**30}}}',
        f'{{"step": 1, "a": {DEEP}}}',
        "x" * (2 << 20),
    ]
    lines += [
        f'{{"step": 2, "b": {NESTED}, "train/loss": 0.5}}',
        '{"step": 3, "a\\u001b[2J": 1}',
        json.dumps({"step": 3, "n" * 300: 1}),
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    _, data = page_of(tmp_path)
    (run,) = data["runs"]
    assert run["metrics"] == {"train/loss": [0.5, None]} and run["steps"] == [2, 3]
    assert run["notes"] == ["10 lines or values in metrics.jsonl are no metrics"]


def test_a_name_a_line_does_not_fill_the_memory(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(5_000):
            file.write(json.dumps({"step": step, f"name/{step}": 1.0}) + "\n")
    _, data = page_of(tmp_path)
    assert len(data["runs"][0]["metrics"]) == MOST_NAMES


def test_long_runs_are_thinned_and_keep_the_last_values() -> None:
    series = Series()
    for step in range(1, 100_001):
        series.add(
            step,
            {"step": step, "train/loss": step / 100_000}
            | ({"val/loss": float(step)} if step % 1000 == 0 else {}),
        )
    steps, metrics = series.columns()
    assert (
        series.stride == 16
        and MOST_STEPS / 2 < len(steps) <= MOST_STEPS
        and steps == sorted(steps)
        and steps[-1] == 100_000
    )
    assert all(
        loss == pytest.approx(step / 100_000, rel=1e-5)
        for step, loss in zip(steps, metrics["train/loss"], strict=True)
    )
    assert [value for value in metrics["val/loss"] if value is not None] == [
        float(step) for step in range(1000, 100_001, 1000)
    ], "none is lost"


def test_steps_far_apart_and_many_values_are_thinned_too() -> None:
    series = Series(most_values=1000)
    for step in range(0, 1 << 52, 1 << 40):
        series.add(step, {f"a{i}": 1.0 for i in range(20)})
    steps, metrics = series.columns()
    assert len(steps) * len(metrics) <= 1000 and steps[-1] == (1 << 52) - (1 << 40)


def test_transcripts_nested_or_split_without_end(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    good = {"step": 1, "prompt": "p", "segments": [{"role": "a", "text": "t"}]}
    strange = [
        f'{{"step": 1, "prompt": "p", "segments": [], "{key}": {NESTED}}}'
        for key in ("info", "split", "stop", "reward")
    ]
    strange += [
        f'{{"step": 1, "prompt": "p", "segments": [{{"role": {NESTED}, "text": "t"}}]}}',
        '{"step": true, "prompt": "p", "segments": []}',
    ]
    lines = [*strange, json.dumps(good), json.dumps({**good, "prompt": "x" * (9 << 20)})]
    (tmp_path / "report" / "x.jsonl").write_text("\n".join(lines) + "\n")
    _, data = page_of(tmp_path)
    assert len(data["transcripts"]) == 1 and data["torn"] == 7


def test_choosing_among_many_strata_takes_no_time() -> None:
    """20,000 steps with a transcript each, and one with 20,000: not the product of the two."""
    sizes = {number: [1] for number in range(20_000)} | {-1: [1] * 20_000}
    assert bounded(lambda: _fitting(sizes, 10**9)).value == 20_000 and _fitting(sizes, 20_005) == 5


@pytest.mark.parametrize(
    "text",
    [
        "?key" * 5000,
        "://" * 5000,
        "://a:" * 5000 + "@",
        "password=\"'" * 3000,
        "eyJ" * 5000,
        "-----BEGIN PRIVATE KEY-----" * 1000,
    ],
)
def test_texts_made_to_take_long_do_not(tmp_path: Path, text: str) -> None:
    (tmp_path / "report").mkdir()
    record = {"step": 1, "prompt": text, "segments": [{"role": "a", "text": text}]}
    (tmp_path / "report" / "x.jsonl").write_text(json.dumps(record) + "\n")
    _, data = page_of(tmp_path)
    assert len(data["transcripts"]) == 1


def test_a_folder_that_cannot_be_written_is_said_with_a_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an ordinary user: root may write everywhere."""
    run = tmp_path / "run"
    write_metrics(run, [{"step": 1, "train/loss": 1.0}])
    run.chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents[:3]):  # pytest's own, of several processes too
        parent.chmod(parent.stat().st_mode | 0o055)

    def as_nobody() -> str:
        if os.getuid() == 0:
            os.setuid(65534)
        write_page(make_page([read_run(run, "r")]), run / "report.html", "--out report.html")
        return ""

    error = bounded(as_nobody).error
    assert (
        error.startswith("ValueError")
        and str(run / "report.html") in error
        and "Give another place: --out" in error
    )


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one\n" + b"x" * 100 + b"\n" + b"two\n" + b"y" * 11 + b"\n" + b"last")
    assert list(read_lines(path, 10)) == [b"one\n", None, b"two\n", None, b"last"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_gigabyte_of_metrics_in_fifty_runs(tmp_path: Path) -> None:
    """Time grows with the bytes, memory does not: 1.35 GB took 71 s on one shared core, within
    1,500 MB of address space.
    """
    entry = {f"group/metric_{i}": 1.23456789012345 * i for i in range(60)}
    lines = "".join(json.dumps({"step": step, **entry}) + "\n" for step in range(1, 12_001))
    for number in range(50):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "metrics.jsonl").write_text(lines)
    total = sum(path.stat().st_size for path in tmp_path.glob("*/metrics.jsonl"))
    assert total > 10**9
    out = tmp_path / "report.html"
    outcome = bounded(
        lambda: main([*(str(tmp_path / f"run{n}") for n in range(50)), "--out", str(out)]),
        seconds=500,
        megabytes=1500,
    )
    assert outcome.value == 0 and out.stat().st_size < 60 << 20, outcome
    print(
        f"{total / 1e9:.2f} GB in {outcome.seconds:.0f} s, page of {out.stat().st_size / 1e6:.0f} MB"
    )
