"""The file of answers: it appears when it is complete; until then a partial file grows, from which
the command can go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from retool.files.durable import replacing

SUFFIX = ".partial"


class AnswersFile:
    """Answers as JSON lines, in the order of the questions.

    Beside `path` a file `path.partial` grows; its first line says with what `settings`. `done` lines
    of it are there already. ValueError where `path` is, or the part was made with others. Nothing
    is written before `begin`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.part = path.with_name(path.name + SUFFIX)
        self.done = 0
        self._header = json.dumps(dict(settings), sort_keys=True, default=str)
        self._whole_bytes = 0  # of the part: whole lines
        self._file: IO[str] | None = None
        if path.exists():
            raise ValueError(f"{path} is there already: choose another --out, or delete it.")
        if not path.parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}. Make it.")
        if self.part.exists():
            self._count()

    def _count(self) -> None:
        """See what is there."""
        with self.part.open("rb") as file:
            first = file.readline().decode("utf-8", "replace").rstrip("\n")
            if first != self._header:
                raise ValueError(
                    f"{self.part} was begun with other settings ({_difference(first, self._header)}). "
                    "Delete it, or choose another --out."
                )
            self._whole_bytes = file.tell()
            while file.readline().endswith(b"\n"):
                self._whole_bytes = file.tell()
                self.done += 1

    def begin(self) -> None:
        """Open the part; a line that a killed process left unfinished goes."""
        if self._whole_bytes:
            os.truncate(self.part, self._whole_bytes)
        else:
            self.part.write_text(self._header + "\n", encoding="utf-8")
        self._file = self.part.open("a", encoding="utf-8")

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a line; it survives the end of this process."""
        assert self._file is not None, "begin comes first"
        self._file.write(json.dumps(dict(entry), ensure_ascii=False, default=str) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Give the file its name."""
        self.close()
        # Copied, not renamed: the part's first line is ours and no answer
        with self.part.open("rb") as source, replacing(self.path) as out:
            source.readline()
            shutil.copyfileobj(source, out)
        self.part.unlink()

    def close(self) -> None:
        """Leave the part for another time."""
        if self._file is not None:
            self._file.close()


def _difference(first: str, header: str) -> str:
    """Which settings differ."""
    try:
        old: dict[str, Any] = dict(json.loads(first))
    except (ValueError, TypeError):
        return "it isn't a part of ours"
    new: dict[str, Any] = json.loads(header)
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return ", ".join(f"{name}: {old.get(name)} → {new.get(name)}" for name in names)
