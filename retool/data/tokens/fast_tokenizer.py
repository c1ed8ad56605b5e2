"""One text, or one turn's ids, through a fast tokenizer's own backend.

The results are those of `tokenizer(text)` and `tokenizer.decode(ids)`.

A rollout does this for every turn on the one thread that feeds the engine. There transformers'
preparation, and the thread pool that its batches go through, cost more than the tokens themselves.
Whatever a tokenizer does besides its backend goes the long way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from retool.data.tokens.bounds import failures_told

STEPS = (
    "__call__",
    "_encode_plus",
    "_batch_encode_plus",
    "_convert_encoding",
    "_switch_to_input_mode",
    "decode",
    "_decode",
)


# From so many characters on the thread pool costs less than other threads would lose by waiting
MIN_CHARACTERS_FOR_POOL = 200


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text`, nothing added. With a long text other threads go on meanwhile."""
    with failures_told():
        if (backend := plain_backend(tokenizer)) is not None:
            if len(text) >= MIN_CHARACTERS_FOR_POOL:  # a batch lets go of Python's lock
                return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return backend.encode(text, add_special_tokens=False).ids
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    with failures_told():
        if (backend := plain_backend(tokenizer)) is not None:
            # The fast way counts no offsets, which are a third of the work.
            found = backend.encode_batch_fast(texts, add_special_tokens=False)
            return [entry.ids for entry in found]
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def token_offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """(start, end) characters of each token of `text`. Only fast tokenizers can tell."""
    with failures_told():
        if (backend := plain_backend(tokenizer)) is not None:
            return backend.encode(text, add_special_tokens=False).offsets
        return tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of `ids`, exactly: special tokens are kept, nothing is cleaned up."""
    if _is_plain(type(tokenizer)):
        return tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def plain_backend(tokenizer: Any) -> Any:
    """The backend, or None: take the long way.

    It can be used while nothing is set in it that a call of the tokenizer would set otherwise.
    """
    if not _is_plain(type(tokenizer)):
        return None
    backend = tokenizer.backend_tokenizer
    as_called = backend.truncation is None and backend.padding is None
    return (
        backend
        if as_called and backend.encode_special_tokens == tokenizer.split_special_tokens
        else None
    )


@cache
def _is_plain(kind: type) -> bool:
    """Whether a tokenizer of this class only passes texts and ids on.

    That is a fast one that has none of the steps in between of its own.
    """
    from transformers import PreTrainedTokenizerFast

    own = (
        kind.__mro__[: kind.__mro__.index(PreTrainedTokenizerFast)]
        if issubclass(kind, PreTrainedTokenizerFast)
        else None
    )
    return own is not None and not any(step in vars(base) for base in own for step in STEPS)
