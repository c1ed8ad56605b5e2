"""FlashAttention's versions: 2 from the flash-attn package (flash), 2 that torch has in it
(varlen), and 3 and 4 (flash3, flash4), which torch runs where their packages are installed.

[Note: one of torch's at a time] torch puts another version in the place of its own for the whole
process, so every call here says which it wants. A run trains with one: it changes once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from retool.model.attention.pack import Attended, Backward, Forward, Gradients, Pack
from retool.model.attention.parts import new_parts

NEWER = {"flash3": "FA3", "flash4": "FA4"}  # our name and torch's
PACKAGE = {"flash": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
MADE_FOR = {"flash3": 9, "flash4": 10}  # generation of GPUs: Hopper, Blackwell


def missing(backend: str) -> str:
    """The package that a backend needs and that isn't installed; empty where nothing is missing."""
    package = PACKAGE.get(backend, "")
    # A package is looked for only where its parent is
    parents = accumulate(package.split("."), "{}.{}".format) if package else []
    return "" if all(find_spec(name) is not None for name in parents) else package


def available(device: torch.device) -> list[str]:
    """What can be had on a GPU, fastest first; varlen always."""
    generation, _ = torch.cuda.get_device_capability(device)
    return [
        name
        for name in ("flash3", "flash4", "flash", "varlen")
        if MADE_FOR.get(name, generation) == generation and not missing(name)
    ]


def _options(head_dim: int, pack: Pack) -> dict[str, Any]:
    return {
        "cu_seqlens_q": pack.cu_seqlens,
        "cu_seqlens_k": pack.cu_seqlens,
        "max_seqlen_q": pack.max_seqlen,
        "max_seqlen_k": pack.max_seqlen,
        "dropout_p": 0.0,
        "softmax_scale": head_dim**-0.5,
        "causal": True,
        # Before the query itself; -1 for all
        "window_size_left": pack.window - 1,
        "window_size_right": -1,
        "softcap": pack.cap,
        "alibi_slopes": None,
    }


def unregistered(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind one that a package has registered with `torch.library.custom_op`.

    The way through torch's dispatcher is for compilers and autograd, which see no kernel here, and
    takes the host longer than the launch.
    """
    return getattr(operator, "_init_fn", operator)


def _package_forward(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Attended:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    forward = unregistered(_flash_attn_varlen_forward)
    out, lse, *_ = forward(q, k, v, **_options(q.shape[-1], pack))
    return out, lse


def _package_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pack: Pack
) -> Gradients:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    dq, dk, dv = new_parts(q, k)
    deterministic = torch.are_deterministic_algorithms_enabled()
    backward = unregistered(_flash_attn_varlen_backward)
    backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        deterministic=deterministic,
        **_options(q.shape[-1], pack),
    )
    return dq, dk, dv


@lru_cache(maxsize=1)
def _varlen_options() -> dict[str, Any]:
    """torch 2.11 groups heads unasked; from 2.12 on they must be asked for."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    grouped = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )
    return {"return_aux": AuxRequest(lse=True), **grouped}


def _use(version: str | None) -> None:
    """Which version torch runs from here on; None is its own."""
    from torch.nn import attention

    if attention.current_flash_attention_impl() == version:
        return
    if version is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(version)


def _torch_forward(version: str | None, q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Attended:
    from torch.nn.attention.varlen import varlen_attn

    assert not pack.cap, "torch's kernels have no caps"
    _use(version)
    out, lse = varlen_attn(
        q,
        k,
        v,
        pack.cu_seqlens,
        pack.cu_seqlens,
        pack.max_seqlen,
        pack.max_seqlen,
        # The causal mask is a window, too: nothing after the query, -1 for all before it
        window_size=(pack.window - 1, 0),
        **_varlen_options(),
    )
    return out, lse


def _torch_backward(
    version: str | None,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pack: Pack,
) -> Gradients:
    _use(version)
    # of dropout, which isn't used
    rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    cu = pack.cu_seqlens
    longest = pack.max_seqlen
    # As torch's own backward has it: causal is what has no window
    window = {"window_size_left": pack.window - 1, "window_size_right": 0} if pack.window else {}
    causal = not pack.window
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, causal, rng, unused, **window
    )


FORWARD: dict[str, Forward] = {
    "flash": _package_forward,
    "varlen": partial(_torch_forward, None),
    **{name: partial(_torch_forward, version) for name, version in NEWER.items()},
}
BACKWARD: dict[str, Backward] = {
    "flash": _package_backward,
    "varlen": partial(_torch_backward, None),
    **{name: partial(_torch_backward, version) for name, version in NEWER.items()},
}
