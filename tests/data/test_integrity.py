"""A token cache that isn't what was written is noticed and made again; one that is changed while it
is made is refused.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from retool.data import integrity
from retool.data.loader import open_dataset
from retool.data.read.source import RowSource
from tests.data.test_loader import answer, jsonl

ROWS = [answer(f"The answer is {n}.") for n in range(40)]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return jsonl(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def opened(tmp_path: Path, path: str, renderer_of):
    """Opens the cache of `path`, as a new run would."""
    return lambda: open_dataset(
        RowSource(path), renderer_of("chatml"), cache_dir=tmp_path / "cache"
    )


def _content(dataset) -> list[tuple[list[int], list[bool]]]:
    return [(dataset[i].tokens.tolist(), dataset[i].mask.tolist()) for i in range(len(dataset))]


def _flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(bytes(data))


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = {
    "an empty report": ("report.json", lambda p: p.write_bytes(b"")),
    "another report": ("report.json", lambda p: p.write_text(json.dumps({"tokens": 1}))),
    "a flipped bit in the report": ("report.json", lambda p: _flip(p, 40)),
    "empty lengths": ("lengths.npy", lambda p: p.write_bytes(b"")),
    "flipped lengths": ("lengths.npy", _flip),
    "flipped counts of trained tokens": ("trained.npy", _flip),
    "no rows": ("rows.npy", lambda p: p.unlink()),
    "flipped tokens": ("tokens.bin", _flip),
    "short tokens": ("tokens.bin", lambda p: os.truncate(p, 8)),
    "long tokens": ("tokens.bin", lambda p: p.write_bytes(p.read_bytes() + b"\0\0\0\0")),
    "a folder for tokens": ("tokens.bin", _as_folder),
    "a flipped mask": (
        "mask.bin",
        lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
    ),
    "no mask": ("mask.bin", lambda p: p.unlink()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_cache_is_made_again_and_said(
    opened, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, report = opened()
    expected = _content(first)
    folder = first.folder
    name, harm = DAMAGE[what]
    harm(folder / name)
    again, second = opened()
    assert _content(again) == expected and second == report
    assert "is damaged" in caplog.text and "It is made again" in caplog.text and name in caplog.text
    caplog.clear()
    third, _ = opened()
    assert _content(third) == expected and not caplog.text, "and is whole from then on"
    assert not [p.name for p in folder.parent.iterdir() if p.name.startswith("building-")]


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a folder"])
def test_what_stands_in_the_place_of_a_cache_makes_room(opened, tmp_path: Path, kind: str) -> None:
    first, _ = opened()
    expected = _content(first)
    folder = first.folder
    folder.rename(tmp_path / "elsewhere")
    if kind == "file":
        folder.write_text("mine")
    else:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("mine")
        folder.symlink_to(tmp_path / ("nothing" if kind == "link to nothing" else "full"))
    assert _content(opened()[0]) == expected
    assert kind == "file" or (tmp_path / "full" / "mine").exists()


def test_a_large_cache_is_compared_while_the_run_goes_on(
    opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _content(opened()[0])
    folder = opened()[0].folder
    monkeypatch.setattr(integrity, "WAIT_FOR_BYTES", 0)
    whole, _ = opened()
    whole._check.wait()
    assert whole.problem() is None
    _flip(folder / "tokens.bin")
    damaged, _ = opened()
    damaged._check.wait()
    assert (
        "tokens.bin holds other bytes" in damaged.problem()
        and "Start the same command again" in damaged.problem()
    )
    assert _content(opened()[0]) == expected and "It is made again" in caplog.text


def test_the_ranks_of_a_run_compare_everything_once(
    opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = list[bool]()
    real = integrity.damage
    monkeypatch.setattr(
        "retool.data.cache.damage",
        lambda folder, everything: compared.append(everything) or real(folder, everything),
    )
    opened()
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1234")):
        monkeypatch.setenv(name, value)
    for _ in range(3):
        opened()
    assert compared.count(True) == 1
    monkeypatch.setenv("MASTER_PORT", "1235")  # another run
    opened()
    assert compared.count(True) == 2


def test_a_file_that_changes_while_it_is_read_is_refused(
    opened, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retool.data import cache

    real = cache._write

    def write(*args):
        report = real(*args)
        jsonl(tmp_path / "rows.jsonl", [*ROWS, answer("one more")])
        return report

    monkeypatch.setattr(cache, "_write", write)
    with pytest.raises(ValueError, match=r"rows\.jsonl changed while it was read"):
        opened()
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    monkeypatch.setattr(cache, "_write", real)
    assert len(opened()[0]) == 41


def test_a_full_disk_names_the_cache_and_leaves_nothing(
    opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("retool.data.cache.seal", full)
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*No space left on device\): make room"):
        opened()
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_what_a_killed_builder_left_is_removed(opened, tmp_path: Path) -> None:
    folder = opened()[0].folder
    mine = folder.parent / f"building-{folder.name}-torn"
    other = folder.parent / "building-0123456789abcdef-torn"
    for torn in (mine, other):
        torn.mkdir()
    (folder / "report.json").unlink()
    opened()
    assert not mine.exists() and other.exists(), "another cache's may be going on"


def test_everything_is_on_disk_before_the_cache_has_its_name(
    opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list[str]()
    real_sync = integrity.fsync
    real_rename = Path.rename
    monkeypatch.setattr(integrity, "fsync", lambda p: order.append(p.name) or real_sync(p))
    monkeypatch.setattr(
        Path, "rename", lambda self, to: order.append("renamed") or real_rename(self, to)
    )
    opened()
    assert order[-1] == "renamed" and {
        "tokens.bin",
        "mask.bin",
        "lengths.npy",
        "trained.npy",
        "rows.npy",
        "report.json",
    } <= set(order[:-1])
