"""Peak memory of a training step per GPU, predicted from shapes alone: no GPU and no weights are
needed.

Legend: t tokens of a micro-batch on one GPU (T/sp) · D model · F ffn · N, K query, kv heads · H
head dim · E = N·H · V vocab · p bytes of the compute dtype · m bytes of the master dtype · r bytes
of the reduced gradient · x bytes of the residual stream (p, or 4 under `fp32_residual`).

    state        per owned parameter: master m, gradient max(r, 4), two moments 2·m, and a compute
                 copy p where p ≠ m, if kept
    gathered     the buffers that units take turns in, weights (p) and gradients (r):
                 `assign_buffers` of the layout
    kept         per layer and token, what backward finds (`layer_bytes`; p bytes an element,
                 log-sum-exp and norms 4, the residual x):
                   full       block input D (residual), attention's result E
                   selective  also the normed input D, q k v (N+2K)·H, and under sp > 1 the result
                              that came back E
                   none       also the second residual D and its norm D, gate and up 2·F, their
                              product F
                   offload    as full; of the layers that are in host memory, one is on its way
                 and the rope tables, 4·H
    head         (`head_bytes`) the hidden states through the final norm, their gradient (both x),
                 the fp32 gradient of the vocabulary matrix 4·V·D, and with it either a chunk of
                 fp32 logits or the same gradient in the compute dtype; of long packs the final
                 norm's backward: six fp32 tensors of D, and the vocabulary matrix's gradient
    block        (`block_bytes`) one block's backward: what is recomputed, the MLP's gradients 3·F,
                 the weights' gradients; under full recomputation one F less, for the product is
                 gone before the gradients of gate and up are there by chunk, of long packs
                 (`chunked_block_bytes`): the normed input D, q k v, attention's result E under sp >
                 1, the gradients of the block's output, its input (x) and attention's result 2·D +
                 E, and with them the larger of
                   MLP        of a chunk: second residual, its norm, gate, up and their gradients,
                              and the product's 4·D + 5·F; the weights' gradients in p bytes, and
                              their sums in 4
                   attention  its output's gradient before and after the all-to-all 2·E under sp >
                              1, gradients of q k v, the kernel's sum of the queries' in fp32 2·E,
                              those of keys and values for each query head 2·E where K < N, and two
                              fp32 numbers a head
    end          the embedding's dense gradient, after everything kept is gone

A tied vocabulary matrix's first gradient (p·V·D) waits through the whole backward for the
embedding's.

State and buffers are exact (a test compares them with what sharding allocates); activations and
transients are a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from retool.model.build import plan_layout
from retool.model.config import ModelConfig
from retool.model.logprobs import LOGIT_BYTES
from retool.model.recompute import Recompute, token_chunks
from retool.optim import VISITING
from retool.parallel.fsdp.layout import Layout
from retool.parallel.fsdp.overlap import assign_buffers, rooms
from retool.parallel.fsdp.wrap import NORM_CHUNK
from retool.parallel.ulysses import HeadPlan
from retool.perf import GIB

LADDER: tuple[Recompute, ...] = ("none", "selective", "full", "offload")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
OUTSIDE = 1.5 * GIB  # CUDA context, NCCL buffers, cuBLAS workspaces: not seen by torch's allocator
SLACK = 1.05  # fragmentation, and what the formula doesn't know
# tokens per GPU whose backward takes longer than reducing the gradients, whatever the model's size
HIDDEN = 2_048
FILLED = 32_768  # tokens a GPU needs in a micro-batch to be busy; more buys nothing


@dataclass(frozen=True)
class Setting:
    """What of a run decides its memory.

    `shards` ranks share a parameter; dtypes are keys of `DTYPE_BYTES`.

    `hold`: gradients are added up on each rank and reduced once a step, which takes a whole copy of
    them. `keep_copy`: a rank's shard is there in the compute dtype too, else cast at every gather.
    `fp32_residual`: blocks add up in fp32 whatever they compute in.
    """

    shards: int = 1
    sp: int = 1
    master: str = "fp32"
    compute: str = "bf16"
    reduce: str = "fp32"
    param_offload: bool = False
    optimizer_offload: bool = False
    reshard: bool = True
    hold: bool = False
    keep_copy: bool = True
    fp32_residual: bool = False

    @property
    def residual(self) -> int:
        """Bytes of an element of the residual stream."""
        return max(DTYPE_BYTES[self.compute], 4 * self.fp32_residual)

    @property
    def copied(self) -> bool:
        """Whether there is a copy of the weights in the compute dtype."""
        return self.param_offload or (
            self.compute != self.master and (self.keep_copy or self.shards == 1)
        )


@dataclass(frozen=True)
class Prediction:
    """Bytes on one GPU by phase; `host`: activations in its process's host memory.

    `state` is there all the time; `buffers`, a part of it, are those in which units are gathered
    and their gradients reduced.
    """

    load: float
    forward_backward: float
    optimizer: float
    save: float
    state: float
    activations: float
    buffers: float = 0.0
    host: float = 0.0

    @property
    def peak(self) -> float:
        return max(self.load, self.forward_backward, self.optimizer, self.save)

    def fits(self, device_gib: float) -> bool:
        """Whether it runs on a device of that much memory, with room for what isn't the
        allocator's.
        """
        return self.peak * SLACK + OUTSIDE <= device_gib * GIB


def predict(
    config: ModelConfig,
    setting: Setting,
    tokens: int,
    recompute: Recompute,
    parked: int | None = None,
) -> Prediction:
    """Memory of a step whose micro-batches have `tokens` tokens per GPU.

    `parked`: layers whose activations go to the host where `recompute` is offload; None = all but
    the last.
    """
    layout = plan_layout(config, setting.shards)
    p = DTYPE_BYTES[setting.compute]
    m = DTYPE_BYTES[setting.master]
    r = DTYPE_BYTES[setting.reduce]
    x = setting.residual
    owned = layout.shard_numel
    gradient = max(r, 4)
    master = 0 if setting.param_offload else m * owned
    copy = p * owned * setting.copied
    moments = 0 if setting.optimizer_offload else 2 * m * owned
    state = master + copy + gradient * owned + moments
    buffers = gathered(layout, setting.reshard) * p + gathered(layout, True) * r
    if setting.shards > 1:
        # Held in at least fp32
        buffers += sum(u.numel for u in layout.units) * gradient * setting.hold
    visiting = (
        3 * min(owned, VISITING) * m * (setting.param_offload + 2 * setting.optimizer_offload)
    )
    away = config.layers - 1 if parked is None else parked
    away *= recompute == "offload"
    each = tokens * layer_bytes(config, setting.sp, p, recompute, x)
    kept = (config.layers - away + (away > 0)) * each + tokens * 4 * config.head_dim
    # The vocabulary matrix's gradient, and the embedding's
    table = config.vocab * config.hidden * p
    block = block_bytes(config, setting.sp, tokens, p, recompute, x) + (table if config.tied else 0)
    largest = max(u.numel for u in layout.units)
    summed = r * largest // setting.shards if setting.shards > 1 else 0
    end = table + max(table if config.tied else 0, summed)  # both gradients, or one and its sum
    return Prediction(
        load=max(m * owned + copy + gradient * owned + buffers, state + buffers),
        forward_backward=state
        + buffers
        + max(kept + max(head_bytes(config, tokens, p, x), block), end),
        optimizer=state + buffers + max(visiting, 8 * min(owned, NORM_CHUNK)),
        save=state + buffers + (m * largest if setting.shards > 1 else 0),
        state=state + buffers,
        activations=kept,
        buffers=buffers,
        host=away * each,
    )


def gathered(layout: Layout, reshard: bool) -> int:
    """Elements of all buffers that units take turns in, each its own without `reshard`; none where
    there is one shard.
    """
    if layout.shards == 1:
        return 0
    sizes = [u.numel for u in layout.units]
    return sum(rooms(sizes, assign_buffers(sizes, [not reshard] * len(sizes))))


def layer_bytes(config: ModelConfig, sp: int, p: int, recompute: Recompute, x: int) -> int:
    """Bytes that one layer keeps for backward per local token: what the compiled block saves,
    matrix inputs among it.
    """
    heads = config.heads
    wide = config.heads * config.head_dim
    residual = config.hidden
    elements = wide
    singles = heads
    if recompute in ("none", "selective"):
        elements += config.hidden + _qkv(config, sp) + (wide if sp > 1 else 0)
        singles += 1
        if config.qk_norm:
            elements = elements + (heads + 2 * config.kv_heads) * config.head_dim
            singles = singles + heads + config.kv_heads
    if recompute == "none":
        residual = residual + config.hidden
        elements = elements + config.hidden + 3 * config.ffn
        singles = singles + 1
    return residual * x + elements * p + 4 * singles


def _qkv(config: ModelConfig, sp: int) -> int:
    """Elements of q, k and v per local token, after their all-to-all: kv heads travel to every rank
    that reads them.
    """
    kv = sum(
        len(r) for r in HeadPlan(sp, 0, config.heads, config.kv_heads, config.head_dim).kv_ranges
    )
    return (config.heads + 2 * kv) * config.head_dim


def head_bytes(config: ModelConfig, tokens: int, p: int, x: int) -> float:
    """What the vocabulary head and its loss need at their largest: in the forward with logits, or
    when its gradients are scaled.
    """
    wide = max(p, 4)
    hidden = tokens * (config.hidden * (2 * x + 2 * p + wide) + 64)
    table = config.vocab * config.hidden
    logits = min(tokens * config.vocab * wide, LOGIT_BYTES["cuda"])
    forward = hidden + table * wide + max(logits, table * p + tokens * config.hidden * p)
    # The final norm isn't compiled: in the middle of its backward six tensors of [t, D] are alive.
    norm = tokens * (6 * config.hidden * wide + 64) + table * p
    return max(forward, norm)


def block_bytes(
    config: ModelConfig, sp: int, tokens: int, p: int, recompute: Recompute, x: int
) -> float:
    """What one block's backward needs beside what is kept."""
    if recompute in ("full", "offload") and len(token_chunks(tokens)) > 1:
        return chunked_block_bytes(config, sp, tokens, p, x)
    again = layer_bytes(config, sp, p, "none", x) - layer_bytes(config, sp, p, recompute, x)
    if recompute in ("full", "offload"):
        # The product of gate and up is gone before the gradients of both are there
        again -= config.ffn * p
    weights = (
        config.hidden
        * (3 * config.ffn + 2 * (config.heads + config.kv_heads) * config.head_dim)
        * p
    )
    return tokens * (again + 3 * config.ffn * p + 2 * config.hidden * x) + weights


def chunked_block_bytes(config: ModelConfig, sp: int, tokens: int, p: int, x: int) -> float:
    """The same where the MLP runs by chunk."""
    chunk = token_chunks(tokens)[0].stop
    wide = config.heads * config.head_dim
    qkv = _qkv(config, sp)
    returned = wide if sp > 1 else 0
    after = config.hidden * (3 * config.ffn + wide)
    before = config.hidden * (wide + 2 * config.kv_heads * config.head_dim)
    mlp = chunk * (2 * config.hidden * (x + p) + 5 * config.ffn * p) + after * (p + max(p, 4))
    # cuDNN makes the gradients of keys and values for each query head, and adds those of a group up
    # at the end.
    grouped = 2 * wide if config.heads > config.kv_heads else 0
    kernel = wide * max(p, 4) + grouped * p + 8 * config.heads
    attention = tokens * ((2 * returned + qkv) * p + kernel) + (before + after) * p
    return tokens * (2 * config.hidden * x + (config.hidden + qkv + returned + wide) * p) + max(
        mlp, attention
    )


@dataclass(frozen=True)
class Choice:
    """A token budget per GPU, the recomputation it needs, and whether gradients are held until the
    step's last micro-batch.

    `fits` is None where the device's memory is unknown. `parked`: layers whose activations go to
    host memory. Without `keep_copy` a rank's shard is cast to the compute dtype at every gather.
    """

    tokens: int
    recompute: Recompute
    prediction: Prediction
    fits: bool | None
    hold: bool = False
    parked: int = 0
    keep_copy: bool = True


def ladder(recompute: Recompute | None, offload: bool | Literal["auto"]) -> tuple[Recompute, ...]:
    """Policies to try in turn, for what was asked for (None: the least that fits) and whether
    activations may go to host memory.
    """
    rungs = LADDER[:3] if recompute is None else (recompute,)
    if offload is True:
        return ("offload",)
    return (*rungs, "offload") if offload == "auto" and rungs[-1] == "full" else rungs


def choose(
    config: ModelConfig,
    setting: Setting,
    longest: int,
    tokens: int | None,
    recompute: Recompute | None,
    device_gib: float | None,
    offload: bool | Literal["auto"] = False,
) -> Choice:
    """The least recomputation that fits, and with no `tokens` given a budget that fits too.

    `longest`: the longest sample's tokens per GPU, which must fit whatever the budget. Given
    `tokens` or `recompute` are kept; the weights' compute copy goes before more is recomputed;
    activations go to host memory only where `offload` says that all shall, or may as the last
    resort ("auto": of as few layers as will do). Without a known device nothing is recomputed and a
    GPU's share is just filled. Gradients are held where micro-batches are too short to hide their
    reduction (always, without a device) and there is room.
    """
    floor = max(longest, tokens or 0)
    rungs = ladder(recompute, offload)
    all_away = config.layers - 1
    if device_gib is None:
        budget = tokens or max(longest, min(FILLED, 4 * longest))
        hold = setting.shards > 1
        plan = predict(config, replace(setting, hold=hold), max(budget, longest), rungs[0])
        return Choice(budget, rungs[0], plan, None, hold, all_away * (rungs[0] == "offload"))
    settings = [setting, replace(setting, keep_copy=False)]
    settings = settings if settings[1].copied < setting.copied else settings[:1]
    for rung, setting in product(rungs, settings):
        if not predict(config, setting, floor, rung).fits(device_gib):
            continue
        budget = floor
        while (
            tokens is None
            and budget < FILLED
            and predict(config, setting, min(2 * budget, FILLED), rung).fits(device_gib)
        ):
            budget = min(2 * budget, FILLED)
        held = replace(setting, hold=setting.shards > 1 and budget <= HIDDEN)
        chosen = held if predict(config, held, budget, rung).fits(device_gib) else setting
        parked = all_away * (rung == "offload")
        while (
            offload == "auto"
            and parked > 1
            and predict(config, chosen, budget, rung, parked - 1).fits(device_gib)
        ):
            parked -= 1
        plan = predict(config, chosen, budget, rung, parked)
        return Choice(tokens or budget, rung, plan, True, chosen.hold, parked, chosen.keep_copy)
    plan = predict(config, settings[-1], floor, rungs[-1])
    parked = all_away * (rungs[-1] == "offload")
    return Choice(tokens or floor, rungs[-1], plan, False, False, parked, settings[-1].keep_copy)
