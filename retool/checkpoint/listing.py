"""What `python -m retool.checkpoint ls` shows."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retool.checkpoint.format.folder import (
    faulty_files,
    holds_export,
    holds_shards,
    model_folder,
    recorded_files,
    world_size,
)
from retool.checkpoint.format.tracker import checkpoints, set_aside
from retool.checkpoint.resume import latest
from retool.files.untrusted import shown


def list_checkpoints(root: Path, console: Console) -> int:
    """Steps, sizes, world sizes and contents under a run's folder; * marks the one that a resume
    takes.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    chosen = latest(root)
    table = Table("", "step", "ranks", "GiB", "holds", "state")
    everything = sorted([*checkpoints(root), *set_aside(root)], reverse=True)
    for step, path in everything:
        row = ("*" if path == chosen else "", str(step), *_described(path))
        # As text: names of unknown origin would else be read as markup.
        table.add_row(*map(Text, row))
    nothing = Text(f"{shown(str(root))} holds no checkpoint.")
    console.print(table if table.row_count else nothing, soft_wrap=True)
    return 0


def _described(path: Path) -> tuple[str, str, str, str]:
    """Ranks, size, contents and state of a checkpoint as `ls` shows them."""
    try:
        where = model_folder(path)
        wrong = faulty_files(where)
        ranks = "?" if wrong else str(world_size(where))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        state = _state(where, wrong)
        if path.suffix:
            state = f"named {path.name}, as its replacement was cut off: {state}"
        return ranks, f"{size / 2**30:.2f}", " ".join(_contents(where)), state
    except OSError as error:
        return "?", "?", "", f"can't be read ({error.strerror or error})"


def _contents(where: Path) -> list[str]:
    kinds = [kind for kind in ("model", "optim", "extra_state") if holds_shards(where, kind)]
    return [*kinds, "export"] if holds_export(where) else kinds


def _state(where: Path, wrong: list[str]) -> str:
    if wrong:
        return shown(wrong[0])
    return "complete" if recorded_files(where) else "complete, without checksums"
