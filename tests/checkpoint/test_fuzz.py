"""Mutated checkpoints, thousands of them: each reader gives a result or a ValueError that names the
file, in a moment, in little memory.

Bytes are changed anywhere; pickles opcode by opcode, in archives whose checksums are right again;
JSON value by value. What a mutant reads as can't always be judged (another number is a number), so
where checksums are there a read must be the truth.
"""

from __future__ import annotations

import itertools
import json
import pickletools
import random
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retool.checkpoint import latest, load
from retool.checkpoint.format.folder import faulty_files
from retool.checkpoint.merge import merge
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.verify import verify
from retool.parallel.mesh import make_mesh
from tests.bounded import bounded
from tests.checkpoint import states
from tests.checkpoint.test_merge import SHARDS
from tests.checkpoint.test_same_step import _write

SECONDS = 10.0  # a mutant takes some 20 ms; a shared machine may stand still for a moment
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    "",
    "x",
    "../../etc/passwd",
    "\x1b[2J",
    "[/b]",
    [],
    {},
    [[]],
    [1] * 100,
    {"a": {}},
)


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 4, 32))):
        at = chance.randrange(len(out))
        match chance.randrange(4):
            case 0:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                out[at] = chance.choice((0, 0xFF, chance.randrange(256)))
            case 2:
                del out[at : at + chance.randrange(1, 64)]
            case _:
                out[at:at] = out[at : at + chance.randrange(1, 64)]
        out = out or bytearray(b"\0")
    return bytes(out)


def mutated_pickle(data: bytes, chance: random.Random) -> bytes:
    """Opcodes left out, doubled, swapped, copied from elsewhere, or with other arguments."""
    starts = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    ops = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(1, len(ops))
        match chance.randrange(5):
            case 0:
                del ops[at]
            case 1:
                ops[at:at] = [ops[at]] * chance.choice((1, 2, 1000))
            case 2:
                ops[at] = chance.choice(ops)
            case 3:
                ops[at] = ops[at][:1] + bytes(chance.randrange(256) for _ in ops[at][1:])
            case _:
                ops[at] = bytes([chance.choice(b"()]}tuesabRQ\x81\x85\x86\x87Nhj")]) + ops[at][1:]
        if len(ops) < 2:
            break
    return b"".join(ops)


def mutated_json(data: bytes, chance: random.Random) -> bytes:
    content = json.loads(data)
    node = content
    while isinstance(node, (dict, list)) and node:
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.3:
            break
        node = node[key]
    if isinstance(node, dict) and node and chance.random() < 0.2:
        node[chance.choice(("../x", "\x1b", "[/b]", "data.pt"))] = node.pop(key)
    elif node:
        node[key] = chance.choice(STRANGE)
    return json.dumps(content).encode()


def mutate(path: Path, chance: random.Random) -> str:
    """Change a file; what was done."""
    data = path.read_bytes()
    if path.suffix == ".json" and chance.random() < 0.8:
        path.write_bytes(mutated_json(data, chance))
        return "json"
    if path.suffix != ".pt" or chance.random() < 0.3:
        path.write_bytes(mutated_bytes(data, chance))
        return "bytes"
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = mutated_pickle(records[name], chance)
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    return "pickle"


def quiet(what: str, done: int) -> None:
    del what, done


def moments(folder: Path) -> list[str]:
    source = ShardSource(folder, "exp_avg")
    for name in source.names():
        source.read(name, 0, min(1, *source.shape(name)))
    return list(source.names())


def loaded(folder: Path) -> tuple[Any, ...]:
    """Everything that a resume takes from a checkpoint."""
    fresh = states.blank(make_mesh())
    told = load(folder, fresh, make_mesh(), seed=1)
    assert fresh.exp_avg is not None and fresh.exp_avg_sq is not None
    sums = [
        zlib.crc32(flat.numpy().tobytes())
        for flat in (fresh.params, fresh.exp_avg, fresh.exp_avg_sq)
    ]
    return told.step, told.optimizer_step, told.extra, told.data_state, *sums


READERS: dict[str, Callable[[Path], Any]] = {
    "faults": faulty_files,
    "latest": lambda folder: str(latest(folder.parent)),
    "verify": lambda folder: verify(folder, quiet),
    "merge": lambda folder: [
        path.name for path in merge(folder, folder.parent / "out", torch.float32)
    ],
    "moments": moments,
    "load": loaded,
}


def read_all(folder: Path, readers: list[str]) -> dict[str, tuple[Any, str]]:
    """What each reader gives or raises."""
    told: dict[str, tuple[Any, str]] = {}
    for name in readers:
        try:
            told[name] = READERS[name](folder), ""
        except ValueError as error:
            told[name] = None, str(error)
    return told


def _sources(tmp_path: Path) -> list[Path]:
    _write(tmp_path / "ours" / "global_step_5", 5)
    shutil.copytree(tmp_path / "ours" / "global_step_5", tmp_path / "unvouched" / "global_step_5")
    (tmp_path / "unvouched" / "global_step_5" / "checksums.json").unlink()
    real = [SHARDS / release / "w2" for release in ("torch2.8", "torch2.13")]
    return [
        tmp_path / "ours" / "global_step_5",
        tmp_path / "unvouched" / "global_step_5",
        *(folder for folder in real if folder.is_dir()),
    ]


def _fuzz(tmp_path: Path, count: int, seed: int, readers: int) -> None:
    """`count` mutants, each read by `readers` readers."""
    sources = _sources(tmp_path / "sources")
    truth = loaded(sources[0])
    chance = random.Random(seed)
    refused = 0
    for number in range(count):
        source = chance.choice(sources)
        folder = tmp_path / "run" / "global_step_5"
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        (folder / "huggingface").chmod(0o755)
        path = chance.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        what = f"mutant {number} of seed {seed}: {mutate(path, chance)} of {path.relative_to(folder)} of {source}"
        chosen = chance.sample(sorted(READERS), readers)
        outcome = bounded(lambda folder=folder, chosen=chosen: read_all(folder, chosen), seconds=30)
        assert not outcome.error, f"{what}: {outcome.error}"
        assert outcome.seconds < SECONDS, f"{what}: {outcome.seconds:.1f} s"
        for reader, (_, error) in outcome.value.items():
            assert not error or str(tmp_path / "run") in error, (
                f"{what}: {reader} names no file: {error}"
            )
            assert error.isprintable() and len(error) < 5000, f"{what}: {reader}: {error[:200]!r}"
            refused += bool(error)
        value, error = outcome.value.get("load", (None, "not read"))
        assert error or source != sources[0] or value == truth, f"{what}: silently wrong"
        shutil.rmtree(tmp_path / "run")
    assert refused > count * readers / 10, "too few mutants are told from the truth"


def test_fifty_mutants(tmp_path: Path) -> None:
    _fuzz(tmp_path, 50, seed=1, readers=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2, 6))
def test_thousands_of_mutants(tmp_path: Path, seed: int) -> None:
    _fuzz(tmp_path, 1000, seed, readers=len(READERS))
