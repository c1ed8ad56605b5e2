"""From what the user typed to the sources of rows: paths, folders, globs, URLs, data sets of the hub."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml
from fsspec.core import url_to_fs

from retool.data.read.library import Part, hub_source, is_hub_name, is_saved, saved_split
from retool.files.afar import answer

KINDS = (".parquet", ".jsonl", ".json", ".csv")
PACKED = {".gz": "gzip", ".zst": "zstd"}
KNOWN = f"{', '.join(KINDS)} (or these with {' or '.join(PACKED)})"


def kind_of_file(file: str) -> tuple[str, str | None]:
    """(.jsonl, gzip) of `rows.jsonl.gz`: what a file is by its name; kind "" for any other name.

    A name is all that decides: not the content, which may be anybody's.
    """
    stem, packed = os.path.splitext(file)
    compression = PACKED.get(packed)
    kind = os.path.splitext(stem)[1] if compression else packed
    return (kind if kind in KINDS else "", compression)


def resolve_files(
    files: str | Sequence[str], any_suffix: bool = False, part: Part | None = None
) -> list[str]:
    """Every source of rows that `files` names, in order.

    That is a path, a folder, a glob, a URL or a data set of the hub, one or a list, the list as text
    too. `part` says which split and configuration are read, where there are several.

    `any_suffix` leaves the format to a user's row function. Raises ValueError for a missing file,
    an empty folder, an unknown suffix and a file named twice.
    """
    if not isinstance(files, str):
        names = [str(entry) for entry in files]
    elif _is_list(files):
        names = [str(entry) for entry in yaml.safe_load(files)]
    else:
        names = [files]
    if not names or not all(name.strip() for name in names):
        raise ValueError(
            f"no data file is named in {files!r}: give a file ({', '.join(KINDS)}), a folder, a glob, a "
            "data set of the hub (org/name), or a list of these."
        )
    found: list[str] = []
    for name in map(str.strip, names):
        expand = partial(_expand, name, any_suffix, part or Part())
        found += answer(name, expand)
    for path in found:
        if not _is_utf8(path):
            told = os.fsencode(path).decode("utf-8", "backslashreplace")
            raise ValueError(
                f"the name of {told} isn't UTF-8, so no message could name it: rename the file."
            )
    twice = sorted({path for path in found if found.count(path) > 1})
    if twice:
        raise ValueError(
            f"{twice[0]} is named more than once in {files!r}: its rows would be trained twice."
        )
    return found


def _is_list(files: str) -> bool:
    """Whether it is a list written as text, `[a, b]`, and not the name of a file."""
    text = files.strip()
    return text.startswith("[") and text.endswith("]") and not os.path.exists(files)


def _expand(name: str, any_suffix: bool, part: Part) -> list[str]:
    fs, path = url_to_fs(os.path.expanduser(name))
    if fs.isdir(path):
        return _in_folder(name, any_suffix, part)
    # What is there goes first: `org/name` may be a folder here, and a name may hold a * or a [
    if fs.exists(path):
        inside = [path]
    elif not any_suffix and _is_on_hub(name):
        return [hub_source(name, part)]
    elif glob.has_magic(path):
        inside = sorted(str(entry) for entry in fs.glob(path))
        if not inside:
            raise ValueError(f"no file matches {name}.")
    else:
        raise ValueError(_hidden(name, path) or f"{name} doesn't exist.{_way_out(name)}")
    wrong = [entry for entry in inside if not any_suffix and not kind_of_file(entry)[0]]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is none of {KNOWN}: convert it, or read it with a function of yours "
            "(data.custom_cls.path, name)."
        )
    _refuse_split(name, part)
    return [str(fs.unstrip_protocol(entry)) if "://" in name else entry for entry in inside]


def _hidden(name: str, path: str) -> str:
    """What to say of a file in a folder that this user may not look into; "" of any other."""
    above = next(p for p in Path(path).absolute().parents if os.path.exists(p))
    if "://" in name or os.access(above, os.X_OK):
        return ""
    return f"{name} can't be seen: this user may not look into {above} (permission denied)."


def _refuse_split(name: str, part: Part) -> None:
    """Raise ValueError where a split is named, and files have none."""
    if part.split is not None:
        raise ValueError(
            f"{name} has no splits, and {part.split_key}={part.split} names one: leave it out, or name "
            "files of that split."
        )


def _in_folder(name: str, any_suffix: bool, part: Part) -> list[str]:
    """What a folder holds: a data set that `datasets` saved, or the data files in it."""
    fs, path = url_to_fs(os.path.expanduser(name))
    folder = str(fs.unstrip_protocol(path)) if "://" in name else path
    if not any_suffix:
        split = saved_split(folder, part)
        if split is not None:
            return [split]
        _refuse_split(name, part)
        if is_saved(folder):
            return [folder]
    entries = sorted(str(entry) for entry in fs.ls(path, detail=False))
    inside = [entry for entry in entries if any_suffix or kind_of_file(entry)[0]]
    if not inside:
        deeper = [entry for entry in entries if fs.isdir(entry)]
        hint = f" Its folders may: {', '.join(deeper[:4])}." if deeper else ""
        raise ValueError(f"the folder {name} has no {KNOWN} file in it.{hint}")
    return [str(fs.unstrip_protocol(entry)) if "://" in name else entry for entry in inside]


def _is_on_hub(name: str) -> bool:
    """Whether a name that no file has is taken for a data set of the hub.

    Not `data/train` where there is a folder `data`: that is a path that went wrong.
    """
    if kind_of_file(name)[0] or not is_hub_name(name):
        return False
    return ":" in name or not os.path.isdir(name.partition("/")[0])


def _way_out(name: str) -> str:
    if "," in name:
        return f" Several files are a list: [{name}]."
    if "/" in name or kind_of_file(name)[0]:
        return " Check the path."
    return " Check the path; a data set of the hub is named org/name."


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
