"""Keeps secrets out of everything that leaves a run: console, logs, files, trackers, error reports,
tracebacks. One function, `redact`.

A text is a secret by the name that it stands under (`password`, `X-Api-Key`, `DB_PWD`), by its look
(a login in a URL, a token with a maker's prefix), or because it was seen elsewhere: in an
environment variable or a configuration key with such a name. Ordinary names stay readable:
`prompt_key`, `max_token_len_per_gpu`, `eos_token`. detect-secrets was tried instead: it knows few
of these forms without its entropy test, which takes paths and model names for secrets, and needs
half a millisecond a line.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

HIDDEN = "<redacted>"

# --- names ---

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
SECRET_WORDS = frozenset(
    "password passwd passwort passphrase passcode pwd secret credential apikey authorization bearer dsn "
    "cookie webhook accesskey secretkey "
    "privatekey accountkey authtoken accesstoken connectionstring clientsecret".split()
)
# Secrets at the end of a name only
LAST_WORDS = frozenset("auth pass pat sas jwt sig signature".split())
# Before `key`, which alone, as in prompt_key, is the name of a column
KEYS = frozenset(
    "api access private secret account auth encryption signing ssh subscription storage service master "
    "session deploy license shared hmac "
    "client".split()
)
# Before `tokens`, else they are text
TOKENS = frozenset("api auth access refresh bearer hf hub session bot github gitlab id".split())
# Before `token`: parts of a text, or a count of them
TEXT_TOKENS = frozenset(
    "bos eos pad unk sep cls mask stop special added extra start end begin next first last per new max min "
    "num image video audio tool "
    "think control turn answer prompt response trained sampled highest eot eom a the of each every".split()
)
# Says something about a secret, and isn't one
ABOUT = frozenset(
    "file path dir directory folder socket sock host port helper provider env name length len size count "
    "type kind field column policy error exception "
    "required".split()
)
# The thing itself, said once more
VALUE = frozenset("value plain raw text b64 base64 current".split())
# One of these is in every name that `is_secret_name` holds for one, as it is written
STEMS = (*SECRET_WORDS, *LAST_WORDS, "key", "token", "connection")
# No secret, whatever its name
ORDINARY = frozenset(
    "true false none null auto test root user main admin default yes localhost".split()
)
# Variables of every shell: the folder one is in, and the one before. No passwords for all that
FOLDERS_OF_A_SHELL = frozenset({"PWD", "OLDPWD"})
SHORTEST_WORD = 4  # characters of a password that is looked for in other texts
SHORTEST_TOKEN = 8
SHORTEST_NUMBER = 6  # digits; a token that is a smaller number counts something


@functools.lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether a value under this name is a secret."""
    words = [word.lower() for word in WORD.findall(name)]
    while words and (words[-1] in VALUE or words[-1].isdigit()):
        words.pop()
    if not words or words[-1] in ABOUT:
        return False
    single = [_singular(word) for word in words]
    if SECRET_WORDS & {*words, *single} or words[-1] in LAST_WORDS:
        return True
    for first, second in itertools.pairwise(single):
        if second == "key" and first in KEYS:
            return True
        if (first, second) == ("connection", "string"):
            return True
    return _names_token(words)


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _names_token(words: list[str]) -> bool:
    """Whether the name means a token that gives access, and not a token of a text."""
    before = words[-2] if len(words) > 1 else ""
    return (words[-1] == "token" and before not in TEXT_TOKENS) or (
        words[-1] == "tokens" and before in TOKENS
    )


# --- looks ---

# Lengths are bounded, so that no text, however it is made, takes long.

IN_TEXT: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
            re.DOTALL,
        ),
        HIDDEN,
    ),
    # A login before a host. The password may hold / and @; digits and a slash after the colon are a
    # port, unless a host follows.
    (
        re.compile(r"(?<=://)[^\s/@:\"'<>]{0,200}:(?!\d{1,5}(?:[/?#]|$))[^\s\"'<>]{0,400}@"),
        f"{HIDDEN}@",
    ),
    (
        re.compile(r"(?<=://)[^\s/@:\"'<>]{1,200}:\d{1,5}/[^\s\"'<>]{0,400}@(?=[\w-]+\.\w)"),
        f"{HIDDEN}@",
    ),
    (re.compile(r"(?<=://)[^\s/@\"'<>]{1,400}@"), f"{HIDDEN}@"),
    # Addresses that are secrets themselves: whoever knows a webhook can post to it.
    (
        re.compile(
            r"(://hooks\.[^\s/\"']{1,200}/|://[^\s\"'<>]{0,400}?/(?:webhooks?\w*|hooks?)/)[^\s\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(://api\.telegram\.org/bot)[^\s/\"']+"), rf"\1{HIDDEN}"),
    (
        re.compile(
            r"([?&][^=&\s]{0,60}(?:sig|signature|key|token|secret|password|credential|code)[^=&\s]{0,60}=)[^&\s\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"\b(Bearer|Basic)(\s+)(?=[^\s\"']{0,400}\d)[\w.~+/\-]{8,}={0,2}(?![\w=])",
            re.IGNORECASE,
        ),
        rf"\1\2{HIDDEN}",
    ),
    (re.compile(r"\beyJ[\w-]{6,2000}\.[\w-]{6,}(?:\.[\w-]*)?"), HIDDEN),  # a JSON web token
    (re.compile(r"\b(?:AIza|ya29\.)[\w-]{20,}"), HIDDEN),
    (
        re.compile(
            r"\b(?:hf_|r8_|sk-|pk-lf-|sk_live_|rk_live_|sk_test_|whsec_|gh[opsur]_|github_pat_|"
            r"glpat-|xox[abeprs]-|xapp-|npm_|pypi-|gsk_|xai-|"
            r"pplx-|tvly-|nvapi-|lsv2_|dop_v1_|dapi|SG\.|AKIA|ASIA|AGE-SECRET-KEY-)[\w.\-]{12,}"
        ),
        HIDDEN,
    ),
)
# `name=value`, `name: value`, `"name": "value"`, `--name value`: whether what follows is a secret,
# the name says.
NAMED = re.compile(
    r"(?<![\w.\-])(?P<name>[A-Za-z_][\w.\-]{0,100})"
    r"(?:[\"']?\s?=\s?|[\"']?\s*(?P<colon>:)\s+|[\"']\s*:\s*)"
    r"|--(?P<option>[\w\-]{1,100})\s+"
)
ITS_VALUE = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|[^\s\"']+")
TO_LINE_END = re.compile(r"[^\n]+")
PHRASES = frozenset("password passphrase passwd pwd secret".split())  # may be several words
MIXED = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{12,}")


def _hide_named(text: str) -> str:
    """`text` without values that follow a name which makes them secrets."""
    # The search below is the dearest of all, and most texts have no such name.
    lowered = text.lower()
    if not any(stem in lowered for stem in STEMS):
        return text
    parts: list[str] = []
    done = 0
    while (named := NAMED.search(text, done)) is not None:
        parts.append(text[done : named.end()])
        done = named.end()
        name = named["name"] or named["option"]
        if not is_secret_name(name):
            continue
        last = WORD.findall(name)[-1].lower()
        phrase = named["colon"] and last in PHRASES and text[done : done + 1] not in ("'", '"')
        value = (TO_LINE_END if phrase else ITS_VALUE).match(text, done)
        if value is None:
            continue
        bare = value[0].strip("\"'")
        if not _looks_like_one(bare, last, in_prose=named["colon"] is not None):
            continue
        quote = value[0][0] if value[0][0] in "\"'" else ""
        parts.append(f"{quote}{HIDDEN}{quote}")
        done = value.end()
    return "".join(parts) + text[done:]


def _looks_like_one(value: str, last_word: str, in_prose: bool) -> bool:
    """Whether the text after such a name is a secret, and not just a remark about one ("at token:
    the").
    """
    if value.startswith(HIDDEN) or value.lower() in ORDINARY:
        return False
    if last_word == "token" and value.isdigit():
        return len(value) >= SHORTEST_NUMBER
    may_be_a_remark = in_prose and last_word in ("token", "auth", "pass")
    return not may_be_a_remark or MIXED.fullmatch(value) is not None


# --- known ones ---

_remembered: set[str] = set()


def remember(value: Any) -> None:
    """Hide this value from now on wherever it appears, if it is long enough to be told from
    ordinary text.
    """
    if isinstance(value, str) and len(value) >= SHORTEST_TOKEN and value.lower() not in ORDINARY:
        _remembered.add(value)


def _known() -> re.Pattern[str] | None:
    """All values that are secrets by the name of an environment variable, or were remembered."""
    return _one_of(frozenset(_in_environment()) | _remembered)


def _in_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if name in FOLDERS_OF_A_SHELL or not is_secret_name(name):
            continue
        is_password = SECRET_WORDS & {word.lower() for word in WORD.findall(name)}
        shortest = SHORTEST_WORD if is_password else SHORTEST_TOKEN
        for part in {value, *re.split(r"[,;\s]+", value)}:  # API_KEYS=one,two
            if len(part) >= shortest and part.lower() not in ORDINARY:
                yield part


@functools.lru_cache(16)
def _one_of(values: frozenset[str]) -> re.Pattern[str] | None:
    if not values:
        return None
    longest_first = sorted(values, key=lambda value: (-len(value), value))
    return re.compile("|".join(map(_pattern_of, longest_first)))


def _pattern_of(value: str) -> str:
    """A pattern for secrets. A short one must be a word of its own: `test` isn't a part of
    `latest`.
    """
    literal = re.escape(value)
    return literal if len(value) >= SHORTEST_TOKEN else rf"(?<!\w){literal}(?!\w)"


# --- what others call ---


def redact(value: Any, name: str = "") -> Any:
    """`value` (a text, a number, nested dicts and lists) without its secrets; `name` is what it
    stands under.
    """
    return _redact(value, name if is_secret_name(name) else "", _known())


def _redact(value: Any, secret: str, known: re.Pattern[str] | None) -> Any:
    """`secret`: the name above that makes everything below a secret."""
    if isinstance(value, Mapping):
        out: dict[Any, Any] = {}
        for key, inner in value.items():
            shown = _redact_text(key, known) if isinstance(key, str) else key
            name = str(key) if is_secret_name(str(key)) else secret
            out[shown] = _redact(inner, name, known)
        return out
    if isinstance(value, (list, tuple)):
        return [_redact(inner, secret, known) for inner in value]
    if secret and isinstance(value, (int, float)) and not isinstance(value, bool):
        is_small = abs(value) < 10 ** (SHORTEST_NUMBER - 1)
        counts_tokens = is_small and _names_token(WORD.findall(secret.lower()))
        return value if counts_tokens else HIDDEN
    if not isinstance(value, str) or not value:
        return value
    if secret:
        remember(value)
        return HIDDEN
    return _redact_text(value, known)


def _redact_text(text: str, known: re.Pattern[str] | None) -> str:
    if known is not None:
        text = known.sub(HIDDEN, text)
    for pattern, replacement in IN_TEXT:
        text = pattern.sub(replacement, text)
    return _hide_named(text)


def redact_word(word: str) -> str:
    """A word `key=value` of a command line, whose value may hold spaces, without its secrets."""
    key, equals, value = word.partition("=")
    return f"{key}={redact(value, key)}" if equals and is_secret_name(key) else redact(word)


class _HideInRecords(logging.Filter):
    """Has every record of a logger say what it says without secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = redact(record.getMessage())
        record.args = ()
        return True


def logger(name: str) -> logging.Logger:
    """The logger of this name, which tells no secrets."""
    out = logging.getLogger(name)
    if not any(isinstance(found, _HideInRecords) for found in out.filters):
        out.addFilter(_HideInRecords())
    return out


def hide_in_tracebacks() -> None:
    """Have errors that nobody caught, in any thread, end up on standard error without secrets."""

    def show(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = redact("".join(traceback.format_exception(kind, error, trace)))
        print(told, end="", file=sys.stderr, flush=True)

    sys.excepthook = show
    threading.excepthook = lambda args: show(args.exc_type, args.exc_value, args.exc_traceback)
