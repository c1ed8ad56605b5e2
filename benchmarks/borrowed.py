"""Training as transformers' own module beside our decoder: the same weights, batches and optimizer,
one process.

    python benchmarks/borrowed.py [--tokens 16384] [--length 2048] [--repeats 5] [--json out.json]

A step is forward, backward and AdamW over `--tokens` tokens in documents of `--length`; every token
is trained, ids are random. bf16 on a GPU, fp32 without. Both have our sharding, attention kernels,
vocabulary head and optimizer: what is compared are the blocks. The baseline is transformers' module.
"""

from __future__ import annotations

import gc
import statistics
from typing import Any
from zlib import crc32

import numpy as np
import torch
from table import arguments, attempt, failed, hardware, head, measure, row, save, spread

from retool.batch import PackedBatch, Sample, pack
from retool.model.borrowed.read import borrow
from retool.model.build import ModelOptions, build_decoder
from retool.model.catalogue.families import parse_model_config
from retool.model.config import ModelConfig
from retool.model.recompute import Recompute
from retool.optim import AdamW, AdamWOptions
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from retool.perf import StepTimer
from retool.sft.step import train_step

# As config.json has them
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
FIELDS = {
    "model_type": "qwen2",
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
COLUMNS = ["", "tokens/s", "× baseline", "ms a step", "GiB", "loss"]


def same_weights(model: Sharded) -> None:
    """Normal matrices and biases (σ 0.02) and norms of one; each is drawn by its name."""
    generator = torch.Generator(model.mesh.device)
    for unit, member in model.layout.members:
        place = model.master[unit.start + member.offset :][: member.numel]
        if "norm" in member.name:
            place.fill_(1.0)
        else:
            place.normal_(0, 0.02, generator=generator.manual_seed(crc32(member.name.encode())))
    model.refresh()


def documents(tokens: int, length: int, vocab: int) -> PackedBatch:
    rng = np.random.default_rng(0)
    count = max(1, tokens // length)
    ids = rng.integers(0, vocab, (count, length)).astype(np.int32)
    return pack([Sample(each, np.ones(length, bool)) for each in ids])


def timed(
    config: ModelConfig,
    batch: PackedBatch,
    recompute: Recompute,
    compiled: bool,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    """Milliseconds of each step, and the loss that the first one found."""
    options = ModelOptions(recompute=recompute, use_compile=compiled)
    model = build_decoder(config, make_mesh(device=device.type), options)
    same_weights(model)
    optimizer = AdamW(model, AdamWOptions())
    timer = StepTimer(model.mesh.device)
    losses = list[Any]()

    def step() -> None:
        losses.append(train_step(model, optimizer, [batch], batch.trained_tokens, 1e-5, timer))

    found = measure(step, model.mesh.device, repeats)
    return {**found, "loss": losses[0].read()[0], "tokens": batch.real_tokens}


def in_table(line: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return failed(line["name"], line, len(COLUMNS))
    median = statistics.median(line["ms"])
    times = "" if "failed" in base else f"{statistics.median(base['ms']) / median:.2f}×"
    return [
        line["name"],
        f"{1e3 * line['tokens'] / median:,.0f}",
        times,
        spread(line["ms"]),
        f"{line['gib']:.1f}",
        f"{line['loss']:.4f}",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=5)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--length", type=int, default=2_048)
    args = parser.parse_args()
    device = torch.device(args.device)
    content = {**FIELDS, **SHAPES[args.shape]}
    theirs = borrow(content)
    ours = parse_model_config(content)
    fast = device.type == "cuda"
    batch = documents(args.tokens, args.length, theirs.vocab)
    print(f"{hardware(device)}; {args.shape}, {batch.real_tokens:,} tokens a step")
    lines = list[dict[str, Any]]()
    for recompute in ("none", "full"):
        head(f"recompute {recompute}", COLUMNS)
        base = len(lines)
        for name, config, compiled in (
            ("transformers' module (baseline)", theirs, False),
            ("our decoder, not compiled", ours, False),
            ("our decoder", ours, fast),
        ):
            line = attempt(
                lambda config=config, compiled=compiled, how=recompute: timed(
                    config, batch, how, compiled, device, args.repeats
                )
            )
            lines.append({"recompute": recompute, "name": name, **line})
            row(in_table(lines[-1], lines[base]))
            gc.collect()  # a sharded module and its hooks refer to each other
            if fast:
                torch.cuda.empty_cache()
            save(args.json, device, lines)


if __name__ == "__main__":
    main()
