"""A model that is small enough for tests, with all that a model's folder has."""

from __future__ import annotations

from pathlib import Path

import torch

from examples.quickstart import data, model
from retool.data.template.choose import TEMPLATES


def write_model(folder: Path, seed: int = 0) -> Path:
    """A random model of two layers with a tokenizer, a template and an end of text of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    rows = [data.to_row(problem, "t") for problem in data.make_problems(20, seed=0)]
    tokenizer = model.train_tokenizer(
        [message["content"] for row in rows for message in row["messages"]]
    )
    model.write_tokenizer(folder, tokenizer, TEMPLATES["hermes"].read_text())
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder
