"""What a run needs of this machine besides GPUs: a free port, a compiler, disk space, host memory,
clients of stores.

Each check yields every fault it finds and raises none; nothing is started and nothing is left
behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import fsspec
import torch

from retool.config import Fault
from retool.files.own_folder import existing_part
from retool.parallel.meeting import OWN_STORES, mixes_rounds, shares_store
from retool.perf import GIB
from retool.preflight.ranks.verdict import met_before

DEFAULT_PORT = 29500  # torchrun's, without --standalone
BF16_FROM = (8, 0)  # CUDA compute capability
NOTABLE_SHARE_IN_USE = 0.1  # share of a GPU's memory that others may hold before it is worth saying
MAX_PINNED_SHARE = 0.8  # of the host's memory


def check_port(environment: Mapping[str, str]) -> Iterator[Fault]:
    """MASTER_PORT is a number, and free on the machine of rank 0 when its process is the one that
    will open it (torchrun's agent does that itself).
    """
    if "MASTER_PORT" not in environment:
        return
    text = environment["MASTER_PORT"]
    if not text.isdigit() or not 0 <= int(text) < 65536:
        yield Fault(
            f"MASTER_PORT={text}",
            "is no port.",
            "Use a number from 1024 to 65535, or let torchrun --standalone choose.",
        )
        return
    # The launcher may hold the port itself, or an earlier run of this program: it isn't free then,
    # and right.
    is_open = shares_store(environment) or met_before()
    if environment.get("RANK", "0") == "0" and not is_open and not port_is_free(int(text)):
        yield Fault(
            f"MASTER_PORT={text}",
            "is taken by another process on this machine.",
            "Choose another one (torchrun --master_port).",
        )


def check_rounds(environment: Mapping[str, str]) -> Iterator[Fault]:
    """A fault if ranks that torchrun restarts can't tell their round from the one before."""
    if mixes_rounds(environment):
        problem = (
            "on several machines: after a restart torchrun would have the new ranks meet where the old "
            "ones did, and wait for dead ones."
        )
        way_out = f"Set {OWN_STORES}=1 for every torchrun, or leave --max-restarts out."
        yield Fault("torchrun --max-restarts", problem, way_out)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on it now."""
    with closing(socket.socket()) as probe:
        # As torch's store listens: a port that lingers after its last use counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def check_compiler(wanted: bool | str, prefix: str = "model.") -> Iterator[Fault]:
    """A fault if blocks are to be compiled and can't be: torch.compile on GPUs needs triton, and
    triton a C compiler.

    `wanted`: true, false, or auto (where there is a GPU).
    """
    if wanted is False or (wanted == "auto" and not torch.cuda.is_available()):
        return
    where = f"{prefix}use_compile={str(wanted).lower()}"
    off = f"or use {prefix}use_compile=false."
    if torch.cuda.is_available() and find_spec("triton") is None:
        yield Fault(where, "needs the package triton.", f"pip install triton, {off}")
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang")):
        yield Fault(where, "needs a C compiler, and there is none.", f"Install gcc, {off}")


def check_store(url: str | None, key: str) -> Iterator[Fault]:
    """A fault if the client package of a remote store isn't installed. The store itself isn't
    asked.
    """
    if url is None or "://" not in url:
        return
    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        yield Fault(
            f"{key}={url}", f"needs a package: {error}.", "Install it, or leave the key out."
        )
    except ValueError:
        yield Fault(
            f"{key}={url}",
            f"{protocol}:// is no kind of store that fsspec knows.",
            "Use hdfs://, s3://, gs://, file:// …",
        )


def check_output(
    folder: Path, needed: float, key: str = "trainer.default_local_dir"
) -> Iterator[Fault]:
    """Faults if the output folder can't be made or written, or its disk has no room for `needed`
    bytes.

    Nothing is left behind.
    """
    existing = existing_part(folder)
    where = f"{key}={folder}"
    if not existing.is_dir():
        yield Fault(where, f"{existing} is a file, not a folder.", f"Choose another {key}.")
        return
    for path in (folder, *folder.parents):
        if os.path.islink(path) and not os.path.exists(path):
            problem = f"{path} is a link to {os.readlink(path)}, which isn't there."
            yield Fault(where, problem, f"Mount or make that, or choose another {key}.")
            return
    try:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder)  # tells a name that is too long
        # Tried, not asked: permission bits don't tell of read-only mounts, quotas and network
        # disks.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Fault(
            where,
            f"can't be written: {error.strerror or error}.",
            f"Choose another {key}, or change the folder's permissions.",
        )
        return
    if not may_look_into(folder):
        problem = "can be written by this user, and not read."
        yield Fault(where, problem, f"Choose another {key}, or chmod u+rx {folder}.")
        return
    free = free_bytes(folder)
    if free < needed:
        problem = (
            f"needs {needed / GIB:.1f} GiB for a checkpoint, and its disk has {free / GIB:.1f} GiB "
            "free."
        )
        yield Fault(
            where,
            problem,
            "Free space, choose another folder, or save less (trainer.checkpoint.save_contents).",
        )


def may_look_into(folder: Path) -> bool:
    """Whether this user may list `folder`, or the nearest one above it, where it would be made."""
    return os.access(existing_part(folder), os.R_OK | os.X_OK)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk where `folder` is, or would be made."""
    return shutil.disk_usage(existing_part(folder)).free


def check_host_memory(needed: float, key: str) -> Iterator[Fault]:
    """A fault unless `needed` bytes of pinned host memory, of all processes of a machine together,
    fit into it.
    """
    total = host_memory()
    if total is not None and needed > MAX_PINNED_SHARE * total:
        problem = f"needs {needed / GIB:.1f} GiB of this machine's memory, which has {total / GIB:.1f} GiB."
        yield Fault(key, problem, "Offload less, use more machines, or a smaller model.")


def host_memory() -> int | None:
    """Bytes of memory that this machine, or the container's limit, gives; None where that can't be
    told.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    # In a container the machine's memory isn't what the run may use.
    limit = Path("/sys/fs/cgroup/memory.max")
    try:
        said = limit.read_text().strip()
    except OSError:
        return total
    return min(total, int(said)) if said.isdigit() else total


def unused_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> Iterator[str]:
    """GPUs of this machine that torch can't use, and that nobody hid: the run would take the CPU
    without a word.
    """
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    found = sorted(device.name for device in devices.glob("nvidia[0-9]*"))
    if not found or hidden or torch.cuda.is_available():
        return
    why = "torch can't use the driver: nvidia-smi says whether it works"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA: install the build for your driver"
    yield (
        f"this machine has {', '.join(found)}, and the run takes the CPU, which is far slower: {why}. "
        "If you mean the CPU, say trainer.device=cpu."
    )


def gpu_notes(per_node: int, compute: str, environment: Mapping[str, str]) -> Iterator[str]:
    """GPUs of this machine that somebody else uses, or that compute in bf16 slowly: from
    nvidia-smi, which starts no context on them.
    """
    # nvidia-smi, not torch: a CUDA context on each GPU would take memory before the run begins.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    chosen = ["-i", visible] if visible else []
    query = [
        "nvidia-smi",
        *chosen,
        "--query-gpu=name,memory.used,memory.total,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for index, line in enumerate(said.strip().splitlines()[:per_node]):
        try:
            name, used, total, capability = (cell.strip() for cell in line.split(","))
            taken, whole, (major, minor) = (
                float(used) / 1024,
                float(total) / 1024,
                capability.split("."),
            )
        except ValueError:
            continue  # "[N/A]", of a part of a GPU
        if compute == "bf16" and (int(major), int(minor)) < BF16_FROM:
            yield (
                f"GPU {index} ({name}) has no bf16 arithmetic: it is emulated, slowly. Use "
                "fsdp_config.param_dtype=fp16."
            )
        if taken > NOTABLE_SHARE_IN_USE * whole:
            yield (
                f"GPU {index} ({name}) has {whole - taken:.1f} of {whole:.1f} GiB free: something else "
                "runs on it."
            )
