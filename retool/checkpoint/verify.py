"""Everything that can be said about weights on disk without running them: are they complete,
undamaged, consistent and finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeVar

import torch

from retool.checkpoint.flat.fill import CHUNK, TensorSource, match_names, require_tied
from retool.checkpoint.format.checksums import checksums_of
from retool.checkpoint.format.folder import (
    CHECKSUMS,
    CONFIG,
    DATA,
    faulty_files,
    holds_export,
    holds_shards,
    model_folder,
    recorded_files,
)
from retool.checkpoint.format.safetensors import INDEX
from retool.checkpoint.format.torch_file import TorchFile
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.checkpoint.merge import Progress, stored_names
from retool.checkpoint.shards.same_step import NOTHING_VOUCHES, require_one_step
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.shards.states import read_state
from retool.model.borrowed.read import read_any_config
from retool.model.build import plan_layout

T = TypeVar("T")


def verify(folder: Path, progress: Progress) -> list[str]:
    """What is wrong with a checkpoint, or with a Hugging Face model folder: empty if nothing is.

    Reads all of it, in pieces.

    A checkpoint: files and sizes against checksums.json; checksums; one step in all files; every
    rank's shapes and rows; copies of the same rows; finite values; moments as large as their
    parameters; the export equal to the shards in its dtype. A model folder: config.json, every file
    that the index names, names and shapes as config.json says, finite values. See `assurance` for
    what is known where nothing is wrong.
    """
    where = model_folder(folder)
    if is_model_folder(where):
        return _model_faults(where, progress)
    problems = faulty_files(where)
    if problems:
        return problems
    for check in (
        _files(where),
        _one_step(where),
        _shards(where, progress),
        _export(where, progress),
    ):
        try:
            problems += check
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return problems


def is_model_folder(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model, and no shards of a run."""
    if holds_shards(folder, "model") or (folder / CONFIG).exists():
        return False
    named = (folder / INDEX).is_file() or (folder / "config.json").is_file()
    return named or any(folder.glob("*.safetensors"))


def _model_faults(folder: Path, progress: Progress) -> list[str]:
    problems: list[str] = []

    def attempt(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except ValueError as error:
            problems.append(str(error))
            return None

    config = attempt(lambda: read_any_config(folder))
    source = attempt(lambda: SafetensorsSource(folder))
    if source is None:
        return problems
    if config is not None:
        layout = plan_layout(config, 1)
        attempt(lambda: match_names(layout, source))
        attempt(lambda: require_tied(layout, source))
    for name in source.names():
        bad = attempt(partial(_not_finite, source, name, progress))
        if bad:
            problems.append(f"{folder}: {name} has {bad} values that are not finite.")
    return problems


def _not_finite(source: TensorSource, name: str, progress: Progress) -> int:
    """How many values of a tensor are NaN or infinite."""
    return sum(int((~torch.isfinite(piece)).sum()) for piece in _pieces(source, name, progress))


def assurance(folder: Path) -> str:
    """What can be said for a checkpoint in which `verify` found nothing wrong: without checksums
    that is less.
    """
    where = model_folder(folder)
    if is_model_folder(where):
        return (
            f"{folder}: complete and finite; a model folder has no checksums, so nothing vouches for its "
            "values"
        )
    if recorded_files(where):
        return f"{folder}: complete, undamaged, finite"
    return f"{folder}: complete and finite, but {NOTHING_VOUCHES}"


def _one_step(where: Path) -> Iterator[str]:
    require_one_step(where)
    # A generator as the other checks are: what it finds is raised when its turn comes
    yield from ()


def _files(where: Path) -> Iterator[str]:
    for name, entry in recorded_files(where).items():
        # The others' blocks are compared when they are read, so no shard is read twice
        if not name.endswith(".pt") and checksums_of(where / name) != entry:
            yield f"{where / name} differs from {CHECKSUMS}: it was changed or is damaged."
        if name.startswith("extra_state") or Path(name).name == DATA:
            TorchFile(where / name, entry["crc32"]).check_all()
            read_state(where / name, entry["crc32"])


def _shards(where: Path, progress: Progress) -> Iterator[str]:
    if not holds_shards(where, "model"):
        return
    weights = ShardSource(where, "model")
    sources = [weights]
    if holds_shards(where, "optim"):
        sources += [ShardSource(where, "exp_avg"), ShardSource(where, "exp_avg_sq")]
    for source in sources:
        if source.which != "exp_avg_sq":  # in the same files as exp_avg
            source.check_files()
        for name in source.names():
            mine = source.shape(name)
            expected = weights.shape(name)
            if mine != expected:
                yield (
                    f"{where}: {source.which} of {name} is {list(mine)}, the parameter "
                    f"{list(expected)}."
                )
            if bad := _not_finite(source, name, progress):
                yield f"{where}: {source.which} of {name} has {bad} values that are not finite."


def _export(where: Path, progress: Progress) -> Iterator[str]:
    """Errors unless the export holds what the shards hold, in its own dtype."""
    folder = where / "huggingface"
    if not holds_export(where) or not holds_shards(where, "model"):
        return
    source = ShardSource(where)
    export = SafetensorsSource(folder)
    expected = set(stored_names(source, folder))
    exported = set(export.names())
    for name in sorted(expected ^ exported):
        yield f"{folder}: {name} is {'missing' if name in expected else 'not in the shards'}."
    for name in sorted(expected & exported):
        shape = source.shape(name)
        if export.shape(name) != shape:
            yield f"{folder}: {name} is {list(export.shape(name))}, in the shards {list(shape)}."
        elif not _equal(source, export, name, progress):
            yield f"{folder}: {name} differs from the shards."


def _equal(source: ShardSource, export: TensorSource, name: str, progress: Progress) -> bool:
    pieces = zip(_pieces(source, name, progress), _pieces(export, name), strict=True)
    return all(
        # NaN differs from itself. Values that aren't finite are told elsewhere; here only
        # differences count.
        torch.equal(ours.to(theirs.dtype).nan_to_num(), theirs.nan_to_num())
        for ours, theirs in pieces
    )


def _pieces(
    source: TensorSource, name: str, progress: Progress | None = None
) -> Iterator[torch.Tensor]:
    numel = prod(source.shape(name))
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        yield source.read(name, start, stop)
        if isinstance(source, ShardSource):
            source.release()
        if progress is not None:
            progress(name, stop - start)
