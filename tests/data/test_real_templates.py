"""24 templates as their publishers ship them, with ten conversations each: what isn't shown in full
is refused, with a way out that works.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from retool.data.read.chunk import RowError
from retool.data.read.rows import Conversation, to_conversation
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.tokens.encoder import Piece
from tests.data.templates_table import CONVERSATIONS, small_tokenizer
from tests.real_data import TEMPLATES, real_template

Samples = list[list[Piece]]


@pytest.fixture(scope="module")
def renderer_with():
    made: dict[str, Renderer] = {}

    def make(name: str, **settings: Any) -> Renderer:
        key = f"{name} {sorted(settings.items())}"
        if key not in made:
            template = real_template(name)
            made[key] = Renderer(small_tokenizer(name, template), Rendering(**settings))
        return made[key]

    return make


def ways_out(why: str) -> Iterator[dict[str, str]]:
    """The settings of each way out that a refusal names."""
    for way in why.partition("what works for it: ")[2].split(" or "):
        yield dict(setting.split("=") for setting in re.findall(r"data\.[\w.]+=\w+", way))


def settings_of(way: dict[str, str]) -> dict[str, Any]:
    """The fields of a rendering."""
    kwargs: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for key, value in way.items():
        name = key.rpartition(".")[2]
        parsed = {"true": True, "false": False}.get(value, value)
        if key.startswith("data.apply_chat_template_kwargs."):
            kwargs[name] = parsed
        else:
            arguments[name] = parsed
    return {**arguments, **({"template_kwargs": kwargs} if kwargs else {})}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"</?think>", " ", text))


def words_of(message: dict[str, Any], without_thoughts: bool) -> Iterator[list[str]]:
    """The words that the message's turn must hold, each list in its order."""
    content = message["content"]
    if without_thoughts:
        content = re.sub(r"<think>.*?</think>", "", content, flags=re.DOTALL)
    else:
        yield words(message.get("reasoning_content", ""))
    yield words(content)
    for made in message.get("tool_calls", []):
        yield words(
            made["function"]["name"]
            + " "
            + " ".join(f"{k} {v}" for k, v in made["function"]["arguments"].items())
        )


def is_subsequence(part: Sequence[str], whole: Sequence[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def check_words(
    samples: Samples, conversation: Conversation, *, without_thoughts: bool, all_turns: bool
) -> None:
    """Each assistant message stands in its trained piece, word for word, and its arguments as JSON
    or one by one.
    """
    trained = {piece.turn: piece.text for pieces in samples for piece in pieces if piece.trained}
    assert trained
    if all_turns:
        assert sorted(trained) == conversation.assistant_turns
    for turn, text in trained.items():
        message = conversation.messages[turn]
        for part in words_of(message, without_thoughts):
            assert is_subsequence(part, words(text)), f"{part} in {text!r}"
        for made in message.get("tool_calls", []):
            arguments = made["function"]["arguments"]
            assert json.dumps(arguments) in text or all(
                f">{k}" in text or f"={k}>" in text for k in arguments
            ), text
        if without_thoughts:
            assert (
                not is_subsequence(["Adding", "twos"], words(text))
                and "idea" not in text
                and "known" not in text
            )


def check_contexts(renderer: Renderer, samples: Samples, conversation: Conversation) -> None:
    """What stands before a trained piece is what inference would show there; the tokens decode to
    the text.
    """
    for pieces in samples:
        before = ""
        for piece in pieces:
            if piece.trained:
                assert piece.turn is not None
                messages = conversation.messages[: piece.turn]
                assert before == renderer.text(
                    messages,
                    conversation.tools,
                    conversation.enable_thinking,
                    generation_prompt=True,
                )
                assert any(piece.text.endswith(end) for end in renderer.ends.known)
            before += piece.text
        sample = renderer.tokenise(pieces)
        assert renderer.tokenizer.decode(sample.tokens) == before


def take(renderer_with: Any, name: str, way: dict[str, str], conversation: Conversation) -> None:
    """Go the way out, and see that it works."""
    settings = settings_of(way)
    renderer = renderer_with(name, **settings)
    samples = renderer.pieces(conversation)
    dropped = settings.get("drop_reasoning", False)
    all_turns = settings.get("history") != "last"
    check_words(samples, conversation, without_thoughts=dropped, all_turns=all_turns)
    if not dropped and not settings.get("reasoning_in_content"):
        check_contexts(renderer, samples, conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_word_is_trained_or_the_row_refused_with_a_way_out(name, renderer_with):
    found = []
    for row in CONVERSATIONS.values():
        conversation = to_conversation(row, "rows.jsonl", 7)
        ways: list[dict[str, str]] = []
        try:
            renderer = renderer_with(name)
            samples = renderer.pieces(conversation)
        except RowError as error:
            assert re.match(r"rows\.jsonl, row 7(, message \d \(\w+\))?: ", str(error))
            ways = list(ways_out(str(error)))
            assert ways, error
        except ValueError as error:  # the template itself won't do
            ways = [
                dict(
                    setting.split("=")
                    for setting in re.findall(r"data\.chat_template=hermes", str(error))
                )
            ]
            assert ways[0], error
        else:
            check_words(samples, conversation, without_thoughts=False, all_turns=True)
            check_contexts(renderer, samples, conversation)
        for way in ways:
            take(renderer_with, name, way, conversation)
        found.append("+".join(_letter(*setting) for setting in ways[0].items()) if ways else "yes")
    assert " ".join(found) == EXPECTED[name]


def _letter(key: str, value: str) -> str:
    name = key.rpartition(".")[2]
    return value if name in ("history", "chat_template") else name


# For each conversation in its order: `yes` where the template shows it in full, or the first way
# out that its refusal names.
EXPECTED = {
    "GLM-4.6": "hermes hermes hermes hermes hermes hermes hermes hermes hermes hermes",
    "HuggingFaceTB-SmolLM3-3B": "yes hermes hermes hermes yes yes hermes reasoning_in_content hermes yes",
    "Kimi-K2-Instruct": "yes hermes hermes hermes yes yes hermes reasoning_in_content hermes yes",
    "LFM2.5-Instruct": "yes hermes hermes hermes yes yes hermes reasoning_in_content hermes yes",
    "MiMo-VL": "yes yes yes yes yes yes yes reasoning_in_content reasoning_in_content yes",
    "Mistral-Small-3.2-24B-Instruct-2506": "yes yes yes yes yes yes hermes reasoning_in_content hermes yes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes yes yes yes hermes hermes hermes hermes hermes hermes",
    "Phi-4-mini-instruct": "yes yes yes yes yes yes hermes reasoning_in_content hermes yes",
    "Qwen-QwQ-32B": "split split split split enable_thinking enable_thinking+split enable_thinking+split enable_thinking enable_thinking+split split",
    "Qwen-Qwen3-0.6B": "split split split split yes split yes yes yes split",
    "Qwen3-Coder": "yes yes yes yes yes yes yes reasoning_in_content reasoning_in_content yes",
    "Qwen3-Instruct-2507": "yes yes yes yes yes yes yes reasoning_in_content reasoning_in_content yes",
    "Qwen3.5-4B": "split yes yes yes yes split yes yes yes split",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "hermes hermes hermes hermes yes split hermes yes hermes hermes",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "split hermes hermes hermes enable_thinking enable_thinking+split hermes enable_thinking hermes split",
    "deepseek-ai-DeepSeek-V3.1": "yes hermes hermes hermes enable_thinking enable_thinking+split hermes enable_thinking hermes yes",
    "google-gemma-2-2b-it": "yes hermes hermes hermes yes yes hermes reasoning_in_content hermes yes",
    "ibm-granite-granite-3.3-2B-Instruct": "yes hermes hermes hermes yes yes hermes reasoning_in_content hermes yes",
    "ibm-granite-granite-4.0": "yes yes yes yes yes yes yes reasoning_in_content reasoning_in_content yes",
    "meta-llama-Llama-3.1-8B-Instruct": "yes yes yes hermes yes yes hermes reasoning_in_content hermes yes",
    "meta-llama-Llama-3.2-3B-Instruct": "yes yes yes hermes yes yes hermes reasoning_in_content hermes yes",
    "microsoft-Phi-3.5-mini-instruct": "yes hermes hermes hermes yes yes hermes reasoning_in_content hermes yes",
    "mistralai-Mistral-Nemo-Instruct-2407": "yes yes hermes yes yes yes hermes reasoning_in_content hermes yes",
    "openai-gpt-oss-120b": "split yes yes hermes yes split yes yes yes split",
}
