"""The judge's replies, kept on disk: nobody pays twice for the same question, not even in a later
run.

A file for each request, named by its hash. Any number of processes may share the folder: a file is
there as a whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retool.files.durable import replace_text

# Two of its digits name a folder: a million files in one are slow to look up
FOLDER_DIGITS = 2


class Replies:
    """Texts by the request that they answer; None as the folder keeps nothing."""

    def __init__(
        self,
        folder: str | None,
        address: str,
    ) -> None:
        self._folder = Path(folder).expanduser() if folder else None
        self._address = address

    def find(self, body: Mapping[str, Any]) -> str | None:
        """The reply to a request that was made before, to this address."""
        file = self._file(body)
        if file is None:
            return None
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            text = kept["text"]
        except (OSError, ValueError, LookupError, TypeError):
            return None  # not there; or what somebody else put there: it is asked again
        return text if isinstance(text, str) else None

    def keep(
        self,
        body: Mapping[str, Any],
        text: str,
    ) -> None:
        """Remember a reply. A full disk ends no run: it is only asked again."""
        file = self._file(body)
        if file is None:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps({"text": text}), lasting=False)
        except OSError:
            return

    def _file(self, body: Mapping[str, Any]) -> Path | None:
        """Where the reply to a request is: model, messages and sampling are all in its body."""
        if self._folder is None:
            return None
        asked = json.dumps([self._address, body], sort_keys=True)
        name = hashlib.sha256(asked.encode()).hexdigest()
        return self._folder / name[:FOLDER_DIGITS] / f"{name}.json"
