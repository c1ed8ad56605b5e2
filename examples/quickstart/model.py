"""A model folder from nothing: a byte-level BPE tokenizer trained on the demo's own text, and a
tiny Qwen2 with random weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from examples.quickstart.data import TOOL, Problem, to_row

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
# One token each, but ordinary text when decoded
TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB = 1024  # at most; these texts have fewer words
CONTEXT = 1024


def render(problems: Iterable[Problem], chat_template: str) -> list[str]:
    """Conversations as text, the way transformers renders them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    conversations = [to_row(problem, "")["messages"] for problem in problems]
    return list(
        render_jinja_template(
            conversations=conversations, tools=[TOOL], chat_template=chat_template
        )[0]
    )


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE, split into words, single digits and runs of signs as Qwen2's is: any text
    comes back unchanged.

    transformers gives a `qwen2` folder Qwen2's splitting whatever its tokenizer.json says, so
    another one would not survive loading.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END_OF_TEXT, TURN_START, TURN_END]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(TAGS),
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (piece for text in texts for piece in _split(text, (*specials, *TAGS))), trainer
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return tokenizer


def _split(text: str, marks: Iterable[str]) -> list[str]:
    """Text without the marks, which must not teach the BPE merges of their own."""
    pieces = [text]
    for mark in marks:
        pieces = [part for piece in pieces for part in piece.split(mark)]
    return pieces


def write_tokenizer(folder: Path, tokenizer: Tokenizer, chat_template: str) -> None:
    """The files from which `AutoTokenizer` and others read a tokenizer and its chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(chat_template)


def write_model(folder: Path, tokenizer: Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of 1.1M parameters with random weights, saved as Hugging Face does; the model, to
    look at it before training.
    """
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    end = tokenizer.token_to_id(TURN_END)
    pad = tokenizer.token_to_id(END_OF_TEXT)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    # blocks that at first add little to a token's own embedding: copying numbers is learnt twice as
    # fast
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.15)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad, do_sample=False)
    model.save_pretrained(folder)
    return model
