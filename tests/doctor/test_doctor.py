"""`retool doctor`: what is wrong is said with the way out, and is the exit status."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retool.doctor import folder, machine, network
from retool.doctor.__main__ import main
from retool.doctor.finding import Finding, table
from retool.doctor.machine import Machine
from retool.doctor.network import BETWEEN, Link
from retool.doctor.speed import described, product_finding, step_finding
from retool.model.traffic.machines import Machines
from retool.parallel.mesh import Mesh, make_mesh
from retool.parallel.network import Place
from tests.model.tiny import SHAPE
from tests.ranks import run_ranks

HERE = Machine(
    rank=0,
    first=True,
    place=Place("a", "10.0.0.1"),
    versions={"torch": "2.11", "numpy": "2"},
    gpu="H200, 141 GiB",
    open_files=65536,
    locked_memory=-1,
    infiniband=True,
    shm=2**33,
)
THERE = replace(HERE, rank=1, place=Place("b", "10.0.0.2"))


def problems(*machines: Machine) -> dict[str, str]:
    found = machine.findings(machines, sandbox=True)
    return {finding.subject: finding.problem for finding in found if finding.problem}


def test_one_process_is_told_what_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE}))
    words = ["--folder", str(tmp_path / "run"), "--command", "sft", "--device", "cpu"]
    assert main([*words, "--model", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "16,384 tokens a rank: fsdp_size=1 waits 0%" in said
    shutil.rmtree(tmp_path / "model")
    for subject in ("processes", "GPUs", "product of matrices", "open files", "folder: writable"):
        assert f"✓ {subject}" in said, said
    assert said.endswith("nothing is wrong.\n") and [*tmp_path.iterdir()] == []


def test_a_folder_that_cannot_be_written_is_exit_status_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("retool.doctor.folder.tempfile.mkstemp", refuse)
    assert main(["--folder", str(tmp_path), "--command", "sft", "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "✗ folder: writable" in said and "Permission denied" in said
    assert "1 thing(s) to mend" in said


def test_machines_that_differ() -> None:
    assert problems(HERE, THERE) == {}
    other = replace(THERE, versions={"torch": "2.12", "numpy": "2"}, gpu="A100, 80 GiB")
    found = problems(HERE, other)
    assert set(found) == {"GPUs", "torch"}
    (line,) = [f.found for f in machine.findings([HERE, other], False) if f.subject == "torch"]
    assert line == "2.11 (rank 0 on a); 2.12 (rank 1 on b)"
    assert "numpy" in problems(HERE, replace(THERE, versions={"torch": "2.11"}))


@pytest.mark.parametrize(
    ("subject", "change", "way_out"),
    [
        ("open files", {"open_files": 256}, "ulimit -n"),
        ("locked memory", {"locked_memory": 65536}, "ulimit -l unlimited"),
        ("/dev/shm", {"shm": 64 * 2**20}, "--shm-size"),
        ("sandbox", {"sandbox": ("no network",)}, "retool sandbox doctor"),
    ],
)
def test_limits_of_one_machine(subject: str, change: dict[str, int], way_out: str) -> None:
    (found,) = problems(HERE, replace(THERE, **change)).items()
    assert found[0] == subject and "b" in found[1] and way_out in found[1]


def test_limits_that_are_none() -> None:
    assert (
        problems(replace(HERE, open_files=-1), replace(THERE, infiniband=False, locked_memory=0))
        == {}
    )


def test_clocks_that_differ() -> None:
    """The least difference counts: a rank may leave a barrier late."""
    right = network.clock_finding([[0.0, 1.9], [5.0, 5.2]], [HERE, THERE])
    assert right == Finding("clocks", "at most 200 ms apart")
    wrong = network.clock_finding([[0.0, 600.5], [5.0, 605.0]], [HERE, THERE])
    assert wrong.found == "at most 600,000 ms apart"
    assert wrong.problem.startswith("b's differs from a's: start chrony")


def test_machines_are_told_apart_by_their_addresses() -> None:
    """Clones have one name."""
    here = Place("node", "10.0.0.1")
    there = Place("node", "10.0.0.2")
    found = network.parts_of([here, here, there])
    assert found == {"in a machine": [[0, 1], [2]], "between machines": [[0, 2], [1]]}


def test_a_network_that_is_slow_for_gpus() -> None:
    def problems_of(device: str, where: str, rate: float) -> list[str]:
        mesh = Mesh(0, 2, 1, 2, torch.device(device))
        link = Link(where, 2, rate, rate, rate, rate, 1e-5)
        return [f.subject for f in network.findings(mesh, [link], 4) if f.problem]

    slow = 0.9e9 / 8  # bytes a second
    assert len(problems_of("cuda", "between machines", slow)) == 4
    assert problems_of("cuda", "between machines", 2 * slow) == []
    assert problems_of("cuda", "in a machine", slow) == problems_of("cpu", BETWEEN, slow) == []


def test_disks_that_are_several_or_late() -> None:
    nothing = ("", list[int](), list[int]())

    def wrong(*said: tuple[str, list[int], list[int]]) -> dict[str, str]:
        found = folder._findings(Path("/run"), [HERE, THERE], said)
        return {finding.subject: finding.problem for finding in found if finding.problem}

    assert wrong(nothing, nothing) == {}
    assert "on b: mount one disk" in wrong(nothing, ("", [0], [0]))["folder: shared"]
    assert "within 3 s on b" in wrong(nothing, ("", [], [0]))["folder: renames show"]
    refused = wrong(nothing, ("Permission denied", [], []))["folder: writable"]
    assert refused == "Not by rank 1 on b: Permission denied."


def measured() -> Link:
    """A second for each exchange of a MB between two ranks."""
    mesh = make_mesh(device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "_fastest", lambda _, work: 1.0)
        return network._measure(mesh, "in a machine", [[0, 1]], 1)


@pytest.mark.slow
def test_bandwidths_are_those_of_a_ring() -> None:
    half = 2**20 / 2
    expected = Link("in a machine", 2, 2 * half, half, half, half, shortest=1.0)
    assert run_ranks(measured, 2) == [expected] * 2


def test_long_lines_stay_in_their_column() -> None:
    lines = table([Finding("a", "word " * 40, "wrong " * 30)]).splitlines()
    assert max(map(len, lines)) <= 110 and all(line.startswith(("✗ a", " ")) for line in lines[:-2])


def test_a_slow_gpu_and_a_model_that_cannot_be_read(tmp_path: Path) -> None:
    assert not product_finding([HERE, THERE], [7e14, 6.9e14], cuda=True).problem
    assert not product_finding([HERE, THERE], [7e14, 1e14], cuda=False).problem
    slow = product_finding([HERE, THERE], [7e14, 1e14], cuda=True)
    assert "rank 1 on b is slow" in slow.problem
    assert slow.found == "100.0 to 700.0 TFLOP/s"
    machines = Machines(1, 1.0, 1.0, 1.0)
    assert "has no config.json" in step_finding(machines, 2, tmp_path, 10).problem


def test_what_was_measured_is_what_a_step_is_planned_with(tmp_path: Path) -> None:
    ranks = [replace(HERE, rank=0), replace(HERE, rank=1), THERE, replace(THERE, rank=3)]
    links = [
        Link("in a machine", 2, 8e9, 5e9, 8e9, 8e9, shortest=2e-5),
        Link("between machines", 2, 1e6, 1e6, all_gather=8e5, reduce_scatter=5e5, shortest=4e-4),
    ]
    found = described(ranks, links, [2e12, 1e12, 2e12, 2e12])
    assert found == Machines(2, 8e9, 2e6, 0.55e12, 1e-5, 2e-4, gather=1.25, scatter=2.0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE}))
    said = step_finding(found, 4, tmp_path, 1024).found
    first, better = said.split("; ")
    assert "fsdp_size=4 waits 9" in first and "fsdp_size=2" in better
