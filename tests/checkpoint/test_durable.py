"""The order of a save on the disk: what a power cut at any instant would leave. Nothing may get its
name before it is synced, and the older checkpoint goes last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from retool import checkpoint
from retool.checkpoint.convert import convert
from retool.checkpoint.format.folder import MARK
from tests.checkpoint import states


@dataclass
class Disk:
    """What has been synced, and what happened to names, in order."""

    synced: dict[int, Any] = field(default_factory=dict)  # inode → what of it would survive
    events: list[str] = field(default_factory=list)

    def sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.synced[path.stat().st_ino] = lasting(path)
        self.events.append(f"sync {path.name}")

    def rename(self, old: Path, new: Path) -> None:
        # Of the mark only the name counts
        for path in (old, *(inside for inside in old.rglob("*") if inside.name != MARK)):
            assert self.synced.get(path.stat().st_ino) == lasting(path), f"{path} may be lost"
        self.events.append(f"{old.name} → {new.name}")


def lasting(path: Path) -> Any:
    """The names in a folder, or a file's bytes."""
    return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()


@contextmanager
def watched_disk() -> Iterator[Disk]:
    """What is synced and renamed while this lasts; what goes away need not have been synced."""
    disk = Disk()
    fsync = os.fsync
    with pytest.MonkeyPatch.context() as patch:

        def watch(name: str) -> None:
            real = getattr(Path, name)

            def renamed(old: Path, new: Path) -> Path:
                if new.suffix in (".tmp", ".old"):
                    disk.events.append(f"{old.name} goes")
                else:
                    disk.rename(old, new)
                return real(old, new)

            patch.setattr(Path, name, renamed)

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            disk.sync(descriptor)

        watch("rename")
        watch("replace")
        patch.setattr(os, "fsync", synced)
        yield disk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run's folder; its model has a folder in its own."""
    source = states.source_model(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    return tmp_path / "run"


def test_a_power_cut_at_any_instant_leaves_a_whole_checkpoint(root: Path) -> None:
    assert states.save(str(root), steps=(5,)) == [None]
    with watched_disk() as disk:
        assert states.save(str(root), steps=(6,), keep=1) == [None]

    tracker = "latest_checkpointed_iteration.txt"
    names = [event for event in disk.events if not re.search("sync|json", event)]
    assert names == [
        "global_step_6.tmp → global_step_6",
        f".{tracker}.tmp → {tracker}",
        "global_step_5 goes",
    ]
    named = disk.events.index("global_step_6.tmp → global_step_6")
    assert disk.events[named + 1 :] == [
        "sync run",
        f"sync .{tracker}.tmp",
        f".{tracker}.tmp → {tracker}",
        "sync run",
        "global_step_5 goes",
    ]
    assert checkpoint.latest(root) == root / "global_step_6"


@pytest.mark.parametrize("subfolder", ["", "actor"])
def test_a_power_cut_at_any_instant_of_a_conversion_leaves_a_whole_checkpoint(
    root: Path, subfolder: str
) -> None:
    assert states.save(str(root), steps=(5,), subfolder=subfolder) == [None]
    with watched_disk() as disk:
        convert(root / "global_step_5", 2)
    names = [event for event in disk.events if not re.search("sync|json", event)]
    assert names == ["global_step_5 goes", "global_step_5.converting → global_step_5"]
    assert disk.events[-1] == f"sync {root.name}"
