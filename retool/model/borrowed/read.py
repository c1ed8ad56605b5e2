"""A model's folder → how it runs: as our decoder where `families` has a file for it, else as
transformers' own module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from retool.model.borrowed.config import (
    BorrowedConfig,
    Implementation,
    content_of,
    loaded_config,
    quiet,
)
from retool.model.borrowed.logits import logits_scale
from retool.model.borrowed.module import (
    around_blocks,
    blocks_of,
    causal_model,
)
from retool.model.borrowed.names import names_on_disk
from retool.model.borrowed.trial import try_on_shapes
from retool.model.borrowed.watch import Kept
from retool.model.catalogue.families import FAMILIES, read_model_config
from retool.model.config import ModelConfig
from retool.model.hf.fields import SIZES, WAYS_OUT, beside_text, has_own_code, refused, size
from retool.model.hub import read_json_object

# Fields that count experts
EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
)
# How fields end that say how much is dropped
DROPS = (
    "dropout",
    "pdrop",
    "dropout_prob",
    "layerdrop",
)
# How fields begin of a head that isn't a language model's
OTHER_HEADS = ("classifier", "summary")
# Kinds of layers that differ in what attention sees, and in nothing else
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Ropes whose frequencies depend on how long a sample is
ROPES_OF_LENGTH = ("dynamic", "longrope")


class Measured(NamedTuple):
    """What a model's module was found to be; elements of a block's matrices (the mean), and what
    the block that keeps most keeps.
    """

    config: BorrowedConfig
    matrices: int
    kept: Kept


def read_any_config(
    folder: str | Path,
    impl: Implementation = "auto",
) -> ModelConfig:
    """Read `folder/config.json`: a family's configuration, or a `BorrowedConfig`.

    With `impl` transformers it is a `BorrowedConfig` even where a family has a file. ValueError names
    all that can't run, and how to go on.
    """
    path = Path(folder) / "config.json"
    content = read_json_object(path) if path.is_file() else {}
    name = content.get("model_type")
    known = isinstance(name, str) and is_causal(name)
    if not known or (name in FAMILIES and impl == "auto"):
        return read_model_config(folder)
    try:
        return borrow(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_causal(model_type: str) -> bool:
    """Whether the installed transformers has a causal language model of this type."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )

    return model_type in CAUSAL


def borrow(content: dict[str, Any]) -> BorrowedConfig:
    """The content of a `config.json` → what runs of it as transformers' module.

    ValueError says what can't.
    """
    text = content_of(content)
    dropped = list(_dropped(text))
    if faults := list(_refusals(content)):
        raise ValueError(" ".join([*faults, *dropped]))
    try:
        config = measured(text).config
    except ValueError as error:
        raise ValueError(" ".join([_cannot_run(content["model_type"], error), *dropped])) from None
    if dropped:
        raise ValueError(" ".join(dropped))
    return config


def _cannot_run(name: str, error: ValueError) -> str:
    problem = f"can't run as transformers' module: {error}"
    if name in FAMILIES:
        return f"model_type {name!r} {problem}. Use model.impl=auto."
    return (
        f"model_type {name!r} has no file in retool, and {problem}. Use another model: one of "
        f"{', '.join(FAMILIES)}, or one that docs/models.md lists."
    )


def _refusals(c: dict[str, Any]) -> Iterator[str]:
    """What config.json says that can't work, whatever the module."""
    for name in WAYS_OUT:
        asked = has_own_code(c) if name == "auto_map" else c.get(name)
        # Dropout has several names: see `_dropped`
        if asked and not name.endswith(DROPS):
            yield refused(name, c[name])
    yield from beside_text(c)
    if c.get("is_encoder_decoder"):
        yield "is_encoder_decoder=true is not implemented. Use a decoder."
    for name in SIZES:
        given = c.get(name)
        # A window of 0 is how some files say that there is none
        none = given == 0 and name.startswith("sliding_window")
        if type(given) in (int, float) and not none:
            size(c, name)


def _dropped(text: str) -> Iterator[str]:
    """What would be dropped, by the file or by transformers' defaults."""
    try:
        config = loaded_config(text)
    except ValueError:
        return  # `measured` says why
    shares = list[str]()
    for name, value in vars(config).items():
        drops = name.endswith(DROPS) and not name.startswith(OTHER_HEADS)
        if drops and isinstance(value, (int, float)) and value:
            shares.append(f"{name}={value}")
    if shares:
        yield f"{' and '.join(shares)} is not implemented. {WAYS_OUT['attention_dropout']}"


def _refuse_settings(config: Any) -> None:
    """ValueError for what transformers' configuration says that isn't done here."""
    for name in EXPERTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 1:
            problem = f"it is a mixture of experts ({name}={count})"
            raise ValueError(f"{problem}, whose balance loss isn't added")
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - ATTENTION_LAYERS):
        raise ValueError(f"it has layers of {others[0]}")
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *rope.values()]
    for each in ropes:
        kind = each.get("rope_type") if isinstance(each, dict) else None
        if kind in ROPES_OF_LENGTH:
            problem = f"its rope ({kind}) depends on how long a sample is"
            raise ValueError(f"{problem}, which a pack hides")


@lru_cache(maxsize=4)
def measured(content: str) -> Measured:
    """What a config.json's text makes. ValueError for what can't run."""
    config = loaded_config(content)
    _refuse_settings(config)
    with quiet():
        causal = causal_model(content)
    _refuse_stored_buffers(causal)
    names_on_disk(causal)
    scale = logits_scale(causal)
    table = causal.get_output_embeddings().weight
    embedding = causal.get_input_embeddings()
    trial = try_on_shapes(causal)
    calls = trial.calls
    longest, because = _longest(causal, calls.windows)
    shape = BorrowedConfig(
        family=json.loads(content)["model_type"],
        vocab=len(table),
        hidden=table.shape[1],
        ffn=0,
        layers=trial.blocks,
        heads=min(calls.heads),
        kv_heads=min(calls.kv_heads),
        head_dim=max(calls.widths),
        norm_eps=0.0,
        rope_theta=0.0,
        rope_scaling=None,
        tied=embedding.weight is table,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windows=tuple(calls.windows) if any(calls.windows) else (),
        max_position=getattr(config, "max_position_embeddings", None) or 0,
        logits_scale=scale,
        content=content,
        architecture=type(causal).__name__,
        longest=longest,
        because=because,
    )
    return Measured(shape, _block_matrices(causal), trial.kept)


def _block_matrices(causal: Any) -> int:
    blocks = blocks_of(causal)
    elements = 0
    for _, block in blocks:
        for parameter in block.parameters():
            if parameter.ndim > 1:
                elements += parameter.numel()
    return elements // len(blocks)


def _refuse_stored_buffers(causal: Any) -> None:
    """ValueError for what is stored with the weights and is none."""
    computed = {name for name, _ in causal.named_non_persistent_buffers()}
    every = (name for name, _ in causal.named_buffers())
    stored = [name for name in every if name not in computed]
    if stored:
        more = f" (and {len(stored) - 1} more)" if len(stored) > 1 else ""
        raise ValueError(f"its files hold {stored[0]}{more}, which is no weight")


def _longest(causal: Any, windows: list[int]) -> tuple[int, str]:
    """Most tokens of a document, and why; 0 where there is no limit."""
    config = causal.config
    kinds = getattr(config, "layer_types", None) or ()
    limits: list[tuple[int, str]] = []
    slides = [kind == "sliding_attention" for kind in kinds]
    # Some say it in masks only, which aren't made here
    if any(slides) and slides != list(map(bool, windows)):
        window = config.sliding_window
        limits.append((window, f"its sliding window of {window}"))
    tokens = causal.get_input_embeddings()
    for name, module in around_blocks(causal):
        if isinstance(module, nn.Embedding) and module is not tokens:
            table = module.num_embeddings
            limits.append((table, f"its table of positions ({name})"))
    return min(limits, default=(0, ""))
