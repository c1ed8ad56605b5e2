"""A tokenizer made on the spot, and templates that behave as the well-known ones."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from tests.real_data import real

HERE = Path(__file__).parent
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
LINES = [
    "You are a helpful assistant. The user asks and the assistant answers.\n\n\n",
    '<tool_call>\n{"name": "calculator", "arguments": {"code": "print(12*2)"}}\n</tool_call>\n\n\n',
    "<tool_response>\n24\n</tool_response>\n<think>\n\n</think>\n\nJulie reads 120 pages, so the answer is 42.\n\n\n",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Runs a program.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}},
                "required": ["code"],
            },
        },
    }
]


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of about 400 tokens with ChatML and Llama specials; a run of
    newlines is one token.
    """
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        LINES * 20,
        trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = (HERE / "templates" / "chatml.jinja").read_text()
    return fast


@pytest.fixture(scope="session")
def renderer_of(tokenizer):
    """A renderer with the template of that name in tests/data/templates, or our own `hermes`."""

    def make(name, history="error", **template_kwargs):
        template = name if name == "hermes" else str(HERE / "templates" / f"{name}.jinja")
        return Renderer(tokenizer, Rendering(template, template_kwargs, history=history))

    return make


@pytest.fixture(scope="session")
def qwen_tokenizer():
    from retool.data.tokens.load import load_tokenizer

    return load_tokenizer(str(real("qwen2.5-tokenizer")))


def call(code, name="calculator"):
    return {"type": "function", "function": {"name": name, "arguments": {"code": code}}}


@pytest.fixture
def tool_row():
    """Two calls in the first turn, one in the second, with text around them."""
    return {
        "messages": [
            {"role": "system", "content": "Be exact."},
            {"role": "user", "content": "How many pages?"},
            {
                "role": "assistant",
                "content": "Two sums.",
                "tool_calls": [call("print(12*2)"), call('print("é\\n")')],
            },
            {"role": "tool", "content": "24"},
            {"role": "tool", "content": "é"},
            {"role": "assistant", "content": "", "tool_calls": [call("print(120-36)")]},
            {"role": "tool", "content": "84"},
            {"role": "assistant", "content": "The answer is 42."},
        ],
        "tools": TOOLS,
    }


@pytest.fixture
def chat_row():
    return {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Goodbye."},
        ]
    }


@pytest.fixture
def conversation():
    def make(row, **kwargs):
        return to_conversation(row, "rows.jsonl", 7, **kwargs)

    return make
