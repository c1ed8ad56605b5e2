"""Which chat template a run uses: the tokenizer's own, ours (`hermes`), or a file of the user's."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from retool.data.tokens.load import load_tokenizer

QWEN_LOOP = "522ca2c94a1a3b4e419825e275d236bb349c3700b7bcd49775ccc3c994469f27"  # SHA-256
HERMES_BEGIN = "{%- set begin = '' -%}"
HERMES_END = "{%- set end = '<|im_end|>' -%}"
HERMES_SETTING = re.compile(r"^\{%- set (?:begin|end) = .* -%\}$", re.MULTILINE)
TEMPLATES = {"hermes": Path(__file__).with_name("hermes.jinja")}


def read_template(chat_template: str) -> str:
    """The text of a template named by `data.chat_template`: `hermes`, or a file."""
    path = TEMPLATES.get(chat_template, Path(chat_template))
    if not os.path.isfile(path):
        raise ValueError(
            f"data.chat_template={chat_template}: there is no such file; give a jinja file, or "
            f"{', '.join(TEMPLATES)}."
        )
    return path.read_text(encoding="utf-8")


def chosen_template(chat_template: str, tokenizer: Any) -> str:
    """The text of the template that `data.chat_template` names, as `tokenizer` needs it.

    Raises ValueError.

    Ours begins with the tokenizer's BOS where it wants one, and ends turns with its EOS where it
    lacks ChatML's token: any tokenizer that can end a text can learn it.
    """
    text = read_template(chat_template)
    if chat_template != "hermes":
        return text
    end = end_of_hermes(tokenizer)
    if end is None:
        raise ValueError(
            "data.chat_template=hermes: this tokenizer has neither <|im_end|> nor an eos_token to "
            "end turns with."
        )
    begin = tokenizer.bos_token if _wants_bos(tokenizer) else ""
    return text.replace(HERMES_BEGIN, _set("begin", begin), 1).replace(
        HERMES_END, _set("end", end), 1
    )


def exported_template(
    folder: str | Path, chat_template: str | None, trust_remote_code: bool = False
) -> str | None:
    """What `data.chat_template` puts in the place of the template of the model in `folder`.

    None where it names nothing.
    """
    if chat_template != "hermes":
        return None if chat_template is None else read_template(chat_template)
    return chosen_template(chat_template, load_tokenizer(str(folder), trust_remote_code))


def end_of_hermes(tokenizer: Any) -> str | None:
    """The token that ends a turn of our template with this tokenizer; None where it has none."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return next((token for token in ("<|im_end|>", tokenizer.eos_token) if token in added), None)


def _wants_bos(tokenizer: Any) -> bool:
    """Whether texts begin with BOS: the tokenizer puts it there, or its own template does."""
    if not tokenizer.bos_token:
        return False
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return True
    own = tokenizer.chat_template
    texts = own.values() if isinstance(own, dict) else [own or ""]
    return any("bos_token" in text or tokenizer.bos_token in text for text in texts)


def _set(name: str, value: str) -> str:
    return f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}"


def shows_contents_as_they_are(
    tokenizer: Any, template: str | None, template_kwargs: Mapping[str, Any]
) -> bool:
    """Whether glue is known to be fixed text around the unchanged contents of messages.

    The contents aren't tested by the template, and what came before doesn't matter.

    It is with our own template, `hermes`, and with those of Qwen2.5: of a tool's or user's message
    after an assistant's they read the role, those of its neighbours, and the content, to show it.
    So a conversation is shown as the beginning of every longer one, too (`template.one_render`). Of
    other templates nothing is known.
    """
    from transformers import PreTrainedTokenizerBase

    render = PreTrainedTokenizerBase.apply_chat_template
    text = template or tokenizer.chat_template
    if (
        type(tokenizer).apply_chat_template is not render
        or template_kwargs.keys() & inspect.signature(render).parameters.keys()
    ):
        return False
    return isinstance(text, str) and (_is_hermes(text) or _has_loop_of_qwen(text))


def _has_loop_of_qwen(template: str) -> bool:
    """Whether it is Qwen2.5's from its loop over the messages on, with nothing set before it.

    The loop reads nothing but the messages.
    """
    before, loop, rest = template.partition("{%- for message in messages %}")
    return (
        not re.search(r"\bset\b", before)
        and hashlib.sha256((loop + rest).rstrip().encode()).hexdigest() == QWEN_LOOP
    )


def _is_hermes(text: str) -> bool:
    """Whether it is ours, whatever tokens it begins and ends with."""
    return HERMES_SETTING.sub("", text) == HERMES_SETTING.sub("", _hermes())


@cache
def _hermes() -> str:
    return read_template("hermes")
