"""Command-line arguments, and the files that they name → assignments of values to keys.

Every fault is collected; none stops the search for the next.
"""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from retool.config.elsewhere import LAUNCHERS, absent, is_elsewhere, key_for, plain
from retool.config.schema import Fault, Leaf, is_dict

MOST_OF_A_FILE = 10  # unknown keys that are told one by one
SHOWN_OF_TOO_MANY = 3
MIN_TAIL_LIKENESS = 0.75
MIN_SHORT_TAIL_LIKENESS = 0.8  # of up to three letters
# Last parts that say nothing without what stands before them
VAGUE = frozenset("enable path name type format metric n len".split())
DOTTED = re.compile(r"[a-z]\w*(\.[a-z]\w*)*")
MIN_LIKENESS = 0.7  # of the groups of two keys whose last parts are the same


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
    """The keys that arguments may name, and the values that were read so far.

    `synonyms` maps other names of keys to ours; `ignored` are keys that are accepted and dropped.
    `meant`: keys that a fault offers in the place of others.
    """

    known: Mapping[str, Leaf]
    synonyms: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    assignments: list[Assignment] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    meant: set[str] = field(default_factory=set)

    def read(self, words: Sequence[str]) -> None:
        """Read the arguments in order: later ones override earlier ones."""
        left = list(words)
        while left:
            word = left.pop(0)
            key, equals, text = word.partition("=")
            key = key.lstrip("+")  # Hydra's `+key=value`, which existing scripts use
            if not equals or not key or key.startswith("-") or (not text and _is_bare(left)):
                value = text or self._value_apart(word, left)
                way_out = f"{self._meant(key or word, value)}; --help lists every key."
                self.faults.append(Fault(word, "is not key=value.", way_out))
            elif key == "config":
                self._read_file(text)
            else:
                self._assign(key, text, word)

    def take(self, options: Mapping[str, Any]) -> None:
        """Values from Python, by their keys; groups of keys may be mappings of them."""
        for key, value in flattened(options, self.known):
            plain = _from_python(value)
            self._assign(key, plain, f"{key}={plain}")

    def _read_file(self, path: str) -> None:
        content, fault = _yaml_file(path)
        if fault is not None:
            self.faults.append(fault)
            return
        entries = list(flattened(content, self.known))
        before = len(self.faults)
        for key, value in entries:
            self._assign(key, value, f"{key} in {path}")
        wrong = len(self.faults) - before
        # A file of another program: a hundred faults would say less than one.
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
        return Fault(shown, f"unknown key {key}.", absent(key) or self._instead(key))

    def _instead(self, key: str) -> str:
        meant = key_for(key, self.known)
        if meant is not None:  # it may count otherwise elsewhere
            self.meant.add(meant)
            return f"Did you mean {meant}? {self.known[meant].doc}"
        near = self.nearest_key(key)
        if near is not None:
            self.meant.add(near)
            return f"Did you mean {near}?"
        group = key.rpartition(".")[0]
        if any(known.startswith(group + ".") for known in self.known):
            return f"--help {group} lists that group's keys."
        return "--help lists every key."

    def nearest_key(self, key: str) -> str | None:
        """The key that was probably meant: by its name in other programs, else by its spelling."""
        meant = key_for(key, self.known)
        names = [*self.known, *self.synonyms, *self.ignored]
        tail = key.rpartition(".")[2]
        # What has a name elsewhere and nothing here isn't another word misspelt.
        if meant or (is_elsewhere(key) and not any(n.rpartition(".")[2] == tail for n in names)):
            return meant
        near = nearest(key, names)
        return self.synonyms.get(near, near) if near else None

    def _value_apart(self, word: str, left: list[str]) -> str:
        """The value of a key that stands before it as a word of its own, taken off what is left."""
        named = word.rstrip("=")
        is_key = named in self.synonyms or (DOTTED.fullmatch(named) and self.nearest_key(named))
        if not (is_key or word.startswith("-")) or word in ("--check", "--help"):
            return ""
        if left[:1] == ["="]:
            left.pop(0)
        return left.pop(0) if _is_bare(left) else ""

    def _meant(self, key: str, value: str) -> str:
        """What to write instead of an argument that isn't key=value; `value` is its value, if it
        has one.
        """
        bare = key.lstrip("-").rstrip("=")
        has_dashes = key.startswith("-")
        if has_dashes and bare.lower() in ("check", "help"):
            return f"Write --{bare.lower()}"
        if not bare:
            return "Write key=value without spaces"
        if has_dashes and bare in ("c", "config", "config_file", "config-file", "config_path"):
            return f"Write config={value or 'run.yaml'}"
        if bare in self.known or bare in self.synonyms:
            self.meant.add(self.synonyms.get(bare, bare))
            signs = " and dashes" if has_dashes else ""
            return f"Write {bare}={value or '…'}, without spaces{signs}"
        if has_dashes:
            return self._option_meant(bare, value)
        near = self.nearest_key(bare) if DOTTED.fullmatch(bare) else None
        if near is None:
            return _file_meant(bare, self.known)
        self.meant.add(near)
        return f"Write {near}={value or '…'}"

    def _option_meant(self, name: str, value: str) -> str:
        """What to write for another program's `--name value`."""
        if plain(name) in LAUNCHERS:
            option = f"--{name}={value or '…'}"
            return f"Options of torchrun stand before -m: torchrun {option} -m …"
        leave_out = absent(name)
        if leave_out is not None:
            return leave_out.rstrip(".")
        near = self.nearest_key(name.replace("-", "_"))
        if near is None or near not in self.known:
            return "Write key=value, without dashes"
        self.meant.add(near)
        choices = typing.get_args(self.known[near].type)
        if choices and value not in choices:  # --bf16 true is param_dtype=bf16
            value = name if name in choices else ""
        return f"Write {near}={value or '…'}"


def _is_bare(words: Sequence[str]) -> bool:
    """Whether the next word can only be the value of the one before it."""
    if not words or "=" in words[0]:
        return False
    return not words[0].startswith("-") or words[0][1:2].isdigit()


def _file_meant(word: str, known: Iterable[str]) -> str:
    """What to write for a file, a folder or a model that is given without a key."""
    ending = Path(word).suffix.lower()
    if ending in (".yaml", ".yml"):
        return f"Write config={word}"
    is_data = ending in (".parquet", ".jsonl", ".json", ".csv", ".gz", ".zst", ".arrow")
    if "/" in word and not is_data:
        model = key_for("model_name_or_path", known)
        return f"Write {model}={word}" if model else "Write key=value"
    return f"Write data.train_files={word if is_data else 'train.parquet'}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be: one with its last part, or nearly.

    What stands before that decides between several, and isn't enough alone: a key of the same group
    is as a rule another key.
    """
    candidates = list(names)
    by_tail: dict[str, list[str]] = {}
    for known in candidates:
        by_tail.setdefault(known.rpartition(".")[2], []).append(known)
    head, _, tail = name.rpartition(".")
    tails = [tail]
    if tail not in by_tail:
        alike = MIN_TAIL_LIKENESS if len(tail) > 3 else MIN_SHORT_TAIL_LIKENESS
        tails = difflib.get_close_matches(tail, by_tail, 1, alike)
    if not tails:
        return None
    # SequenceMatcher prepares its second text: `head` is the one that stays.
    likeness = difflib.SequenceMatcher(b=head)
    best = None
    best_ratio = -1.0
    for known in by_tail[tails[0]]:
        likeness.set_seq1(known.rpartition(".")[0])
        if likeness.ratio() > best_ratio:
            best = known
            best_ratio = likeness.ratio()
    vague = tails[0] in VAGUE or len(by_tail[tails[0]]) > 1
    if head and vague and best_ratio < MIN_LIKENESS:
        return None
    return best


# --- files ---


def _yaml_file(path: str) -> tuple[dict[str, Any], Fault | None]:
    """The content of a YAML file of keys, or what is wrong with it."""
    where = f"config={path}"
    path = os.path.expanduser(path)
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


def flattened(
    content: Mapping[str, Any], known: Mapping[str, Leaf], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Nested keys as dotted ones; mappings that are a key's own value stay."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            yield from flattened(value, known, key + ".")
        else:
            yield key, value


def _from_python(value: Any) -> Any:
    """A value as a file would hold it: paths are texts, sequences lists, numpy's numbers plain."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple, set)):
        return [_from_python(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): _from_python(entry) for key, entry in value.items()}
    return value.item() if hasattr(value, "item") else value


def _made_for_something_else(path: str, wrong: int, count: int) -> Fault:
    """The fault of a file with so many unknown keys that it can't be meant for this command."""
    return Fault(
        f"config={path}",
        f"{wrong} of its {count} keys are none of this command's.",
        "Give a file of this command: config.yaml in the folder of one of its runs, or your own.",
    )
