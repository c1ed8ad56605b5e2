"""The file of answers: it appears when it is complete; until then a partial file grows, from which
the command can go on.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from retool.files.durable import replacing
from retool.files.lock import keep
from retool.rl.agent.calls import clean

SUFFIX = ".partial"


class AnswersFile:
    """Answers as JSON lines, in the order of the questions.

    Beside `path` a file `path.partial` grows; its first line says with what `settings`. `done` lines
    of it are there already. ValueError where `path` is, or the part was made with others. Nothing
    is written before `begin`.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.done = 0
        self._header = json.dumps(dict(settings), sort_keys=True, default=str)
        self._whole_bytes = 0  # of the part: whole lines
        self._file: IO[str] | None = None
        self._require_absent()
        if not path.parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}. Make it.")
        self.part = path.with_name(path.name + SUFFIX)
        if self.part.exists():
            self._count()

    def _require_absent(self) -> None:
        if self.path.exists():
            raise ValueError(f"{self.path} is there already: choose another --out, or delete it.")

    def _count(self) -> None:
        """See what is there."""
        self.done = 0
        self._whole_bytes = 0
        with self.part.open("rb") as file:
            first = file.readline().decode("utf-8", "replace").rstrip("\n")
            # Empty: a process was killed before it could write anything
            if first and (difference := _difference(first, self._header)):
                raise ValueError(
                    f"{self.part} was begun with other settings ({difference}). Delete it, or choose "
                    "another --out."
                )
            self._whole_bytes = file.tell()
            while file.readline().endswith(b"\n"):
                self._whole_bytes = file.tell()
                self.done += 1

    def begin(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Open the part, for this process alone; a line that a killed process left unfinished goes.

        ValueError where another process has it, or where it answers other rows than these.
        """
        self._require_absent()
        self._file = self.part.open("a", encoding="utf-8")
        if not keep(self._file):
            raise ValueError(
                f"another process is writing {self.part}: wait for it, or choose another --out."
            )
        # Looked at again: until now another one may have gone on with it, or come to its end
        self._require_absent()
        self._count()
        self._require_answers_to(rows)
        os.truncate(self.part, self._whole_bytes)
        if not self._whole_bytes:
            self._file.write(self._header + "\n")
            self._file.flush()

    def _require_answers_to(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.part.open("rb") as file:
            file.readline()
            for number in range(self.done):
                row = rows[number] if number < len(rows) else None
                if row is None or not file.readline().startswith(_begin(row).encode()):
                    raise ValueError(
                        f"{self.part} answers other rows than there are now (row {number} differs). "
                        "Delete it, or choose another --out."
                    )

    def write(self, row: Mapping[str, Any], completions: Sequence[Mapping[str, Any]]) -> None:
        """Append the answers to a row; they survive the end of this process."""
        assert self._file is not None, "begin comes first"
        self._file.write(f"{_begin(row)}{_as_json(completions)}}}\n")
        self._file.flush()

    def finish(self) -> None:
        """Give the file its name."""
        # Copied, not renamed: the part's first line is ours and no answer
        with self.part.open("rb") as source, replacing(self.path) as out:
            source.readline()
            shutil.copyfileobj(source, out)
        self.part.unlink()
        # Not earlier: another process would take the part for one to go on with
        self.close()

    def close(self) -> None:
        """Leave the part for another time."""
        if self._file is not None:
            self._file.close()


def _begin(row: Mapping[str, Any]) -> str:
    """What the line of a row begins with."""
    return f'{{"row": {_as_json(row)}, "completions": '


def _as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    # Half of a surrogate pair can only be written as an escape
    return text if text.isascii() or clean(text) == text else json.dumps(value, default=str)


def _difference(first: str, header: str) -> str:
    """Which settings differ. What an older version didn't write isn't compared."""
    try:
        old: dict[str, Any] = dict(json.loads(first))
    except (ValueError, TypeError):
        return "it isn't a part of ours"
    new: dict[str, Any] = json.loads(header)
    names = sorted(name for name in old if old[name] != new.get(name))
    return ", ".join(f"{name}: {old[name]} → {new.get(name)}" for name in names)
