"""Tokenizers that take every text they are given for the beginning of one: what is trained decodes
to what was written.
"""

import copy
from functools import cache

import numpy as np
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

from retool.data.read.chunk import RowError
from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.data.tokens.load import load_tokenizer
from tests.data.conftest import HERE, LINES, SPECIALS
from tests.data.test_chat import check_replay
from tests.real_data import real

ANSWERS = ["answers", " answers", "\n\nThe user asks", "The assistant, so:\n  is", "12", ""]
DECODER = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


def trained_on_lines(raw, **kwargs):
    from transformers import PreTrainedTokenizerFast

    raw.decoder = decoders.Sequence(DECODER)
    special = ["<unk>", *SPECIALS]
    alphabet = [chr(i) for i in range(32, 127)] + ["\n", "▁"]
    raw.train_from_iterator(
        LINES * 10,
        trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, vocab_size=400),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", unk_token="<unk>", **kwargs
    )


@cache
def legacy():
    """What LlamaTokenizer makes with `legacy: true`: a space after every special token."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return trained_on_lines(raw)


@cache
def prepending():
    """What older tokenizer.json files of Llama 2, Mistral and TinyLlama have."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return trained_on_lines(raw)


@cache
def first():
    """Only the beginning of a text gets one."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return trained_on_lines(raw)


@cache
def prefixing():
    """Byte-level with `add_prefix_space`."""
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        LINES * 10,
        trainers.BpeTrainer(special_tokens=SPECIALS, initial_alphabet=alphabet, vocab_size=400),
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")


def stories():
    """A real one, of a tiny model."""
    tokenizer = load_tokenizer(str(real("stories260k")))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def written(tokenizer, ids):
    """The text of tokens that follow others, spelt from their own names."""
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    if tokenizer.backend_tokenizer.pre_tokenizer and "ByteLevel" in str(
        tokenizer.backend_tokenizer.pre_tokenizer
    ):
        return tokenizer.decode(ids)
    return "".join(tokens).replace("▁", " ").replace("<0x0A>", "\n")


@pytest.mark.parametrize(
    "make", [legacy, prepending, first, prefixing, stories], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("template", ["chatml", "hermes", "llama3"])
def test_no_space_is_trained_that_nobody_wrote(make, template):
    tokenizer = make()
    renderer = Renderer(
        tokenizer,
        Rendering(
            template if template == "hermes" else str(HERE / "templates" / f"{template}.jinja")
        ),
    )
    messages = [
        m
        for answer in ANSWERS
        for m in ({"role": "user", "content": "asks"}, {"role": "assistant", "content": answer})
    ]
    conversation = to_conversation({"messages": messages}, "f", 0)
    sample = check_replay(renderer, conversation)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.mask.astype(int), [0]])))
    turns = [
        written(tokenizer, sample.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]
    end = renderer.ends.known[0]
    assert turns == [
        (answer.strip() if template == "llama3" else answer) + end for answer in ANSWERS
    ]


@pytest.mark.parametrize(
    "make", [legacy, prepending, first, prefixing, stories], ids=lambda make: make.__name__
)
def test_a_turn_has_the_tokens_of_one_pass_over_the_text(make):
    """Where the generation prompt ends with a newline that nothing merges with, that is what a
    model has learnt from.
    """
    tokenizer = make()
    renderer = Renderer(tokenizer, Rendering(str(HERE / "templates" / "chatml.jinja")))
    row = {
        "messages": [
            {"role": "user", "content": "asks"},
            {"role": "assistant", "content": "The user answers"},
        ]
    }
    (sample,) = renderer.render(to_conversation(row, "f", 0))
    assert sample.tokens.tolist() == tokenizer.encode(
        renderer.text(row["messages"]), add_special_tokens=False
    )


def test_a_tokenizer_that_does_not_give_the_text_back_is_refused(tokenizer):
    """On the rows themselves: lower-casing shows only where there is a capital, a missing token
    where the character is.
    """
    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    renderer = Renderer(lower, Rendering(str(HERE / "templates" / "chatml.jinja")))
    row = {
        "messages": [{"role": "user", "content": "HI"}, {"role": "assistant", "content": "so, Yes"}]
    }
    with pytest.raises(
        RowError,
        match=r"f, row 16: message 1: the tokenizer doesn't give the text back: 'Yes.*has become 'yes.*Use a tokenizer",
    ):
        renderer.render(to_conversation(row, "f", 16))
    row["messages"][1]["content"] = "so, yes"
    assert renderer.render(to_conversation(row, "f", 16))[0].trained
    unknown = Renderer(legacy(), Rendering(str(HERE / "templates" / "chatml.jinja")))
    row["messages"][1]["content"] = "yes: ∑"
    with pytest.raises(RowError, match=r"f, row 3: message 1: .*'∑.*has become '<unk>"):
        unknown.render(to_conversation(row, "f", 3))


def test_what_unicode_holds_for_the_same_text_is_not_refused(tokenizer):
    """Qwen's tokenizers compose accents."""
    composing = copy.deepcopy(tokenizer)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    row = {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "cafe\u0301"},
        ]
    }
    (sample,) = Renderer(composing, Rendering(str(HERE / "templates" / "chatml.jinja"))).render(
        to_conversation(row, "f", 0)
    )
    assert "caf\u00e9" in composing.decode(sample.tokens)
