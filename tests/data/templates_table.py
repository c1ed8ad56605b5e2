"""Real templates without their tokenizers, and the ten conversations that each must show in full or
refuse with a way out.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOKEN = re.compile(
    r"<\|[\w▁]+\|>|<｜[\w▁]+｜>|\[/?[A-Z_]{3,}\]|<(?:start|end)_of_turn>|</?think>|</?tool_call>"
)
# What a template's source doesn't tell: the EOS (and BOS) of the model's tokenizer, by the
# beginning of the file's name.
ENDS = {
    "deepseek-ai": ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "GLM": ("<|endoftext|>", None),
    "Kimi": ("<|im_end|>", "[BOS]"),
    "LFM": ("<|im_end|>", "<|startoftext|>"),
    "Mistral": ("</s>", "<s>"),
    "mistralai": ("</s>", "<s>"),
    "NousResearch": ("<|im_end|>", "<|begin_of_text|>"),
    "Phi-4": ("<|end|>", "<|endoftext|>"),
    "microsoft": ("<|endoftext|>", "<s>"),
    "google": ("<eos>", "<bos>"),
    "ibm": ("<|end_of_text|>", None),
    "meta-llama": ("<|eot_id|>", "<|begin_of_text|>"),
    "openai": ("<|return|>", "<|startoftext|>"),
    "": ("<|im_end|>", None),
}


def small_tokenizer(name: str, template: str) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that the template and its model know."""
    eos, bos = next(ends for start, ends in ENDS.items() if name.startswith(start))
    raw = Tokenizer(
        models.BPE(
            {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokens = sorted({*TOKEN.findall(template), eos, *([bos] if bos else [])})
    # Added to Qwen3's tokenizer, but not special
    words = (
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
    )
    raw.add_tokens(
        [AddedToken(token, special=token not in words, normalized=False) for token in tokens]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def tool(name: str, /, **types: str) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": f"The {key}."} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": [*types]}
    return {
        "type": "function",
        "function": {"name": name, "description": "It looks things up.", "parameters": parameters},
    }


def call(name: str, number: int, /, **arguments: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "id": f"abcdefgh{number}",
        "function": {"name": name, "arguments": arguments},
    }


def said(role: str, content: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


WEATHER = tool("get_weather", city="string", days="integer")
SEARCH = tool("search_web", query="string")
IN_PARIS = call("get_weather", 1, city="Paris", days=3)
RAIN = call("search_web", 2, query='rain "in" Rome')
ASKED = said("user", "Weather in Paris?")
SUNNY = said("tool", "18 degrees, sunny", tool_call_id="abcdefgh1")
ANSWER = said("assistant", "A sunny day.")

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain chat": {
        "messages": [
            said("user", "Hello there"),
            said("assistant", "Greetings, friend."),
            said("user", "Name a fruit."),
            said("assistant", "Apples."),
        ]
    },
    "tool call": {
        "messages": [ASKED, said("assistant", tool_calls=[IN_PARIS]), SUNNY, ANSWER],
        "tools": [WEATHER],
    },
    "system and two tools": {
        "messages": [
            said("system", "Be brief."),
            ASKED,
            said("assistant", tool_calls=[IN_PARIS]),
            SUNNY,
            ANSWER,
        ],
        "tools": [WEATHER, SEARCH],
    },
    "parallel calls": {
        "messages": [
            ASKED,
            said("assistant", tool_calls=[IN_PARIS, RAIN]),
            SUNNY,
            said("tool", "wet streets", tool_call_id="abcdefgh2"),
            ANSWER,
        ],
        "tools": [WEATHER, SEARCH],
    },
    "a thought": {
        "messages": [
            said("user", "Two plus two?"),
            said("assistant", "<think>\nAdding twos.\n</think>\n\nFour."),
        ]
    },
    "thoughts in two turns": {
        "messages": [
            said("user", "Two plus two?"),
            said("assistant", "<think>\nAdding twos.\n</think>\n\nFour."),
            said("user", "And one more?"),
            said("assistant", "<think>\nOne above that.\n</think>\n\nFive."),
        ]
    },
    "a thought before a call": {
        "messages": [
            ASKED,
            said("assistant", "<think>\nNo idea; ask.\n</think>\n\n", tool_calls=[IN_PARIS]),
            SUNNY,
            said("assistant", "<think>\nNow known.\n</think>\n\nA sunny day."),
        ],
        "tools": [WEATHER],
    },
    "reasoning_content": {
        "messages": [
            said("user", "Two plus two?"),
            said("assistant", "Four.", reasoning_content="Adding twos."),
        ]
    },
    "reasoning_content and a call": {
        "messages": [
            ASKED,
            said("assistant", reasoning_content="No idea; ask.", tool_calls=[IN_PARIS]),
            SUNNY,
            said("assistant", "A sunny day.", reasoning_content="Now known."),
        ],
        "tools": [WEATHER],
    },
    "white space around": {
        "messages": [
            said("user", " Hello "),
            said("assistant", "\n\n  An indented line.\nAnother. \n"),
            said("user", "More\n"),
            said("assistant", " Last. "),
        ]
    },
}
