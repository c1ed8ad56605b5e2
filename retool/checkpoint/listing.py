"""What `python -m retool.checkpoint ls` shows."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retool.checkpoint.format.folder import faulty_files, model_folder, recorded_files, world_size
from retool.checkpoint.format.tracker import checkpoints
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
    for step, path in checkpoints(root):
        row = ("*" if path == chosen else "", str(step), *_described(path))
        # As text: names of unknown origin would else be read as markup
        table.add_row(*map(Text, row))
    console.print(
        table if table.row_count else Text(f"{shown(str(root))} holds no checkpoint."),
        soft_wrap=True,
    )
    return 0


def _described(path: Path) -> tuple[str, str, str, str]:
    """Ranks, size, contents and state of a checkpoint as `ls` shows them."""
    try:
        where = model_folder(path)
        wrong = faulty_files(where)
        kinds = [
            kind
            for kind in ("model", "optim", "extra_state")
            if any(where.glob(f"{kind}_world_size_*.pt"))
        ]
        kinds += ["export"] if any((where / "huggingface").glob("*.safetensors")) else []
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        ranks = "?" if wrong else str(world_size(where))
        condition = (
            shown(wrong[0])
            if wrong
            else "complete"
            if recorded_files(where)
            else "complete, without checksums"
        )
    except OSError as error:
        return "?", "?", "", f"can't be read ({error.strerror or error})"
    return ranks, f"{size / 2**30:.2f}", " ".join(kinds), condition
