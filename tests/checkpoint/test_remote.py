"""Copies on a remote store: complete, the tracker last, tried again, and never fatal to the run."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from retool import checkpoint
from retool.checkpoint import SaveOptions, latest, remote
from retool.checkpoint.__main__ import main
from retool.checkpoint.format.folder import CHECKSUMS
from retool.checkpoint.format.tracker import TRACKER
from retool.checkpoint.publish import prune
from retool.checkpoint.remote import Mirror
from retool.data.read.files import columns_of, iter_chunks
from retool.files import afar
from retool.parallel.mesh import make_mesh
from tests.checkpoint import states
from tests.checkpoint.weak_link import WeakLink
from tests.ranks import free_port


class Flaky(LocalFileSystem):
    """A local disk that fails now and then, and writes down what it is asked for."""

    protocol = "flaky"
    cachable = False
    fail_first = 0
    log: list[str] = []  # noqa: RUF012

    def put_file(self, path1: Any, path2: Any, callback: Any = None, **kwargs: Any) -> None:
        Flaky.log.append(str(path2))
        if Flaky.fail_first > 0:
            Flaky.fail_first -= 1
            raise ConnectionError("the store is away")
        super().put_file(path1, path2, **kwargs)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        Flaky.log.append(str(path))
        super().pipe_file(path, value, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


def _save(
    root: Path, url: str, steps: tuple[int, ...] = (1,), keep: int | None = None
) -> checkpoint.Staging:
    mesh = make_mesh()
    staging = checkpoint.Staging(mesh)
    states.source_model(root.parent / "source")
    for step in steps:
        result = checkpoint.save(
            root,
            states.state(mesh, step=step),
            mesh,
            checkpoint.TrainingState(step=step),
            model_folder=root.parent / "source",
            options=SaveOptions(remote_url=url, keep=keep),
            staging=staging,
        ).wait()
        assert result.error is None
    staging.close()
    return staging


def _content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_every_file_arrives_and_the_copy_can_be_resumed(tmp_path: Path) -> None:
    staging = _save(tmp_path / "run", f"file://{tmp_path}/far", steps=(1, 2), keep=1)
    assert staging.mirror is not None and staging.mirror.failures == []
    assert _content(tmp_path / "far/global_step_2") == _content(tmp_path / "run/global_step_2")
    assert latest(tmp_path / "far") == tmp_path / "far/global_step_2"
    assert main(["verify", str(tmp_path / "far/global_step_1")]) == 0


def test_the_tracker_comes_last_and_failures_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flaky, "log", [])
    monkeypatch.setattr(Flaky, "fail_first", 3)
    mirror = Mirror(f"flaky://{tmp_path}/far", wait_s=0.001)
    _save(tmp_path / "run", f"file://{tmp_path}/other")
    mirror.add(tmp_path / "run/global_step_1")
    mirror.close()
    assert mirror.failures == [] and Flaky.log[0] == Flaky.log[3]
    assert (
        Flaky.log[-1].endswith("latest_checkpointed_iteration.txt")
        and sum(n.endswith("iteration.txt") for n in Flaky.log) == 1
    )
    assert _content(tmp_path / "far/global_step_1") == _content(tmp_path / "run/global_step_1")


def test_a_store_that_stays_away_is_reported_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Flaky, "log", [])
    monkeypatch.setattr(Flaky, "fail_first", 10**9)
    _save(tmp_path / "run", f"file://{tmp_path}/other")
    mirror = Mirror(f"flaky://{tmp_path}/far", wait_s=0.001)
    mirror.add(tmp_path / "run/global_step_1")
    mirror.close()
    assert len(mirror.failures) == 1 and "the store is away" in mirror.failures[0]
    assert "was not copied" in caplog.text and "The local checkpoint is complete" in caplog.text
    assert not (tmp_path / "far/latest_checkpointed_iteration.txt").exists(), (
        "the tracker must not name what isn't there"
    )
    assert latest(tmp_path / "run") == tmp_path / "run/global_step_1"


def test_an_unknown_kind_of_store_is_reported(tmp_path: Path) -> None:
    staging = _save(tmp_path / "run", "nosuchstore://bucket")
    assert staging.mirror is not None and "nosuchstore" in staging.mirror.failures[0]


def test_what_is_being_copied_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    for step in (1, 2, 3):
        (tmp_path / f"global_step_{step}").mkdir()
        (tmp_path / f"global_step_{step}" / CHECKSUMS).touch()

    assert prune(tmp_path, 1, frozenset({tmp_path / "global_step_2"})) == [
        tmp_path / "global_step_1"
    ]
    assert prune(tmp_path, 1) == [tmp_path / "global_step_2"]


class S3:
    """A real S3 server on this machine (moto's), with a bucket, behind a weak link."""

    url = "s3://bucket/runs"

    def __init__(self) -> None:
        port = free_port()
        self.server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.link = WeakLink(port)
        self._direct = {"client_kwargs": {"endpoint_url": f"http://127.0.0.1:{port}"}}
        for _ in range(200):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)

    def back(self, folder: Path) -> Path:
        """What is there, past the link."""
        store = fsspec.filesystem("s3", **self._direct, skip_instance_cache=True)
        store.get("bucket/runs/", f"{folder}/", recursive=True)
        return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    pytest.importorskip("moto", reason="the S3 server is moto[server]")
    pytest.importorskip("s3fs", reason="s3:// needs s3fs")
    there = S3()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{there.link.port}",
            # Its client's own tries, which our tests needn't wait for
            "AWS_MAX_ATTEMPTS": "1",
        }.items():
            patch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        try:
            fsspec.filesystem("s3").mkdir("bucket")
            yield there
        finally:
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            there.link.close()
            there.server.kill()
            there.server.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with three checkpoints."""
    root = tmp_path_factory.mktemp("saved")
    _save(root / "run", f"file://{root}/other", steps=(1, 2, 3))
    return root / "run"


def test_an_s3_server_gets_every_byte(tmp_path: Path, s3: S3, saved: Path) -> None:
    mirror = Mirror(f"{s3.url}/whole")
    mirror.add(saved / "global_step_1")
    mirror.close()
    assert mirror.failures == []
    back = s3.back(tmp_path / "back") / "whole"
    assert _content(back / "global_step_1") == _content(saved / "global_step_1")
    assert latest(back) == back / "global_step_1"


def _bytes_of(folder: Path) -> int:
    return sum(len(data) for data in _content(folder).values())


@pytest.mark.parametrize("how", ["cut", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_store_that_dies_midway_has_no_half_checkpoint_that_counts(
    tmp_path: Path,
    s3: S3,
    saved: Path,
    how: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(remote, "STALL_S", 2.0)
    mirror = Mirror(f"{s3.url}/{how}", wait_s=0.01)
    mirror.add(saved / "global_step_1")
    mirror.close()
    assert mirror.failures == []
    mirror = Mirror(f"{s3.url}/{how}", wait_s=0.01)
    s3.link.fail(how, after_bytes=_bytes_of(saved / "global_step_2") // 2)
    begin = time.monotonic()
    mirror.add(saved / "global_step_2")
    mirror.close()
    assert time.monotonic() - begin < 20 and s3.link.failures
    assert "was not copied" in mirror.failures[0] and "is complete" in caplog.text
    half = s3.back(tmp_path / "half") / how
    there = [p.name for p in (half / "global_step_2").rglob("*") if p.is_file()]
    assert there and CHECKSUMS not in there
    assert latest(half) == half / "global_step_1"
    assert (half / TRACKER).read_text() == "1"
    s3.link.mend()
    mirror = Mirror(f"{s3.url}/{how}", wait_s=0.01)
    mirror.add(saved / "global_step_3")
    mirror.close()
    assert mirror.failures == []
    whole = s3.back(tmp_path / "whole") / how
    assert latest(whole) == whole / "global_step_3"
    assert _content(whole / "global_step_3") == _content(saved / "global_step_3")


@pytest.mark.slow
def test_a_store_that_answers_with_errors_for_a_while_gets_it_all(
    tmp_path: Path, s3: S3, saved: Path
) -> None:
    mirror = Mirror(f"{s3.url}/errors", wait_s=0.3)
    before = s3.link.failures
    s3.link.fail("error", after_bytes=_bytes_of(saved / "global_step_1") // 2)
    mirror.add(saved / "global_step_1")
    while s3.link.failures == before:
        time.sleep(0.01)
    s3.link.mend()
    mirror.close()
    assert mirror.failures == []
    back = s3.back(tmp_path / "back") / "errors"
    assert _content(back / "global_step_1") == _content(saved / "global_step_1")
    assert latest(back) == back / "global_step_1"


def test_data_on_a_store_that_fails_names_the_file(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afar, "SILENCE_S", 2.0)
    file = "s3://bucket/rows.jsonl"
    fsspec.filesystem("s3").pipe_file(file, b'{"messages": []}\n' * 50_000)
    assert columns_of(file) == ["messages"]
    assert sum(map(len, iter_chunks([file]))) == 50_000
    for how in ("cut", "silent"):
        s3.link.fail(how, after_bytes=200_000)
        begin = time.monotonic()
        with pytest.raises(ValueError, match=r"s3://bucket/rows\.jsonl.*Check the store"):
            list(iter_chunks([file]))
        assert time.monotonic() - begin < 20
        s3.link.mend()


def test_a_store_that_takes_nothing_any_more_is_given_up_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "global_step_1").mkdir()
    (tmp_path / "global_step_1" / "data.pt").write_bytes(b"x")
    monkeypatch.setattr(Flaky, "put_file", lambda *args, **named: time.sleep(30))
    monkeypatch.setattr(remote, "STALL_S", 0.5)
    begin = time.monotonic()
    mirror = Mirror(f"flaky://{tmp_path}/far")
    mirror.add(tmp_path / "global_step_1")
    mirror.close()
    assert 0.4 < time.monotonic() - begin < 10 and "takes nothing any more" in mirror.failures[0]
    assert "The local checkpoint is complete" in caplog.text
