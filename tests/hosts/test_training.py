"""The same command on several machines: the numbers of one, and checkpoints that any number of
machines goes on from.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from retool.checkpoint.__main__ import main as checkpoints
from retool.checkpoint.format.tracker import TRACKER
from tests import warm
from tests.hosts.launch import run
from tests.hosts.network import Host, network
from tests.sft.test_command import steps, words

# Shards inside a machine, copies across; a sequence is two ranks' of one machine
HYBRID = ("ulysses_sequence_parallel_size=2", "model.fsdp_config.fsdp_size=2")
STEPS = 8
FEW = 3


def sft(work: Path, out: Path, *more: str, last: int = STEPS) -> list[str | Path]:
    keys = words(work, out, *more, trainer__total_training_steps=last, trainer__save_freq=4)
    return ["-m", "retool.sft", *keys]


def trained(hosts: Sequence[Host], each: int, command: Sequence[str | Path], logs: Path) -> str:
    """What the first machine said of a run that ended well on all of them."""
    ended = run(hosts, each, command, logs)
    assert all(one.status == 0 for one in ended), [one.text[-3000:] for one in ended]
    return ended[0].text


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(entry["train/loss"], entry["train/grad_norm"]) for entry in steps(folder)]


@pytest.mark.slow
def test_two_machines_train_as_one_does(work: Path, hosts: list[Host], tmp_path: Path) -> None:
    """gloo would choose the loopback of each: their names mean nothing here."""
    said = trained(hosts, 1, sft(work, tmp_path / "apart", last=FEW), tmp_path / "logs")
    assert "2 on 2 machine(s)" in said
    trained(hosts[1:], 2, sft(work, tmp_path / "together", last=FEW), tmp_path / "logs of one")
    assert losses(tmp_path / "apart") == losses(tmp_path / "together")


@pytest.mark.slow
def test_a_folder_that_each_machine_has_its_own_of_is_refused(
    work: Path, hosts: list[Host], tmp_path: Path
) -> None:
    out = hosts[0].disk / "run"
    ended = run(hosts, 1, sft(work, out), tmp_path / "logs")
    assert [one.status for one in ended] == [1, 1], ended
    assert f"trainer.default_local_dir={out} (on host-b)" in ended[0].text, ended[0].text
    assert "isn't the folder that rank 0 has under this name" in ended[0].text
    for name in "ab":
        assert not (tmp_path / "machines" / name / "run").exists(), "nothing is left"


def cut_off(whole: Path, folder: Path) -> Path:
    """A copy of a run that ended after its fourth step."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "global_step_8")
    (folder / TRACKER).write_text("4")
    return folder


@pytest.mark.slow
def test_hybrid_shards_and_resumes_on_other_machines(work: Path, tmp_path: Path) -> None:
    """On one, two and three machines, the first of them another one each time."""
    with network(3, tmp_path / "machines") as (a, b, c):
        logs = tmp_path / "logs"
        whole = tmp_path / "whole"
        trained([a], 4, sft(work, whole, *HYBRID), logs / "one machine")
        apart = tmp_path / "apart"
        trained([b, a], 2, sft(work, apart, *HYBRID), logs / "two machines")
        assert losses(apart) == losses(whole), "the same layout, the same bits"
        for number, machines in enumerate([[c], [b, c], [c, a, b]]):
            out = cut_off(apart, tmp_path / f"resumed {number}")
            said = trained(machines, 2, sft(work, out, *HYBRID), logs / out.name)
            assert f"resumed from {out / 'global_step_4'}" in said
            np.testing.assert_allclose(losses(out)[-4:], losses(whole)[-4:], rtol=1e-4)
            assert {p.name for p in out.iterdir()} >= {"global_step_8", TRACKER}
            assert checkpoints(["verify", str(out / "global_step_8")]) == 0


@pytest.mark.slow
def test_a_resume_is_refused_where_one_machine_lacks_the_folder(
    work: Path, hosts: list[Host], tmp_path: Path
) -> None:
    """Trained on one machine's own disk, gone on with on two."""
    out = hosts[0].disk / "run"
    trained(hosts[:1], 2, sft(work, out), tmp_path / "logs")
    mine = tmp_path / "machines" / "a" / "run"
    before = (mine / TRACKER).read_text()
    ended = run(hosts, 1, sft(work, out), tmp_path / "again")
    assert [one.status for one in ended] == [1, 1]
    assert "isn't the folder that rank 0 has under this name" in ended[0].text
    assert (mine / TRACKER).read_text() == before
    assert not (tmp_path / "machines" / "b" / "run").exists()


STORE_PORT = 5000
BUCKET = "import fsspec; fsspec.filesystem('s3').mkdir('bucket')"
FETCH = (
    "import fsspec, sys; fsspec.filesystem('s3').get('bucket/run/', sys.argv[1], recursive=True)"
)


def serve_s3(machine: Host) -> warm.Popen:
    """A real S3 server (moto's) on a machine that doesn't train, with a bucket."""
    words = ["-m", "moto.server", "-H", machine.address, "-p", str(STORE_PORT)]
    server = machine.start(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while machine.start(["-c", BUCKET], stderr=subprocess.DEVNULL).wait(60):
        assert time.monotonic() < end and server.poll() is None, "no S3 server"
        time.sleep(0.2)
    return server


@pytest.mark.slow
def test_checkpoints_of_two_machines_go_to_object_storage(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is complete; another machine goes on from it."""
    pytest.importorskip("moto", reason="the S3 server is moto[server]")
    with network(3, tmp_path / "machines") as (a, b, store):
        address = f"http://{store.address}:{STORE_PORT}"
        for name, value in (
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("NO_PROXY", "*"),
        ):
            monkeypatch.setenv(name, value)
        server = serve_s3(store)
        try:
            out = tmp_path / "run"
            command = sft(work, out, "trainer.default_hdfs_dir=s3://bucket/run")
            trained([a, b], 1, command, tmp_path / "logs")
            back = tmp_path / "back"
            assert b.start(["-c", FETCH, str(back)]).wait(60) == 0
        finally:
            server.kill()
            server.wait()
        assert {p.name for p in back.iterdir()} >= {"global_step_4", "global_step_8", TRACKER}
        assert checkpoints(["verify", str(back / "global_step_8")]) == 0
        said = trained([b], 2, sft(work, back, last=STEPS + 1), tmp_path / "logs of the copy")
        assert f"resumed from {back / 'global_step_8'}" in said
