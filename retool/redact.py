"""Secrets stay out of what is written: configuration dumps, logs and reports."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HIDDEN = "<redacted>"
# Names such as prompt_key and max_token_len_per_gpu are no secrets: `key` counts only after api, access or private, `token` at the end.
SECRET_NAME = re.compile(
    r"((api|access|private|secret)_?key(_id)?|secret|passw(or)?d|credentials?|authorization|(^|[_.-])(auth|token))$", re.IGNORECASE
)
IN_TEXT = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), HIDDEN),  # scheme://user:password@host
    (re.compile(r"([?&][^=&\s]*(?:sig|signature|key|token|secret|password|credential)[^=&\s]*=)[^&\s]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_\-]{12,}"), HIDDEN),
)


def redact(value: Any, name: str = "") -> Any:
    """`value` (nested dicts and lists) without its secrets: by the key's name, by the look of the text, and by being
    the value of an environment variable whose name says that it's a secret."""
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_NAME.search(name):
        return HIDDEN
    for secret in (v for k, v in os.environ.items() if len(v) >= 8 and SECRET_NAME.search(k)):
        value = value.replace(secret, HIDDEN)
    for pattern, replacement in IN_TEXT:
        value = pattern.sub(replacement, value)
    return value


def save_config(config: Mapping[str, Any], path: Path) -> None:
    """Write a resolved configuration (`retool.config.to_dict`) as YAML that `config=` reads back, secrets redacted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
