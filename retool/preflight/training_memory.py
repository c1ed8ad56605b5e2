"""Peak memory of a training step per GPU, predicted from shapes alone.

No GPU and no weights are needed. State and buffers are exact (a test compares them with what
sharding allocates); activations and what is there for a moment are a model, tested against peaks
that were measured.

    state        of a rank's parameters: master weights, gradient, two moments, and a copy in the
                 compute dtype where that is another: `state_bytes`
    buffers      in which units take turns, for weights and for gradients: `buffer_bytes`
    activations  what the layers keep for the backward, and the rope tables: `activation_bytes`
    head         the vocabulary head and its loss at their largest: `head_bytes`
    block        one block's backward: `block_bytes`
    end          the embedding's dense gradient, when everything kept is gone: `end_bytes`

A step's peak is state and buffers, and with them either the activations and the larger of head and
block, or the end. What a layer's tensors are is the family's: `costs` in `retool.model.families`.
"""

from __future__ import annotations

from dataclasses import dataclass

from retool.model.build import plan_layout
from retool.model.config import ModelConfig
from retool.model.costs import layer_costs
from retool.model.layer_costs.cost import Cost, ElementBytes, LayerCosts
from retool.model.logprobs import LOGIT_BYTES, sum_logit_bytes
from retool.model.recompute import Recompute, token_chunks
from retool.optim import OFFLOAD_CHUNK_NUMEL
from retool.parallel.fsdp.buffers import take_turns
from retool.parallel.fsdp.layout import Layout
from retool.parallel.fsdp.sharded import NORM_CHUNK_NUMEL
from retool.perf import GIB

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
# CUDA context, NCCL buffers, cuBLAS workspaces: torch's allocator doesn't see them.
OUTSIDE = 1.5 * GIB
# Times a prediction: fragmentation, and what the model doesn't know.
SLACK = 1.05
# Of the head's forward and of the final norm's backward, per token: labels, log-probabilities and
# the like.
SMALL_BYTES_PER_TOKEN = 64


@dataclass(frozen=True)
class Setting:
    """What of a run decides its memory.

    `shards` ranks share a parameter, `ep` divide experts; dtypes are keys of `DTYPE_BYTES`.

    `hold`: gradients are added up on each rank and reduced once a step, which takes a whole copy of
    them. `keep_copy`: a rank's shard is there in the compute dtype too, else cast at every gather.
    `may_stay`: where there is room, weights stay gathered from the forward to the backward, as they
    do without `reshard`. `fp32_residual`: blocks add up in fp32 whatever they compute in. `summed`:
    the loss is one weighted sum over tokens, as SFT's is. `compiled`: the blocks are.
    """

    shards: int = 1
    ep: int = 1
    sp: int = 1
    master: str = "fp32"
    compute: str = "bf16"
    reduce: str = "fp32"
    param_offload: bool = False
    optimizer_offload: bool = False
    reshard: bool = True
    may_stay: bool = False
    hold: bool = False
    keep_copy: bool = True
    fp32_residual: bool = False
    summed: bool = False
    compiled: bool = True

    @property
    def master_bytes(self) -> int:
        return DTYPE_BYTES[self.master]

    @property
    def reduce_bytes(self) -> int:
        return DTYPE_BYTES[self.reduce]

    @property
    def gradient_bytes(self) -> int:
        """Of an element of the gradient that adds up over micro-batches: in at least fp32."""
        return max(self.reduce_bytes, 4)

    @property
    def element(self) -> ElementBytes:
        """Bytes of an element of an activation."""
        compute = DTYPE_BYTES[self.compute]
        return ElementBytes(compute, residual=max(compute, 4 * self.fp32_residual))

    @property
    def copied(self) -> bool:
        """Whether there is a copy of the weights in the compute dtype."""
        # Experts that a rank owns alone are computed with as they are
        kept = self.keep_copy or self.shards == self.ep
        return self.param_offload or (self.compute != self.master and kept)


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
        """Whether it runs on a device of that much memory.

        There is room for what isn't the allocator's, too.
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
    layout = plan_layout(config, setting.shards, setting.ep)
    buffers = buffer_bytes(layout, setting)
    state = state_bytes(layout, setting) + buffers
    loading = state_bytes(layout, setting, loading=True) + buffers
    away = layers_away(config, recompute, parked)
    layer = tokens * layer_bytes(config, setting, recompute)
    activations = activation_bytes(config, tokens, layer, away)
    head = head_bytes(config, setting, tokens, recompute)
    block = block_bytes(config, setting, tokens, recompute)
    if config.tied:
        # The head's gradient of the one matrix waits through the whole backward for the embedding's.
        block += table_bytes(config, setting)
    largest_unit = max(unit.numel for unit in layout.units)
    # A save rearranges one unit at a time into the rows that go to the disk
    saved = setting.master_bytes * largest_unit if setting.shards > 1 else 0
    return Prediction(
        load=max(loading, state),
        forward_backward=state
        + max(activations + max(head, block), end_bytes(config, setting, largest_unit)),
        optimizer=state + update_bytes(layout, setting),
        save=state + saved,
        state=state,
        activations=activations,
        buffers=buffers,
        host=away * layer,
    )


def state_bytes(layout: Layout, setting: Setting, loading: bool = False) -> int:
    """A rank's master weights, their compute copy, gradients and moments.

    While they are loaded, master weights are on the device in any case, and no moments are there.
    """
    master = setting.master_bytes if loading or not setting.param_offload else 0
    copy = setting.element.compute * setting.copied
    no_moments = loading or setting.optimizer_offload
    both_moments = 0 if no_moments else 2 * setting.master_bytes
    return layout.shard_numel * (master + copy + setting.gradient_bytes + both_moments)


def buffer_bytes(layout: Layout, setting: Setting) -> int:
    """What units are gathered in, what gradients are reduced in, and all gradients if they are held."""
    weights = gathered(layout, setting.reshard) * setting.element.compute
    # Gradients take turns even where every unit's weights stay gathered
    gradients = gathered(layout, True) * setting.reduce_bytes
    held = 0
    if setting.hold and setting.shards > 1:
        kept = sum(unit.part_numel for unit in layout.units if unit.owners > 1)
        held = kept * setting.gradient_bytes
    return weights + gradients + held


def gathered(layout: Layout, reshard: bool) -> int:
    """Elements of all buffers that units take turns in; none for what one rank owns alone.

    Without `reshard` each unit has a buffer of its own.
    """
    return sum(take_turns(layout.units, [not reshard] * len(layout.units)).sizes)


def update_bytes(layout: Layout, setting: Setting) -> int:
    """What an update needs: pieces that come from host memory, or of the gradient in float64."""
    owned = layout.shard_numel
    tensors_away = setting.param_offload + 2 * setting.optimizer_offload
    # Of each, one piece is used while the next arrives and the last one leaves.
    visiting = 3 * min(owned, OFFLOAD_CHUNK_NUMEL) * setting.master_bytes * tensors_away
    return max(visiting, 8 * min(owned, NORM_CHUNK_NUMEL))


def layers_away(config: ModelConfig, recompute: Recompute, parked: int | None) -> int:
    """The number of layers whose activations are in host memory."""
    if recompute != "offload":
        return 0
    return config.layers - 1 if parked is None else parked


def activation_bytes(config: ModelConfig, tokens: int, layer: int, away: int) -> int:
    """What is kept for the backward on the device, `layer` bytes of each layer that stays.

    Of the layers in host memory one is on its way. The rope tables are cos and sin in fp32.
    """
    on_device = config.layers - away + (away > 0)
    # Layers without rope have tables of their own, of ones and zeros; those with a window may
    tables = 1 + bool(config.unrotated) + (config.window_rope is not None)
    rope_tables = tokens * 4 * config.turned_channels * tables
    return on_device * layer + rope_tables


def layer_bytes(config: ModelConfig, setting: Setting, recompute: Recompute) -> int:
    """Bytes that one layer keeps for the backward, per token of this rank."""
    costs = layer_costs(config, setting.sp, setting.compiled)
    return setting.element.of(costs.kept[recompute])


def table_bytes(config: ModelConfig, setting: Setting) -> int:
    """The vocabulary matrix, or its gradient, in the compute dtype."""
    return config.vocab * config.hidden * setting.element.compute


def head_bytes(config: ModelConfig, setting: Setting, tokens: int, recompute: Recompute) -> int:
    """What the vocabulary head and its loss need at their largest.

    That is in the forward with logits, or when its gradients are scaled. Of long packs it is the
    final norm's backward: it isn't compiled, so in its middle six tensors of [t, D] are alive.
    """
    element = setting.element
    table = config.vocab * config.hidden
    hidden = (
        Cost("the last block's result, and its gradient", 2 * config.hidden, "residual"),
        Cost("its norm, and the norm's gradient", 2 * config.hidden),
        Cost("the norm in the dtype of sums", config.hidden, "sums"),
    )
    at_once = sum_logit_bytes("cuda", recompute) if setting.summed else LOGIT_BYTES["cuda"]
    logits = min(tokens * config.vocab * element.sums, at_once)
    scaled = (table + tokens * config.hidden) * element.compute
    forward = tokens * (element.of(hidden) + SMALL_BYTES_PER_TOKEN) + table * element.sums
    norm = tokens * (6 * config.hidden * element.sums + SMALL_BYTES_PER_TOKEN)
    return max(forward + max(logits, scaled), norm + table_bytes(config, setting))


def block_bytes(config: ModelConfig, setting: Setting, tokens: int, recompute: Recompute) -> int:
    """What one block's backward needs beside what is kept."""
    costs = layer_costs(config, setting.sp, setting.compiled)
    element = setting.element
    whole_block = recompute in ("full", "offload")
    if whole_block and setting.ep == 1 and len(token_chunks(tokens)) > 1:
        return chunked_block_bytes(costs, element, tokens)
    # What the backward makes again is there in full while it runs, for one block at a time.
    again = element.of(costs.kept["none"]) - element.of(costs.kept[recompute])
    if whole_block:
        again -= element.of(costs.freed_early)
    if setting.ep > 1:
        again += element.of(costs.travelling)
    own = costs.parameters - costs.divided + costs.divided // setting.ep
    return tokens * (again + element.of(costs.gradients)) + own * element.compute


def chunked_block_bytes(costs: LayerCosts, element: ElementBytes, tokens: int) -> int:
    """The same where the MLP runs by chunk: the larger of its backward and attention's."""
    chunk = token_chunks(tokens)[0].stop
    after = sum(matrix.elements for matrix in costs.after)
    # The weights' gradients of a chunk, and their sums
    mlp = chunk * element.of(costs.chunked.mlp) + after * (element.compute + element.sums)
    weight_gradients = costs.parameters * element.compute
    attention = tokens * element.of(costs.chunked.attention) + weight_gradients
    return tokens * element.of(costs.chunked.throughout) + max(mlp, attention)


def end_bytes(config: ModelConfig, setting: Setting, largest_unit: int) -> int:
    """The embedding's gradient at the end, and with it the head's of the same matrix, or its sum."""
    table = table_bytes(config, setting)
    head = table if config.tied else 0
    shards = setting.shards
    reduced = setting.reduce_bytes * largest_unit // shards if shards > 1 else 0
    return table + max(head, reduced)
