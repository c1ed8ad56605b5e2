"""Every format of calls against real chat templates: what a template shows of a call is read back as
the same call. And against what models write that isn't one.
"""

from __future__ import annotations

from typing import Any

import pytest

from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.rl.agent.formats.choose import choose_format, shown_format, template_format
from retool.rl.agent.formats.table import FORMATS
from retool.rl.agent.reading.call import Call
from retool.rl.agent.reading.form import read_calls
from tests.data.templates_table import FOLDER, small_tokenizer

NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja")) or ["none"]
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
            template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("name", NAMES)
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
