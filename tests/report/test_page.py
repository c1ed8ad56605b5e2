"""The report without a browser: what goes into the page, from folders that are whole, torn, hostile
or none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from retool.files.html import embed
from retool.metrics.transcripts import (
    Segment,
    Transcript,
    read_transcripts,
    split_by_mask,
    token_texts,
    write_transcripts,
)
from retool.report.__main__ import main, names_of
from retool.report.glossary import MEANINGS, meaning
from retool.report.page import ASSETS, make_page
from retool.report.runs import choose_transcripts, default_config, read_run
from retool.sft.config import SFTConfig
from tests.report.conftest import rl_run, sft_run, write_metrics


def data_of(html: str) -> dict[str, Any]:
    return json.loads(
        re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[0]
    )


def test_the_page_allows_its_own_scripts_and_styles_and_nothing_else(tmp_path: Path) -> None:
    html = make_page([read_run(sft_run(tmp_path / "run"), "run")])
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)[0]
    assert (
        policy.startswith("default-src 'none'; ")
        and "unsafe" not in policy
        and "http" not in policy
    )
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = [
            "'sha256-" + base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() + "'"
            for body in bodies
        ]
        assert len(bodies) == 2 and f"{kind} {' '.join(hashes)};" in policy
    assert not re.search(r"\b(?:src|href)=", html.split("</style>")[-1].split("<script")[0])
    assert "{{" not in re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_the_chart_library_is_whole_and_its_licence_comes_along() -> None:
    assert "uPlot (v1.6.32)" in (ASSETS / "uPlot.iife.min.js").read_text()[:80]
    assert "MIT License" in (ASSETS / "uPlot.LICENSE.txt").read_text()


def test_embedded_json_cannot_end_its_element() -> None:
    text = "</script><!-- <script> & \u2028\u2029 é"
    made = embed({"a": [text]})
    assert json.loads(made) == {"a": [text]} and not set("<>&\u2028\u2029") & set(made)


def test_what_training_left_behind_is_what_the_page_holds(tmp_path: Path) -> None:
    folder = sft_run(tmp_path / "run", steps=100)
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "train/lo')  # the run goes on
    run = data_of(make_page([read_run(folder, "run")]))["runs"][0]
    assert run["steps"] == list(range(1, 101))
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert run["metrics"]["train/loss"] == pytest.approx(losses, rel=1e-5)
    assert {
        step: value
        for step, value in zip(run["steps"], run["metrics"]["val/loss"], strict=True)
        if value is not None
    } == pytest.approx(
        {entry["step"]: entry["val/loss"] for entry in entries if "val/loss" in entry}, rel=1e-5
    )
    assert (
        run["config"]["optim.lr"] == "1e-05"
        and run["config"]["data.train_files"] == "[train.parquet]"
    )


def test_runs_that_just_began_or_broke(tmp_path: Path) -> None:
    write_metrics(tmp_path / "empty", [])
    assert read_run(tmp_path / "empty", "e").notes == ["no metrics yet"]
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_bytes(b'\x00\xff{"step": 1')
    (tmp_path / "torn" / "config.yaml").write_text("a: [unclosed")
    assert read_run(tmp_path / "torn", "t").notes == [
        "no metrics yet",
        "config.yaml isn't readable YAML",
    ]
    write_metrics(
        tmp_path / "odd",
        [
            {
                "step": 1,
                "train/loss": None,
                "text": "x",
                "flag": True,
                "huge": 10**400,
                "train/lr": 1.0,
            }
        ],
    )
    run = read_run(tmp_path / "odd", "o")
    assert (
        run.metrics["train/loss"] == [None]
        and run.metrics["train/lr"] == [1.0]
        and "text" not in run.metrics
        and "flag" not in run.metrics
    )
    assert data_of(make_page([run, read_run(tmp_path / "empty", "e")]))["runs"][1]["steps"] == []


def test_what_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 1 and "is not a folder" in capsys.readouterr().err
    assert (
        main([str(tmp_path)]) == 1
        and "neither metrics.jsonl nor config.yaml" in capsys.readouterr().err
    )
    folder = sft_run(tmp_path / "run", steps=3)
    assert main([str(folder)]) == 0 and (folder / "report.html").stat().st_size > 50_000
    assert "run: 3 steps with metrics" in capsys.readouterr().out
    assert (
        main([str(folder), "--out", str(tmp_path / "no" / "page.html")]) == 1
        and "error:" in capsys.readouterr().err
    )


def test_names_tell_runs_apart() -> None:
    assert names_of([Path("/a/b/x"), Path("/a/b/y")]) == ["x", "y"]
    assert names_of([Path("/a/one/x"), Path("/a/two/x")]) == ["one/x", "two/x"]


def test_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    folder = tmp_path / "run"
    tokens = ["key ", "hf_", "abcdefghij", "klmnopqrst", " correct-", "horse-battery"]
    segments = [
        Segment("assistant", "".join(tokens), tokens, [-1.0] * 6, 0.5, True),
        Segment("tool", "fine", ["fi", "ne"]),
    ]
    write_transcripts(
        folder,
        "train_000001",
        [
            Transcript(
                1, "s3://u:correct-horse-battery@x", segments, 1.0, info={"api_key": "zzzzzzzz"}
            )
        ],
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"trainer": {"token": "sesame-open", "project_name": "p"}})
    )
    html = make_page([read_run(folder, "run")])
    for secret in ("correct-horse", "horse-battery", "abcdefghij", "sesame-open", "zzzzzzzz"):
        assert secret not in html
    one = data_of(html)["transcripts"][0]
    assert (
        "tokens" not in one["segments"][0]
        and "<redacted>" in one["segments"][0]["text"]
        and one["segments"][1]["tokens"] == ["fi", "ne"]
    )


def test_transcripts_within_a_budget_are_spread_over_the_steps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long = Segment("assistant", "x" * 10_000)
    for step in range(1, 11):
        write_transcripts(
            folder,
            f"train_{step:06d}",
            [Transcript(step, f"{step}.{i}", [long]) for i in range(1 if step == 3 else 8)],
        )
    run = read_run(folder, "run")
    kept, left_out, torn = choose_transcripts([run], 300_000)
    assert torn == 0 and len(kept) + left_out == 73
    each = {step: [t["prompt"] for t in kept if t["step"] == step] for step in range(1, 11)}
    assert each[3] == ["3.0"] and all(
        prompts == [f"{step}.{i}" for i in range(3)] for step, prompts in each.items() if step != 3
    )
    assert len(json.dumps(kept)) < 300_000 < len(json.dumps(kept)) * 1.4
    assert len(choose_transcripts([run], 10**9)[0]) == 73 and choose_transcripts([run], 10)[0] == []


def test_torn_and_strange_transcripts_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "report"
    folder.mkdir(parents=True)
    good = {
        "step": 1,
        "prompt": "p",
        "segments": [
            {
                "role": "a",
                "text": "t",
                "tokens": ["t"],
                "logp": [1, 2],
                "mask": "x",
                "advantage": float("nan"),
            }
        ],
        "reward": float("inf"),
        "num_turns": "four",
        "stop": ["x"],
    }
    lines = [
        json.dumps(good),
        '{"step": 2, "prompt": "p", "segments": 3}',
        "[]",
        "null",
        "[" * 100_000,
        '{"step": 1e999}',
        json.dumps(good)[:40],
    ]
    (folder / "x.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    kept, left_out, torn = choose_transcripts([read_run(tmp_path / "run", "r")], 10**6)
    assert (len(kept), left_out, torn) == (1, 0, 6)
    assert kept[0]["reward"] is None and kept[0]["num_turns"] is None and kept[0]["stop"] == "['x']"
    assert kept[0]["segments"] == [{"role": "a", "text": "t", "mask": False, "tokens": ["t"]}]
    make_page([read_run(tmp_path / "run", "r")])


def test_transcripts_come_back_as_they_were_written(tmp_path: Path) -> None:
    segments = [
        Segment("assistant", "ab", ["a", "b"], [-0.123456, -math.inf], [0.5, 0.5], [True, True]),
        Segment("tool", "c", ["c"], mask=False),
    ]
    path = write_transcripts(
        tmp_path,
        "val_000003",
        [
            Transcript(
                3,
                "q\u2028",
                segments,
                math.nan,
                "eos",
                2,
                "aime",
                "4",
                "val",
                {"acc": 1.0, "x": [1]},
            )
        ],
    )
    assert path == tmp_path / "report" / "val_000003.jsonl" and [
        p.name for p in path.parent.iterdir()
    ] == ["val_000003.jsonl"]
    (record,) = read_transcripts(tmp_path)
    assert record == {
        "step": 3,
        "prompt": "q\u2028",
        "stop": "eos",
        "num_turns": 2,
        "data_source": "aime",
        "ground_truth": "4",
        "split": "val",
        "reward": None,
        "info": {"acc": 1.0},
        "segments": [
            {
                "role": "assistant",
                "text": "ab",
                "tokens": ["a", "b"],
                "logp": [-0.1235, None],
                "advantage": 0.5,
                "mask": True,
            },
            {"role": "tool", "text": "c", "tokens": ["c"], "mask": False},
        ],
    }


def test_a_response_is_split_where_the_writer_changes() -> None:
    segments = split_by_mask(
        ["a", "b", "\n", "out", "c"],
        [True, True, False, False, True],
        [-1, -2, 0, 0, -3],
        [7, 7, 0, 0, 7],
    )
    assert [(s.role, s.text, s.mask) for s in segments] == [
        ("assistant", "ab", True),
        ("tool", "\nout", False),
        ("assistant", "c", True),
    ]
    assert [list(s.logp) for s in segments] == [[-1, -2], [], [-3]] and segments[
        1
    ].advantage is None
    assert split_by_mask([], [], [], []) == []


@pytest.mark.parametrize("text", ["plain words", "naïve café 🙂🙂 漢字", "🙂", "x\ufffdy", ""])
def test_token_texts_join_to_the_text(text: str) -> None:
    """Tokens of one byte each: characters of several tokens appear with their last one."""
    texts = token_texts(list(text.encode()), lambda ids: bytes(ids).decode(errors="replace"))
    assert "".join(texts) == text and len(texts) == len(text.encode())
    assert (
        token_texts(list("🙂".encode())[:2], lambda ids: bytes(ids).decode(errors="replace"))[0]
        == ""
    )


def test_metrics_of_both_commands_are_explained(tmp_path: Path, repository: Path) -> None:
    sources = "".join(path.read_text() for path in (repository / "retool" / "rl").rglob("*.py"))
    for folder in (sft_run(tmp_path / "sft", steps=60), rl_run(tmp_path / "rl", steps=5)):
        for name in read_run(folder, "r").metrics:
            assert meaning(name).says, name
    told = [
        meaning(name)
        for name in re.findall(
            r'"((?:actor|filter|perf|reward|rollout_correction|tool)/\w+)"', sources
        )
    ]
    assert len(told) > 20 and all(m.says for m in told), [m.title for m in told if not m.says]
    assert len({m.title + m.unit for m in MEANINGS.values()}) >= len(MEANINGS) - 6
    assert (
        meaning("critic/score/max").title == "Score, highest"
        and not meaning("critic/score/max").first
    )
    assert (
        meaning("val-core/a/b/acc/mean@8").title == "Accuracy on a/b"
        and meaning("some/new_thing").title == "new thing"
    )


def test_changed_keys_are_told_from_defaults(tmp_path: Path) -> None:
    run = read_run(sft_run(tmp_path / "sft", steps=1, lr=3e-5), "r")
    defaults = default_config(run.config)
    changed = {
        key for key, value in run.config.items() if key in defaults and value != defaults[key]
    }
    assert changed == {"optim.lr", "data.max_length", "trainer.experiment_name"}
    assert "data.seed" not in defaults, "it follows trainer.seed"
    assert (
        default_config(read_run(rl_run(tmp_path / "rl", steps=1), "r").config)[
            "actor_rollout_ref.rollout.n"
        ]
        != ""
    )
    assert set(SFTConfig.__dataclass_fields__) >= {key.split(".")[0] for key in defaults}
