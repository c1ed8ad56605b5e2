"""From the words of a command line, and the files that they name, to assignments of values to keys.

Every fault is collected; none stops the search for the next.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from retool.config.schema import Fault, Leaf, is_dict

MOST_OF_A_FILE = 10  # unknown keys that are told one by one
SHOWN_OF_TOO_MANY = 3


@dataclass(frozen=True)
class Assignment:
    """A value for a key.

    `key` as far as it was given: an entry of a mapping may follow the leaf's. `value` is text from
    the command line, anything from a file. `shown` is how a message names it.
    """

    key: str
    leaf: Leaf
    value: Any
    shown: str


@dataclass
class Reader:
    """What words may name, and what was read of them so far.

    `synonyms` maps other names of keys to ours; `ignored` are keys that are accepted and dropped.
    """

    known: Mapping[str, Leaf]
    synonyms: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    assignments: list[Assignment] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def read(self, words: Sequence[str]) -> None:
        """Read them in order: later ones win."""
        for word in words:
            key, equals, text = word.partition("=")
            key = key.lstrip("+")  # Hydra's `+key=value`, which existing scripts use
            if not equals or not key or key.startswith("-"):
                way_out = f"{self._meant(key, bool(equals))}; --help lists every key."
                self.faults.append(Fault(word, "is not key=value.", way_out))
            elif key == "config":
                self._read_file(text)
            else:
                self._assign(key, text, word)

    def _read_file(self, path: str) -> None:
        content, fault = _yaml_file(path)
        if fault is not None:
            self.faults.append(fault)
            return
        entries = list(_flatten(content, self.known))
        before = len(self.faults)
        for key, value in entries:
            self._assign(key, value, f"{key} in {path}")
        wrong = len(self.faults) - before
        if wrong > MOST_OF_A_FILE:
            del self.faults[before + SHOWN_OF_TOO_MANY :]
            self.faults.append(_made_for_something_else(path, wrong, len(entries)))

    def _assign(self, key: str, value: Any, shown: str) -> None:
        """Note the value of a key, or why there is no such key."""
        name = self.synonyms.get(key, key)
        if name in self.ignored:
            return
        leaf = self._leaf_of(name)
        if leaf is None:
            self.faults.append(self._no_key(key, name, shown))
        else:
            self.assignments.append(Assignment(name, leaf, value, shown))

    def _leaf_of(self, name: str) -> Leaf | None:
        if name in self.known:
            return self.known[name]
        for leaf in self.known.values():
            # An entry of a mapping: data.apply_chat_template_kwargs.enable_thinking=false
            if is_dict(leaf.type) and name.startswith(leaf.key + "."):
                return leaf
        return None

    def _no_key(self, key: str, name: str, shown: str) -> Fault:
        members = [known for known in self.known if known.startswith(name + ".")]
        if members:
            problem = f"{name} is a group of keys, not a key."
            return Fault(shown, problem, f"Set one of its keys, such as {members[0]}.")
        near = nearest(key, [*self.known, *self.synonyms, *self.ignored])
        way_out = "--help lists every key."
        if near is not None:
            way_out = f"Did you mean {self.synonyms.get(near, near)}?"
        return Fault(shown, f"unknown key {key}.", way_out)

    def _meant(self, key: str, complete: bool) -> str:
        """What to write instead of a word that is no key=value."""
        bare = key.lstrip("-")
        has_dashes = key.startswith("-")
        if has_dashes and bare.lower() in ("check", "help"):
            return f"Write --{bare.lower()}"
        if not bare:
            return "Write key=value without spaces"
        if bare in self.known or bare in self.synonyms:
            return f"Write {bare}=…, without spaces" + (" and dashes" if has_dashes else "")
        if has_dashes:
            option = f"{key}=…" if complete else key
            return f"Options of torchrun stand before -m: torchrun {option} -m …"
        return "Write data.train_files=train.parquet"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be.

    By its last part where that is right, then by the whole dotted name, then by a last part that is
    nearly right.
    """
    candidates = list(names)
    by_tail = {known.rpartition(".")[2]: known for known in reversed(candidates)}
    tail = name.rpartition(".")[2]
    if tail in by_tail:
        return by_tail[tail]
    for whole in difflib.get_close_matches(name, candidates, n=1, cutoff=0.8):
        return whole
    for near_tail in difflib.get_close_matches(tail, by_tail, n=1, cutoff=0.75):
        return by_tail[near_tail]
    for loose in difflib.get_close_matches(name, candidates, n=1, cutoff=0.6):
        return loose
    return None


# --- files ---


def _yaml_file(path: str) -> tuple[dict[str, Any], Fault | None]:
    """The content of a YAML file of keys, or what is wrong with it."""
    where = f"config={path}"
    if not Path(path).is_file():
        return {}, Fault(where, "no such file.", "Give the path of a YAML file.")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML's own errors have no common documented base in OmegaConf
        problem = f"isn't readable YAML: {' '.join(str(error).split())}."
        return {}, Fault(where, problem, "Mend the file.")
    if not isinstance(content, dict):
        problem = f"holds a {type(content).__name__} where keys are expected."
        return {}, Fault(where, problem, "Write keys, such as data: …")
    return typing.cast("dict[str, Any]", content), None


def _flatten(
    content: Mapping[str, Any], known: Mapping[str, Leaf], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            yield from _flatten(value, known, key + ".")
        else:
            yield key, value


def _made_for_something_else(path: str, wrong: int, count: int) -> Fault:
    """For a file with so many unknown keys that it can't be meant for this command."""
    return Fault(
        f"config={path}",
        f"{wrong} of its {count} keys are none of this command's.",
        "Give a file of this command: config.yaml in the folder of one of its runs, or your own.",
    )
