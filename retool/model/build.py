"""From a model's configuration to a sharded decoder without weights yet;
`retool.checkpoint.hf.pretrained` fills it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from retool.model.attention.dispatch import choose_backend
from retool.model.block import Execution
from retool.model.borrowed.config import BorrowedConfig, Implementation
from retool.model.borrowed.module import BorrowedModel
from retool.model.config import ModelConfig
from retool.model.decoder import Decoder
from retool.model.experts.balance import Balance
from retool.model.offload import Offload
from retool.model.recompute import Recompute
from retool.parallel.fsdp import Sharded, shard
from retool.parallel.fsdp.collect import collect
from retool.parallel.fsdp.layout import Layout, make_layout
from retool.parallel.mesh import Mesh
from retool.parallel.ulysses import HeadPlan

# As configurations name them
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class ModelOptions:
    """How to hold and run a model.

    A dtype of None: bf16 compute on CUDA, the master's dtype on the CPU.

    `impl`: whose code runs a model that is read from its folder.

    `parked`: blocks whose activations go to host memory where `recompute` is offload; None = all
    but the last. `fp32_residual`: the residual stream in fp32 above bf16 weights, here and in
    engines that take these weights. About a third less gap between their log-probabilities (nothing
    if one side has it alone), for 2·D bytes more per token and layer kept for the backward, 4·D
    where nothing is recomputed.
    """

    param_dtype: torch.dtype | None = None
    master_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    attn: str = "auto"
    recompute: Recompute = "none"
    parked: int | None = None
    use_compile: bool | Literal["auto"] = "auto"
    impl: Implementation = "auto"
    fp32_residual: bool = False
    trained: bool = True
    keep_copy: bool = True
    reshard_after_forward: bool = True
    forward_prefetch: bool = True
    backward_overlap: bool = True


def build_decoder(config: ModelConfig, mesh: Mesh, options: ModelOptions) -> Sharded:
    """A `Sharded` decoder of `config`'s shape with zero weights.

    Its module is a `Decoder` or a `BorrowedModel`, made on the meta device.
    """
    cuda = mesh.device.type == "cuda"
    dtype = options.param_dtype or (torch.bfloat16 if cuda else options.master_dtype)
    offload = None
    if options.recompute == "offload":
        parked = config.layers if options.parked is None else options.parked
        offload = Offload(mesh.device, config.layers, parked)
    watch = None
    if config.experts is not None and options.trained:
        watch = Balance(config.experts, config.layers, mesh)
    execution = Execution(
        plan=HeadPlan(mesh.sp, mesh.sp_rank, config.heads, config.kv_heads, config.head_dim),
        mesh=mesh,
        backend=choose_backend(
            mesh.device,
            dtype,
            config.head_dim,
            options.attn,
            windowed=config.windowed,
            capped=config.score_cap > 0,
        ),
        recompute=options.recompute,
        compiled=cuda if options.use_compile == "auto" else options.use_compile,
        offload=offload,
        fp32_residual=options.fp32_residual,
        watch=watch,
    )
    module = _module(config, execution)
    if isinstance(module, BorrowedModel):
        module.fill_buffers()
    return shard(
        module,
        module.units(),
        mesh,
        param_dtype=dtype,
        master_dtype=options.master_dtype,
        reduce_dtype=options.reduce_dtype,
        members=module.members(),
        aliases=module.aliases(),
        fused=module.fused(),
        divided=module.divided() if isinstance(module, Decoder) else (),
        order=module.order(),
        trained=options.trained,
        keep_copy=options.keep_copy,
        reshard_after_forward=options.reshard_after_forward,
        forward_prefetch=options.forward_prefetch,
        backward_overlap=options.backward_overlap,
    )


def _module(config: ModelConfig, execution: Execution) -> Decoder | BorrowedModel:
    """The model that runs, without memory."""
    if isinstance(config, BorrowedConfig):
        return BorrowedModel(config, execution)
    with torch.device("meta"):
        return Decoder(config, execution)


@lru_cache(maxsize=8)
def plan_layout(config: ModelConfig, shards: int, ep: int = 1) -> Layout:
    """The layout that sharding this model over `shards` ranks will have, of which `ep` divide experts.

    It comes from a model without memory, on one process.
    """
    mesh = Mesh(0, 1, 1, 1, torch.device("cpu"), ep)
    heads = HeadPlan(1, 0, config.heads, config.kv_heads, config.head_dim)
    decoder = _module(config, Execution(heads, mesh))
    divided = decoder.divided() if isinstance(decoder, Decoder) else ()
    units = collect(decoder, decoder.units(), decoder.members(), divided)
    slots = [(unit.name, unit.slots) for unit in units]
    return make_layout(slots, shards, decoder.aliases(), decoder.order(), decoder.fused(), ep)
