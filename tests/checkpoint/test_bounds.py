"""Pickles, archives and headers that ask for hours or terabytes: refused in a moment, before there
is work.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from retool.checkpoint import latest, load
from retool.checkpoint.__main__ import main
from retool.checkpoint.format.folder import faulty_files, recorded_files, world_size
from retool.checkpoint.format.safetensors import SafetensorsFile
from retool.checkpoint.format.torch_file import TorchFile
from retool.checkpoint.format.tracker import tracked
from retool.checkpoint.format.unpickle import parse
from retool.checkpoint.hf.side_files import tied
from retool.checkpoint.hf.weights import SafetensorsSource
from retool.checkpoint.merge import merge
from retool.checkpoint.shards.files import Shards
from retool.checkpoint.shards.optimizer import optimizer_step, parameter_indices
from retool.checkpoint.shards.source import ShardSource
from retool.checkpoint.shards.states import read_state
from retool.checkpoint.verify import verify
from retool.parallel.mesh import make_mesh
from tests.bounded import Outcome, bounded
from tests.checkpoint import states
from tests.checkpoint.test_hostile import _archive

HEAD = b"\x80\x02"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def tower(levels: int, bottom: bytes = b")") -> bytes:
    """A pair of the same pair of the same pair …: 2^levels leaves; it ends on the stack, and under
    memo `levels`.
    """
    return bottom + put(0) + b"".join(get(i) + get(i) + b"\x86" + put(i + 1) for i in range(levels))


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


def tensor(shape: bytes, numel: int = 4, stride: bytes = b")", key: str = "0") -> bytes:
    """A tensor of a storage in record `key`; shape and stride are given as opcodes."""
    storage = (
        b"("
        + text("storage")
        + named("torch.FloatStorage")
        + text(key)
        + text("cpu")
        + b"J"
        + struct.pack("<i", numel)
        + b"tQ"
    )
    return (
        named("torch._utils._rebuild_tensor_v2")
        + b"("
        + storage
        + b"K\x00"
        + shape
        + stride
        + b"\x89"
        + named("collections.OrderedDict")
        + b")RtR"
    )


def mesh_of(shape: bytes) -> bytes:
    """A DTensor whose mesh has a layout of this shape."""
    layout = (
        named("torch.distributed._mesh_layout._MeshLayout")
        + b")\x81}"
        + text("shape")
        + shape
        + b"sb"
    )
    mesh = (
        named("torch.distributed.device_mesh.DeviceMesh")
        + b")\x81}"
        + text("_layout")
        + layout
        + b"sb"
    )
    meta = named("torch.distributed.tensor._dtensor_spec.TensorMeta") + b"K\x04\x85\x85\x81"
    spec = (
        named("torch.distributed.tensor._dtensor_spec.DTensorSpec")
        + b")\x81}("
        + text("mesh")
        + mesh
        + text("tensor_meta")
        + meta
    )
    spec += text("placements") + b")ub"
    state = (
        b"}("
        + text("_local_tensor")
        + tensor(b"K\x04\x85", stride=b"K\x01\x85")
        + text("_spec")
        + spec
        + b"u"
    )
    return (
        named("torch._tensor._rebuild_from_type_v2")
        + b"(N"
        + named("torch.distributed.tensor.DTensor")
        + b")"
        + state
        + b"tR"
    )


def colliding(count: int) -> bytes:
    """Numbers that all have the same hash, as keys."""
    return b"".join(
        b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, count + 1)
    )


STREAMS = {
    "a shared key through REDUCE": named("collections.OrderedDict")
    + b"(]("
    + tower(60)
    + b"N\x86etR",
    "a shared key through SETITEM": b"}" + tower(60) + b"Ns",
    "a mesh of shared tuples": mesh_of(tower(40, b"K\x02\x85")),
    "a mesh of empty tuples": mesh_of(tower(40)),
    "a size made of bytes": b"B"
    + struct.pack("<I", 9_000_000)
    + bytes(9_000_000)
    + put(1)
    + b"("
    + (named("torch.Size") + get(1) + b"\x85R") * 300
    + b"t\x86",
    "100,000 dimensions": tensor(
        b"(" + b"J\xff\xff\xff\x7f" * 100_000 + b"t", stride=b"(" + b"K\x01" * 100_000 + b"t"
    ),
    "a mesh of 100,000 dimensions": mesh_of(b"(" + b"J\xff\xff\xff\x7f" * 100_000 + b"t"),
    "the same list copied a thousand times": text("a")
    + b"N\x86"
    + put(7)
    + b"]("
    + get(7) * 200_000
    + b"e"
    + put(8)
    + b"("
    + (named("collections.OrderedDict") + get(8) + b"\x85R") * 1000
    + b"t\x87",
    "the same attributes set many times": b"}("
    + b"".join(text(f"{i}") + b"N" for i in range(20_000))
    + b"u"
    + put(3)
    + named("torch.distributed.device_mesh.DeviceMesh")
    + b")\x81"
    + (get(3) + b"b") * 100_000
    + b"\x86",
    "keys that collide": b"}(" + colliding(100_000) + b"u",
    "a call with a million arguments": named("torch.device") + b"(" + b"N" * 900_000 + b"tR",
    "millions of opcodes": b"N" * 6_000_000,
    "other names below torch's": named("torch.distributed.tensor os.system"),
    "names that begin like torch's": named("torch.distributed.tensorevil.Shard"),
    "another name of torch's": named("torch.distributed.tensor.placement_types.Placements"),
    "a deep nest of tuples": b")" + b"\x85" * 200_000,
    "a list in itself": b"]" + put(1) + get(1) + b"a",
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_pickle_that_asks_for_too_much_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = _archive(tmp_path / "x.pt", HEAD + STREAMS[name] + b".", **{"data/0": bytes(16)})
    outcome = bounded(lambda: read_state(path), seconds=10)
    assert outcome.error.startswith("ValueError") and "x.pt: " in outcome.error, outcome
    assert (
        len(outcome.error) < 1000
        and outcome.error.isprintable()
        and "python -m retool.checkpoint ls" in outcome.error
    )


def test_a_mesh_of_an_honest_layout_is_read() -> None:
    for shape, expected in (
        (b"K\x04", (4,)),
        (b"K\x02K\x02\x86", (2, 2)),
        (b"K\x02K\x02\x86\x85", (4,)),
    ):
        assert parse(HEAD + mesh_of(shape) + b".").mesh_shape == expected


def test_one_storage_under_many_names_takes_its_bytes_once(tmp_path: Path) -> None:
    """4 MB in the file, 6 GB if each tensor of it were a copy."""
    first = tensor(b"J\x00\x00\x10\x00\x85", 1 << 20, b"K\x01\x85") + put(1)
    names = b"".join(text(f"w{i}") + (get(1) if i else first) for i in range(1500))
    path = _archive(
        tmp_path / "model_world_size_1_rank_0.pt",
        HEAD + b"}(" + names + b"u.",
        **{"data/0": bytes(4 << 20)},
    )
    assert bounded(lambda: len(read_state(path))).value == 1500
    for read in (
        lambda: ShardSource(tmp_path).names(),
        lambda: merge(tmp_path, tmp_path / "out", torch.float32),
        lambda: verify(tmp_path, quiet),
    ):
        outcome = bounded(lambda read=read: str(read()))
        assert "its tensors claim 6291456000 bytes" in (outcome.error or outcome.value), outcome
    assert not list((tmp_path / "out").glob("*.safetensors"))


def quiet(what: str, done: int) -> None:
    del what, done


def test_records_in_the_same_bytes_are_refused(tmp_path: Path) -> None:
    """A thousand entries of the index that point to one record: a thousand times its bytes to
    check.
    """
    path = _archive(tmp_path / "x.pt", HEAD + b"N.", **{"data/0": bytes(1000)})
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/0")
        for i in range(1, 1000):
            again = zipfile.ZipInfo(f"archive/data/{i}")
            again.header_offset = first.header_offset
            again.CRC = first.CRC
            again.file_size = again.compress_size = first.file_size
            archive.filelist.append(again)
        archive._didModify = True
    with pytest.raises(ValueError, match=r"x\.pt: two of its records overlap"):
        TorchFile(path)


def test_an_index_that_claims_a_gigabyte_is_refused(tmp_path: Path) -> None:
    """In a file with a hole in it, so that the gigabyte is there."""
    path = tmp_path / "x.pt"
    size = 1 << 30
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size, 0, 0))
    # The mapping itself takes a gigabyte of addresses
    outcome = bounded(lambda: TorchFile(path), megabytes=1400)
    assert "x.pt" in outcome.error and "larger than any real one" in outcome.error, outcome


def test_a_part_of_a_damaged_record_is_not_read(tmp_path: Path) -> None:
    """Without checksums.json, a tensor that is read in pieces was never compared with its record's
    checksum.
    """
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(torch.arange(1000.0).numpy().tobytes()) + 2000] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    file = TorchFile(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: record data/0 has a wrong checksum"):
        file.read(file.content["a"], 0, 10)


def header_of(entries: dict[str, Any], data: bytes = b"") -> bytes:
    encoded = json.dumps(entries).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize(
    "content",
    [
        header_of({"w": {"dtype": "F32", "shape": [2**40] * 100_000, "data_offsets": [0, 0]}}),
        header_of({"w": {"dtype": "F32", "shape": [2**62] * 60, "data_offsets": [0, 0]}}),
        header_of(
            {f"w{i}": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for i in range(1000)},
            bytes(16),
        ),
        header_of({"w\x1b[2J": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        header_of({"w": {"dtype": {}, "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
        header_of({"w": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}, bytes(16)),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 2**63),
        b"",
    ],
    ids=range(9),
)
def test_lying_safetensors_headers_are_refused_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    for read in (
        lambda: str(SafetensorsFile(tmp_path / "model.safetensors")),
        lambda: str(SafetensorsSource(tmp_path).names()),
    ):
        outcome = bounded(read)
        assert (
            outcome.error.startswith("ValueError")
            and "model.safetensors" in outcome.error
            and outcome.error.isprintable()
        ), outcome


READERS: dict[str, Callable[[Path], Any]] = {
    "faults": faulty_files,
    "latest": lambda folder: latest(folder.parent),
    "world_size": world_size,
    "recorded": recorded_files,
    "verify": lambda folder: verify(folder, quiet),
    "merge": lambda folder: merge(folder, folder.parent / "out", torch.float32),
    "the weights": lambda folder: ShardSource(folder).read("model.norm.weight", 0, 2),
    "the optimizer": lambda folder: optimizer_step(Shards(folder, "optim")),
    "load": lambda folder: load(folder, states.blank(make_mesh()), make_mesh(), seed=1).step,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one rank, in its run's folder."""
    top = tmp_path_factory.mktemp("whole")
    states.source_model(top / "source")
    states.save(str(top / "run"))
    return top / "run" / "global_step_5"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(whole.parent, tmp_path / "run")
    return tmp_path / "run" / whole.name


def outcomes(folder: Path) -> dict[str, Outcome]:
    return {
        name: bounded(lambda read=read: str(read(folder)), seconds=10)
        for name, read in READERS.items()
    }


def refused(told: dict[str, Outcome], readers: str, match: str) -> None:
    for name in readers.split(", "):
        assert match in (told[name].error or told[name].value), (name, told[name])


def test_three_billion_ranks(folder: Path) -> None:
    config = json.loads((folder / "fsdp_config.json").read_text())
    for claimed in (2, 3_000_000_000, 10**300):
        (folder / "fsdp_config.json").write_text(json.dumps({**config, "world_size": claimed}))
        (folder / "checksums.json").unlink(missing_ok=True)
        told = outcomes(folder)
        refused(
            told,
            "faults, verify, merge, the weights, load",
            f"model_world_size_{claimed}_rank_0.pt is missing",
        )
        assert told["latest"].value == "None"


@pytest.mark.parametrize(
    "name",
    [
        "fsdp_config.json",
        "checksums.json",
        "latest_checkpointed_iteration.txt",
        "huggingface/config.json",
        "data.pt",
    ],
)
@pytest.mark.parametrize("kind", ["pipe", "folder", "huge"])
def test_small_files_that_are_none(folder: Path, name: str, kind: str) -> None:
    path = folder.parent / name if "latest" in name else folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 36)
    told = outcomes(folder)
    for reader, outcome in told.items():
        assert not outcome.error or (
            outcome.error.startswith("ValueError") and path.name in outcome.error
        ), (reader, outcome)
    if "latest" in name:
        assert bounded(lambda: tracked(folder.parent)).value is None and told[
            "latest"
        ].value == str(folder)
    else:
        assert path.name in told["verify"].value and path.name in told["load"].error
        assert told["latest"].value == "None"


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"model_world_size_1_rank_0.pt": 3}, "nothing sensible of model_world_size_1_rank_0.pt"),
        ({"model_world_size_1_rank_0.pt": {"size": "1", "crc32": []}}, "nothing sensible"),
        ({"model_world_size_1_rank_0.pt": {"size": 1, "crc32": ["x"]}}, "nothing sensible"),
        ({"model_world_size_1_rank_0.pt": {"size": 1, "crc32": [1, 2, 3]}}, "nothing sensible"),
        ({"../../../../etc/passwd": {"size": 0, "crc32": []}}, "no file of this checkpoint"),
        ({"/etc/passwd": {"size": 0, "crc32": []}}, "no file of this checkpoint"),
        ({"a\x1b[31mred": {"size": 0, "crc32": []}}, "no file of this checkpoint"),
        ({"[/b]": {"size": 1, "crc32": [0]}}, "[/b] is missing"),
    ],
)
def test_checksums_that_say_nonsense(
    folder: Path, entry: dict[str, Any], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((folder / "checksums.json").read_text())
    content["files"] |= entry
    (folder / "checksums.json").write_text(json.dumps(content))
    (found,) = faulty_files(folder)
    assert match in found and found.replace("\n", "").isprintable()
    assert latest(folder.parent) is None
    assert main(["verify", str(folder)]) == 1 and main(["ls", str(folder.parent)]) == 0
    said = capsys.readouterr().out
    assert match in said and "\x1b" not in said


def test_an_optimizer_that_lists_its_parameters_over_and_over(tmp_path: Path) -> None:
    group = b"}" + text("params") + b"](" + b"K\x00" * 10_000 + b"es" + put(1)
    stream = (
        HEAD
        + b"}("
        + text("a")
        + group
        + text("state")
        + b"}"
        + text("param_groups")
        + b"]("
        + get(1) * 100_000
        + b"eu."
    )
    for kind in ("model", "optim"):
        _archive(tmp_path / f"{kind}_world_size_1_rank_0.pt", stream)
    outcome = bounded(lambda: parameter_indices(Shards(tmp_path, "optim")))
    assert "optim_world_size_1_rank_0.pt: more than 1048576 parameters" in outcome.error, outcome


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_step_that_is_no_number_of_updates(tmp_path: Path, step: float) -> None:
    for kind in ("model", "optim"):
        torch.save(
            {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{"params": [0]}]},
            tmp_path / f"{kind}_world_size_1_rank_0.pt",
        )
    with pytest.raises(
        ValueError,
        match=r"optim_world_size_1_rank_0\.pt: the step of parameter 0 is no number of updates",
    ):
        optimizer_step(Shards(tmp_path, "optim"))


def test_an_honest_file_is_let_through(tmp_path: Path) -> None:
    """As many opcodes for each tensor as real files have, many times over."""
    state = {
        i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
        for i in range(3000)
    }
    torch.save({"state": state, "param_groups": []}, tmp_path / "x.pt")
    assert len(TorchFile(tmp_path / "x.pt").content["state"]) == 3000


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", tied),
        ("model.safetensors.index.json", SafetensorsSource),
        ("model.safetensors", SafetensorsSource),
    ],
)
def test_a_model_folder_of_pipes_is_not_waited_for(
    tmp_path: Path, name: str, read: Callable[[Path], Any]
) -> None:
    os.mkfifo(tmp_path / name)
    outcome = bounded(lambda: str(read(tmp_path)))
    assert outcome.error.startswith("ValueError") and name in outcome.error, outcome
