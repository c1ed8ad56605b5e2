"""What this machine must have for a run: each check against a machine that has it, and one that
doesn't.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch

from retool.preflight import machine
from retool.preflight.machine import (
    check_compiler,
    check_host_memory,
    check_port,
    check_rounds,
    check_store,
    gpu_notes,
    host_memory,
    port_is_free,
    unused_gpus,
)
from tests.ranks import free_port


def test_a_taken_port_is_a_fault_only_for_the_process_that_opens_it() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        launched = {"MASTER_PORT": str(port), "RANK": "0"}
        (fault,) = check_port(launched)
        assert (
            str(port) in fault.where
            and "taken" in fault.problem
            and "--master_port" in fault.remedy
        )
        assert not list(check_port(launched | {"RANK": "1"})) and not list(
            check_port(launched | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
        )
        assert not port_is_free(port)
    assert not list(check_port({"MASTER_PORT": str(free_port())})) and not list(check_port({}))


@pytest.mark.parametrize("text", ["", "http", "-1", "65536", "1.5"])
def test_what_is_no_port(text: str) -> None:
    (fault,) = check_port({"MASTER_PORT": text})
    assert "no port" in fault.problem


def test_restarts_on_several_machines_need_stores_of_their_own() -> None:
    launched = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "GROUP_WORLD_SIZE": "2",
    }
    (fault,) = check_rounds(launched)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in fault.remedy
    for name, value in (
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
        ("GROUP_WORLD_SIZE", "1"),
    ):
        assert not list(check_rounds(launched | {name: value}))


def test_compiling_needs_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [fault.remedy for fault in check_compiler("auto")] == [
        "pip install triton, or use model.use_compile=false.",
        "Install gcc, or use model.use_compile=false.",
    ]
    assert not list(check_compiler(False))
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    assert not list(check_compiler("auto")) and len(list(check_compiler(True))) == 1


def test_stores_whose_client_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        not list(check_store(None, "k"))
        and not list(check_store("/mnt/x", "k"))
        and not list(check_store("file:///mnt/x", "k"))
    )
    (fault,) = check_store("nosuch://x", "trainer.default_hdfs_dir")
    assert "nosuch://" in fault.problem

    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(machine.fsspec, "get_filesystem_class", missing)
    (fault,) = check_store("s3://bucket/x", "trainer.default_hdfs_dir")
    assert (
        fault.where == "trainer.default_hdfs_dir=s3://bucket/x" and "Install s3fs" in fault.problem
    )


def test_host_memory() -> None:
    total = host_memory()
    assert total is not None and 2**28 < total < 2**45
    assert not list(check_host_memory(total / 2, "k")) and not list(check_host_memory(0, ""))
    (fault,) = check_host_memory(total, "model.fsdp_config.param_offload=true")
    assert fault.where == "model.fsdp_config.param_offload=true" and "GiB" in fault.problem


def test_gpus_that_torch_cannot_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a torch of the wrong build a run on eight GPUs would begin on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("nvidia0", "nvidiactl", "null"):
        (tmp_path / name).touch()
    for built, why in ((None, "is built without CUDA"), ("12.8", "can't use the driver")):
        monkeypatch.setattr(torch.version, "cuda", built)
        (note,) = unused_gpus({}, tmp_path)
        assert (
            note.startswith("this machine has nvidia0, and the run takes the CPU") and why in note
        )
    assert not list(unused_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path))
    (tmp_path / "nvidia0").unlink()
    assert not list(unused_gpus({}, tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "nvidia0").touch()
    assert not list(unused_gpus({}, tmp_path))


def test_gpus_that_are_shared_or_old(tmp_path: Path) -> None:
    """nvidia-smi's answer is read as it comes; here a script gives it."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        '#!/bin/sh\necho "$@" > ' + str(tmp_path / "asked") + "\n"
        "echo 'NVIDIA H200, 420, 143771, 9.0'; echo 'NVIDIA H200, 90000, 143771, 9.0'; echo 'Tesla V100, 3, 16384, 7.0'; echo 'odd, [N/A], [N/A], 9.0'\n"
    )
    script.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        notes = list(gpu_notes(4, "bf16", {"CUDA_VISIBLE_DEVICES": "1,2"}))
        assert (
            len(notes) == 2
            and notes[0].startswith("GPU 1 (NVIDIA H200) has 52.5 of 140.4 GiB free")
            and "V100) has no bf16" in notes[1]
        )
        assert "-i 1,2" in (tmp_path / "asked").read_text()
        assert (
            len(list(gpu_notes(4, "fp32", {}))) == 1
            and not list(gpu_notes(1, "bf16", {}))
            and "-i" not in (tmp_path / "asked").read_text()
        )
        script.write_text("#!/bin/sh\nexit 9\n")
        assert not list(gpu_notes(4, "bf16", {}))
