"""What a row says an assistant wrote, against what a template shows of it: thoughts, calls, words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from retool.config import parse
from retool.data.audit.audit import audit
from retool.data.audit.summary import summary
from retool.data.cache import open_dataset
from retool.data.read.chunk import RowError
from retool.data.read.rows import to_conversation
from retool.data.read.source import RowSource
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.template.choose import exported_template, shows_contents_as_they_are
from retool.sft.config import SYNONYMS, SFTConfig
from retool.sft.preflight import audit_command, rendering_of, row_format
from tests.data.templates_table import CONVERSATIONS, call, said, small_tokenizer, tool
from tests.real_data import real_template

CHATML = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
BODY
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
WORDS = CHATML.replace("BODY", "{{- m.content or '' -}}")
TOOLS = "{{- tools | tojson if tools else '' -}}"


def calls_as(shown: str) -> str:
    """A template that shows the words of a message, and each of its calls like this."""
    return TOOLS + CHATML.replace(
        "BODY",
        "{{- m.content or '' -}}{%- for call in m.tool_calls or [] -%}" + shown + "{%- endfor -%}",
    )


def renderer(template: str, **settings: Any) -> Renderer:
    return Renderer(small_tokenizer("", template + "{#- <|im_start|> -#}"), Rendering(**settings))


def trained(made: Renderer, messages: list[dict[str, Any]], tools: Any = None) -> list[str]:
    row = {"messages": messages, "tools": tools}
    samples = made.pieces(to_conversation(row, "rows.jsonl", 7))
    return [piece.text for pieces in samples for piece in pieces if piece.trained]


def asked_for(
    arguments: dict[str, Any], **fields: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    message = said(
        "assistant",
        fields.pop("content", None),
        tool_calls=[call("look", 1, **arguments)],
        **fields,
    )
    return [said("user", "Look."), message], [tool("look", **dict.fromkeys(arguments, "string"))]


# -- thoughts
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_that_no_template_shows_is_refused_by_its_field(field):
    messages = [
        said("user", "Two plus two?"),
        said("assistant", "Four.", **{field: "Adding twos."}),
    ]
    refusal = rf"row 7, message 1 \(assistant\): .*doesn't show {field} \('Adding twos\.'\).*data\.reasoning_in_content=true"
    with pytest.raises(RowError, match=refusal):
        trained(renderer(WORDS), messages)
    assert trained(renderer(WORDS, drop_reasoning=True), messages) == ["Four.<|im_end|>"]
    in_content = ["<think>\nAdding twos.\n</think>\n\nFour.<|im_end|>"]
    assert trained(renderer(WORDS, reasoning_in_content=True), messages) == in_content
    assert trained(renderer(WORDS, chat_template="hermes"), messages) == in_content


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_a_template_gets_the_thought_under_the_name_that_it_reads(field):
    made = renderer(
        CHATML.replace(
            "BODY", "{{- '(' + m.thinking + ') ' if m.thinking else '' -}}{{- m.content -}}"
        )
    )
    messages = [
        said("user", "Two plus two?"),
        said("assistant", "Four.", **{field: "Adding twos."}),
    ]
    assert trained(made, messages) == ["(Adding twos.) Four.<|im_end|>"]


def test_only_trained_turns_need_their_thoughts():
    messages = [
        said("user", "Hi"),
        said("assistant", "Ho", reasoning="Rhyme.", loss_mask=0),
        said("user", "Hm"),
        said("assistant", "Ha"),
    ]
    assert trained(renderer(WORDS), messages) == ["Ha<|im_end|>"]
    with pytest.raises(RowError, match=r"message 1 .*doesn't show reasoning "):
        trained(renderer(WORDS), [*messages[:1], {**messages[1], "loss_mask": 1}, *messages[2:]])


def test_a_thought_in_content_that_is_cut_off_is_refused():
    made = renderer(CHATML.replace("BODY", "{{- m.content.split('</think>')[-1] -}}"))
    messages = [
        said("user", "Two plus two?"),
        said("assistant", "<think>Adding twos.</think>Four."),
    ]
    with pytest.raises(
        RowError,
        match=r"doesn't show the thought in the content \('Adding twos\.'\).*data\.drop_reasoning=true",
    ):
        trained(made, messages)
    empty = [messages[0], said("assistant", "<think>\n\n</think>Four.")]
    assert trained(made, empty) == ["Four.<|im_end|>"]  # nothing was thought, so nothing is lost


def test_a_thought_behind_its_call_is_refused():
    words = "{{- m.content or '' -}}"
    end = "{{- '<|im_end|>\\n' -}}"
    behind = (
        calls_as("<call>{{ call.function | tojson }}</call>")
        .replace(words, "")
        .replace(end, words + end)
    )
    messages, tools = asked_for({"place": "Rome"}, content="<think>Ask.</think>")
    with pytest.raises(
        RowError,
        match=r"shows what this turn thinks \('Ask\.'\) only after its calls.*data\.chat_template=hermes",
    ):
        trained(renderer(behind), messages, tools)


def test_a_thought_given_twice_is_refused():
    messages = [said("user", "Q"), said("assistant", "<think>T</think>A", reasoning="T")]
    with pytest.raises(RowError, match=r"message 1 .*given twice, in reasoning and in the content"):
        trained(renderer(WORDS), messages)
    messages[1] = said("assistant", "A", reasoning="T", thinking="U")
    with pytest.raises(
        RowError, match="reasoning and thinking are two names for one thing, and differ"
    ):
        trained(renderer(WORDS), messages)
    messages[1] = said("assistant", "A", reasoning={"effort": "high"})
    with pytest.raises(RowError, match="reasoning is a dict, not text"):
        trained(renderer(WORDS), messages)


def test_what_is_dropped_is_counted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    thinking = [
        said("user", "Q"),
        said("assistant", "<think>T</think>A"),
        said("user", "R"),
        said("assistant", "B", reasoning="U"),
    ]
    plain = [said("user", "Q"), said("assistant", "A")]
    rows.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in (thinking, plain))
    )
    made = renderer(WORDS, drop_reasoning=True)
    found = audit(RowSource(str(rows)), made, num_workers=0)
    assert found.tally.dropped_thoughts == 2 and found.tally.refused == 0
    assert (
        "reasoning left out",
        "2 turns are trained without their reasoning (data.drop_reasoning)",
    ) in summary(found)
    _, report = open_dataset(
        RowSource(str(rows)), made, num_workers=0, cache_dir=tmp_path / "cache"
    )
    assert (
        report.dropped_thoughts == 2
        and "2 turns trained without their reasoning" in report.sentence()
    )
    assert (
        renderer(WORDS).fingerprint()
        != made.fingerprint()
        != renderer(WORDS, reasoning_in_content=True).fingerprint()
    )


def test_a_thought_that_is_not_closed_is_counted_and_named(tmp_path):
    rows = tmp_path / "rows.jsonl"
    conversations = [
        [said("user", "Q"), said("assistant", "<think>T</think>A <think>U")],
        [said("user", "Q"), said("assistant", "T</think>A")],  # R1's prompt opens it
        [said("user", "<think>"), said("assistant", "<think></think>A")],
        [
            said("user", "Q"),
            said("assistant", "[THINK]T"),
            said("user", "R"),
            said("assistant", "B"),
        ],
        [
            said("user", "Q"),
            {**said("assistant", "<think>T"), "loss_mask": 0},
            said("user", "R"),
            said("assistant", "B"),
        ],
        *[[said("user", "Q"), said("assistant", "<thinking>T")]] * 2,
    ]
    rows.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))
    made = renderer(WORDS)
    found = audit(RowSource(str(rows)), made, num_workers=0)
    assert not found.tally.refusals
    note = dict(summary(found))["thoughts left open"]
    assert note.startswith("4 turns open a thought and don't close it, and are trained so: ")
    places = [f"rows.jsonl, row {row}, message 1" for row in (0, 3, 5)]
    assert [place.split("/")[-1] for place in found.tally.open_places] == places
    assert note.endswith("; …")
    cache = tmp_path / "cache"
    _, report = open_dataset(RowSource(str(rows)), made, num_workers=0, cache_dir=cache)
    assert "4 turns whose thought isn't closed" in report.sentence()


# -- calls
# ------------------------------------------------------------------------------------------------------------

ARGUMENTS = {"place": 'the "Old" Town', "days": 3, "indoors": True, "tags": ["a", "b"]}


def test_a_template_that_prints_arguments_gets_them_as_json():
    """Python would print {'place': …}, which no parser of calls reads."""
    made = renderer(
        calls_as('{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}')
    )
    (text,) = trained(made, *asked_for(ARGUMENTS))
    assert json.loads(text.removesuffix("<|im_end|>")) == {"name": "look", "arguments": ARGUMENTS}


def test_what_python_prints_is_refused():
    made = renderer(
        calls_as(
            "{{ call.function.name }} {%- if call.function.arguments.items() %} {{ call.function.arguments }}{% endif %}"
        )
    )
    with pytest.raises(
        RowError,
        match=r"arguments of 'look' stand there neither as JSON nor one by one.*data\.chat_template=hermes",
    ):
        trained(made, *asked_for(ARGUMENTS))


@pytest.mark.parametrize("order", ["items()", "items() | sort"])
def test_arguments_may_stand_one_by_one_in_the_template_s_own_form(order):
    value = "{{ v if v is string else v | tojson }}"
    form = (
        "<f={{ call.function.name }}>{%- for k, v in call.function.arguments."
        + order
        + " %}<p={{ k }}>"
        + value
        + "</p>{% endfor %}</f>"
    )
    (text,) = trained(renderer(calls_as(form)), *asked_for(ARGUMENTS))
    assert (
        '<p=place>the "Old" Town</p>' in text
        and "<p=indoors>true</p>" in text
        and '<p=tags>["a", "b"]</p>' in text
    )


def test_a_value_that_is_left_out_is_missed():
    form = "<f={{ call.function.name }}>{%- for k, v in call.function.arguments.items() if k != 'days' %}<p={{ k }}>{{ v }}</p>{% endfor %}"
    with pytest.raises(RowError, match="changes the tool call"):
        trained(renderer(calls_as(form)), *asked_for({"place": "Rome", "days": 3}))


def test_arguments_that_look_like_a_call_are_arguments():
    arguments = {"name": 5, "arguments": {"name": "look", "n": 1.0}}
    made = renderer(calls_as("{{ call.function | tojson }}"))
    (text,) = trained(made, *asked_for(arguments))
    assert json.loads(text.removesuffix("<|im_end|>"))["arguments"] == arguments
    changed = renderer(calls_as("{{ call.function | tojson | replace('1.0', '1') }}"))
    with pytest.raises(RowError, match="changes the tool call"):
        trained(changed, *asked_for(arguments))


def test_a_token_that_closes_each_call_ends_no_turn():
    form = "<|im_sep|>{{ call.function | tojson }}<|call_end|>"
    bare = calls_as(form).replace(
        "{{- '<|im_end|>\\n' -}}",
        "{{- '' if m.tool_calls and m.tool_calls | length == 1 else '<|im_end|>\\n' -}}",
    )
    with pytest.raises(RowError, match="no end-of-turn token closes"):
        trained(renderer(bare), *asked_for({"place": "Rome"}))
    once = bare.replace("<|call_end|>", "").replace("{{- '' if", "{{- '<|call_end|>' if")
    assert trained(renderer(once), *asked_for({"place": "Rome"}))[0].endswith("<|call_end|>")


# -- templates
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tool call", "parallel calls", "plain chat"])
def test_a_template_for_tools_beside_a_default_one(name):
    """Hermes 3 has two, and closes the last tool result otherwise than earlier ones."""
    with_tools = real_template("NousResearch-Hermes-3-Llama-3.1-8B-tool_use")
    tokenizer = small_tokenizer("NousResearch", with_tools)
    tokenizer.chat_template = {"default": WORDS, "tool_use": with_tools}
    row = CONVERSATIONS[name]
    texts = trained(Renderer(tokenizer), row["messages"], row.get("tools"))
    assert len(texts) == 2 and all(text.endswith("<|im_end|>") for text in texts)


def test_ours_begins_with_bos_and_ends_with_eos_where_the_tokenizer_has_nothing_else(tmp_path):
    llama = small_tokenizer("meta-llama", "{{ bos_token }}<|start_header_id|>")
    made = Renderer(llama, Rendering("hermes"))
    assert made.text([said("user", "Hi")]) == "<|begin_of_text|><|im_start|>user\nHi<|eot_id|>\n"
    assert made.ends.known == ("<|eot_id|>",)
    # Its glue is still known to be made of the contents alone
    assert shows_contents_as_they_are(llama, made.template, {})
    llama.save_pretrained(tmp_path)
    assert exported_template(tmp_path, "hermes") == made.template
    assert exported_template(tmp_path, None) is None
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.chat_template = exported_template(tmp_path, "hermes")
    assert Renderer(loaded).text([said("user", "Hi")]) == made.text([said("user", "Hi")])


def test_ours_keeps_chatml_where_the_tokenizer_knows_it():
    made = Renderer(small_tokenizer("", WORDS + "{#- <|im_start|> -#}"), Rendering("hermes"))
    assert made.text([said("user", "Hi")]) == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_template_that_can_t_end_turns_names_ours_only_where_that_fits():
    endless = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(
        ValueError,
        match=r"couldn't learn to stop\. .*data\.chat_template=hermes fits this tokenizer",
    ):
        renderer(endless)
    llama = small_tokenizer("meta-llama", endless)
    llama.eos_token = None
    with pytest.raises(ValueError, match="Add a token to this tokenizer"):
        Renderer(llama)


def test_settings_that_refusals_name_are_a_run_s(tmp_path):
    """From the words of a command line to the renderer, and to the audit that reads the same rows."""
    small_tokenizer("", WORDS + "{#- <|im_start|> -#}").save_pretrained(tmp_path)
    words = [
        f"model.partial_pretrain={tmp_path}",
        "data.train_files=rows.jsonl",
        "data.apply_chat_template_kwargs.enable_thinking=true",
    ]
    for setting in ("drop_reasoning", "reasoning_in_content"):
        config = parse(
            SFTConfig,
            [
                *words,
                f"data.{setting}=true",
                "data.multiturn.history=split",
                "data.chat_template=hermes",
            ],
            SYNONYMS,
        )
        made = rendering_of(config, "2026-11-29")
        assert getattr(made, setting)
        assert made.chat_template == "hermes" and made.history == "split"
        assert made.template_kwargs == {"enable_thinking": True}
        assert f"--{setting.replace('_', '-')}" in audit_command(config, ["rows.jsonl"]).split()


def test_the_audit_reads_the_columns_that_the_run_does() -> None:
    keys = ["messages", "tools", "enable-thinking", "prompt", "response"]
    words = [
        "model.partial_pretrain=m",
        "data.train_files=rows.jsonl",
        "data.format=prompt_response",
    ]
    for key in keys:
        place = "data" if key in ("prompt", "response") else "data.multiturn"
        words.append(f"{place}.{key.replace('-', '_')}_key=my_{key}")
    config = parse(SFTConfig, words, SYNONYMS)
    read = row_format(config)
    command = audit_command(config, ["rows.jsonl"])
    for key in keys:
        assert getattr(read, f"{key.replace('-', '_')}_key") == f"my_{key}"
        assert f"--{key}-key my_{key}" in command
    assert "--format prompt_response" in command and read.format == "prompt_response"


# -- other fields
# -----------------------------------------------------------------------------------------------------


def test_thoughts_as_parts_of_the_content():
    parts = [
        {
            "type": "thinking",
            "thinking": [{"type": "text", "text": "Adding "}, {"type": "text", "text": "twos."}],
        },
        {"type": "text", "text": "Four"},
        {"type": "text", "text": "."},
    ]
    asked = said("user", [{"type": "text", "text": "Two plus two?"}])
    with pytest.raises(RowError, match=r"doesn't show reasoning_content \('Adding twos\.'\)"):
        trained(renderer(WORDS), [asked, {"role": "assistant", "content": parts}])
    texts = trained(
        renderer(WORDS, chat_template="hermes"), [asked, {"role": "assistant", "content": parts}]
    )
    assert texts == ["<think>\nAdding twos.\n</think>\n\nFour.<|im_end|>"]
    with pytest.raises(
        RowError,
        match=r"message 1 \(assistant\): content has a part of type 'reasoning' behind text",
    ):
        trained(
            renderer(WORDS),
            [
                asked,
                {"role": "assistant", "content": [*parts, {"type": "reasoning", "text": "Done."}]},
            ],
        )
    with pytest.raises(RowError, match="only the assistant thinks"):
        trained(renderer(WORDS), [{"role": "user", "content": parts}, said("assistant", "A")])
    with pytest.raises(RowError, match="reasoning_content and a part of the content differ"):
        trained(
            renderer(WORDS),
            [asked, {"role": "assistant", "content": parts, "reasoning_content": "Else."}],
        )


def test_a_refusal_that_is_a_field_is_not_left_out():
    messages = [said("user", "Q"), said("assistant", refusal="No, never.")]
    with pytest.raises(
        RowError,
        match=r"message 1 \(assistant\): its refusal \('No, never.*write it into the content",
    ):
        trained(renderer(WORDS), messages)
    messages[1]["content"] = "No, never."
    assert trained(renderer(WORDS), messages) == ["No, never.<|im_end|>"]


def test_results_in_another_order_than_their_calls_are_refused_where_no_id_is_shown():
    calls = [call("look", 1, place="Rome"), call("look", 2, place="Oslo")]
    results = [
        said("tool", "cold", tool_call_id="abcdefgh2"),
        said("tool", "warm", tool_call_id="abcdefgh1"),
    ]
    messages = [
        said("user", "Where?"),
        said("assistant", tool_calls=calls),
        *results,
        said("assistant", "Rome."),
    ]
    form = calls_as("{{ call.function | tojson }}")
    with pytest.raises(
        RowError, match=r"message 3 \(tool\): the results come in another order than their calls"
    ):
        trained(renderer(form), messages, [tool("look", place="string")])
    shown = form.replace(
        "{{- m.content or '' -}}", "{{- (m.tool_call_id or '') + ' ' + (m.content or '') -}}"
    )
    assert len(trained(renderer(shown), messages, [tool("look", place="string")])) == 2
    in_order = [*messages[:2], *reversed(results), messages[4]]
    assert len(trained(renderer(form), in_order, [tool("look", place="string")])) == 2


def test_the_audit_names_fields_that_nothing_shows(tmp_path):
    user = said("user", "Q", name="Ann", loss_mask=0)
    answer = said("assistant", "A", annotations=["x"], weight=1, id="m1", shown=False, tags=[])
    row = {"messages": [user, answer]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    found = audit(RowSource(str(tmp_path / "rows.jsonl")), renderer(WORDS), num_workers=0)
    assert (
        "fields that nothing shows",
        "user.name 1 · assistant.annotations 1 · assistant.shown 1",
    ) in summary(found)
    reads = renderer(CHATML.replace("BODY", "{{- (m.name or '') + m.content -}}"))
    assert audit(RowSource(str(tmp_path / "rows.jsonl")), reads, num_workers=0).tally.unread == {
        "assistant.annotations": 1,
        "assistant.shown": 1,
    }


def test_settings_are_tried_on_the_first_rows_of_a_fault_only(monkeypatch):
    monkeypatch.setattr("retool.data.render.suggestions.MOST_TRIED", 2)
    made = renderer(WORDS)
    messages = [said("user", "Q"), said("assistant", "A", reasoning="T")]
    for works in (
        "what works for it: data",
        "what works for it: data",
        "what works was looked for in the first 2 rows like it",
    ):
        with pytest.raises(RowError, match=works):
            trained(made, messages)
    with pytest.raises(RowError, match="what works for it: data"):  # another fault
        trained(
            made, [messages[0], said("assistant", "A", tool_calls=[call("look", 1, place="Rome")])]
        )
