"""What is known of the fields of a `config.json`: read, implemented for some values only, or
without effect on what a model computes.

A field that is in no table here, and isn't off, may change what the model computes: it is refused
by name.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

# Fields that only some families read: through them a layer may see a part of the sequence only.
WINDOWS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers"})

# The largest value that a size may have: far above any dense model's, and small enough to plan
# with.
SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 32,
    "original_max_position_embeddings": 1 << 32,
    "sliding_window": 1 << 32,
    "sliding_window_pattern": 1_000,
}
# The same of the sizes that only models with experts have.
EXPERT_SIZES = {
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "num_experts_per_tok": 1 << 10,
    "moe_intermediate_size": 1 << 20,
}
READ = frozenset(
    {
        *(name for name in SIZES if not name.startswith("sliding_window")),
        "model_type",
        "rms_norm_eps",
        "tie_word_embeddings",
        "layer_types",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
    }
)

# Fields of which only these values are implemented.
IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "use_rope": (True, None),
}
WAYS_OUT = {
    "quantization_config": "Give the model's folder as it was before it was quantised.",
    "quantization": "Give the model's folder as it was before it was quantised.",
    "attention_dropout": "Nothing is dropped here: write 0 in the file.",
    "auto_map": (
        "The model has code of its own, which isn't run here. Take auto_map out of the file if the "
        "weights are a plain model's."
    ),
}

# Fields that say that there are inputs beside text
OTHER_INPUTS = (
    "vision_config",
    "audio_config",
    "speech_config",
    "text_config",
)

TOKENS = (
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id mask_token_id cls_token_id "
    "decoder_start_token_id"
)
GENERATION = (
    "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams "
    "num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty "
    "length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens use_cache cache_implementation generation_config"
)
BOOKKEEPING = (
    "architectures name_or_path torch_dtype dtype use_bfloat16 torchscript tokenizer_class "
    "tokenizer_type prefix finetuning_task task_specific_params problem_type id2label label2id "
    "num_labels output_hidden_states output_attentions return_dict is_decoder attn_implementation "
    "initializer_range init_method model_max_length max_sequence_length transformers.js_config is_llama_config "
    "unsloth_fixed model_name license language tags datasets base_model max_seq_len"
)
# The same sums in another order, or another order of the work: not other numbers than rounding
# makes.
ORDER_OF_WORK = "pretraining_tp chunk_size_feed_forward gradient_checkpointing"
# Said for programs that only generate, beyond the lengths that the model was trained on.
BEYOND_TRAINING = "dual_chunk_attention_config"
INERT = frozenset(
    " ".join((TOKENS, GENERATION, BOOKKEEPING, ORDER_OF_WORK, BEYOND_TRAINING)).split()
)


def faults_of(c: dict[str, Any], family: frozenset[str]) -> Iterator[str]:
    """Every field that would silently compute something else, with the way out.

    `family` has the fields that the family reads beside those of every family.
    """
    # Everything that isn't known to be harmless is refused: a field that is overlooked would train
    # another model.
    for name, value in c.items():
        if name == "auto_map":
            if has_own_code(c):
                yield refused(name, value)
        elif name in IMPLEMENTED:
            if value not in IMPLEMENTED[name]:
                yield refused(name, value)
        # An unknown field that is off changes nothing, whatever it would switch on.
        elif not (name in READ or name in family or without_effect(name) or is_off(value)):
            yield refused(name, value)


def has_own_code(c: dict[str, Any]) -> bool:
    """Whether the model's folder has code for it, and not for its tokenizer alone."""
    code = c.get("auto_map")
    return isinstance(code, dict) and any(str(kind).startswith("AutoModel") for kind in code)


def beside_text(c: dict[str, Any]) -> Iterator[str]:
    """That a model has inputs beside text, if it has, with the way out."""
    if found := [name for name in OTHER_INPUTS if isinstance(c.get(name), dict)]:
        told = f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} there"
        yield (
            f"{told}, and only models of text alone are trained. Give a folder of its text model "
            "alone: docs/models.md shows how to make one."
        )


def without_agreed(c: dict[str, Any], agreed: Mapping[str, object]) -> dict[str, Any]:
    """The fields without those that name what the family computes in any case.

    Makers write them for programs of their own, and transformers doesn't read them. With another value
    than in `agreed` they stay, and are refused.
    """
    return {name: c[name] for name in c if name not in agreed or c[name] != agreed[name]}


def refused(name: str, value: object) -> str:
    """A field's value is not implemented, and what to do."""
    if name in READ or name in IMPLEMENTED or name in WINDOWS:
        way_out = "Use a model without it."
    else:
        way_out = "If the model doesn't compute with it, take it out of the file."
    return f"{shown(name, value)} is not implemented. {WAYS_OUT.get(name, way_out)}"


def shown(name: str, value: object) -> str:
    """A field and its value, both cut to a readable length: the file may hold anything."""
    return f"{reprlib.repr(name)[1:-1]}={reprlib.repr(value)}"


def without_effect(name: str) -> bool:
    """Whether transformers, or a program around it, keeps a note under this name that no model
    computes with.
    """
    return name in INERT or name.startswith("_") or name.endswith("_version")


def is_off(value: object) -> bool:
    """Whether a switch or a factor that isn't known is said to be absent."""
    return value is None or value is False or value == 0 or value in ("", [], {})


def size(c: dict[str, Any], name: str, default: int | None = None) -> int:
    """A size's value, a whole number from 1 to its limit; `default` where the file has none, or
    says null.
    """
    value = c.get(name)
    if value is None and default is not None:
        return default
    if name not in c:
        raise ValueError(f"lacks {name!r}. Fetch it again.")
    largest = SIZES[name] if name in SIZES else EXPERT_SIZES[name]
    # `type`, not isinstance: true is an int, and no size.
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(
            f"{shown(name, value)} is no whole number from 1 to {largest:,}. Fetch it again."
        )
    return value


def number(c: dict[str, Any], name: str, default: float) -> float:
    """A positive finite number; `default` where the file has none."""
    value = c.get(name, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{shown(name, value)} is no number above 0. Fetch it again.")
    return float(value)


def switch(c: dict[str, Any], name: str) -> bool:
    """True or false; false where the file has none."""
    value = c.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{shown(name, value)} is neither true nor false. Fetch it again.")
    return bool(value)
