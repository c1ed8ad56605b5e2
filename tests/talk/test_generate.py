"""`retool generate`: rows in, the same rows with answers out, however often it was stopped."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest

from retool.__main__ import main
from retool.config.command import in_own_words
from retool.llm.llm import LLM
from retool.preflight.identity import weights_checksum
from retool.rl.agent.formats.hermes import CALL_OPENS
from retool.talk import batch, writing
from retool.talk.answers import AnswersFile
from retool.talk.batch import Completion, answer_all
from retool.talk.options import OWN_WORDS
from retool.talk.questions import read_questions
from tests.llm.models import write_model

CALL = (
    '<tool_call>\n{"name": "code_interpreter", "arguments": {"code": "print(6 * 7)"}}\n</tool_call>'
)
END = "<|im_end|>"
ROWS = [
    {"prompt": "How much is 6*7?", "answer": "42"},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"question": "Why?"},
]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ahead", [1, 4])
def test_answers_come_in_order_with_calls_and_results(
    talker_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(batch, "AHEAD", ahead)  # 1: more answers than are begun at once
    script = {(i, s): [f"{i} {s}{END}"] for i in range(3) for s in range(2)}
    script[0, 1] = [f"So: {CALL}{END}", f"It is 42.{END}"]
    script[2, 0] = ["cut"]
    talker, engine = talker_of(script, n=2, max_tokens=100)
    questions = read_questions([write_rows(tmp_path / "rows.jsonl", ROWS)], talker)

    async def collect() -> list:
        return [pair async for pair in answer_all(talker, questions)]

    found = asyncio.run(collect())
    assert [question.row for question, _ in found] == ROWS
    by_row = [[answer.as_dict() for answer in answers] for _, answers in found]
    assert [[entry["text"] for entry in row] for row in by_row] == [
        ["0 0", "It is 42."],
        ["1 0", "1 1"],
        ["cut", "2 1"],
    ]
    messages = by_row[0][1]["messages"]
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
    assert messages[0]["content"] == "So:" and messages[1]["content"] == "42"
    assert messages[0]["tool_calls"][0]["function"]["arguments"] == {"code": "print(6 * 7)"}
    assert by_row[2][0]["finish_reason"] == "length" and by_row[0][0]["finish_reason"] == "stop"
    # A conversation is asked again from the user's last message on
    assert len(set(engine.seeds.values())) == 6
    assert "Hello" not in engine.text((1, 0), 0) and sorted(engine.dropped) == sorted(script)


def test_what_a_row_lacks_is_said_of_all_rows_at_once(talker_of, tmp_path: Path) -> None:
    talker, _ = talker_of({}, tools=False)
    rows = [{"x": 1}, {"x": 2}, {"prompt": "word " * 2000}, {"messages": []}, {"prompt": "good"}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError) as raised:
        read_questions([file], talker)
    said = str(raised.value)
    assert said.startswith("4 of 5 rows can't be used:") and "Name the column with --column" in said
    assert "row 0" in said and "1 more rows like it" in said and "the model takes 900" in said
    assert read_questions([file], talker, "x", most=0) == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "Who?"}], "text": "x"},
        {"messages": [{"role": "user", "content": "Who?"}], "text": "x"},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
        {"instruction": "Who?", "input": ""},
        {"instruction": "Who?", "output": "I."},
        {"prompt": "Who?", "completion": "I."},
        {"problem": "Who?", "answer": "I."},
        {"id": 3, "text": "Who?"},
        # Of several forms, the first
        {"messages": [{"role": "user", "content": "Who?"}], "conversations": [], "output": "I."},
    ],
)
def test_forms_of_rows(row: dict, talker_of, tmp_path: Path) -> None:
    talker, _ = talker_of({}, tools=False)
    (question,) = read_questions([write_rows(tmp_path / "rows.jsonl", [row])], talker)
    assert question.prompt.messages == [{"role": "user", "content": "Who?"}]


def test_errors_name_no_key_that_the_command_lacks(talker_of, tmp_path: Path) -> None:
    talker, _ = talker_of({}, tools=False)
    rows = [{"messages": "[]"}, {"messages": [{"role": "assistant", "tool_calls": "[]"}]}]
    (tmp_path / "rows.txt").write_text("Who?")
    splits = {"a": datasets.Dataset.from_list([{"prompt": "Who?"}])}
    datasets.DatasetDict({**splits, "b": splits["a"]}).save_to_disk(tmp_path / "saved")
    told = []
    for file in (
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "rows.txt",
        tmp_path / "saved",
    ):
        with pytest.raises(ValueError) as raised:
            read_questions([str(file)], talker)
        told.append(in_own_words(raised.value, OWN_WORDS))
    assert "data." not in "".join(told) and "store it as a list." in told[0]
    assert told[1].endswith(": convert it.")
    assert told[2].endswith(f"Say which: {tmp_path}/saved/a.")


def test_a_column_may_be_named(talker_of, tmp_path: Path) -> None:
    talker, _ = talker_of({}, tools=False)
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Not this", "ask": "Who?"}])
    (question,) = read_questions([file], talker, "ask")
    assert question.prompt.messages == [{"role": "user", "content": "Who?"}]


def test_the_tools_of_a_row_are_shown_where_none_run(talker_of, tmp_path: Path) -> None:
    talker, _ = talker_of({}, tools=False)
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi", "tools": [tool]}])
    (question,) = read_questions([file], talker)
    assert "look_up" in talker.llm.tokenizer.decode(question.prompt.ids)


def test_the_command_goes_on_from_its_part(
    folder: Path,
    own_llm: LLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"How much is {i}?"} for i in range(5)])
    out = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.partial"
    words = ["generate", str(folder), file, "--max-tokens", "6", "--n", "2", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "whole.jsonl")]) == 0
    whole = read_lines(tmp_path / "whole.jsonl")
    assert [entry["row"]["prompt"][-2] for entry in whole] == list("01234")
    assert all(len(entry["completions"]) == 2 for entry in whole)
    # Killed in the middle of its third line
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    settings = {
        "model": str(folder), "files": [file], "column": None, "max_rows": -1, "n": 2, "temperature": 1.0,
        "top_p": 1.0, "top_k": -1, "max_tokens": 6, "seed": 0, "tools": "none", "format": "auto",
        "session": False, "chat_template": None, "dtype": "auto", "max_model_len": None,
        "environment": None, "environment_kwargs": None,
    }  # fmt: skip
    stopped = AnswersFile(out, settings)
    stopped.begin([])
    stopped.close()
    with part.open("a") as grown:
        grown.write("".join(lines[:2]) + lines[2][:20])
    assert main([*words, "--out", str(out), "--seed", "1"]) == 1
    assert "begun with other settings (seed: 0 → 1)" in capsys.readouterr().err
    # How many are sampled at once changes nothing
    monkeypatch.setattr(writing, "open_llm", lambda *_, **__: nullcontext(own_llm))
    assert main([*words, "--out", str(out), "--max-num-seqs", "4"]) == 0
    assert "going on from" in (said := capsys.readouterr().err) and "2 rows are answered" in said
    assert read_lines(out) == whole and not part.exists()
    assert main([*words, "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_part_of_something_else_is_left_alone(tmp_path: Path) -> None:
    part = tmp_path / "out.jsonl.partial"
    part.write_text("not ours\n")
    with pytest.raises(ValueError, match="isn't a part of ours"):
        AnswersFile(tmp_path / "out.jsonl", {"n": 1})
    assert part.read_text() == "not ours\n"
    AnswersFile(tmp_path / "other.jsonl", {"n": 1}).close()
    assert list(tmp_path.iterdir()) == [part]  # a run that ends before it began leaves nothing
    with pytest.raises(ValueError, match="there is no folder"):
        AnswersFile(tmp_path / "none" / "out.jsonl", {})
    with pytest.raises(ValueError, match="is there already"):
        AnswersFile(Path("."), {})


def test_a_part_is_gone_on_with_by_one_process_and_for_the_same_rows(tmp_path: Path) -> None:
    """Each fault would put answers of two kinds into one file, in silence."""
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").touch()  # killed before it wrote anything
    rows = [{"prompt": "a", "x": float("nan")}, {"prompt": "b\ud800 ä"}, {"prompt": "c"}]
    first = AnswersFile(out, {"n": 1})
    late = AnswersFile(out, {"n": 1})
    first.begin(rows)
    with pytest.raises(ValueError, match="another process is writing"):
        late.begin(rows)
    first.write(rows[0], [{"text": "A"}])
    first.write(rows[1], [{"text": "Ä"}])
    first.close()
    for others in (rows[:1], [rows[0], rows[2]], [{}, *rows[1:]]):
        with pytest.raises(ValueError, match="answers other rows than there are now"):
            AnswersFile(out, {"n": 1}).begin(others)
    late.begin([*rows, {"prompt": "new"}])
    assert late.done == 2
    late.write(rows[2], [{"text": "C"}])
    later = AnswersFile(out, {"n": 1})
    late.finish()
    assert [entry["completions"][0]["text"] for entry in read_lines(out)] == ["A", "Ä", "C"]
    assert read_lines(out)[1]["row"] == rows[1]
    with pytest.raises(ValueError, match="is there already"):
        later.begin(rows)
    assert list(tmp_path.iterdir()) == [out]


def test_a_part_of_other_weights_is_not_gone_on_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder has a newer model by then."""
    run = tmp_path / "run"
    shutil.copytree(folder, run / "global_step_1" / "huggingface")
    settings = {"weights": weights_checksum(folder)}
    stopped = AnswersFile(tmp_path / "out.jsonl", settings)
    stopped.begin([])
    stopped.close()
    write_model(run / "global_step_2" / "huggingface", seed=1)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    words = ["generate", str(run), rows, "--out", str(tmp_path / "out.jsonl"), "--device", "cpu"]
    assert main(words) == 1
    assert f"other settings (weights: {settings['weights']} →" in capsys.readouterr().err


def test_ctrl_c_leaves_what_the_same_command_goes_on_from(
    folder: Path,
    talker_of,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talker, engine = talker_of({(i, 0): [f"{i}{END}"] for i in range(3)}, tools=False)
    out = tmp_path / "out.jsonl"

    def interrupt() -> None:
        if len(engine.dropped) == 2:
            raise KeyboardInterrupt

    engine.before_step = interrupt
    monkeypatch.setattr(writing, "open_llm", lambda *_, **__: nullcontext(talker.llm))
    words = [str(folder), write_rows(tmp_path / "rows.jsonl", ROWS), "--out", str(out)]
    assert main(["generate", *words]) == 130
    said = capsys.readouterr().err
    assert said == f"stopped: the same command goes on from {out}.partial\n"
    assert engine.idle() and not out.exists()
    engine.before_step = None
    engine.script = {(i, 0): [f"{i}{END}"] for i in range(3)}
    assert main(["generate", *words]) == 0
    assert [entry["completions"][0]["text"] for entry in read_lines(out)] == ["0", "1", "2"]


def test_answers_that_a_tool_lost_are_counted() -> None:
    tally = writing.Tally(2)
    tally.add([Completion([], "stop", 5), Completion([], "tool_failure", 2, "sandbox: gone")])
    assert "1 of 2 rows answered; 7 tokens" in tally.sentence()
    assert tally.sentence().endswith("; 1 answers lost to a tool that failed")


def test_an_interrupted_batch_leaves_the_engine_empty(talker_of, tmp_path: Path) -> None:
    script = {(i, 0): [f"{i}{END}"] for i in range(3)}
    talker, engine = talker_of(script, tools=False)
    questions = read_questions([write_rows(tmp_path / "rows.jsonl", ROWS)], talker)

    async def first() -> str:
        answers = answer_all(talker, questions)
        async for _, found in answers:
            await answers.aclose()
            return found[0].as_dict()["text"]
        return ""

    assert asyncio.run(first()) == "0" and engine.idle()
    assert CALL_OPENS not in engine.text((0, 0))
