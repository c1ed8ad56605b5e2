"""The files of examples/launchers: what each makes of a command, by torchrun's own parser and ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from retool.config import read
from retool.sft.config import SYNONYMS, SFTConfig
from tests.hosts.network import Host, inside
from tests.ranks import free_port
from tests.sft.test_command import steps, words

# Quotes, what a shell would replace, and a new line: each of them legal in a path
AWKWARD = 'it\'s "$HOME" `id` $(id) \\ *;&|<>#~ {a,b} !x\n(1) é'
KEYS = [
    f"data.train_files=['/data/{AWKWARD.replace(chr(39), chr(39) * 2)}.parquet', b.parquet]",
    "model.partial_pretrain=/m",
    "data.apply_chat_template_kwargs={enable_thinking: false, name: 'a b'}",
    "optim.betas=[0.9,0.95]",
]
COMMAND = ["retool.sft", *KEYS]
STAND_INS = {
    # Says what it was told, and stays until it is asked to stop
    "torchrun": """
        printf '%s\\0' "$@" >"$SAID/words.$$"
        trap 'touch "$SAID/stopped.$$"; exit 1' USR1
        trap 'touch "$SAID/stopped.$$"; exit 0' INT
        trap 'touch "$SAID/stopped.$$"; exit 143' TERM
        case "$*" in *--node_rank="${FAILS:-none}"*) sleep 0.3; exit 7 ;; esac
        while [ -n "${STAYS:-}" ]; do sleep 0.05; done""",
    "srun": """
        shift
        for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & done
        wait""",
    "scontrol": """
        [ "$1" = show ] && printf 'node-a\\nnode-b\\n'
        [ "$1" = requeue ] && touch "$SAID/queued again"
        true""",
    "scancel": """
        for file in "$SAID"/words.*; do kill -USR1 "${file##*.}"; done""",
    "ssh": """
        echo "$1" >>"$SAID/hosts"
        shift
        exec setsid --wait env --default-signal=INT bash -c "$*" """,
}


@pytest.fixture
def launchers(repository: Path) -> Path:
    return repository / "examples" / "launchers"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine whose programs are stand-ins."""
    programs = tmp_path / "bin"
    programs.mkdir()
    said = tmp_path / "said"
    said.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SAID": str(said)}


def told(machine: Mapping[str, str]) -> list[Namespace]:
    """What each torchrun was told, by its rank."""
    files = Path(machine["SAID"]).glob("words.*")
    parsed = [parse_args(file.read_text().split("\0")[:-1]) for file in files]
    return sorted(parsed, key=lambda options: options.node_rank)


def assert_sound(options: Namespace, keys: list[str] | None = None) -> None:
    """It runs our command on two machines, with keys that we know."""
    assert options.module and options.training_script == "retool.sft"
    assert options.nnodes == "2" and options.nproc_per_node == "8"
    given = options.training_script_args
    assert keys is None or given == keys
    assert read(SFTConfig, given, SYNONYMS).faults == ()


def bash(command: list[str | Path], environment: Mapping[str, str]) -> None:
    subprocess.run(["bash", *command], env=environment, check=True, timeout=60)


def test_slurm(launchers: Path, machine: dict[str, str]) -> None:
    """A signal before the time is up: every torchrun is asked to stop, then the job queues again."""
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "STAYS": "yes",
    }
    script = subprocess.Popen(["bash", launchers / "slurm.sh", *COMMAND], env=machine | slurm)
    said = Path(machine["SAID"])
    end = time.monotonic() + 30
    while len(list(said.glob("words.*"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)  # for the last one's trap
    script.send_signal(signal.SIGUSR1)
    assert script.wait(30) == 0
    assert (said / "queued again").exists() and len(list(said.glob("stopped.*"))) == 2
    for rank, options in enumerate(told(machine)):
        assert_sound(options, KEYS)
        assert (options.node_rank, options.master_addr) == (rank, "node-a")
        assert "SIGUSR1" in options.signals_to_handle


def test_ssh(launchers: Path, machine: dict[str, str]) -> None:
    bash([launchers / "ssh.sh", *COMMAND], machine | {"HOSTS": "10.0.0.1 10.0.0.2"})
    assert sorted((Path(machine["SAID"]) / "hosts").read_text().split()) == ["10.0.0.1", "10.0.0.2"]
    for rank, options in enumerate(told(machine)):
        assert_sound(options, KEYS)
        assert (options.node_rank, options.master_addr) == (rank, "10.0.0.1")


def started(launchers: Path, machine: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """ssh.sh in a group of its own, once both torchruns are there."""
    places = {"HOSTS": "10.0.0.1 10.0.0.2", "STAYS": "yes"}
    script = subprocess.Popen(
        # Where the tests run in a shell's background they ignore Ctrl-C, and so would what they start
        ["env", "--default-signal=INT", "bash", launchers / "ssh.sh", *COMMAND],
        env={**machine, **places},
        process_group=0,
    )
    end = time.monotonic() + 30
    while len(list(Path(machine["SAID"]).glob("words.*"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)  # for the last one's trap
    return script


def stopped(machine: Mapping[str, str]) -> int:
    return len(list(Path(machine["SAID"]).glob("stopped.*")))


def test_ssh_passes_on_what_a_terminal_sends(launchers: Path, machine: dict[str, str]) -> None:
    """Ctrl-C goes to a whole group, whose background processes don't hear it."""
    script = started(launchers, machine)
    os.killpg(script.pid, signal.SIGINT)
    assert script.wait(30) == 0 and stopped(machine) == 2


def test_ssh_ends_all_when_one_fails(launchers: Path, machine: dict[str, str]) -> None:
    script = started(launchers, machine | {"FAILS": "1"})
    assert script.wait(30) == 7, "the status of the one that failed"
    assert stopped(machine) == 1


def test_ssh_tells_of_a_failure_beside_a_success(
    launchers: Path, machine: dict[str, str], tmp_path: Path
) -> None:
    """Both at once, tried often: which of them the shell hears of first is chance."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *--node_rank=1*) exit 7 ;; esac\n')
    command = ["bash", launchers / "ssh.sh", *COMMAND]
    scripts = [subprocess.Popen(command, env=machine | {"HOSTS": "a b"}) for _ in range(24)]
    assert [script.wait(60) for script in scripts] == [7] * 24


def check_pod(pod: Mapping[str, Any], container: Mapping[str, Any]) -> None:
    """Its mounts have volumes, among them a disk for the run and room for NCCL."""
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounted.values()) == set(volumes)
    assert "persistentVolumeClaim" in volumes[mounted["/shared"]]
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_jobset(launchers: Path, machine: dict[str, str]) -> None:
    found = yaml.safe_load((launchers / "jobset.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name = found["metadata"]["name"]
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["completions"] == spec["parallelism"] == 2 and spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never" and {"name", "image", "command"} <= set(container)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    check_pod(pod, container)
    for rank in range(2):
        bash(container["command"][1:], machine | {"JOB_COMPLETION_INDEX": str(rank)})
    for rank, options in enumerate(told(machine)):
        assert_sound(options)
        assert options.node_rank == rank
        assert options.master_addr == f"{name}-{job['name']}-0-0.{name}"


def test_trainjob(launchers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = yaml.safe_load((launchers / "trainjob.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = found["spec"]
    assert found["metadata"]["name"] and spec["runtimeRef"]["name"] == "torch-distributed"
    trainer = spec["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    (patch,) = spec["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert job["name"] == container["name"] == "node"
    check_pod(pod, container)
    # What the runtime gives torchrun
    monkeypatch.setenv("PET_NNODES", str(trainer["numNodes"]))
    monkeypatch.setenv("PET_NPROC_PER_NODE", str(trainer["numProcPerNode"]))
    program, *given = trainer["command"]
    assert program == "torchrun"
    assert_sound(parse_args(given))


def test_sky(launchers: Path, machine: dict[str, str]) -> None:
    found = yaml.safe_load((launchers / "sky.yaml").read_text())
    sky = {
        "SKYPILOT_NUM_NODES": str(found["num_nodes"]),
        "SKYPILOT_NUM_GPUS_PER_NODE": found["resources"]["accelerators"].partition(":")[2],
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    for rank in range(2):
        bash(["-c", found["run"]], machine | sky | {"SKYPILOT_NODE_RANK": str(rank)})
    for rank, options in enumerate(told(machine)):
        assert_sound(options)
        assert (options.node_rank, options.master_addr) == (rank, "10.0.0.1")
        (folder,) = (word for word in options.training_script_args if "local_dir" in word)
        assert folder.partition("=")[2].startswith(next(iter(found["file_mounts"])))


@pytest.mark.slow
def test_accelerate_starts_two_processes(work: Path, launchers: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    keys = words(work, out, trainer__total_training_steps=2, trainer__device="cpu")
    options = ["--num_processes=2", f"--main_process_port={free_port()}", "-m", "retool.sft"]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", launchers / "accelerate.sh", *options, *keys],
        env={**os.environ, "PATH": programs},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "processes: 2 on 1 machine(s)" in done.stdout and len(steps(out)) == 2


@pytest.mark.slow
def test_ssh_to_two_machines(
    work: Path, launchers: Path, hosts: list[Host], machine: dict[str, str], tmp_path: Path
) -> None:
    """The stand-in of ssh enters the machine with that address; torchrun is torchrun."""
    programs = tmp_path / "bin"
    cases = [f'{host.address}) exec {" ".join(inside(host.pid))} bash -c "$*" ;;' for host in hosts]
    body = "\n".join(["#!/usr/bin/env bash", "where=$1", "shift", "case $where in", *cases, "esac"])
    (programs / "ssh").write_text(body)
    (programs / "torchrun").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"'
    )
    out = tmp_path / "run"
    keys = words(work, out, trainer__total_training_steps=2)
    addresses = {"HOSTS": " ".join(host.address for host in hosts), "GPUS": "1"}
    bash([launchers / "ssh.sh", "retool.sft", *keys], machine | addresses)
    assert len(steps(out)) == 2


@pytest.mark.slow
def test_ray_on_a_cluster_of_two_nodes(work: Path, launchers: Path, tmp_path: Path) -> None:
    """Two raylets on this computer, each with room for one worker."""
    pytest.importorskip("ray", reason="no ray: pip install 'retool-train[ray]'")
    from ray.cluster_utils import Cluster

    memory = 100 * 2**20
    head = {"num_cpus": 1, "object_store_memory": memory, "include_dashboard": False}
    cluster = Cluster(True, head_node_args=head)
    out = tmp_path / "run"
    keys = words(work, out, trainer__total_training_steps=2)
    script = [sys.executable, launchers / "ray_train.py", "--workers=2", "--cpu"]
    options = [f"--address={cluster.address}", f"--storage={tmp_path / 'ray'}"]
    try:
        cluster.add_node(num_cpus=1, object_store_memory=memory)
        done = subprocess.run(
            [*script, *options, "retool.sft", *keys],
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=170,
        )
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # A worker takes the only CPU of its node; the nodes have one address
    assert "processes: 2 on 1 machine(s)" in done.stdout and len(steps(out)) == 2
