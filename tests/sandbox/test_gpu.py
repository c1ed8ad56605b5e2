"""With CUDA initialised in the parent, nothing of the GPU is reachable from inside."""

from __future__ import annotations

import glob
import os

import pytest

from retool.sandbox import Limits, Sandbox

pytestmark = pytest.mark.gpu

LOOK = """
import ctypes, glob, os
found = []
for name in <DEVICES>:
    for mode in (os.O_RDONLY, os.O_RDWR):
        try:
            os.open(name, mode)
            found.append(name)
        except OSError:
            pass
found += glob.glob("/dev/nvidia*") + glob.glob("/proc/driver/nvidia*") + glob.glob("/dev/dri*")
found += [name for name in os.environ if "CUDA" in name or "NVIDIA" in name]
for name in range(3, 4096):
    try:
        os.fstat(name)
        found.append(f"descriptor {name}")
    except OSError:
        pass
for library in ("libcuda.so.1", *<LIBRARIES>):
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        continue
    count = ctypes.c_int(-1)
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0:
        found.append(f"{count.value} devices through {library}")
print("ESCAPED" if found else "nothing", found)
"""


@pytest.mark.parametrize(
    "without",
    [
        frozenset(),
        frozenset(
            {
                "user_namespace",
                "mount_namespace",
                "pid_namespace",
                "network_namespace",
                "ipc_namespace",
            }
        ),
    ],
    ids=["all layers", "no namespaces"],
)
def test_no_gpu_inside(without: frozenset[str]) -> None:
    torch = pytest.importorskip("torch")
    held = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    devices = glob.glob("/dev/nvidia*")
    assert devices, "CUDA works without devices in /dev: where are they?"
    libraries = [
        path
        for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/local/nvidia/lib64", "/usr/lib64")
        for path in glob.glob(f"{folder}/libcuda.so*")
    ]
    program = LOOK.replace("<DEVICES>", repr(devices)).replace("<LIBRARIES>", repr(libraries))
    try:
        sandbox = Sandbox(Limits(), workers=2, without=without)
    except ValueError as error:
        if not without:
            raise
        pytest.skip(f"this kernel has no second line: {error}")
    with sandbox:
        own = {
            os.readlink(f"/proc/{sandbox.pid}/fd/{name}")
            for name in os.listdir(f"/proc/{sandbox.pid}/fd")
        }
        assert not [target for target in own if "nvidia" in target], (
            "the sandbox's processes inherited the GPU"
        )
        result = sandbox.run_blocking(program)
        assert (result.status, result.stdout) == ("success", "nothing []\n"), result
        assert sandbox.run_blocking("import numpy\nprint(numpy.ones(3).sum())").stdout == "3.0\n"
    assert float(held.sum()) == 1 << 20
