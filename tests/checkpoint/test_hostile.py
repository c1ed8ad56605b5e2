"""Checkpoints are untrusted input: nothing in one is executed, and every damaged or lying file is
named in a ValueError.
"""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import resource
import shutil
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from retool.checkpoint import latest
from retool.checkpoint.format.folder import recorded_files
from retool.checkpoint.format.stored_tensors import StoredShard, StoredTensor
from retool.checkpoint.format.torch_file import TorchFile
from retool.checkpoint.format.unpickle import parse
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.shards.states import read_state
from tests.checkpoint.test_round_trip import saved


class _Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _marker(tmp_path: Path) -> tuple[Path, str]:
    marker = tmp_path / "executed"
    return marker, f"touch {marker}"


def hostile(tmp_path: Path) -> dict[str, Any]:
    _, command = _marker(tmp_path)
    return {
        "os.system": _Calls(os.system, command),
        "builtins.eval": _Calls(builtins.eval, f"__import__('os').system({command!r})"),
        "builtins.getattr": b"\x80\x02c__builtin__\ngetattr\ncos\nsystem\nX\x08\x00\x00\x00__call__\x86R.",
        "nested": {"model.weight": [_Calls(dict, [("a", _Calls(os.system, command))])]},
        "in a tensor's hooks": _Calls(
            torch._utils._rebuild_tensor_v2, _Calls(os.system, command), 0, (1,), (1,), False, {}
        ),
        "torch.load": _Calls(torch.load, "/etc/passwd"),
        "numpy": np.arange(3),
        "posix.system by name": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        "inst": b"(S'true'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'true'\no.",
        "extension registry": b"\x80\x02\x82\x01.",
        "module attribute": b"\x80\x02ctorch.distributed.tensor\n__builtins__\nX\x04\x00\x00\x00evalR.",
        "build on a class": b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    }


def _archive(path: Path, data: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {
            "data.pkl": data,
            "byteorder": b"little",
            "version": b"3\n",
            **records,
        }.items():
            archive.writestr(f"archive/{name}", content)
    return path


def test_nothing_is_executed(tmp_path: Path) -> None:
    marker, _ = _marker(tmp_path)
    for name, thing in hostile(tmp_path).items():
        path = _archive(
            tmp_path / "x.pt",
            thing if isinstance(thing, bytes) else pickle.dumps(thing, protocol=2),
        )
        with pytest.raises(ValueError, match=str(path)):
            read_state(path)
        assert not marker.exists(), name


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"a": np.arange(3)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: refused: it names numpy\..*_reconstruct"):
        TorchFile(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # a huge memo index
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a string longer than the file
        b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",  # an integer longer than the file
        b"\x80\x02" + b"(" * 10_000 + b".",
        b"\x80\x02" + b"]" * 3 + b"0" * 5 + b".",
        b"\x80\x02}" + b"(" + b")\x85" * 50 + b"u.",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01",
        b"",
    ],
)
def test_broken_streams_end_at_once(stream: bytes) -> None:
    with pytest.raises(ValueError):
        parse(stream)


def test_nested_sharing_takes_no_time(tmp_path: Path) -> None:
    """Thirty levels of a pair of the same pair: 2³⁰ leaves if walked naively; as a key, as long to
    hash.
    """
    stream = b"\x80\x02)q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(30)
    )
    value = read_state(_archive(tmp_path / "x.pt", stream + b"."))
    assert len(value) == 2
    with pytest.raises(ValueError, match="dict key of type tuple"):
        parse(stream + b"}h\x1eK\x01s.")


class _Storage:
    """Pickles as a storage of `numel` elements in record data/0, whatever is there."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return (
            ("storage", torch.FloatStorage, "0", "cpu", obj.numel)
            if isinstance(obj, _Storage)
            else None
        )


def _claiming(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=2).dump(
        _Calls(torch._utils._rebuild_tensor_v2, _Storage(numel), offset, shape, stride, False, {})
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "stride"),
    [
        (4, 0, (1_000_000, 1_000_000), (1_000_000, 1)),
        (4, 2, (3,), (1,)),
        (4, -1, (3,), (1,)),
        (4, 0, (-4,), (1,)),
        (4, 0, (4,), (0,)),
        (4, 0, (2, 2), (1, 2)),
        (1 << 62, 0, (4,), (1,)),
        (1 << 38, 0, (1 << 38,), (1,)),
        (5, 0, (5,), (1,)),
        (4, 0, (4,), (1, 1)),
    ],
)
def test_lying_sizes_are_refused_before_anything_is_allocated(
    tmp_path: Path, numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = _archive(
        tmp_path / "x.pt", _claiming(numel, offset, shape, stride), **{"data/0": bytes(16)}
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=str(path)):
        read_state(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, (
        "more than 50 MB for a file of 500 bytes"
    )


def test_an_honest_tensor_of_the_same_form_is_read(tmp_path: Path) -> None:
    path = _archive(
        tmp_path / "x.pt",
        _claiming(4, 1, (3,), (1,)),
        **{"data/0": np.arange(4, dtype=np.float32).tobytes()},
    )
    assert read_state(path).tolist() == [1.0, 2.0, 3.0]


def _edited(folder: Path, name: str, edit) -> None:
    """Replace a file's content by what `edit` makes of it, saved the way torch saves."""
    content = torch.load(folder / name, weights_only=False)
    edit(content)
    torch.save(content, folder / name)
    (folder / "checksums.json").unlink(missing_ok=True)


def _lie(tensor, shape) -> None:
    meta = tensor._spec.tensor_meta
    tensor._spec.tensor_meta = type(meta)(torch.Size(shape), meta.stride, meta.dtype)


@pytest.mark.parametrize("shape", [(12, 8), (1 << 39, 8), (5, 8), (11, 9), (88,)])
def test_a_spec_that_lies_about_shapes_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = saved(tmp_path, 2)
    _edited(
        folder,
        "model_world_size_2_rank_1.pt",
        lambda c: _lie(c["model.embed_tokens.weight"], shape),
    )
    with pytest.raises(ValueError, match=r"model_world_size_2_rank_1\.pt.*embed_tokens"):
        ShardSource(folder).read("model.embed_tokens.weight", 0, 88)


def test_unknown_placements_and_meshes_are_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    def replaced(placements, ranks, names):
        def edit(content):
            mesh = DeviceMesh(
                "cpu",
                torch.arange(prod(ranks)).view(ranks),
                mesh_dim_names=names,
                _init_backend=False,
                _rank=0,
            )
            local = content["model.embed_tokens.weight"]._local_tensor
            content["model.embed_tokens.weight"] = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=torch.Size((11, 8)), stride=(8, 1)
            )

        return edit

    folder = saved(tmp_path, 2)
    for placements, ranks, names in (
        ((Shard(1),), (2,), ("fsdp",)),
        ((Partial(),), (2,), ("fsdp",)),
        ((Shard(0), Shard(0)), (2, 1), ("tp", "fsdp")),
        ((Shard(0),), (3,), ("fsdp",)),
    ):
        _edited(folder, "model_world_size_2_rank_0.pt", replaced(placements, ranks, names))
        with pytest.raises(ValueError, match=r"model_world_size_2_rank_0\.pt"):
            ShardSource(folder).read("model.embed_tokens.weight", 0, 88)


def test_plain_tensors_of_several_ranks_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2)
    _edited(
        folder,
        "model_world_size_2_rank_0.pt",
        lambda c: c.update({n: t._local_tensor for n, t in c.items()}),
    )
    with pytest.raises(
        ValueError,
        match=r"plain tensor in a checkpoint of 2 ranks, so nothing says whether it is a part or the whole",
    ):
        ShardSource(folder).read("model.embed_tokens.weight", 0, 88)


def test_zip_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(
                name, content + bytes(200_000_000) if name.endswith("data.pkl") else content
            )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"x\.pt: record .* is compressed"):
        TorchFile(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("with_checksums", [True, False])
def test_a_thousand_mutated_files_end_in_clear_errors(tmp_path: Path, with_checksums: bool) -> None:
    """Truncations and flipped bits anywhere: an error naming the file, or the very bytes that were
    there (padding was hit).
    """
    folder = saved(tmp_path, 2)
    blocks = {
        name: entry["crc32"] if with_checksums else None
        for name, entry in recorded_files(folder).items()
    }
    good = {
        p: (p.read_bytes(), _everything(p, blocks[p.name]))
        for p in sorted(folder.glob("*_rank_*.pt"))
    }
    chance = random.Random(7)
    refused = 0
    for count in range(600):
        path = chance.choice(list(good))
        content, expected = good[path]
        data = bytearray(content)
        if count % 3 == 0:
            del data[chance.randrange(len(data)) :]
        else:
            for _ in range(chance.choice((1, 1, 8))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            assert _everything(path, blocks[path.name]) == expected, (
                f"silently wrong after mutation {count} of {path.name}"
            )
        except ValueError as error:
            assert path.name in str(error), f"{error} does not name {path.name}"
            refused += 1
    assert refused > 300


def _everything(path: Path, blocks: list[int] | None) -> list[Any]:
    """What is read of a file: its structure, and the bytes of its tensors."""
    file = TorchFile(path, blocks)
    return [repr(file.content), *(file.value(t).numpy().tobytes() for t in _stored(file.content))]


def _stored(content: Any) -> list[StoredTensor]:
    if isinstance(content, (StoredTensor, StoredShard)):
        return [content.local if isinstance(content, StoredShard) else content]
    parts = (
        content.values()
        if isinstance(content, dict)
        else content
        if isinstance(content, (list, tuple))
        else ()
    )
    return [t for part in parts for t in _stored(part)]


def test_damaged_side_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, 1)
    for name, content in (
        ("fsdp_config.json", "{"),
        ("fsdp_config.json", '{"world_size": "2"}'),
        ("fsdp_config.json", "[" * 100_000),
        ("checksums.json", "[]"),
    ):
        shutil.copy(folder / name, tmp_path / name)
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            ShardSource(folder)
        assert latest(folder.parent) is None and name in caplog.text
        caplog.clear()
        shutil.copy(tmp_path / name, folder / name)
    assert latest(folder.parent) == folder
