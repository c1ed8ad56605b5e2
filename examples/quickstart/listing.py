"""The files that a finished run must have left behind, and a look at them."""

from __future__ import annotations

import json
from pathlib import Path

from rich.tree import Tree

RUN_FILES = ("latest_checkpointed_iteration.txt", "metrics.jsonl", "config.yaml")
SHARDS = ("model", "optim", "extra_state")
EXPORT_FILES = ("config.json", "generation_config.json", "model.safetensors")
WEIGHTS = (".safetensors", ".bin", ".index.json")


def expected_files(step: int, world: int, source: Path) -> list[str]:
    """Paths relative to the run's folder.

    Every file of the `source` model but its weights is carried into the export.
    """
    shards = [
        f"{kind}_world_size_{world}_rank_{rank}.pt" for kind in SHARDS for rank in range(world)
    ]
    carried = [
        path.name
        for path in sorted(source.iterdir())
        if path.is_file() and not path.name.endswith(WEIGHTS)
    ]
    export = [f"huggingface/{name}" for name in (*EXPORT_FILES, *carried)]
    return [
        *RUN_FILES,
        *(
            f"global_step_{step}/{name}"
            for name in dict.fromkeys([*shards, "fsdp_config.json", "data.pt", *export])
        ),
    ]


def check_run(run: Path, step: int, world: int, source: Path) -> Path:
    """The complete checkpoint's folder.

    Raises ValueError naming every file that is missing or empty, or what contradicts it.
    """
    missing = [
        name
        for name in expected_files(step, world, source)
        if not (run / name).is_file() or not (run / name).stat().st_size
    ]
    if missing:
        raise ValueError(
            f"{run} is incomplete: {', '.join(missing)} missing or empty. Look into train.log, and start "
            "again."
        )
    if (latest := (run / RUN_FILES[0]).read_text().strip()) != str(step):
        raise ValueError(f"{run / RUN_FILES[0]} says step {latest!r}, not {step}.")
    folder = run / f"global_step_{step}"
    if (layout := json.loads((folder / "fsdp_config.json").read_text())).get("world_size") != world:
        raise ValueError(f"{folder / 'fsdp_config.json'} says {layout}, not world_size {world}.")
    return folder


def tree_of(folder: Path) -> Tree:
    """The folder as a rich tree, with sizes."""
    tree = Tree(f"{folder}/")
    _grow(tree, folder)
    return tree


def _grow(tree: Tree, folder: Path) -> None:
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir():
            _grow(tree.add(f"{path.name}/"), path)
        else:
            tree.add(f"{path.name}  [dim]{path.stat().st_size / 1e3:,.1f} kB[/dim]")
