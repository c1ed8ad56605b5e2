"""Rollout throughput of the engine: sampled tokens per second, share of the bandwidth roofline, weight sync, log-prob gap.

    python benchmarks/rollout.py [--shape qwen2.5-0.5b] [--sequences 256] [--prompt 896] [--new 256] [--json out.json]
    python benchmarks/rollout.py --shape tiny --sequences 8 --prompt 24 --new 16        a look at it on the CPU

Every engine gets the same random prompts (or `--group` samples of each) and samples `--new` tokens of each at temperature 1, none
ends earlier. *all* counts from the first prompt to the last token, *decode* only steps in which every sequence decodes. The
roofline: weights and the KV of every sequence are read once per step from memory at its nominal bandwidth. transformers runs the same
shape on the same device in the same process: `generate_batch` (its continuous batching) and `generate` (one padded batch).
With `--model FOLDER` real weights are used; the log-prob gap to the training forward says something only then.
"""

from __future__ import annotations

import gc
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sft import SHAPES, random_weights
from table import arguments, hardware, save

from retool.batch import Sample, pack
from retool.checkpoint.pretrained import load_pretrained
from retool.model.build import ModelOptions, build_decoder
from retool.model.config import ModelConfig, read_model_config
from retool.model.logprobs import logprobs
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from retool.perf import GIB
from retool.rl.engine import Engine, EngineOptions, SamplingParams, TurnDone

BANDWIDTH = {"H100 80GB HBM3": 3.35e12, "H100 PCIe": 2.0e12, "H200": 4.8e12, "A100": 2.0e12}  # bytes per second


def bandwidth(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return next((b for name, b in BANDWIDTH.items() if name in torch.cuda.get_device_name(device)), None)


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def roofline_seconds(config: ModelConfig, contexts: list[int], size: int, per_second: float) -> float:
    """Time to read the weights and every sequence's KV once, for a decode step at these context lengths."""
    kv = 2 * config.layers * config.kv_heads * config.head_dim * size
    return (config.matmul_parameters * size + sum(contexts) * kv) / per_second


def ours(engine: Engine, prompts: list[list[int]], args: Namespace, seed: int) -> dict[str, Any]:
    """Seconds of everything and of the decode-only steps, and the turns."""
    device, stats = engine.device, engine.stats
    start = synchronised(device)
    for i, prompt in enumerate(prompts):
        engine.start((seed, i), prompt, SamplingParams(max_tokens=args.new, temperature=1.0, seed=(seed, i)), group=(seed, i // args.group))
    turns: list[TurnDone] = []
    decode_start, drawn = start, stats.sampled_tokens
    while not engine.idle():
        before = stats.prefill_tokens
        turns += engine.step()
        if stats.prefill_tokens > before:  # a prompt is still being computed
            decode_start, drawn = synchronised(device), stats.sampled_tokens
    end = synchronised(device)
    for i in range(len(prompts)):
        engine.drop((seed, i))
    return {"seconds": end - start, "decode_seconds": end - decode_start, "decode_tokens": stats.sampled_tokens - drawn, "turns": turns}


def measure_ours(engine: Engine, prompts: list[list[int]], args: Namespace) -> dict[str, Any]:
    device, config = engine.device, engine.config
    begin = synchronised(device)
    ours(engine, prompts, args, 0)
    warm_up = synchronised(device) - begin
    runs = [ours(engine, prompts, args, 1 + r) for r in range(args.repeats)]
    total = len(prompts) * args.new
    decode = [r["decode_tokens"] / r["decode_seconds"] for r in runs]
    line: dict[str, Any] = {"name": "retool", "all": [total / r["seconds"] for r in runs], "decode": decode}
    line |= {"warm_up_seconds": warm_up, "stats": vars(engine.stats)}
    per_second = bandwidth(device)
    assert engine.weights.dtype is not None
    if per_second is not None:
        steps = args.new - 1
        contexts = [[len(p) + k for p in prompts] for k in range(1, steps + 1)]
        seconds = sum(roofline_seconds(config, c, engine.weights.dtype.itemsize, per_second) for c in contexts)
        line["roofline"] = len(prompts) * steps / seconds
    line["turns"] = runs[-1]["turns"]
    return line


def measure_sync(engine: Engine, model: Sharded, repeats: int) -> list[float]:
    """Milliseconds of each weight sync."""
    out = []
    for _ in range(repeats + 1):
        start = synchronised(engine.device)
        engine.sync(model)
        out.append(1e3 * (synchronised(engine.device) - start))
    return out[1:]


@torch.no_grad()
def gap(model: Sharded, prompts: list[list[int]], turns: list[TurnDone], most: int = 16) -> dict[str, float]:
    """|logp of the engine − logp of the training forward| over sampled tokens of some sequences."""
    differences = []
    for turn in turns[:most]:
        prompt = prompts[turn.key[1]]  # pyright: ignore[reportIndexIssue]
        tokens = np.array([*prompt, *turn.tokens], np.int32)
        batch = pack([Sample(tokens, np.ones(len(tokens), bool))]).to(model.mesh.device)
        logp = model(batch, lambda hidden, weight, labels=batch.labels: logprobs(hidden, weight, labels)[0])
        differences.append(np.abs(logp[len(prompt) - 1 : -1].cpu().numpy() - np.array(turn.logp)))
    flat = np.concatenate(differences)
    return {"mean": float(flat.mean()), "max": float(flat.max())}


def transformers_model(config: ModelConfig, folder: Path | None, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model of the same shape, random unless there is a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if folder is not None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return loaded.to(device).eval()
    theirs = AutoConfig.for_model(
        config.family, vocab_size=config.vocab, hidden_size=config.hidden, intermediate_size=config.ffn, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied, max_position_embeddings=32_768, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with device:
        return AutoModelForCausalLM.from_config(theirs, dtype=dtype).eval()


def generate_batch(model: Any, prompts: list[list[int]], args: Namespace) -> int:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options = GenerationConfig(max_new_tokens=args.new, eos_token_id=-1, pad_token_id=0, **sampling)
    found = model.generate_batch(prompts, generation_config=options, progress_bar=False)
    return sum(len(o.generated_tokens) for o in found.values())


def generate(model: Any, prompts: list[list[int]], args: Namespace) -> int:
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new, min_new_tokens=args.new, do_sample=True,
                         temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)  # fmt: skip
    return out.numel() - ids.numel()


def measure_theirs(name: str, run: Callable[..., int], model: Any, prompts: list[list[int]], args: Namespace) -> dict[str, Any]:
    rates = []
    for repeat in range(args.repeats + 1):  # the first one warms up
        torch.manual_seed(repeat)
        start = synchronised(model.device)
        tokens = run(model, prompts, args)
        rates.append(tokens / (synchronised(model.device) - start))
    return {"name": name, "all": rates[1:]}


def show(lines: list[dict[str, Any]], config: ModelConfig, device: torch.device, args: Namespace) -> None:
    print(f"\n{hardware(device)}\n{args.shape if args.model is None else args.model}: {args.sequences} sequences, {args.prompt} prompt + "
          f"{args.new} sampled tokens, {config.layers} layers\n")  # fmt: skip
    print("| | tok/s, all | spread | decode only | of roofline | retool is × |\n|---|---:|---:|---:|---:|---:|")
    mine = statistics.median(lines[0]["all"])
    for entry in lines:
        middle = statistics.median(entry["all"])
        decode = statistics.median(entry["decode"]) if "decode" in entry else None
        share = f"{decode / entry['roofline']:.1%}" if decode and "roofline" in entry else ""
        spread = f"{min(entry['all']):,.0f}–{max(entry['all']):,.0f}"
        print(f"| {entry['name']} | {middle:,.0f} | {spread} | {f'{decode:,.0f}' if decode else ''} | {share} | {mine / middle:.1f} |")
    if "sync_ms" in lines[0]:
        print(f"\nweight sync {statistics.median(lines[0]['sync_ms']):.1f} ms · log-prob gap to the training forward: mean "
              f"{lines[0]['gap']['mean']:.1e}, largest {lines[0]['gap']['max']:.1e}"
              f"{' (random weights)' if args.model is None else ''} · {lines[0]['gib']:.1f} GiB")  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder with real weights, instead of --shape")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=896)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--group", type=int, default=1, help="samples of each prompt")
    parser.add_argument("--kv-gib", type=float, default=24.0 if torch.cuda.is_available() else 0.25)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--peers", default="generate_batch,generate", help="of transformers; empty: none")
    args = parser.parse_args()
    device = torch.device(args.device)
    mesh = make_mesh(device=args.device)
    config = SHAPES[args.shape] if args.model is None else read_model_config(args.model)
    model = build_decoder(config, mesh, ModelOptions()) if args.model is None else load_pretrained(args.model, mesh)
    if args.model is None:
        random_weights(model)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, min(config.vocab, 150_000), args.prompt).tolist() for _ in range(-(-args.sequences // args.group))]
    prompts = [drawn[i // args.group] for i in range(args.sequences)]
    engine = Engine(config, device, EngineOptions(
        max_num_seqs=args.sequences, kv_bytes=int(args.kv_gib * GIB), max_length=args.prompt + args.new + 1,
        use_cuda_graphs=not args.no_graphs, max_batch_tokens=max(8192, args.sequences), use_compile=False if args.no_compile else "auto",
    ))  # fmt: skip
    engine.sync(model)
    lines = [measure_ours(engine, prompts, args)]
    lines[0] |= {"sync_ms": measure_sync(engine, model, args.repeats), "gap": gap(model, prompts, lines[0].pop("turns"))}
    lines[0]["gib"] = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")
    dtype = model.compute.dtype
    engine.release()
    del engine, model
    gc.collect()
    for name in filter(None, args.peers.split(",")):
        theirs = transformers_model(config, args.model, device, dtype)
        lines.append(measure_theirs(f"transformers {name}", PEERS[name], theirs, prompts, args))
        del theirs
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(lines, config, device, args)
    save(args.json, device, lines)


PEERS: dict[str, Callable[..., int]] = {"generate_batch": generate_batch, "generate": generate}

if __name__ == "__main__":
    main()
