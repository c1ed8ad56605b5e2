"""Files and rows: every form of naming files, every container, and a clear error for everything
else.
"""

import gzip
import json
import os
import signal
import tracemalloc

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool.data.read.chunk import Chunk, RowError
from retool.data.read.containers import plain
from retool.data.read.files import columns_of, file_identity, iter_chunks
from retool.data.read.names import resolve_files
from retool.data.read.row_format import RowFormat
from retool.data.read.rows import to_conversation
from retool.data.read.user_function import load_function
from retool.data.tokenise import LengthLimit, map_chunks, tokenise_chunk

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(files, **kwargs):
    return [entry for chunk in iter_chunks(files, **kwargs) for entry in chunk]


def refused(row, match, **kwargs):
    with pytest.raises(RowError, match=match) as caught:
        to_conversation(row, "train.parquet", 41, RowFormat(**kwargs))
    assert str(caught.value).startswith("train.parquet, row 41")


class TestFiles:
    def test_every_way_to_name_them(self, tmp_path):
        a = jsonl(tmp_path / "a.jsonl", [{}])
        b = jsonl(tmp_path / "b.jsonl", [{}])
        pq.write_table(pa.table({"x": [1]}), tmp_path / "c.parquet")
        (tmp_path / "README.md").write_text("not data")
        c = str(tmp_path / "c.parquet")
        assert resolve_files(a) == [a]
        assert resolve_files([b, a]) == [b, a]
        assert resolve_files(f"[{a},{b}]") == resolve_files(f"['{a}', '{b}']") == [a, b]
        assert resolve_files(str(tmp_path)) == [a, b, c]
        assert resolve_files(str(tmp_path / "*.jsonl")) == [a, b]
        assert resolve_files([str(tmp_path / "b*"), c]) == [b, c]

    def test_urls(self):
        memory = fsspec.filesystem("memory")
        with memory.open("/rows/part.jsonl", "w") as stream:
            stream.write(json.dumps({"messages": [USER, ANSWER]}) + "\n")
        with memory.open("/rows/part.parquet", "wb") as stream:
            pq.write_table(pa.table({"messages": [[USER, ANSWER]]}), stream)
        files = resolve_files("memory://rows")
        assert files == ["memory:///rows/part.jsonl", "memory:///rows/part.parquet"]
        assert resolve_files("memory://rows/*.parquet") == files[1:]
        found = [to_conversation(row, "f", i).messages for i, row in rows_of(files)]
        assert found == [[USER, ANSWER]] * 2
        assert columns_of(files[0]) == columns_of(files[1]) == ["messages"]
        assert file_identity(files[0]) != file_identity(files[1])

    def test_bad_names(self, tmp_path):
        for name, match in [
            ("nowhere.parquet", "doesn't exist"),
            ("*.parquet", "no file matches"),
            ("", "no .parquet or .jsonl|has no"),
        ]:
            with pytest.raises(ValueError, match=match):
                resolve_files(str(tmp_path / name) if name else str(tmp_path))
        (tmp_path / "rows.xml").write_text("<a/>")
        with pytest.raises(ValueError, match=r"none of \.parquet, \.jsonl.*custom_cls"):
            resolve_files(str(tmp_path / "rows.xml"))
        a = jsonl(tmp_path / "a.jsonl", [{}])
        with pytest.raises(ValueError, match="more than once"):
            resolve_files([a, str(tmp_path / "*.jsonl")])
        with pytest.raises(ValueError, match="no data file is named"):
            resolve_files([])

    def test_empty_and_broken_files(self, tmp_path):
        empty, header, broken, blank = (
            tmp_path / name for name in ("e.parquet", "h.parquet", "b.parquet", "b.jsonl")
        )
        empty.write_bytes(b"")
        pq.write_table(pa.table({"messages": pa.array([], pa.string())}), header)
        broken.write_bytes(b"PAR1 but no more")
        blank.write_text("\n\n")
        for path, match in [
            (empty, "is empty"),
            (header, "has no rows"),
            (broken, "isn't a readable parquet"),
            (blank, "has no rows"),
        ]:
            with pytest.raises(ValueError, match=match):
                columns_of(str(path))
            if path != blank:
                with pytest.raises(ValueError, match=match):
                    rows_of([str(path)])

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b'{\n  "messages": []\n}\n', "line 1 isn't JSON"),
            (b'[{"messages": []}]\n', "line 1 is a JSON list, not an object"),
            (gzip.compress(b'{"messages": []}\n'), "line 1 isn't JSON"),
            ('{"messages": []}\n'.encode("utf-16"), "line 1 isn't JSON"),
        ],
        ids=["pretty", "list", "gz", "utf-16"],
    )
    def test_a_file_without_a_row_says_what_is_there_instead(self, tmp_path, content, match):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"a\.jsonl, row 0: {match}.* A \.jsonl has an object"
        ):
            columns_of(str(tmp_path / "a.jsonl"))

    def test_missing_column_says_which_there_are(self):
        columns = ["turns", "tools"]
        with pytest.raises(
            ValueError,
            match=r"no column 'messages'; it has turns, tools.*data\.multiturn\.messages_key",
        ):
            RowFormat().check("a.jsonl", columns)
        RowFormat(messages_key="turns").check("a.jsonl", columns)
        with pytest.raises(ValueError, match=r"no column 'tool_list'.*data\.multiturn\.tools_key"):
            RowFormat(messages_key="turns", tools_key="tool_list").check("a.jsonl", columns)
        with pytest.raises(ValueError, match=r"no column 'response'.*data\.response_key"):
            RowFormat(multiturn=False, prompt_key="tools").check("a.jsonl", columns)

    def test_fields_that_only_later_lines_have(self, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", [{"messages": []}, {"messages": [], "functions": []}])
        assert columns_of(path) == ["messages", "functions"]
        RowFormat(tools_key="functions").check(path, columns_of(path))

    def test_rows_keep_their_numbers_over_chunks_and_limits(self, tmp_path):
        a = jsonl(tmp_path / "a.jsonl", [{"n": i} for i in range(600)])
        pq.write_table(
            pa.table({"n": list(range(600)), "unused": ["x"] * 600}),
            tmp_path / "b.parquet",
            row_group_size=100,
        )
        files = [a, str(tmp_path / "b.parquet")]
        both = rows_of(files, columns=["n"])
        assert [i for i, _ in both] == [*range(600), *range(600)]
        assert [row for _, row in both] == [{"n": i} for i in range(600)] * 2
        assert rows_of(files, columns=["n"], limit=700) == both[:700]
        assert rows_of(files, columns=["n"], limit=0) == []

    def test_bad_json_lines_are_named(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n{"n": \n[1]\n')
        found = rows_of([str(tmp_path / "a.jsonl")])
        assert [i for i, _ in found] == [0, 2, 3]
        assert "row 2: line 3 isn't JSON" in str(found[1][1])
        assert "row 3: line 4 is a JSON list" in str(found[2][1])

    def test_reading_is_bounded(self, tmp_path):
        """Going through a file of 20 MB never holds more than a few chunks of it."""
        row = (
            json.dumps({"messages": [USER, {"role": "assistant", "content": "x" * 10_000}]}) + "\n"
        )
        (tmp_path / "a.jsonl").write_text(row * 2_000)
        tracemalloc.start()
        rows = sum(len(chunk) for chunk in iter_chunks([str(tmp_path / "a.jsonl")]))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert rows == 2_000
        assert peak < 9e6

    def test_row_function(self, tmp_path):
        (tmp_path / "mine.py").write_text(
            "import numpy as np\n"
            "class Rows:\n    pass\n"
            "def rows(path):\n"
            "    for i in range(300):\n"
            "        yield {'messages': np.array([{'role': 'user', 'content': path}, {'role': 'assistant', 'content': str(i)}])}\n"
        )
        function = load_function(str(tmp_path / "mine.py"), "rows")
        found = rows_of(["anything.xyz"], rows_function=function)
        assert to_conversation(found[299][1], "f", 299).messages[1]["content"] == "299"
        with pytest.raises(ValueError, match="not a Dataset class"):
            load_function(str(tmp_path / "mine.py"), "Rows")
        with pytest.raises(ValueError, match="has no 'row'; it has Rows, rows"):
            load_function(str(tmp_path / "mine.py"), "row")
        with pytest.raises(ValueError, match="doesn't exist"):
            load_function(str(tmp_path / "other.py"), "rows")
        (tmp_path / "mine").write_text("def rows(path): pass\n")
        with pytest.raises(ValueError, match=r"mine isn't a Python file.*suffix \.py"):
            load_function(str(tmp_path / "mine"), "rows")
        for text, said in (
            ("\ndef rows(", r"SyntaxError: .*mine\.py, line 2"),
            ("\n\n1 / 0", r"ZeroDivisionError: .*, line 3"),
            (
                "import sys\nsys.exit(0)",
                r"SystemExit: 0 \(.*mine\.py, line 2\)\. Put .* under if __name__",
            ),
            ("import argparse\nargparse.ArgumentParser().parse_args(['x'])", "SystemExit: 2"),
        ):
            (tmp_path / "mine.py").write_text(text)
            with pytest.raises(ValueError, match=said):
                load_function(str(tmp_path / "mine.py"), "rows")
        ((_, bad),) = rows_of(["f"], rows_function=lambda path: [3])
        assert "gave a int, not a dict" in str(bad)


class TestContainers:
    def test_parquet_unions_are_undone(self, tmp_path):
        calls = [
            {"function": {"name": "f", "arguments": {"a": 1}}},
            {"function": {"name": "g", "arguments": {"b": ["x", None]}}},
        ]
        messages = [
            USER,
            {**ANSWER, "tool_calls": calls},
            {"role": "tool", "content": "r", "name": "f", "tool_call_id": "1"},
            {**ANSWER, "loss_mask": 0},
        ]
        pq.write_table(
            pa.Table.from_pylist([{"messages": messages, "tools": None}]), tmp_path / "a.parquet"
        )
        ((_, row),) = rows_of([str(tmp_path / "a.parquet")])
        assert row["messages"][0]["tool_calls"] is None  # what the format makes of an absent field
        found = to_conversation(row, "f", 0)
        assert found.messages[0] == USER
        assert [call["function"] for call in found.messages[1]["tool_calls"]] == [
            call["function"] for call in calls
        ]
        assert found.messages[2] == messages[2] and found.messages[3] == messages[3]
        assert found.tools is None

    def test_json_strings(self):
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
        calls = [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": null, "b": [1]}'},
            },
            {"name": "f", "arguments": ""},
        ]
        found = to_conversation(
            {
                "messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}],
                "tools": json.dumps(tools),
            },
            "f",
            0,
        )
        assert found.tools == tools  # a null inside JSON text was written on purpose
        assert found.messages[1]["content"] == ""
        assert found.messages[1]["tool_calls"][0] == {
            **calls[0],
            "function": {"name": "f", "arguments": {"a": None, "b": [1]}},
        }
        assert found.messages[1]["tool_calls"][1] == {
            "type": "function",
            "function": {"name": "f", "arguments": {}},
        }

    def test_numpy_and_arrow_all_the_way_down(self):
        raw = {
            "messages": np.array(
                [
                    USER,
                    {
                        "role": "assistant",
                        "content": np.str_("Hello"),
                        "loss_mask": np.float64(1.0),
                        "tool_calls": np.array(
                            [
                                {
                                    "function": {
                                        "name": "f",
                                        "arguments": {
                                            "n": np.int64(3),
                                            "xs": np.array([1.5, 2.0]),
                                            "t": (1, 2),
                                        },
                                    }
                                }
                            ]
                        ),
                    },
                ]
            ),
            "tools": pa.array([{"name": "f", "parameters": {"required": ["n"]}}]),
            "enable_thinking": np.bool_(True),
        }
        found = to_conversation(raw, "f", 0)
        assert json.loads(json.dumps(found.messages)) == found.messages
        assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {
            "n": 3,
            "xs": [1.5, 2.0],
            "t": [1, 2],
        }
        assert found.messages[1]["loss_mask"] == 1 and type(found.messages[1]["loss_mask"]) is int
        assert found.tools == [{"name": "f", "parameters": {"required": ["n"]}}]
        assert found.enable_thinking is True
        assert plain(pa.scalar([1, None])) == [1, None] and plain(pa.chunked_array([[1], [2]])) == [
            1,
            2,
        ]

    def test_pandas_writes_an_absent_number_as_nan(self):
        found = to_conversation(
            {"messages": [{**USER, "loss_mask": float("nan")}, {**ANSWER, "loss_mask": 0.0}]},
            "f",
            0,
        )
        assert found.messages == [USER, {**ANSWER, "loss_mask": 0}]

    def test_text_parts(self):
        parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
        assert (
            to_conversation(
                {"messages": [USER, {"role": "assistant", "content": parts}]}, "f", 0
            ).messages[1]
            == ANSWER
        )

    def test_single_turn(self):
        form = RowFormat(multiturn=False, prompt_key="question", response_key="answer")
        found = to_conversation({"question": "Hi", "answer": "Hello", "messages": 3}, "f", 0, form)
        assert found.messages == [USER, ANSWER]
        system = {"role": "system", "content": "S"}
        assert to_conversation(
            {"question": [system, USER], "answer": "Hello"}, "f", 0, form
        ).messages == [system, USER, ANSWER]


class TestWhatOpenAIWrites:
    @pytest.mark.parametrize("value", [0, 0.0, np.int64(0), False])
    def test_weight_is_loss_mask(self, value):
        found = to_conversation(
            {"messages": [USER, {**ANSWER, "weight": value}, USER, {**ANSWER, "weight": 1}]}, "f", 0
        )
        assert found.messages == [
            USER,
            {**ANSWER, "loss_mask": 0},
            USER,
            {**ANSWER, "loss_mask": 1},
        ]
        both = {**ANSWER, "weight": value, "loss_mask": 0}
        assert to_conversation({"messages": [USER, both]}, "f", 0).messages == [
            USER,
            {**ANSWER, "loss_mask": 0},
        ]

    @pytest.mark.parametrize("name", ["train", "training", "loss"])
    def test_other_trainers_switches(self, name):
        """Axolotl's and ms-swift's: a turn that its row switches off would be trained, unseen."""
        turns = [USER, {**ANSWER, name: False}, USER, {**ANSWER, name: True}]
        found = to_conversation({"messages": turns}, "f", 0).messages
        assert [message.get("loss_mask") for message in found] == [None, 0, None, 1]
        figure = {**ANSWER, name: 0.25}
        assert to_conversation({"messages": [USER, figure]}, "f", 0).messages == [USER, figure]
        refused(
            {"messages": [USER, {**ANSWER, name: False, "weight": 1}]},
            rf"message 1 \(assistant\): weight and {name} say the opposite",
        )

    def test_weights_that_cannot_be_honoured(self):
        refused(
            {"messages": [USER, {**ANSWER, "weight": 0.5}]},
            r"message 1 \(assistant\): weight is 0.5; it is 0 or 1",
        )
        refused(
            {"messages": [{**USER, "weight": 1}, ANSWER]},
            r"message 0 \(user\): weight is 1, but only what the assistant",
        )
        both = {**ANSWER, "weight": 0, "loss_mask": 1}
        refused(
            {"messages": [USER, both]},
            r"message 1 \(assistant\): loss_mask and weight say the opposite.*keep one",
        )

    def test_functions_and_function_call(self, tmp_path):
        call = {"name": "f", "arguments": '{"x": 1}'}
        body = {"name": "f", "parameters": {"type": "object"}}
        messages = [
            USER,
            {"role": "assistant", "content": None, "function_call": call},
            {"role": "function", "name": "f", "content": "2"},
            ANSWER,
        ]
        tools = [{"type": "function", "function": body}]
        for functions in ([body], json.dumps([body]), tools):
            found = to_conversation({"messages": messages, "functions": functions}, "f", 0)
            made = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
            assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": made}
            assert (
                found.messages[2] == {"role": "tool", "name": "f", "content": "2"}
                and found.tools == tools
            )
        pq.write_table(
            pa.Table.from_pylist([{"messages": messages, "functions": [body], "other": 1}]),
            tmp_path / "a.parquet",
        )
        ((_, row),) = rows_of([str(tmp_path / "a.parquet")], columns=RowFormat().columns)
        assert to_conversation(row, "f", 0).tools == tools and "other" not in row

    def test_what_is_said_twice_or_not_by_the_assistant_is_refused(self):
        call = {"name": "f", "arguments": "{}"}
        refused(
            {"messages": [USER, {**ANSWER, "function_call": call, "tool_calls": [call]}]},
            "'function_call' and 'tool_calls': keep one",
        )
        refused(
            {"messages": [{**USER, "function_call": call}, ANSWER]},
            "only the assistant makes tool calls",
        )
        refused({"messages": [USER, {**ANSWER, "function_call": "f()"}]}, "'function_call' is str")
        refused(
            {"messages": [USER, ANSWER], "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
            "'tools' and 'functions' differ: keep one",
        )

    def test_a_column_of_that_name_may_hold_something_else(self):
        for other in ("sums", ["a", "b"], None, []):
            assert (
                to_conversation({"messages": [USER, ANSWER], "functions": other}, "f", 0).tools
                is None
            )


class TestBrokenFiles:
    """Each ends in an error that names file and row."""

    def test_a_deep_line(self, tmp_path):
        deep = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
        (tmp_path / "a.jsonl").write_text('{"n": 1}\n' + deep + '{"n": ' + "9" * 5_000 + "}\n")
        found = rows_of([str(tmp_path / "a.jsonl")])
        assert "a.jsonl, row 1: line 2 is nested too deeply" in str(found[1][1])
        assert "a.jsonl, row 2: line 3 can't be read: Exceeds the limit" in str(found[2][1])
        assert columns_of(str(tmp_path / "a.jsonl")) == ["n"]

    def test_a_row_that_python_can_hold_and_not_go_through(self, renderer_of):
        value = []
        for _ in range(5_000):
            value = [value]
        refused(
            {
                "messages": [
                    USER,
                    {**ANSWER, "tool_calls": [{"name": "f", "arguments": {"x": value}}]},
                ]
            },
            "nested too deeply",
        )
        refused(
            {
                "messages": [
                    USER,
                    {**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"x": ' + "[" * 50_000}]},
                ]
            },
            "nested too deeply",
        )
        deep = {"x": json.loads("[" * 400 + "]" * 400)}
        rows = [{"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": deep}]}]}]
        made = tokenise_chunk(
            Chunk("rows", 5, rows), renderer_of("hermes"), RowFormat(), LengthLimit(10_000)
        )
        assert made.report.samples == 1 or "rows, row 5: " in made.refusals[0]

    def test_a_damaged_page(self, tmp_path):
        path = tmp_path / "a.parquet"
        table = pa.table({"messages": [json.dumps([i, "x" * 50]) for i in range(3_000)]})
        pq.write_table(table, path, row_group_size=1_000, compression="zstd", use_dictionary=False)
        data = bytearray(path.read_bytes())
        start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
        data[start + 40 : start + 140] = bytes(100)
        path.write_bytes(data)
        with pytest.raises(
            ValueError,
            match=r"a\.parquet is damaged: it can't be read from row (768|1,000) on .*Copy it again",
        ):
            rows_of([str(path)])

    def test_text_that_is_not_utf8_names_its_row(self, tmp_path):
        values = pa.array([b"good", b"\xff\xfe", b"good"]).cast(pa.binary())
        text = pa.Array.from_buffers(pa.string(), 3, values.buffers())
        pq.write_table(pa.table({"n": text}), tmp_path / "a.parquet")
        found = rows_of([str(tmp_path / "a.parquet")])
        assert [row for _, row in found[::2]] == [{"n": "good"}] * 2
        assert "a.parquet, row 1: it can't be read" in str(found[1][1])

    def test_a_name_that_is_not_utf8(self, tmp_path):
        (tmp_path / "good.jsonl").write_text("{}")
        with open(os.fsencode(tmp_path) + b"/\xff.jsonl", "w") as file:
            file.write("{}")
        for name in (
            str(tmp_path),
            str(tmp_path / "*"),
            os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"),
        ):
            with pytest.raises(ValueError, match=r"\\xff\.jsonl isn't UTF-8.*rename") as caught:
                resolve_files(name)
            str(caught.value).encode()

    def test_a_killed_tokenising_process(self, monkeypatch):
        monkeypatch.setattr("retool.data.tokenise.INLINE_CHUNKS", 0)
        chunks = [Chunk("train.jsonl", 256 * i, [{}] * 256) for i in range(4)]
        with pytest.raises(
            ValueError,
            match=r"killed, at train\.jsonl, rows (0 to 255|256 to 511).*data\.num_workers",
        ):
            list(map_chunks(killed, chunks, 1))


def killed(chunk):
    os.kill(os.getpid(), signal.SIGKILL)


class TestRefusals:
    @pytest.mark.parametrize(
        ("messages", "match"),
        [
            (None, r"isn't a list of messages \(NoneType\)"),
            ("Hi", r"isn't a list of messages \(str\)"),
            ([], r"isn't a list of messages \(empty\)"),
            (["Hi"], r"isn't a list of messages \(a list of str\)"),
            (
                [USER, {"role": "bot", "content": "x"}],
                r"message 1: unknown role 'bot'; known are system",
            ),
            ([USER, {"content": "x"}], r"message 1: unknown role None"),
            ([ANSWER, USER], "first turn is the assistant's"),
            ([{"role": "system", "content": "s"}, ANSWER], "first turn is the assistant's"),
            ([USER], "no assistant turn"),
            ([USER, {**ANSWER, "content": 3}], r"message 1 \(assistant\): content is int"),
            (
                [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER],
                r"message 0 \(user\): .*part of type 'image'",
            ),
            (
                [USER, {"role": "tool", "content": {"sum": 4}}, ANSWER],
                r"message 1 \(tool\): content is a dict, not text: store it as text",
            ),
            ([USER, {**ANSWER, "content": "\ud83d"}], "isn't valid Unicode"),
            ([USER, {**ANSWER, "loss_mask": 2}], r"message 1 \(assistant\): loss_mask is 2"),
            ([{**USER, "loss_mask": 1}, ANSWER], r"message 0 \(user\): loss_mask is 1"),
            (
                [{**USER, "tool_calls": [{"name": "f"}]}, ANSWER],
                "only the assistant makes tool calls",
            ),
            ([USER, {**ANSWER, "tool_calls": "f()"}], "'tool_calls' is str"),
            (
                [USER, {**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}],
                r"tool call 0: it has no function name",
            ),
        ],
    )
    def test_messages(self, messages, match):
        refused({"messages": messages}, match)

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ('{"code": ', "can't be parsed"),
            ("print(1)", "can't be parsed"),
            ("[1]", "are a list, not an object"),
            (3, "are a int, not an object"),
            ('{"x": [NaN]}', "hold NaN or an infinite number"),
            ({"x": float("inf")}, "hold NaN or an infinite number"),
        ],
    )
    def test_arguments(self, arguments, match):
        good = {"name": "f", "arguments": {}}
        turn = {
            **ANSWER,
            "tool_calls": [good, {"function": {"name": "run", "arguments": arguments}}],
        }
        refused(
            {"messages": [USER, turn]},
            rf"message 1 \(assistant\), tool call 1: the arguments of 'run' {match}",
        )

    @pytest.mark.parametrize(
        ("tools", "match"),
        [
            ("[{", "is text but not JSON"),
            ('{"name": "f"}', "is a dict, not a list"),
            ([{"type": "function"}], "tool 0 of 'tools' isn't a function schema"),
        ],
    )
    def test_tools(self, tools, match):
        refused({"messages": [USER, ANSWER], "tools": tools}, match)

    def test_the_rest(self):
        refused({"messages": [USER, ANSWER], "enable_thinking": "yes"}, "not true or false")
        refused({"text": "x", "id": 3}, "it has no column 'messages'; it has text, id")
        refused(
            {"prompt": "x", "response": None}, "'response' is NoneType, not text", multiturn=False
        )
        refused(
            {"prompt": 3, "response": "x"}, "'prompt' isn't a list of messages", multiturn=False
        )

    def test_prompts_need_no_answer(self):
        assert to_conversation({"messages": [USER]}, "f", 0, prompt_only=True).assistant_turns == []
