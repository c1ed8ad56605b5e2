"""Peak memory of a training step per GPU, predicted from shapes alone: no GPU and no weights are needed.

Legend: t tokens of a micro-batch on one GPU (T/sp) · D model · F ffn · N, K query, kv heads · H head dim · V vocab
· p bytes of the compute dtype · m bytes of the master dtype.

    state        per owned parameter: master m, gradient max(reduce, 4), two moments 2·m, and a compute copy p where p ≠ m
    gathered     the buffers that units take turns in, weights (p) and gradients (reduce): `assign_buffers` of the layout
    activations  per layer and token, what backward keeps (p bytes each, log-sum-exp 4):
                   block input D · q, k, v (N+2K)·H · attention output N·H (twice under sp > 1: before and after the
                   all-to-all) · log-sum-exp N
                   without recomputation also the second residual D and gate, up 2·F (Qwen3: q, k before their norm)
    transient    the larger of one block's backward, t·(6·F + 6·D)·p, and the head's: hidden states and their gradient
                 2·t·D·p, the fp32 weight gradient 4·V·D, one chunk of fp32 logits, 64 bytes a token

State and buffers are exact (a test compares them with what sharding allocates); activations and transients are a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch

from retool.model.config import ModelConfig
from retool.model.decoder import Decoder, Run
from retool.model.logprobs import LOGIT_BYTES
from retool.parallel.fsdp.layout import Layout, SlotSpec, make_layout
from retool.parallel.fsdp.overlap import assign_buffers
from retool.parallel.mesh import Mesh
from retool.parallel.ulysses import HeadPlan
from retool.perf import GIB

Recompute = Literal["none", "selective", "full"]
LADDER: tuple[Recompute, ...] = ("none", "selective", "full")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
OUTSIDE = 1.5 * GIB  # CUDA context, NCCL buffers, cuBLAS workspaces: not seen by torch's allocator
SLACK = 1.05  # fragmentation, and what the formula doesn't know
FILLED = 32_768  # tokens a GPU needs in a micro-batch to be busy; more buys nothing


@dataclass(frozen=True)
class Setting:
    """What of a run decides its memory. `shards` ranks share a parameter; dtypes are fp32, bf16 or fp64."""

    shards: int = 1
    sp: int = 1
    master: str = "fp32"
    compute: str = "bf16"
    reduce: str = "fp32"
    param_offload: bool = False
    optimizer_offload: bool = False
    reshard: bool = True


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU by phase."""

    load: float
    forward_backward: float
    optimizer: float
    save: float
    state: float
    activations: float

    @property
    def peak(self) -> float:
        return max(self.load, self.forward_backward, self.optimizer, self.save)

    def fits(self, device_gib: float) -> bool:
        """Whether it runs on a device of that much memory, with room for what isn't the allocator's."""
        return self.peak * SLACK + OUTSIDE <= device_gib * GIB


def plan_layout(config: ModelConfig, shards: int) -> Layout:
    """The layout that sharding this model over `shards` ranks will have, from a model without memory."""
    mesh = Mesh(0, 1, 1, 1, torch.device("cpu"))
    with torch.device("meta"):
        decoder = Decoder(config, Run(HeadPlan(1, 0, config.heads, config.kv_heads, config.head_dim), mesh))
    names = {id(p): n for n, p in decoder.named_parameters()}
    members, seen = decoder.members(), set[int]()
    units: list[tuple[str, list[SlotSpec]]] = []
    for unit, modules in decoder.units():
        slots: list[SlotSpec] = []
        for parameter in chain.from_iterable(m.parameters() for m in modules):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name, shape = names[id(parameter)], tuple(parameter.shape)
                slots.append((name, shape, members.get(name, [(name, shape)]), True))
        units.append((unit, slots))
    return make_layout(units, shards, decoder.aliases(), decoder.order())


def predict(config: ModelConfig, setting: Setting, tokens: int, recompute: Recompute) -> Prediction:
    """Memory of a step whose micro-batches have `tokens` tokens per GPU."""
    layout, p, m = plan_layout(config, setting.shards), DTYPE_BYTES[setting.compute], DTYPE_BYTES[setting.master]
    r = DTYPE_BYTES[setting.reduce]
    owned, gradient = layout.shard_numel, max(r, 4)
    master = 0 if setting.param_offload else m * owned
    copy = p * owned if p != m or setting.param_offload else 0
    moments = 0 if setting.optimizer_offload else 2 * m * owned
    state = master + copy + gradient * owned + moments
    gathered = 0
    if setting.shards > 1:
        sizes = [u.numel for u in layout.units]
        gathered = _rooms(sizes, [not setting.reshard] * len(sizes)) * p + _rooms(sizes, [False] * len(sizes)) * r
    visiting = 0
    if setting.param_offload or setting.optimizer_offload:
        visiting = 3 * m * max(u.shard_numel for u in layout.units)
    activations = tokens * config.layers * layer_bytes(config, setting.sp, p, recompute)
    step = state + gathered + activations + transient_bytes(config, tokens, p)
    largest = max(u.numel for u in layout.units)
    return Prediction(
        load=state + gathered,
        forward_backward=step,
        optimizer=state + gathered + visiting,
        save=state + gathered + (m * largest if setting.shards > 1 else 0),
        state=state + gathered,
        activations=activations,
    )


def _rooms(sizes: list[int], own: list[bool]) -> int:
    """Elements of all buffers that units of these sizes take turns in."""
    buffers = assign_buffers(sizes, own)
    return sum(max(n for n, b in zip(sizes, buffers, strict=True) if b == k) for k in range(max(buffers) + 1))


def layer_bytes(config: ModelConfig, sp: int, p: int, recompute: Recompute) -> int:
    """Bytes that one layer keeps for backward per local token."""
    heads, kv = config.heads, config.kv_heads
    if sp > 1:  # kv heads travel to every rank that reads them
        kv = sum(len(r) for r in HeadPlan(sp, 0, heads, config.kv_heads, config.head_dim).kv_ranges)
    kept = config.hidden + (heads + 2 * kv) * config.head_dim + heads * config.head_dim * (2 if sp > 1 else 1)
    if recompute == "none":
        kept += config.hidden + 2 * config.ffn
    if recompute != "full" and config.qk_norm:
        kept += (heads + config.kv_heads) * config.head_dim
    return kept * p + 4 * heads


def transient_bytes(config: ModelConfig, tokens: int, p: int) -> float:
    """What comes and goes on top of what is kept, at its largest."""
    block = tokens * (6 * config.ffn + 6 * config.hidden) * p
    logits = min(tokens * config.vocab * 4, LOGIT_BYTES["cuda"])
    head = tokens * (2 * config.hidden * p + 64) + 4 * config.vocab * config.hidden + logits
    return max(block, head)


@dataclass(frozen=True)
class Choice:
    """A token budget per GPU and the recomputation it needs; `fits` is None where the device's memory is unknown."""

    tokens: int
    recompute: Recompute
    prediction: Prediction
    fits: bool | None


def choose(
    config: ModelConfig, setting: Setting, longest: int, tokens: int | None, recompute: Recompute | None, device_gib: float | None
) -> Choice:
    """The least recomputation that fits, and with no `tokens` given a budget that fits too.

    `longest`: the longest sample's tokens per GPU, which must fit whatever the budget. Given `tokens` or `recompute` are
    kept. Without a known device nothing is recomputed and a GPU's share is just filled.
    """
    floor = max(longest, tokens or 0)
    rungs = LADDER if recompute is None else (recompute,)
    if device_gib is None:
        budget = tokens or max(longest, min(FILLED, 4 * longest))
        return Choice(budget, rungs[0], predict(config, setting, max(budget, longest), rungs[0]), None)
    for rung in rungs:
        if not predict(config, setting, floor, rung).fits(device_gib):
            continue
        budget = floor
        while tokens is None and budget < FILLED and predict(config, setting, min(2 * budget, FILLED), rung).fits(device_gib):
            budget = min(2 * budget, FILLED)
        return Choice(tokens or budget, rung, predict(config, setting, budget, rung), True)
    return Choice(tokens or floor, rungs[-1], predict(config, setting, floor, rungs[-1]), False)
