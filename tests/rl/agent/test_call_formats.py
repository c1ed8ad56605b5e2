"""Every format of calls against real chat templates: what a template shows of a call is read back as
the same call. And against what models write that isn't one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.rl.agent.episode import Sampled
from retool.rl.agent.formats.choose import choose_format, shown_format, template_format
from retool.rl.agent.formats.table import FORMATS, FormatFailure, find_format
from retool.rl.agent.loop import run_episode
from retool.rl.agent.options import Agent, AgentOptions, ends_of_calls
from retool.rl.agent.reading.call import Call, with_ids
from retool.rl.agent.reading.form import MAX_CALLS_READ, before_calls, read_calls
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.types import Prompt, Stop
from tests.data.templates_table import small_tokenizer
from tests.real_data import TEMPLATES, real_template

# (the format in which the template shows a call, the one that is chosen); templates that fit no
# renderer of ours aren't here.
CHOSEN = {
    "HuggingFaceTB-SmolLM3-3B": (None, "hermes"),
    "Kimi-K2-Instruct": (None, "hermes"),
    "LFM2.5-Instruct": (None, "pythonic"),
    "MiMo-VL": ("hermes", "hermes"),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", "mistral"),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", "hermes"),
    "Phi-4-mini-instruct": ("llama3_json", "llama3_json"),
    "Qwen-QwQ-32B": ("hermes", "hermes"),
    "Qwen-Qwen3-0.6B": ("hermes", "hermes"),
    "Qwen3-Coder": ("qwen3_coder", "qwen3_coder"),
    "Qwen3-Instruct-2507": ("hermes", "hermes"),
    "Qwen3.5-4B": ("qwen3_coder", "qwen3_coder"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (None, "deepseek"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek", "deepseek"),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek", "deepseek"),
    "google-gemma-2-2b-it": (None, "hermes"),
    "ibm-granite-granite-3.3-2B-Instruct": (None, "granite"),
    "ibm-granite-granite-4.0": ("hermes", "hermes"),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", "llama3_json"),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3_json", "llama3_json"),
    "microsoft-Phi-3.5-mini-instruct": (None, "hermes"),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", "mistral"),
    "openai-gpt-oss-120b": ("gpt_oss", "gpt_oss"),
}
# What a template of this name has among the tokens of its model alone
MODEL_TOKENS = {"LFM2.5-Instruct": ["<|tool_call_start|>", "<|tool_call_end|>"]}

HEADERS = ("<|im_start|>assistant\n", "<｜Assistant｜>")
TYPES = {"code": "string", "n": "integer", "x": "number", "on": "boolean", "items": "array"}
TOOL = {
    "type": "function",
    "function": {
        "name": "run_it",
        "description": "Runs it.",
        "parameters": {
            "type": "object",
            "properties": {
                **{name: {"type": kind, "description": "What."} for name, kind in TYPES.items()},
                "map": {"type": "object", "description": "What."},
            },
            "required": ["code"],
        },
    },
}
HOSTILE = 'print("[1]")\nif a < b and c > d:\n    s = \'{"k": "</tool_call>"}\' # ü 漢 🙂 \\n\n'
ARGUMENTS: list[dict[str, Any]] = [
    {"code": "print(1)"},
    {"code": HOSTILE},
    {"code": "3", "n": -12, "x": 2.5e-7, "on": True, "items": [1, "two", None], "map": {"k": [{}]}},
    {"code": "true"},
    {"code": " two\n\nlines "},
    {"code": ""},
]


def calling(*arguments: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {
            "type": "function",
            "id": f"{k}abcdefgh",
            "function": {"name": "run_it", "arguments": given},
        }
        for k, given in enumerate(arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.fixture(scope="module")
def renderer_with():
    made: dict[str, Renderer] = {}

    def make(name: str) -> Renderer:
        if name not in made:
            template = real_template(name)
            tokenizer = small_tokenizer(name, template)
            tokenizer.add_tokens(MODEL_TOKENS.get(name, []), special_tokens=True)
            made[name] = Renderer(tokenizer, Rendering())
        return made[name]

    return make


def turn_of(renderer: Renderer, message: dict[str, Any]) -> str:
    """What the model would have written for a message, its end-of-turn token left out."""
    question = {"role": "user", "content": "Do it."}
    prompt = renderer.text([question], [TOOL], generation_prompt=True)
    text = renderer.text([question, message], [TOOL])
    turn = text.removeprefix(prompt)
    if turn == text:  # a thought that the prompt opens
        turn = next(text.partition(header)[2] for header in HEADERS if header in text)
    places = [turn.find(end) for end in renderer.ends.known if end in turn]
    return turn[: min(places)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_that_a_template_wants(name: str, renderer_with) -> None:
    if name not in CHOSEN:
        with pytest.raises(ValueError, match="chat template"):
            renderer_with(name)
        return
    renderer = renderer_with(name)
    assert (shown_format(renderer), template_format(renderer)) == CHOSEN[name]
    assert choose_format("auto", renderer)[0] == CHOSEN[name][1]
    assert choose_format("code_block", renderer)[0] == "code_block"


@pytest.mark.parametrize("name", [name for name, (shown, _) in CHOSEN.items() if shown])
def test_what_a_template_shows_is_read_back(name: str, renderer_with) -> None:
    renderer = renderer_with(name)
    form = FORMATS[CHOSEN[name][1]]
    for arguments in ARGUMENTS:
        text = turn_of(renderer, calling(arguments))
        assert read_calls(form, text, [TOOL]) == [Call("run_it", arguments)], text


@pytest.mark.parametrize(
    "name", [name for name, (shown, _) in CHOSEN.items() if shown and shown != "gpt_oss"]
)
def test_several_calls_of_a_turn_are_read_back(name: str, renderer_with) -> None:
    renderer = renderer_with(name)
    form = FORMATS[CHOSEN[name][1]]
    try:
        text = turn_of(renderer, calling(ARGUMENTS[0], ARGUMENTS[2]))
    except ValueError as error:  # Llama's
        assert "single tool" in str(error)
        return
    assert [call.arguments for call in read_calls(form, text, [TOOL])] == [
        ARGUMENTS[0],
        ARGUMENTS[2],
    ]


ONE = {"code": "print(1)"}
# A call of each format as its model writes it
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "run_it", "arguments": {"code": "print(1)"}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=run_it>\n<parameter=code>\nprint(1)\n</parameter>\n</function>\n</tool_call>",
    "llama3_json": '{"name": "run_it", "parameters": {"code": "print(1)"}}',
    "mistral": '[TOOL_CALLS][{"name": "run_it", "arguments": {"code": "print(1)"}, "id": "0abcdefgh"}]',
    "granite": '<|tool_call|>[{"name": "run_it", "arguments": {"code": "print(1)"}}]',
    "pythonic": '<|tool_call_start|>[run_it(code="print(1)")]<|tool_call_end|>',
    "deepseek": '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>run_it<｜tool▁sep｜>{"code": "print(1)"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    "gpt_oss": '<|start|>assistant to=functions.run_it<|channel|>commentary json<|message|>{"code": "print(1)"}<|call|>',
    "glm": "<tool_call>run_it\n<arg_key>code</arg_key>\n<arg_value>print(1)</arg_value>\n</tool_call>",
    "code_block": "```python\nprint(1)\n```",
    "retool": "<code>\nprint(1)\n</code>",
}
CODE_TOOL = {
    "type": "function",
    "function": {
        "name": "run_it",
        "description": "Runs it.",
        "parameters": {"properties": {"code": {"type": "string"}}, "required": ["code"]},
    },
}


def names_and_code(calls: list[Call]) -> list[tuple[str, str]]:
    return [(call.name, call.arguments["code"].strip()) for call in calls if not call.problem]


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_is_found_among_words_and_not_among_thoughts(name: str) -> None:
    form = FORMATS[name]
    call = WRITTEN[name]
    wanted = [("run_it", "print(1)")]
    for text in (call, f"I run it.\n{call}", f"{call}\n", f"<think>What?</think>\n\n{call}"):
        assert names_and_code(read_calls(form, text, [CODE_TOOL])) == wanted, text
        assert names_and_code(read_calls(form, text, [CODE_TOOL], "tagged")) == wanted, text
    assert before_calls(form, f"I run it.\n{call}").strip() == "I run it."
    thought = f"<think>\n{call}\n</think>\nNo."
    in_thoughts = wanted if name == "retool" else []
    assert names_and_code(read_calls(form, thought, [CODE_TOOL], "tagged")) == in_thoughts
    assert (
        names_and_code(read_calls(form, f"<think>\n{call}", [CODE_TOOL], "tagged")) == in_thoughts
    )
    opened = thought.removeprefix("<think>")
    assert names_and_code(read_calls(form, opened, [CODE_TOOL], "opened")) == in_thoughts


@pytest.mark.parametrize("name", FORMATS)
def test_a_turn_that_is_cut_or_torn_raises_nothing(name: str) -> None:
    """Of every beginning of a turn, and of one with a hole or a sign too much, comes a call, a short
    problem for the model, or nothing. Cut, it is never a call of another tool.
    """
    form = FORMATS[name]
    text = WRITTEN[name]
    torn = [text[:k] for k in range(len(text))]
    torn += [text[:k] + text[k + 3 :] for k in range(len(text))]
    torn += [text[:k] + sign + text[k:] for k in range(len(text)) for sign in "\x00<\"'\\[{\ud800"]
    for broken in torn:
        for call in read_calls(form, broken, [CODE_TOOL], "tagged"):
            assert call.problem is None or 0 < len(call.problem) < 400
    for k in range(len(text)):
        names = {call.name for call in read_calls(form, text[:k], [CODE_TOOL]) if not call.problem}
        assert names <= {"run_it"}, text[:k]


NO_CALLS = [
    "",
    "The answer is 42.",
    "[1, 2, 3] and [see(1)](https://x.y) and {x: 1}",
    '{"answer": 42}\n{"name": "Ada", "age": 36}',
    "A list: [\n  f,\n  g\n]",
    "We say call, tool and function; `print(1)` prints.",
    "```json\n{}\n```",
]


@pytest.mark.parametrize("name", FORMATS)
def test_words_are_no_call(name: str) -> None:
    for text in NO_CALLS:
        assert read_calls(FORMATS[name], text, [CODE_TOOL]) == [], text


@pytest.mark.parametrize("name", FORMATS)
def test_a_flood_is_read_in_no_time(name: str) -> None:
    form = FORMATS[name]
    floods = [
        WRITTEN[name] * 5_000,
        WRITTEN[name].replace("print(1)", "(" * 200_000),
        WRITTEN[name].replace("print(1)", "x" * 1_000_000),
        WRITTEN[name][: len(WRITTEN[name]) // 2] * 3_000,
        "<think></think>" * 20_000 + WRITTEN[name],
        WRITTEN[name][: len(WRITTEN[name]) // 2] + " \n" * 200_000 + "x",
        "\n[a(" * 3_000 + "\n{" * 3_000,
    ]
    for flood in floods:
        begin = time.process_time()
        assert len(read_calls(form, flood, [CODE_TOOL], "tagged")) <= MAX_CALLS_READ + 1
        assert time.process_time() - begin < 2


def read(name: str, text: str) -> list[Call]:
    return read_calls(FORMATS[name], text, [TOOL])


def test_numbers_words_and_lists_without_json() -> None:
    text = "<tool_call>\n<function=run_it>\n<parameter=code>\n{}\n</parameter>\n<parameter=on>\nTrue\n</parameter>\n"
    text += "<parameter=n>\nmany\n</parameter>\n<parameter=other>\n[1]\n</parameter>\n</function>\n</tool_call>"
    arguments = {"code": "{}", "on": True, "n": "many", "other": [1]}
    assert read("qwen3_coder", text) == [Call("run_it", arguments)]
    unclosed = "<function=run_it>\n<parameter=code>\na\n<parameter=n>\n3\n</function>"
    assert read("qwen3_coder", unclosed) == [Call("run_it", {"code": "a", "n": 3})]
    python = "[run_it('''a\n'b' [''', n=-3, x=1e3, on=true, items=[1, None, 'c'], map={'k': (1,)}), a.b(c=\"x\ny\")]"
    arguments = {"code": "a\n'b' [", "n": -3, "x": 1000.0, "on": True, "items": [1, None, "c"]}
    assert read("pythonic", python) == [
        Call("run_it", {**arguments, "map": {"k": [1]}}),
        Call("a.b", {"c": "x\ny"}),
    ]
    for value in ("f(1)", "__import__('os')", "1 + 1", "{1: 2}", "f'{x}'", "*a", "lambda: 0", "x"):
        (call,) = read("pythonic", f"[run_it(code={value})]")
        assert call.problem, value


def test_the_ways_in_which_mistral_and_llama_write_calls() -> None:
    for text, identifier in (
        ('[TOOL_CALLS]run_it{"code": "a"}', ""),
        ('[TOOL_CALLS]run_it[ARGS]{"code": "a"}', ""),
        ('[TOOL_CALLS] run_it[CALL_ID]123456789[ARGS]{"code": "a"}', "123456789"),
        (
            '[TOOL_CALLS] [{"name": "run_it", "arguments": {"code": "a"}, "id": "123456789"}]',
            "123456789",
        ),
        ('[TOOL_CALLS]{"name": "run_it", "arguments": "{\\"code\\": \\"a\\"}"}', ""),
    ):
        (call,) = read("mistral", text)
        assert (call, call.id) == (Call("run_it", {"code": "a"}), identifier)
        (named,) = with_ids([call], text)
        assert len(named.id) == 9 and (named.id == identifier or not identifier)
    one = '{"name": "run_it", "parameters": {"code": "a"}}'
    assert read("llama3_json", f"<|python_tag|>{one}; {one}") == [Call("run_it", {"code": "a"})] * 2
    assert read("llama3_json", f"Like this: {one}") == []
    (call,) = read("llama3_json", '{"name": "run_it", "parameters": {"code": ')
    assert call.problem and "isn't valid JSON" in call.problem


def test_gpt_oss_speaks_on_channels() -> None:
    thought = '<|channel|>analysis<|message|>Say {"code": "x"} to=functions.run_it<|end|>'
    call = (
        "<|start|>assistant<|channel|>commentary to=functions.run_it <|constrain|>json<|message|>"
    )
    said = "<|start|>assistant<|channel|>final<|message|>It is 1."
    assert read("gpt_oss", thought + said) == []
    assert read("gpt_oss", f'{thought}{call}{{"code": "a"}}') == [Call("run_it", {"code": "a"})]
    (bad,) = read("gpt_oss", f"{call}print(1)<|call|>")
    assert bad.problem and "isn't valid JSON" in bad.problem


OWN = """
from retool.rl.agent.reading.call import Call

def arrows(text, tools):
    lines = [line[3:] for line in text.splitlines() if line.startswith("-> ")]
    return [Call(tools[0]["function"]["name"], {"code": line}) for line in lines]

def broken(text, tools):
    return [text] if tools else []

def wrong(text, tools):
    return text.nothing
"""


def test_a_format_of_the_users_own(tmp_path, renderer_with) -> None:
    (tmp_path / "own.py").write_text(OWN)
    form = find_format(f"{tmp_path}/own.py/arrows")
    text = "<think>-> draft\n-> draft</think>\n-> print(1)\nand\n-> print(2)"
    for reasoning in ("none", "tagged"):
        calls = read_calls(form, text, [CODE_TOOL], reasoning)
        assert names_and_code(calls) == [("run_it", "print(1)"), ("run_it", "print(2)")]
    with pytest.raises(FormatFailure, match="gives a str, not a Call"):
        read_calls(find_format(f"{tmp_path}/own.py/broken"), text, [CODE_TOOL])
    with pytest.raises(ValueError, match=r"wrong raises AttributeError.*Mend the function"):
        find_format(f"{tmp_path}/own.py/wrong")
    with pytest.raises(ValueError, match=r"format=hermess is not known. Did you mean hermes\?"):
        choose_format("hermess", renderer_with("Qwen3-Coder"))


def test_tokens_that_end_a_turn_of_calls(renderer_with) -> None:
    for name, tokens in (
        ("openai-gpt-oss-120b", ["<|call|>"]),
        ("meta-llama-Llama-3.1-8B-Instruct", ["<|eom_id|>"]),
        ("Qwen3-Coder", []),
    ):
        renderer = renderer_with(name)
        ids = ends_of_calls(renderer, FORMATS[template_format(renderer)])
        assert renderer.tokenizer.convert_ids_to_tokens(ids) == tokens


class Runs:
    """A tool that says what it was given."""

    name = "run_it"
    schema = CODE_TOOL

    async def call(self, arguments: dict[str, Any]) -> ToolResult:
        return ToolResult(f"ran {arguments['code']}", "success")

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "turn", "answered"),
    [
        (
            "openai-gpt-oss-120b",
            '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.run_it<|channel|>commentary json<|message|>{"code": "a"}<|call|>',
            '<|start|>functions.run_it to=assistant<|channel|>commentary<|message|>"ran a"<|end|><|start|>assistant',
        ),
        (
            "mistralai-Mistral-Nemo-Instruct-2407",
            '[TOOL_CALLS][{"name": "run_it", "arguments": {"code": "a"}, "id": "X23456789"}]</s>',
            '[TOOL_RESULTS]{"content": ran a, "call_id": "X23456789"}[/TOOL_RESULTS]',
        ),
        (
            "meta-llama-Llama-3.1-8B-Instruct",
            '<|python_tag|>{"name": "run_it", "parameters": {"code": "a"}}<|eom_id|>',
            '<|start_header_id|>ipython<|end_header_id|>\n\n"ran a"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
        ),
    ],
)
def test_an_episode_goes_on_after_a_call(
    name: str, turn: str, answered: str, renderer_with
) -> None:
    """Two rounds of calls, each answered as the template has it, then an answer without one."""
    renderer = renderer_with(name)
    tokenizer = renderer.tokenizer
    form = FORMATS[template_format(renderer)]
    options = AgentOptions(1000, format=form, call_end_ids=ends_of_calls(renderer, form))
    messages = [{"role": "user", "content": "Do it."}]
    ids = np.asarray(renderer.render_prompt(messages, [CODE_TOOL]), np.int32)
    told: list[str] = []
    turns = [turn, turn, "Done." + renderer.ends.known[0]]

    async def generate(new_ids: Sequence[int], max_tokens: int) -> Sampled:
        told.append(tokenizer.decode(new_ids))
        said = tokenizer(turns[len(told) - 1], add_special_tokens=False)["input_ids"]
        return Sampled(said, [0.0] * len(said), [0.0] * len(said), "stop")

    prompt = Prompt(0, messages, [CODE_TOOL], ids, "rows", "42")
    agent = Agent({"run_it": Runs()}, renderer, options)
    trajectory = asyncio.run(run_episode(prompt, 0, generate, agent))
    assert (trajectory.stop, trajectory.tool_calls) == (Stop.NO_CALL, 2)
    assert told[1:] == [answered, answered]


def test_a_format_that_breaks_is_nobodys_fault_but_its_own(tmp_path, renderer_with) -> None:
    (tmp_path / "own.py").write_text(OWN)
    renderer = renderer_with("Qwen3-Coder")
    options = AgentOptions(100, format=find_format(f"{tmp_path}/own.py/broken"))
    end = renderer.end_of_turn_ids[0]

    async def generate(ids: Sequence[int], max_tokens: int) -> Sampled:
        return Sampled([end], [0.0], [0.0], "stop")

    prompt = Prompt(0, [], [CODE_TOOL], np.zeros(1, np.int32), "rows", "42")
    agent = Agent({"run_it": Runs()}, renderer, options)
    trajectory = asyncio.run(run_episode(prompt, 0, generate, agent))
    assert trajectory.stop == Stop.INFRASTRUCTURE
    assert "gives a str, not a Call" in trajectory.tool_failure
