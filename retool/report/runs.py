"""A run's folder as the page shows it: metrics by step, the configuration as flat keys, transcripts
within a budget.

Everything may be missing, torn or hostile: the run may still be going, and its texts come from
datasets and models.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from retool.config import REQUIRED, Leaf, leaves
from retool.config.redact import redact
from retool.metrics.transcripts import FOLDER, read_transcripts
from retool.report.glossary import MEANINGS, meaning
from retool.report.series import MOST_VALUES, Series, is_number, read_series
from retool.report.settings import in_words, read_config, require_small

TEXT_KEYS = ("split", "data_source", "prompt", "ground_truth", "stop")
ENTRY_KEYS = (
    "step",
    "split",
    "data_source",
    "prompt",
    "ground_truth",
    "reward",
    "stop",
    "num_turns",
)


@dataclass(frozen=True)
class Run:
    """One run. `metrics`: name → values along `steps`, None where a step has none.

    `config`: dotted key → value as text.
    """

    name: str
    folder: Path
    steps: list[int]
    metrics: dict[str, list[float | None]]
    config: dict[str, str]
    written: float | None  # when metrics.jsonl last grew, seconds since 1970
    notes: list[str]


def read_run(folder: Path, name: str, most_values: int = MOST_VALUES) -> Run:
    """Read a run's metrics, thinned to `most_values` numbers, and its configuration.

    ValueError where the folder is none, or no run's.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder. Give the folder of a run: trainer.default_local_dir."
        )
    file = folder / "metrics.jsonl"
    settings = folder / "config.yaml"
    # Any one of them will do: a run that has just begun has no metrics yet
    if not file.is_file() and not settings.is_file() and not (folder / FOLDER).is_dir():
        raise ValueError(
            f"{folder} has neither metrics.jsonl nor config.yaml nor {FOLDER}/: "
            "it is no run's folder."
        )
    series = read_series(file, most_values) if file.is_file() else Series()
    steps, metrics = series.columns()
    notes = _notes(file, series, steps)
    config = read_config(settings, notes)
    written = file.stat().st_mtime if file.is_file() else None
    return Run(name, folder, steps, metrics, config, written, notes)


def _notes(file: Path, series: Series, steps: list[int]) -> list[str]:
    notes: list[str] = []
    if file.exists() and not file.is_file():
        notes.append("metrics.jsonl is no file")
    if not steps:
        notes.append("no metrics yet")
    if series.stride > 1:
        notes.append(f"one value for every {series.stride} steps, as all would not fit on a page")
    notes += series.signs.summary()
    if series.left_out:
        notes.append(f"{series.left_out} lines or values in metrics.jsonl are no metrics")
    return notes


def default_config(config: Mapping[str, str]) -> dict[str, str]:
    """Defaults of the command that a run's keys belong to; those that follow another key are left
    out.
    """
    values = ((leaf.key, leaf.default) for leaf in _leaves(config) if leaf.default is not REQUIRED)
    return {key: in_words(value) for key, value in values if "${" not in str(value)}


def required_keys(config: Mapping[str, str]) -> list[str]:
    """Keys without a default of the command that a run's keys belong to: its model and its data."""
    return [leaf.key for leaf in _leaves(config) if leaf.default is REQUIRED]


def _leaves(config: Mapping[str, str]) -> list[Leaf]:
    from retool.sft.config import SFTConfig

    schema: type = SFTConfig
    # The folder doesn't say which command made it, but only one of the two has these keys
    if any(key.startswith("actor_rollout_ref.") for key in config):
        from retool.rl.config import RLConfig

        schema = RLConfig
    return list(leaves(schema))


def about(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the metrics mean, as the page reads it, the best known ones first."""
    places = {name: place for place, name in enumerate(MEANINGS)}
    said = {name: asdict(meaning(name)) for name in names}

    def place(name: str) -> int:
        # Behind the losses, what only a pattern knows but stands at the top; the rest at the end
        return places.get(name, 2 if said[name]["first"] else len(places))

    return {name: said[name] for name in sorted(said, key=place)}


# --- transcripts ---


def choose_transcripts(runs: list[Run], budget: int) -> tuple[list[dict[str, Any]], int, int]:
    """(transcripts for the page, how many were left out, how many lines were unreadable), at most
    `budget` bytes as JSON.

    When not all fit, each step of each run and split gives as many as the others do, its first
    ones. Two passes over the files, one transcript in memory at a time besides those that are kept.
    """
    sizes: dict[tuple[int, int, str], list[int]] = defaultdict(list)
    torn = 0
    for number, run in enumerate(runs):
        for record in read_transcripts(run.folder):
            if record is None or not _is_shallow(record):
                torn += 1
                continue
            sizes[_stratum(number, record)].append(len(json.dumps(record)) + 1)
    each = _fitting(sizes, budget)
    kept: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        taken: dict[tuple[int, int, str], int] = defaultdict(int)
        for record in read_transcripts(run.folder) if each else ():
            if record is None or not _is_shallow(record):
                continue
            stratum = _stratum(number, record)
            if taken[stratum] < each:
                taken[stratum] += 1
                kept.append(entry(number, record))
    return kept, sum(map(len, sizes.values())) - len(kept), torn


def _is_shallow(record: Mapping[str, Any]) -> bool:
    """Whether what a record tells besides its segments is as small as it should be: it may be
    nested without end.
    """
    try:
        require_small([value for key, value in record.items() if key != "segments"])
        require_small([segment.get("role") for segment in record["segments"]])
    except ValueError:
        return False
    return True


def _stratum(number: int, record: Mapping[str, Any]) -> tuple[int, int, str]:
    return number, record["step"], str(record.get("split", "train"))


def _fitting(sizes: Mapping[Any, list[int]], budget: int) -> int:
    """The largest number of transcripts of each stratum whose sizes stay within the budget."""
    index = 0
    used = 0
    longer = [strata for strata in sizes.values() if strata]
    while longer:
        used += sum(strata[index] for strata in longer)
        if used > budget:
            return index
        index += 1
        longer = [strata for strata in longer if len(strata) > index]
    return index


def entry(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as the page reads it: known fields only, of the right types, without secrets."""
    shown: dict[str, Any] = {
        "run": number,
        **{key: record[key] for key in ENTRY_KEYS if key in record},
    }
    texts = {key: str(shown.get(key, "")) for key in TEXT_KEYS}
    if "split" not in shown:
        texts["split"] = "train"
    info = record.get("info")
    # One call for all of it: looking up what is a secret here takes longer than looking for it in a
    # few texts.
    clean = redact(
        {
            "texts": texts,
            "info": info if isinstance(info, dict) else {},
            "segments": [segment["text"] for segment in record["segments"]],
        }
    )
    shown |= clean["texts"]
    for key in ("reward", "num_turns"):
        shown[key] = shown.get(key) if is_number(shown.get(key)) else None
    shown["info"] = {str(key): in_words(value) for key, value in clean["info"].items()}
    shown["segments"] = [
        _segment(segment, text)
        for segment, text in zip(record["segments"], clean["segments"], strict=True)
    ]
    return shown


def _segment(segment: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A segment whose text without secrets is `text`; its tokens only where they are sound, and
    hide no secret.
    """
    shown: dict[str, Any] = {
        "role": str(segment.get("role", "")),
        "text": text,
        "mask": segment.get("mask") is True,
    }
    tokens: Any = segment.get("tokens")
    hides_secret = text != segment["text"]
    if hides_secret or not _is_list_of(tokens, str):
        return shown
    shown["tokens"] = tokens
    for name in ("logp", "advantage", "mask"):
        value = segment.get(name)
        one_for_all = isinstance(value, (int, float, bool))
        if one_for_all or _fits(value, tokens):
            shown[name] = value
    return shown


def _is_list_of(values: Any, *kinds: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kinds) for value in values)


def _fits(values: Any, tokens: Sequence[str]) -> bool:
    """Whether `values` has a number, or nothing, for each token."""
    return _is_list_of(values, int, float, bool, type(None)) and len(values) == len(tokens)
