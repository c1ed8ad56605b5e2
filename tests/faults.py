"""What a command is refused for, asked of `--check` and of the run itself: both must say the same,
and neither may change a file.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Main = Callable[[list[str]], int]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(
    main: Main, words: Sequence[str], out: Path, capfd: pytest.CaptureFixture[str]
) -> list[str]:
    """The faults of a command that must not start, `--check` first; fails where the run says
    anything else, or touches `out`.
    """
    before = contents(out)
    capfd.readouterr()
    said: list[list[str]] = []
    for more in (["--check"], []):
        status = main([*words, *more])
        printed = capfd.readouterr()
        assert status == 1, (
            f"{'the check' if more else 'the run'} found nothing: {printed.out}{printed.err}"
        )
        said.append(faults_in(printed.out))
        assert not printed.err.startswith("error:"), f"refused late: {printed.err}"
    assert said[0] == said[1] and said[0], "--check isn't the run"
    assert contents(out) == before, "a refused run changed its folder"
    return said[0]


def faults_in(text: str) -> list[str]:
    """The lines of a printed list of faults."""
    lines = text.splitlines()
    first = next(
        (i for i, line in enumerate(lines) if re.match(r"\d+ faults?, nothing started", line)),
        len(lines),
    )
    return [line.strip() for line in lines[first + 1 :] if line.startswith("  ")]


def planned(main: Main, words: Sequence[str], capfd: pytest.CaptureFixture[str]) -> str:
    """What `--check` prints of a run that could start."""
    capfd.readouterr()
    status = main([*words, "--check"])
    text = capfd.readouterr().out
    assert status == 0, text
    return text


def another_model(model: Path, folder: Path, changed: Mapping[str, Any] | None = None) -> Path:
    """A copy of a model folder, with one value of one matrix changed, or with other values in
    config.json.
    """
    import json

    shutil.copytree(model, folder)
    if changed is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        return folder
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] + torch.full_like(tensors[name], 1e-3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
