"""`read` accepts dotted `key=value` words and `config=run.yaml` (a file; later words win), `parse`
raises what `read` found.

Every fault is collected; none stops the search for the next.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from retool.config.schema import REQUIRED, C, ConfigError, Fault, Leaf, Parsed, is_dict, leaves

MOST_OF_A_FILE = 10  # unknown keys that are told one by one
NULLS = ("null", "none", "~", "")


def read(
    schema: type[C], words: Sequence[str], synonyms: Mapping[str, str] | None = None
) -> Parsed[C]:
    """Read `key=value` words over the defaults of `schema`; `synonyms` maps other names of keys to
    ours.
    """
    known = {leaf.key: leaf for leaf in leaves(schema)}
    assignments, faults = _assignments(words, known, synonyms or {})
    node = OmegaConf.structured(schema)
    faulty = set()
    for key, leaf, raw, shown in assignments:
        try:
            value = _from_text(leaf, raw) if isinstance(raw, str) else _as_list(leaf, raw)
            node = OmegaConf.merge(node, _nested(key, value))
        except (OmegaConfBaseException, ValueError) as error:
            faulty.add(leaf.key)
            faults.append(_type_fault(leaf, shown, error))
    for leaf in known.values():
        try:
            if OmegaConf.is_missing(*_parent(node, leaf.key)):
                if leaf.key not in faulty:
                    faults.append(
                        Fault(
                            leaf.key, "is required and not given.", f"Add {leaf.key}=…: {leaf.doc}"
                        )
                    )
                node = OmegaConf.merge(
                    node, _nested(leaf.key, [] if typing.get_origin(leaf.type) is tuple else "")
                )
                continue
            value = OmegaConf.select(node, leaf.key, throw_on_missing=True)
            faults += _bound_faults(leaf, value)
            if value == "" and not leaf.nullable:
                faults.append(
                    Fault(
                        f"{leaf.key}=",
                        "is empty: perhaps of a shell variable that isn't set.",
                        leaf.doc,
                    )
                )
        except OmegaConfBaseException as error:
            faults.append(
                Fault(
                    leaf.key,
                    str(error).splitlines()[0] + ".",
                    "Interpolate a key that exists: ${trainer.project_name}.",
                )
            )
            fallback = None if leaf.nullable else leaf.default
            node = OmegaConf.merge(
                node, _nested(leaf.key, "" if fallback is REQUIRED else fallback)
            )
    return Parsed(typing.cast(C, OmegaConf.to_object(node)), tuple(faults))


def parse(schema: type[C], words: Sequence[str], synonyms: Mapping[str, str] | None = None) -> C:
    """`read`, raising `ConfigError` (a ValueError) with every fault."""
    parsed = read(schema, words, synonyms)
    if parsed.faults:
        raise ConfigError(parsed.faults)
    return parsed.config


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dicts, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


# --- from words to (key, value) ---

# The key as far as given (a dict's entry may follow), its leaf, the value, how to show it
Assignment = tuple[str, Leaf, Any, str]


def _assignments(
    words: Sequence[str], known: Mapping[str, Leaf], synonyms: Mapping[str, str]
) -> tuple[list[Assignment], list[Fault]]:
    out: list[Assignment] = []
    faults: list[Fault] = []
    for word in words:
        key, equals, text = word.partition("=")
        key = key.lstrip("+")  # Hydra's `+key=value`, which existing scripts use
        if not equals or not key or key.startswith("-"):
            faults.append(
                Fault(
                    word,
                    "is not key=value.",
                    f"{_meant(key, bool(equals), known, synonyms)}; --help lists every key.",
                )
            )
        elif key == "config":
            entries, trouble = _from_file(text, known)
            faults += trouble
            mine: list[Fault] = []
            for name, value in entries:
                _place(name, value, f"{name} in {text}", known, synonyms, out, mine)
            faults += (
                mine
                if len(mine) <= MOST_OF_A_FILE
                else [*mine[:3], _many(text, len(mine), len(entries))]
            )
        else:
            _place(key, text, word, known, synonyms, out, faults)
    return out, faults


def _many(path: str, wrong: int, count: int) -> Fault:
    """For a file with so many unknown keys that it must have been made for something else."""
    problem = f"{wrong} of its {count} keys are none of this command's."
    return Fault(
        f"config={path}",
        problem,
        "Give a file of this command: config.yaml in the folder of one of its runs, or your own.",
    )


def _meant(key: str, complete: bool, known: Mapping[str, Leaf], synonyms: Mapping[str, str]) -> str:
    """What to write instead of a word that is no key=value."""
    bare = key.lstrip("-")
    if flag := next(
        (flag for flag in ("check", "help") if key.startswith("-") and bare.lower() == flag), None
    ):
        return f"Write --{flag}"
    if not bare:
        return "Write key=value without spaces"
    if bare in known or bare in synonyms:
        return f"Write {bare}=…, without spaces" + (" and dashes" if key != bare else "")
    if key.startswith("-"):
        return f"Options of torchrun stand before -m: torchrun {key}{'=…' if complete else ''} -m …"
    return "Write data.train_files=train.parquet"


def _place(
    key: str,
    value: Any,
    shown: str,
    known: Mapping[str, Leaf],
    synonyms: Mapping[str, str],
    out: list[Assignment],
    faults: list[Fault],
) -> None:
    name = synonyms.get(key, key)
    leaf = known.get(name)
    if leaf is None:  # an entry of a dict: data.apply_chat_template_kwargs.enable_thinking=false
        leaf = next(
            (o for o in known.values() if is_dict(o.type) and name.startswith(o.key + ".")), None
        )
    if leaf is not None:
        out.append((name, leaf, value, shown))
        return
    members = [k for k in known if k.startswith(name + ".")]
    if members:
        faults.append(
            Fault(
                shown,
                f"{name} is a group of keys, not a key.",
                f"Set one of its keys, such as {members[0]}.",
            )
        )
        return
    near = nearest(key, [*known, *synonyms])
    faults.append(
        Fault(
            shown,
            f"unknown key {key}.",
            f"Did you mean {synonyms.get(near, near)}?" if near else "--help lists every key.",
        )
    )


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be: by the whole dotted name, else by its
    last part.
    """
    candidates = list(names)
    tails = {c.rpartition(".")[2]: c for c in reversed(candidates)}
    if (same := tails.get(name.rpartition(".")[2])) is not None:
        return same
    whole = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
    tail = difflib.get_close_matches(name.rpartition(".")[2], tails, n=1, cutoff=0.75)
    loose = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return whole[0] if whole else tails[tail[0]] if tail else loose[0] if loose else None


def _from_file(path: str, known: Mapping[str, Leaf]) -> tuple[list[tuple[str, Any]], list[Fault]]:
    if not Path(path).is_file():
        return [], [Fault(f"config={path}", "no such file.", "Give the path of a YAML file.")]
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML's own errors have no common documented base in OmegaConf
        return [], [
            Fault(
                f"config={path}",
                f"isn't readable YAML: {' '.join(str(error).split())}.",
                "Mend the file.",
            )
        ]
    if not isinstance(content, dict):
        return [], [
            Fault(
                f"config={path}",
                f"holds a {type(content).__name__} where keys are expected.",
                "Write keys, such as data: …",
            )
        ]
    return list(_flatten(typing.cast("dict[str, Any]", content), known)), []


def _flatten(
    content: Mapping[str, Any], known: Mapping[str, Leaf], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            yield from _flatten(value, known, key + ".")
        else:
            yield key, value


# --- values ---


def _from_text(leaf: Leaf, text: str) -> Any:
    """A value as the key's type reads it.

    Text keys take the word as it is: a project called 007 isn't the number 7.
    """
    stripped = text.strip()
    if leaf.nullable and stripped.lower() in NULLS:
        return None
    if len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "'\"":
        stripped = stripped[1:-1]
    value = leaf.spellings.get(stripped, stripped)
    if (
        leaf.type is str
        or value.startswith("${")
        or (typing.get_origin(leaf.type) is Literal and value in typing.get_args(leaf.type))
    ):
        return value
    is_list = typing.get_origin(leaf.type) is tuple
    if is_list and not value.startswith(("[", "(")):
        return [value]
    if is_list and value.startswith("("):
        value = f"[{value[1:-1]}]"
    if leaf.type is int and value.lstrip("+-").replace("_", "").isdigit():
        return int(value)
    return _as_list(leaf, _yaml(value))


def _yaml(text: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist(["x=" + text]), resolve=False)["x"]  # pyright: ignore
    except Exception as error:
        raise ValueError(f"isn't readable: {' '.join(str(error).split())}") from error


def _as_list(leaf: Leaf, value: Any) -> Any:
    if (
        typing.get_origin(leaf.type) is tuple
        and value is not None
        and not isinstance(value, (list, tuple))
    ):
        return [value]
    if (
        is_dict(leaf.type)
        and isinstance(value, dict)
        and any(v is None and ":" in str(k) for k, v in value.items())
    ):
        raise ValueError(f"{value} has no space after a colon, which YAML wants")
    return leaf.spellings.get(value, value) if isinstance(value, str) else value


def _type_fault(leaf: Leaf, shown: str, error: Exception) -> Fault:
    choices = typing.get_args(leaf.type) if typing.get_origin(leaf.type) is Literal else ()
    near = difflib.get_close_matches(shown.partition("=")[2], [str(c) for c in choices], n=1)
    detail = f" ({error})" if type(error) is ValueError else ""
    return Fault(
        shown, f"is not {leaf.expected}{detail}.", f"Did you mean {near[0]}?" if near else leaf.doc
    )


def _bound_faults(leaf: Leaf, value: Any) -> Iterator[Fault]:
    if leaf.minimum is leaf.above is leaf.maximum is None:
        return
    numbers = OmegaConf.to_container(value) if OmegaConf.is_config(value) else [value]
    for number in typing.cast("list[Any]", numbers):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            continue
        low = leaf.minimum is not None and not number >= leaf.minimum
        if (
            low
            or (leaf.above is not None and not number > leaf.above)
            or (leaf.maximum is not None and not number <= leaf.maximum)
        ):
            sides = [("at least", leaf.minimum), ("above", leaf.above), ("at most", leaf.maximum)]
            wanted = " and ".join(f"{name} {bound:g}" for name, bound in sides if bound is not None)
            yield Fault(f"{leaf.key}={number}", f"must be {wanted}.", leaf.doc)


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _parent(node: Any, key: str) -> tuple[Any, str]:
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    return node, last
