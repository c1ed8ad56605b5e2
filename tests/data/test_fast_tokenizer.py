"""The short ways of a rollout's turns give exactly what the long ways give: texts, ids, and the
glue between turns.
"""

from __future__ import annotations

import copy
import random
import re
from functools import cache

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from retool.data.render.between_turns import HOLE
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.template.choose import TEMPLATES
from retool.data.template.turns import PLACEHOLDER
from retool.data.tokens import fast_tokenizer
from tests.data.conftest import HERE, LINES, SPECIALS, TOOLS

SCRAPS = [
    "",
    " ",
    "  \n",
    "\n\n\n",
    "\t",
    "24",
    "print(12*2)",
    "é",
    "e\u0301",
    "\u0958",
    "한글",
    "𝄞🙂",
    "\x00",
    "\u200b",
    "\ufeff",
    "ﬁ",
    "İ",
    "\ufffd",
    "\r\n",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    " <|eot_id|> ",
    "<tool_response>",
    "</tool_response>\n",
    "{{ messages }}",
    "{% if %}",
    PLACEHOLDER,
    HOLE,
    "a b",
    "X",
]


def scraps(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choices(SCRAPS, k=rng.randint(0, most)))


@cache
def metaspace(cls=None, **kwargs):
    """Takes the start of a text for that of a word, and normalises."""
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="?"))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="first"),
    )
    raw.train_from_iterator(LINES * 10, trainers.BpeTrainer(special_tokens=["?", *SPECIALS]))
    raw.add_tokens([AddedToken("<wide>", lstrip=True, rstrip=True)])
    return (cls or PreTrainedTokenizerFast)(tokenizer_object=raw, eos_token="<|im_end|>", **kwargs)


@cache
def wordpiece():
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece(unk_token="?"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    raw.train_from_iterator(LINES * 10, trainers.WordPieceTrainer(special_tokens=["?", *SPECIALS]))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", clean_up_tokenization_spaces=True
    )


@cache
def python_only():
    """A slow tokenizer: a token for a character."""
    from transformers import PreTrainedTokenizer

    class Characters(PreTrainedTokenizer):
        def get_vocab(self):
            return {**{chr(i): i for i in range(0x600)}, **self.added_tokens_encoder}

        vocab_size = property(lambda self: 0x600)

        def _tokenize(self, text, **kwargs):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token) if ord(token) < 0x600 else ord("?")

        def _convert_id_to_token(self, index):
            return chr(index)

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    slow = Characters(eos_token="<|im_end|>")
    slow.add_tokens(SPECIALS, special_tokens=True)
    return slow


@cache
def with_steps_of_its_own():
    from transformers import PreTrainedTokenizerFast

    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(
                [t.upper() for t in text] if isinstance(text, list) else text.upper(),
                *args,
                **kwargs,
            )

        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs).lower()

    return metaspace(Shouting)


@cache
def that_splits_specials():
    return metaspace(split_special_tokens=True)


@pytest.fixture(
    params=[
        "byte-level",
        metaspace,
        wordpiece,
        python_only,
        with_steps_of_its_own,
        that_splits_specials,
    ],
    ids=lambda p: getattr(p, "__name__", p),
)
def each(request, tokenizer):
    return tokenizer if request.param == "byte-level" else request.param()


def long_ids(tokenizer, text):
    return tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]


def long_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_texts_and_ids_as_the_tokenizer_itself(each) -> None:
    rng = random.Random(0)
    for text in [*SCRAPS, *(scraps(rng, 12) for _ in range(200))]:
        ids = long_ids(each, text)
        assert fast_tokenizer.encode_text(each, text) == ids
        assert fast_tokenizer.decode_ids(each, ids) == long_text(each, ids)
        if each.is_fast:
            found = each(text, add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            assert fast_tokenizer.token_offsets(each, text) == found and len(found) == len(ids)
    for _ in range(50):
        ids = rng.choices(range(len(each)), k=rng.randint(0, 20))
        assert fast_tokenizer.decode_ids(each, ids) == long_text(each, ids)


def test_what_an_earlier_call_left_set_does_not_count(tokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    text = "The user asks and the assistant answers."
    expected = long_ids(tokenizer, text)
    tokenizer([text], truncation=True, max_length=3)
    assert len(tokenizer.backend_tokenizer.encode(text).ids) == 3
    assert fast_tokenizer.encode_text(tokenizer, text) == expected
    tokenizer([text], padding="max_length", max_length=99)
    assert fast_tokenizer.encode_text(tokenizer, text) == expected and len(
        fast_tokenizer.token_offsets(tokenizer, text)
    ) == len(expected)
    tokenizer("x", split_special_tokens=True)
    assert (
        fast_tokenizer.encode_text(tokenizer, "<|im_end|>")
        == long_ids(tokenizer, "<|im_end|>")
        == [SPECIALS.index("<|im_end|>")]
    )


def glue(
    renderer,
    messages,
    responses,
    tools=None,
    enable_thinking=None,
    ended=True,
    generation_prompt=True,
):
    """What `render_tool_turn` stands for, by transformers' own render of everything; what messages
    say of special tokens is letters.
    """
    kwargs = {
        **renderer.rendering.template_kwargs,
        **({} if enable_thinking is None else {"enable_thinking": enable_thinking}),
    }
    shown = [*messages[:-1], {"role": "assistant", "content": "Stand-in"}, *responses]
    if makes_specials(renderer.tokenizer):
        shown = [
            {**message, "content": hidden(message["content"])}
            if message.get("content")
            else message
            for message in shown
        ]
    text = renderer.tokenizer.apply_chat_template(
        shown,
        tools=tools,
        chat_template=renderer.template,
        add_generation_prompt=generation_prompt,
        tokenize=False,
        **kwargs,
    )
    start = text.rindex("Stand-in") + len("Stand-in")
    end = next(token for token in renderer.ends.known if text[start:].lstrip().startswith(token))
    return letters_and_specials(
        renderer, text[text.index(end, start) + (len(end) if ended else 0) :]
    )


def makes_specials(tokenizer):
    return long_ids(tokenizer, "<|im_end|>") == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def hidden(text):
    for i, token in enumerate(SPECIALS):
        text = text.replace(token, chr(0xE000 + i))
    return text


def letters_and_specials(renderer, text):
    """Token ids of a text whose special tokens are the template's: where some are hidden, the
    stretch between two is spelt out.
    """
    tokenizer = renderer.tokenizer
    if text == shown(text):
        return renderer.encode(["", text])[1]
    ids = []
    before = "\n" if long_ids(tokenizer, "a") != long_ids(tokenizer, "<|im_end|>a")[1:] else ""
    parts = re.split(f"({'|'.join(map(re.escape, SPECIALS))})", text)
    while parts:
        # As far as the stretch that hides something, in one pass; then that stretch.
        plain = next((i for i, part in enumerate(parts) if part != shown(part)), len(parts))
        ids += (
            (
                renderer.encode(["", "".join(parts[:plain])])[1]
                if ids or plain > 1 or parts[0]
                else []
            )
            if plain
            else []
        )
        if plain < len(parts):
            spelt = tokenizer(
                [before + shown(parts[plain])], add_special_tokens=False, split_special_tokens=True
            )["input_ids"][0]
            ids += spelt[
                len(tokenizer(before, add_special_tokens=False)["input_ids"]) if before else 0 :
            ]
        parts = parts[plain + 1 :]
    return ids


def shown(text):
    return re.sub("[\ue000-\ue0ff]", lambda found: SPECIALS[ord(found[0]) - 0xE000], text)


def talk(rng, tool_role="tool"):
    """A conversation up to an assistant's turn, and what follows it."""
    messages = [{"role": "system", "content": scraps(rng)}] * rng.randint(0, 1) + [
        {"role": "user", "content": scraps(rng)}
    ]
    for _ in range(rng.randint(0, 2)):
        call = {
            "type": "function",
            "function": {"name": "calculator", "arguments": {"code": scraps(rng)}},
        }
        messages += [
            {"role": "assistant", "content": scraps(rng), "tool_calls": [call]},
            {"role": tool_role, "content": scraps(rng)},
        ]
    responses = [
        {
            "role": rng.choice([tool_role, tool_role, "user"]),
            "content": scraps(rng),
            "name": "calculator",
        }
        for _ in range(rng.randint(0, 3))
    ]
    return [*messages, {"role": "assistant", "content": "looked at by nobody"}], responses


def require_glue_of_a_whole_render(renderer: Renderer, rng: random.Random) -> None:
    """Of many conversations drawn with `rng`."""
    assert renderer.glue.framed
    for _ in range(150):
        messages, responses = talk(rng)
        options = (
            rng.choice([TOOLS, None]),
            rng.choice([True, None]),
            rng.random() < 0.7,
            rng.random() < 0.7,
        )
        assert renderer.render_tool_turn(messages, responses, *options) == glue(
            renderer, messages, responses, *options
        )


@pytest.mark.parametrize(
    "kwargs",
    [None, {"enable_thinking": False, "opening": "x", "loop": 3}],
    ids=["plain", "template_kwargs"],
)
def test_glue_of_our_template_is_that_of_a_whole_render(each, kwargs) -> None:
    renderer = Renderer(each, Rendering("hermes", kwargs or {}))
    require_glue_of_a_whole_render(renderer, random.Random(1))


def test_glue_of_qwen_s_template(qwen_tokenizer) -> None:
    renderer = Renderer(qwen_tokenizer)
    require_glue_of_a_whole_render(renderer, random.Random(3))
    for change in (
        ("{%- if tools", "{%- set messages = messages[1:] %}{%- if tools"),
        ("{{- message.content }}", "{{- message.content | trim }}"),
    ):
        other = copy.deepcopy(qwen_tokenizer)
        other.chat_template = other.chat_template.replace(*change)
        assert (
            other.chat_template != qwen_tokenizer.chat_template and not Renderer(other).glue.framed
        )


@pytest.mark.parametrize("name", ["chatml", "smollm2", "qwen3", "llama3"])
def test_glue_of_other_templates(name, renderer_of) -> None:
    renderer = renderer_of(name)
    rng = random.Random(2)
    assert not renderer.glue.framed
    for _ in range(30):
        messages, responses = talk(rng, "tool" if name == "qwen3" else "user")
        options = (
            TOOLS if name == "qwen3" and rng.random() < 0.5 else None,
            None,
            rng.random() < 0.7,
            rng.random() < 0.7,
        )
        assert renderer.render_tool_turn(messages, responses, *options) == glue(
            renderer, messages, responses, *options
        )


def test_what_is_not_a_plain_text_goes_the_long_way(renderer_of) -> None:
    renderer = renderer_of("hermes")
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    for response in (
        {"role": "tool", "content": None},
        {"role": "tool"},
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": "a"},
    ):
        assert renderer.render_tool_turn(messages, [response], TOOLS) == glue(
            renderer, messages, [response], TOOLS
        )
    assert not renderer.glue.frames
    for content in ("\ud800", "a\udcff"):
        with pytest.raises(ValueError, match="valid Unicode"):
            renderer.render_tool_turn(messages, [{"role": "tool", "content": content}], TOOLS)


def test_only_our_own_template_is_known(tokenizer) -> None:
    text = TEMPLATES["hermes"].read_text()
    own = copy.deepcopy(tokenizer)
    own.chat_template = text  # as an export has it
    assert (
        Renderer(own).glue.framed
        and not Renderer(own, Rendering(str(HERE / "templates" / "chatml.jinja"))).glue.framed
    )
    assert not Renderer(
        own, Rendering("hermes", {"documents": []})
    ).glue.framed  # an option of apply_chat_template, no template variable
    own.chat_template = {
        "default": text,
        "tool_use": text.replace("message.content", "message.content | trim"),
    }
    renderer = Renderer(own)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    responses = [{"role": "tool", "content": " 24 "}]
    found = [renderer.render_tool_turn(messages, responses, tools) for tools in (TOOLS, None)]
    assert (
        found == [glue(renderer, messages, responses, tools) for tools in (TOOLS, None)]
        and found[0] != found[1]
    )

    class Trimming(type(own)):
        def apply_chat_template(self, conversation, **kwargs):
            return super().apply_chat_template(
                [{**m, "content": m["content"].strip()} for m in conversation], **kwargs
            )

    trimming = Trimming(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    renderer = Renderer(trimming, Rendering("hermes"))
    assert renderer.render_tool_turn(messages, responses) == glue(renderer, messages, responses)
