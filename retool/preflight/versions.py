"""What is installed: packages, and the code of retool itself."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.cuda import nccl

import retool

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy")
# A machine may do without these; where it has one, its kernels are chosen
CHOSEN = ("triton", "flash-attn", "vllm")
OWN_CODE = "retool's code"


def versions() -> dict[str, str]:
    """Package → version, "" where it isn't installed. Of retool also a hash of its code, which may
    differ under one version.
    """
    found = {
        "python": platform.python_version(),
        "retool": retool.__version__,
        OWN_CODE: code_hash(Path(retool.__file__).parent),
    }
    for name in (*PACKAGES, *CHOSEN):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, nccl.version()))
    return found


@cache
def code_hash(folder: Path) -> str:
    """A short hash of all Python files in a folder, their names included."""
    found = hashlib.blake2b(digest_size=4)
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        # With the length, so that no two ways of cutting the same text have one hash
        found.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()
