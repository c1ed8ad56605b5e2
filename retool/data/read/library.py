"""Data sets of the `datasets` library: of the Hugging Face hub, and folders that `save_to_disk` wrote.

Both lie on disk as Arrow files that are mapped, so no more than a chunk is in memory.

A hub data set is named `org/name`, `org/name:split` or `org/name:configuration:split`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs

from retool.data.read.chunk import CHUNK_ROWS, Chunk

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = "dataset_info.json"  # what a saved data set has beside state.json
SAVED_SPLITS = "dataset_dict.json"
HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.+-]+))??(?::([\w.+-]+(?:\[[^]]*\])?))?")


@dataclass(frozen=True)
class Part:
    """Which part of a data set is read, where it has several: `data.name`, `data.*_split`.

    `split_key` is the key that names the split, for messages; None: there is none, and the name of
    the data set says it.
    """

    split: str | None = None
    name: str | None = None
    split_key: str | None = "data.train_split"

    def choose(self, where: str, splits: Sequence[str], sign: str) -> str:
        """The split that is read. Raises ValueError where it isn't there, or none is named.

        Training reads `train` unasked, and so does an audit. `sign` stands between a data set and
        its split where one name says both.
        """
        there = ", ".join(splits)
        if self.split is not None:
            if self.split.partition("[")[0] not in splits:
                way_out = f" Name one with {self.split_key}." if self.split_key else ""
                raise ValueError(f"{where} has no split {self.split!r}; it has {there}.{way_out}")
            return self.split
        if self.split_key != "data.val_split" and "train" in splits:
            return "train"
        if len(splits) == 1:
            return splits[0]
        named = f"{self.split_key}=" if self.split_key else f"{where}{sign}"
        raise ValueError(f"{where} has several splits: {there}. Say which: {named}{splits[0]}.")


IN_NAME = Part(split_key=None)  # where there is no key for a split

# --- folders of save_to_disk ---


def is_saved(source: str) -> bool:
    """Whether a folder is one data set that `save_to_disk` wrote."""
    fs, path = url_to_fs(source)
    return fs.exists(f"{path}/{SAVED}") and fs.exists(f"{path}/state.json")


def saved_split(source: str, part: Part) -> str | None:
    """The folder of the split that is read, of a saved `DatasetDict`; None if the folder is none."""
    fs, path = url_to_fs(source)
    try:
        with fs.open(f"{path}/{SAVED_SPLITS}", "rb") as file:
            splits = json.load(file)["splits"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError) as error:
        raise ValueError(f"{source}/{SAVED_SPLITS} is damaged ({error}): save it again.") from error
    return f"{source.rstrip('/')}/{part.choose(source, splits, '/')}"


# --- the hub ---


def is_hub_name(name: str) -> bool:
    """Whether it may name a data set of the hub. Whether there is a file of that name isn't asked."""
    return HUB.fullmatch(name) is not None


def hub_source(name: str, part: Part) -> str:
    """`name` with its configuration and the split that is read. Fetches it unless it is here.

    Raises ValueError where it can't be had.
    """
    found = HUB.fullmatch(name)
    assert found is not None, "is_hub_name is asked first"
    hub_id, config, split = found.groups()
    config = config or part.name
    there = _load_hub(hub_id, config, None)
    chosen = Part(split or part.split, config, part.split_key).choose(name, list(there), ":")
    return ":".join(word for word in (hub_id, config, chosen) if word)


@lru_cache(maxsize=8)
def _load_hub(hub_id: str, config: str | None, split: str | None) -> Any:
    """A data set of the hub, or all its splits by name."""
    from datasets import load_dataset

    try:
        return load_dataset(hub_id, config, split=split, keep_in_memory=False)
    except Exception as error:  # the hub's client and the library raise many kinds
        raise ValueError(_hub_told(hub_id, error)) from error


def _hub_told(hub_id: str, error: Exception) -> str:
    """What to say where a data set of the hub can't be had."""
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = reason.partition(" Please ")[0].rstrip(
        "."
    )  # what to call in Python is no way out here
    if "onfig" in reason:
        return f"{hub_id}: {reason}. Name the configuration with data.name, or as {hub_id}:CONFIGURATION:SPLIT."
    if isinstance(error, ConnectionError):
        return (
            f"{hub_id} is no file or folder here, and the hub can't be reached ({reason}). Fetch it where "
            "there is a network (hf download, or datasets' save_to_disk) and give the "
            "folder, or check the path."
        )
    return (
        f"{hub_id} is no file or folder here, and the hub gives no data set of that name ({reason}). "
        "Check the name; one that asks for permission needs a login (HF_TOKEN)."
    )


# --- both ---


def open_table(source: str) -> Dataset:
    """The data set that a resolved source names, its rows mapped. Raises ValueError."""
    from datasets import load_from_disk

    found = HUB.fullmatch(source)
    if not is_saved(source) and found is not None:
        return _load_hub(*found.groups())
    try:
        table = load_from_disk(source, keep_in_memory=False)
    except Exception as error:  # of Arrow, of JSON, of the library
        raise ValueError(f"{source} can't be read by datasets ({error}): save it again.") from error
    return table.with_format(None)  # pyright: ignore[reportReturnType]


def table_columns(source: str) -> list[str]:
    """The columns. Raises ValueError where there are no rows."""
    table = open_table(source)
    if not len(table):
        raise ValueError(f"{source} has no rows.")
    return table.column_names


def table_chunks(source: str, columns: Sequence[str] | None) -> Iterator[Chunk]:
    """The rows as Python's containers; of `columns` those that there are."""
    table = open_table(source).with_format(None)
    if columns is not None:
        table = table.select_columns([name for name in table.column_names if name in columns])
    for start in range(0, len(table), CHUNK_ROWS):
        batch = table[start : start + CHUNK_ROWS]
        names = list(batch)
        cells = zip(*batch.values(), strict=True)
        yield Chunk(source, start, [dict(zip(names, row, strict=True)) for row in cells])


def table_files(source: str) -> list[str]:
    """The Arrow files that hold it, for what they are known by."""
    return [str(entry["filename"]) for entry in open_table(source).cache_files]
