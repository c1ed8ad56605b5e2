"""A run's folder as the page shows it: metrics by step, the configuration as flat keys, transcripts within a budget.

Everything may be missing, torn or hostile: the run may still be going, and its texts come from datasets and models.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from retool.config import REQUIRED, leaves
from retool.metrics import read_jsonl
from retool.redact import redact
from retool.report.glossary import MEANINGS, meaning
from retool.transcripts import FOLDER, read_transcripts

ENTRY_KEYS = ("step", "split", "data_source", "prompt", "ground_truth", "reward", "stop", "num_turns")


@dataclass(frozen=True)
class Run:
    """One run. `metrics`: name → values along `steps`, None where a step has none. `config`: dotted key → value as text."""

    name: str
    folder: Path
    steps: list[int]
    metrics: dict[str, list[float | None]]
    config: dict[str, str]
    written: float | None  # when metrics.jsonl last grew, seconds since 1970
    notes: list[str]


def read_run(folder: Path, name: str) -> Run:
    """Read a run's metrics and configuration. ValueError where the folder is none, or holds nothing of a run."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Give the folder of a run: trainer.default_local_dir.")
    file, settings = folder / "metrics.jsonl", folder / "config.yaml"
    if not file.is_file() and not settings.is_file() and not (folder / FOLDER).is_dir():
        raise ValueError(f"{folder} has neither metrics.jsonl nor config.yaml nor {FOLDER}/: it is no run's folder.")
    notes: list[str] = []
    by_step: dict[int, dict[str, Any]] = defaultdict(dict)
    for entry in read_jsonl(file) if file.is_file() else ():
        by_step[entry["step"]].update(entry)
    if not by_step:
        notes.append("no metrics yet")
    steps = sorted(by_step)
    names = dict.fromkeys(key for step in steps for key, value in by_step[step].items() if key != "step" and _is_number(value))
    metrics = {key: [_six_digits(by_step[step].get(key)) for step in steps] for key in names}
    return Run(name, folder, steps, metrics, _read_config(settings, notes), file.stat().st_mtime if file.is_file() else None, notes)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _six_digits(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        return None
    return float(f"{value:.6g}")


def _read_config(path: Path, notes: list[str]) -> dict[str, str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, RecursionError):
        notes.append("config.yaml isn't readable YAML")
        return {}
    return dict(_flat(redact(content))) if isinstance(content, dict) else {}


def _flat(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", in_words(value)


def in_words(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(in_words, value)) + "]"
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)


def default_config(config: Mapping[str, str]) -> dict[str, str]:
    """Defaults of the command that a run's keys belong to; those that follow another key are left out."""
    from retool.sft.config import SFTConfig

    schema: type = SFTConfig
    if any(key.startswith("actor_rollout_ref.") for key in config):
        from retool.rl.config import RLConfig

        schema = RLConfig
    values = ((leaf.key, leaf.default) for leaf in leaves(schema) if leaf.default is not REQUIRED)
    return {key: in_words(value) for key, value in values if "${" not in str(value)}


def about(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the metrics mean, as the page reads it, the best known ones first."""
    order = {name: place for place, name in enumerate(MEANINGS)}
    said = {name: asdict(meaning(name)) for name in names}
    return dict(sorted(said.items(), key=lambda pair: order.get(pair[0], 2 if pair[1]["first"] else len(order))))


# --- transcripts ---


def choose_transcripts(runs: list[Run], budget: int) -> tuple[list[dict[str, Any]], int, int]:
    """(transcripts for the page, how many were left out, how many lines were unreadable), at most `budget` bytes as JSON.

    When not all fit, each step of each run and split gives as many as the others do, its first ones. Two passes over the files, one
    transcript in memory at a time besides those that are kept.
    """
    sizes: dict[tuple[int, int, str], list[int]] = defaultdict(list)
    torn = 0
    for number, run in enumerate(runs):
        for record in read_transcripts(run.folder):
            if record is None:
                torn += 1
                continue
            sizes[_stratum(number, record)].append(len(json.dumps(record)) + 1)
    each = _fitting(sizes, budget)
    kept: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        taken: dict[tuple[int, int, str], int] = defaultdict(int)
        for record in read_transcripts(run.folder):
            if record is not None and taken[_stratum(number, record)] < each:
                taken[_stratum(number, record)] += 1
                kept.append(entry(number, record))
    return kept, sum(map(len, sizes.values())) - len(kept), torn


def _stratum(number: int, record: Mapping[str, Any]) -> tuple[int, int, str]:
    return number, record["step"], str(record.get("split", "train"))


def _fitting(sizes: Mapping[Any, list[int]], budget: int) -> int:
    """The largest number of transcripts of each stratum whose sizes stay within the budget."""
    most, used = max(map(len, sizes.values()), default=0), 0
    for index in range(most):
        used += sum(strata[index] for strata in sizes.values() if index < len(strata))
        if used > budget:
            return index
    return most


def entry(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as the page reads it: known fields only, of the right types, without secrets."""
    shown: dict[str, Any] = {"run": number, **{key: record[key] for key in ENTRY_KEYS if key in record}}
    for key in ("split", "data_source", "prompt", "ground_truth", "stop"):
        shown[key] = redact(str(shown.get(key, "train" if key == "split" else "")))
    for key in ("reward", "num_turns"):
        shown[key] = shown.get(key) if _is_number(shown.get(key)) else None
    info = record.get("info")
    shown["info"] = {str(k): in_words(v) for k, v in redact(info).items()} if isinstance(info, dict) else {}
    shown["segments"] = [_segment(segment) for segment in record["segments"]]
    return shown


def _segment(segment: Mapping[str, Any]) -> dict[str, Any]:
    """A segment; its tokens only where they are sound, and hide no secret."""
    text, tokens = redact(segment["text"]), segment.get("tokens")
    shown: dict[str, Any] = {"role": str(segment.get("role", "")), "text": text, "mask": segment.get("mask") is True}
    if text != segment["text"] or not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return shown
    shown["tokens"] = tokens
    for name in ("logp", "advantage", "mask"):
        value = segment.get(name)
        if isinstance(value, (int, float, bool)) or (isinstance(value, list) and _fits(value, tokens)):
            shown[name] = value
    return shown


def _fits(values: list[Any], tokens: list[str]) -> bool:
    return len(values) == len(tokens) and all(isinstance(value, (int, float, bool, type(None))) for value in values)
