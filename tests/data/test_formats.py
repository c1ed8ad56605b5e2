"""The forms that rows come in, each read from files as people have them, to the same conversation."""

import json

import datasets
import pandas as pd
import pytest

from retool.data.cache import open_dataset
from retool.data.read.chunk import RowError
from retool.data.read.row_format import RowFormat
from retool.data.read.rows import to_conversation
from retool.data.read.source import RowSource
from retool.data.tokenise import LengthLimit

QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}
CALL = {"type": "function", "function": {"name": "run", "arguments": {"code": "1+1"}}}
FUNCTION = {"name": "run", "parameters": {"type": "object", "properties": {}}}
WITH_TOOL = [
    {"role": "system", "content": "Be exact."},
    QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    ANSWER,
]
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": '{"name": "run", "arguments": {"code": "1+1"}}'},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2"},
    ],
    "system": "Be exact.",
    "tools": json.dumps([FUNCTION]),
}
FORMS = {
    "messages": ({"messages": [QUESTION, ANSWER]}, [QUESTION, ANSWER], "messages"),
    "parts": (
        {
            "messages": [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in (QUESTION, ANSWER)
            ]
        },
        [QUESTION, ANSWER],
        "messages",
    ),
    "sharegpt": (SHAREGPT, WITH_TOOL, "ShareGPT; human → user, gpt → assistant, function_call"),
    "alpaca": (
        {"instruction": "Add.", "input": "1+1?", "output": "2"},
        [{"role": "user", "content": "Add.\n\n1+1?"}, ANSWER],
        "Alpaca; instruction + input → user, output → assistant",
    ),
    "alpaca without input": (
        {"instruction": "1+1?", "input": "", "output": "2", "system": ""},
        [QUESTION, ANSWER],
        "Alpaca",
    ),
    "alpaca with rounds": (
        {"instruction": "1+1?", "output": "2", "history": [["Hi", "Hello"]], "system": "Be exact."},
        [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            QUESTION,
            ANSWER,
        ],
        "Alpaca",
    ),
    "messages and a column": (
        {"messages": [QUESTION, ANSWER], "system": "Be exact."},
        [{"role": "system", "content": "Be exact."}, QUESTION, ANSWER],
        "messages",
    ),
    "response and a column": (
        {"prompt": "1+1?", "response": "2", "system": "Be exact."},
        [{"role": "system", "content": "Be exact."}, QUESTION, ANSWER],
        "prompt and response",
    ),
    "prompt and completion": (
        {"prompt": "1+1?", "completion": "2"},
        [QUESTION, ANSWER],
        "prompt and completion; prompt → user",
    ),
    "prompt and completion as messages": (
        {"prompt": [QUESTION], "completion": [ANSWER]},
        [QUESTION, ANSWER],
        "prompt and completion",
    ),
    "prompt and response": (
        {"prompt": "1+1?", "response": "2"},
        [QUESTION, ANSWER],
        "prompt and response; prompt → user",
    ),
    "messages and a text": (
        {"prompt": [QUESTION], "response": "2"},
        [QUESTION, ANSWER],
        "prompt and response",
    ),
}


def conversations(file, **form):
    rows = RowSource(str(file), RowFormat(**form))
    rows.check_columns()
    return [
        to_conversation(row, chunk.file, index, rows.form)
        for chunk in rows.chunks()
        for index, row in chunk
    ]


FLAT = {name for name, (row, *_) in FORMS.items() if all(isinstance(v, str) for v in row.values())}
KINDS = ("json", "jsonl", "parquet", "saved", "csv")  # CSV holds texts alone


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in FORMS for kind in KINDS if kind != "csv" or name in FLAT],
)
def test_recognised_by_the_columns_whatever_the_file(tmp_path, name, kind):
    row, messages, words = FORMS[name]
    file = str(tmp_path / f"a.{kind}")
    data = datasets.Dataset.from_list([row] * 2, on_mixed_types="use_json")
    if kind == "csv":
        pd.DataFrame([row] * 2).to_csv(file, index=False)
    elif kind == "saved":
        data.save_to_disk(file)
    elif kind == "parquet":
        data.to_parquet(file)
    else:
        data.to_json(file, lines=kind == "jsonl")
    found = conversations(file)
    assert [entry.messages for entry in found] == [messages] * 2
    (said,) = RowSource(file).words()
    assert said.startswith(f"a.{kind}: {words}")


def test_tools_of_sharegpt_are_schemas(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([SHAREGPT]))
    (found,) = conversations(tmp_path / "a.json")
    assert found.tools == [{"type": "function", "function": FUNCTION}]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_prompt_that_stands_in_a_column_too(role):
    """It is the same one in parts, and with a line end: it isn't said twice."""
    first = {"role": role, "content": [{"type": "text", "text": "Be exact.\n"}]}
    row = {"messages": [first, QUESTION, ANSWER], "system": "Be exact."}
    said = [message["content"] for message in to_conversation(row, "a.json", 3).messages]
    assert said == ["Be exact.\n", "1+1?", "2"]


def test_columns_that_count_besides_and_those_that_nothing_reads_are_named(tmp_path):
    row = {**FORMS["messages"][0], "weight": 0.5, "source": "web", "system": "Be exact."}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    many = {**FORMS["messages"][0], **{f"c{i}": i for i in range(10)}}
    (tmp_path / "b.jsonl").write_text(json.dumps(many))
    assert RowSource(str(tmp_path)).words() == [
        "a.jsonl: messages; with system; not read: weight, source",
        "b.jsonl: messages; not read: c0, c1, c2, c3, c4, c5, c6, c7 and 2 more",
    ]


def test_files_of_several_forms_make_one_data_set(tmp_path, renderer_of):
    for i, name in enumerate(("messages", "alpaca without input", "prompt and response")):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(FORMS[name][0]))
    rows = RowSource(str(tmp_path))
    dataset, report = open_dataset(
        rows, renderer_of("hermes"), LengthLimit(512), num_workers=0, cache_dir=tmp_path / "cache"
    )
    assert report.rows == 3
    samples = [dataset[i] for i in range(3)]
    assert all(sample.tokens.tolist() == samples[0].tokens.tolist() for sample in samples)
    assert all(sample.mask.tolist() == samples[0].mask.tolist() for sample in samples)
    assert len(rows.words()) == 3


def test_a_turn_that_its_row_switches_off_is_context_and_is_said(tmp_path, renderer_of):
    weighted = {"from": "gpt", "value": "Hello", "weight": 0}
    turns = [{"from": "human", "value": "Hi"}, weighted, *SHAREGPT["conversations"][:1]]
    row = {"conversations": [*turns, {"from": "gpt", "value": "2", "weight": 1}]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    dataset, report = open_dataset(
        RowSource(str(tmp_path / "a.json")),
        renderer_of("chatml"),
        LengthLimit(512),
        num_workers=0,
        cache_dir=tmp_path / "cache",
    )
    trained = dataset[0].tokens[dataset[0].mask].tolist()
    assert renderer_of("chatml").encoder.said(trained) == "2<|im_end|>"
    assert "1 assistant turns with loss_mask or weight 0, context only" in report.sentence()


class TestUnclear:
    def test_columns_of_two_forms_name_the_key(self):
        columns = ["messages", "prompt", "response"]
        with pytest.raises(
            ValueError,
            match=r"a\.csv has the columns of several forms: messages \(messages\), prompt_response "
            r"\(prompt, response\)\. Say which: data\.format=messages",
        ):
            RowFormat().check("a.csv", columns)
        assert RowFormat(format="messages").check("a.csv", columns).format == "messages"
        assert RowFormat(multiturn=False).check("a.csv", columns).format == "prompt_response"

    def test_no_form_at_all_names_all_of_them(self):
        with pytest.raises(
            ValueError,
            match=r"has no column 'messages'; it has text\. Name .*messages_key.*alpaca \(instruction, "
            r"output\); prompt_completion",
        ):
            RowFormat().check("a.csv", ["text"])

    def test_a_form_that_was_named_and_is_not_there(self):
        with pytest.raises(ValueError, match=r"no column 'output'.*data\.format=alpaca needs it"):
            RowFormat(format="alpaca").check("a.csv", ["instruction"])
        with pytest.raises(ValueError, match=r"data\.format=vicuna is unknown: use auto, messages"):
            RowFormat(format="vicuna")

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            (
                {"conversations": [{"from": "narrator", "value": "x"}]},
                r"row 3, message 0: unknown speaker 'narrator' in 'from'; known are system, human",
            ),
            (
                {
                    "conversations": [
                        SHAREGPT["conversations"][0],
                        {"from": "function_call", "value": "f()"},
                    ]
                },
                r"message 1: its value isn't a call in JSON \(Expecting value",
            ),
            (
                {**SHAREGPT, "conversations": [{"from": "system", "value": "x"}]},
                "its column and its message .system. differ",
            ),
            (
                {"messages": [QUESTION, ANSWER], "system": True},
                "row 3: its column 'system' is bool, not text: rename it",
            ),
            ({"instruction": 3, "output": "x"}, "'instruction' is int, not text"),
            ({"instruction": "x", "output": None}, "'output' is NoneType, not text"),
            ({"instruction": "x", "output": "y", "history": ["Hi"]}, "'history' isn't a list of"),
            ({"prompt": "x", "completion": None}, "'completion' is NoneType, not text"),
        ],
    )
    def test_rows_that_are_refused(self, row, said):
        with pytest.raises(RowError, match=said):
            to_conversation(row, "a.json", 3)
