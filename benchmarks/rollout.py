"""Rollout throughput of the engine: sampled tokens per second, share of the bandwidth roofline,
weight sync, log-prob gap.

    python benchmarks/rollout.py [--shape qwen2.5-0.5b] [--sequences 256] [--prompt 896] [--new 128] [--json out.json]
    python benchmarks/rollout.py --shape tiny --sequences 8 --prompt 24 --new 16        a look at it on the CPU

Every engine gets the same random prompts, others in each repeat (or `--group` samples of each), and
samples `--new` tokens of each at temperature 1, none ends earlier. *all* counts from the first
prompt to the last token, *decode* only steps in which every sequence decodes. The roofline: weights
and the KV of every sequence are read once per step from memory at its nominal bandwidth.
Peers run the same shape in the same precision, after us, each in a process of its own:
transformers' `generate_batch` (continuous batching) and `generate` (one padded batch), and `vllm`
(its V1 engine in that process, graphs and compilation on, prefix caching), looked for in `--vllm`
(folders for PYTHONPATH) or where Python finds it. A peer has `--peer-seconds`; the repeats that it
hadn't finished are left out. With `--model FOLDER` real weights are used; the log-prob gap to the
training forward says something only then.

`generate_batch` gets a KV cache of 1.5 times what the sequences need (it keeps 15 % free before it
takes new prompts), and keeps its graphs between repeats. Left to itself it takes 90 % of the device
for the cache, and up to transformers 5.17 its warm-up attends to all of that from 8,192 tokens, in
each call: 56 s on an H200.
"""

from __future__ import annotations

import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sft import SHAPES, random_weights
from table import arguments, failed, hardware, head, row, save, some_of

from retool.batch import Sample, pack
from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone
from retool.model.build import ModelOptions, build_decoder
from retool.model.catalogue.families import read_model_config
from retool.model.config import ModelConfig
from retool.model.costs import multiplied_parameters
from retool.model.logprobs import logprobs
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from retool.perf import GIB

AS_RL = ModelOptions(fp32_residual=True)  # as `retool.rl` holds its policy
# Bytes per second
BANDWIDTH = {
    "H100 80GB HBM3": 3.35e12,
    "H100 PCIe": 2.0e12,
    "H200": 4.8e12,
    "A100": 2.0e12,
}


def bandwidth(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return next(
        (b for name, b in BANDWIDTH.items() if name in torch.cuda.get_device_name(device)), None
    )


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def roofline_seconds(
    config: ModelConfig, contexts: list[int], size: int, per_second: float
) -> float:
    """Time to read the weights and every sequence's KV once, for a decode step at these context
    lengths.
    """
    kv = 2 * config.layers * config.kv_heads * config.head_dim * size
    return (multiplied_parameters(config) * size + sum(contexts) * kv) / per_second


def draw_prompts(config: ModelConfig, args: Namespace, repeat: int) -> list[list[int]]:
    """Random prompts, the same for everyone, others in every repeat: nothing can be kept from the
    one before.
    """
    rng = np.random.default_rng(repeat)
    drawn = [
        rng.integers(0, min(config.vocab, 150_000), args.prompt).tolist()
        for _ in range(-(-args.sequences // args.group))
    ]
    return [drawn[i // args.group] for i in range(args.sequences)]


def ours(engine: Engine, prompts: list[list[int]], args: Namespace, seed: int) -> dict[str, Any]:
    """Seconds of everything and of the decode-only steps, and the turns."""
    device = engine.device
    stats = engine.stats
    start = synchronised(device)
    for i, prompt in enumerate(prompts):
        engine.start(
            (seed, i),
            prompt,
            SamplingParams(max_tokens=args.new, temperature=1.0, seed=(seed, i)),
            group=(seed, i // args.group),
        )
    turns: list[TurnDone] = []
    decode_start = start
    drawn = stats.sampled_tokens
    prefilling = True
    while not engine.idle():
        before = stats.prefill_tokens
        prefilled = prefilling
        turns += engine.step()
        prefilling = stats.prefill_tokens > before
        # The last prompt's draws have been read, the first step of single tokens runs
        if prefilled and not prefilling:
            decode_start = time.perf_counter()
            drawn = stats.sampled_tokens
    end = synchronised(device)
    for i in range(len(prompts)):
        engine.drop((seed, i))
    return {
        "seconds": end - start,
        "decode_seconds": end - decode_start,
        "decode_tokens": stats.sampled_tokens - drawn,
        "turns": turns,
    }


def measure_ours(engine: Engine, args: Namespace) -> dict[str, Any]:
    device = engine.device
    config = engine.config
    begin = synchronised(device)
    ours(engine, draw_prompts(config, args, 0), args, 0)
    warm_up = synchronised(device) - begin
    runs = [
        ours(engine, draw_prompts(config, args, 1 + r), args, 1 + r) for r in range(args.repeats)
    ]
    decode = [r["decode_tokens"] / r["decode_seconds"] for r in runs]
    line: dict[str, Any] = {
        "name": "retool",
        "all": [args.sequences * args.new / r["seconds"] for r in runs],
        "decode": decode,
    }
    line |= {"warm_up_seconds": warm_up, "stats": vars(engine.stats)}
    per_second = bandwidth(device)
    assert engine.weights.dtype is not None
    if per_second is not None:
        steps = args.new - 1
        contexts = [[args.prompt + k] * args.sequences for k in range(1, steps + 1)]
        seconds = sum(
            roofline_seconds(config, c, engine.weights.dtype.itemsize, per_second) for c in contexts
        )
        line["roofline"] = args.sequences * steps / seconds
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
def gap(
    model: Sharded, prompts: list[list[int]], turns: list[TurnDone], most: int = 16
) -> dict[str, float]:
    """|logp of the engine − logp of the training forward| over sampled tokens of some sequences."""
    differences = []
    for turn in turns[:most]:
        prompt = prompts[turn.key[1]]  # pyright: ignore[reportIndexIssue]
        tokens = np.array([*prompt, *turn.tokens], np.int32)
        batch = pack([Sample(tokens, np.ones(len(tokens), bool))]).to(model.mesh.device)
        labels = batch.labels

        def score(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            cap: float = 0.0,
            labels: torch.Tensor = labels,
        ) -> torch.Tensor:
            return logprobs(hidden, weight, labels, cap=cap)[0]

        logp = model(batch, score)
        differences.append(np.abs(logp[len(prompt) - 1 : -1].cpu().numpy() - np.array(turn.logp)))
    flat = np.concatenate(differences)
    return {"mean": float(flat.mean()), "max": float(flat.max())}


def transformers_model(
    config: ModelConfig, folder: Path | None, device: torch.device, dtype: torch.dtype
) -> Any:
    """transformers' model of the same shape, random unless there is a folder."""
    from transformers import AutoModelForCausalLM

    if folder is not None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return loaded.to(device).eval()
    with device:
        return AutoModelForCausalLM.from_config(transformers_config(config), dtype=dtype).eval()


def transformers_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        config.family,
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied,
        max_position_embeddings=32_768,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )


def vllm_engine(
    config: ModelConfig, folder: Path | None, device: torch.device, dtype: torch.dtype
) -> Any:
    """vLLM on the same shape: of a folder without weights its own dummy loader makes some."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            theirs = transformers_config(config)
            theirs.architectures = [f"{config.family.capitalize()}ForCausalLM"]
            theirs.save_pretrained(temporary)
        return LLM(
            model=str(folder or temporary),
            skip_tokenizer_init=True,
            load_format="dummy" if folder is None else "auto",
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=2048,
            gpu_memory_utilization=0.8,
            max_num_seqs=256,
            max_num_batched_tokens=16_384,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )


def vllm_generate(engine: Any, prompts: list[list[int]], args: Namespace) -> int:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    options = SamplingParams(
        temperature=1.0, max_tokens=args.new, ignore_eos=True, detokenize=False
    )
    rows = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = engine.generate(rows, options, use_tqdm=False)
    return sum(len(answer.outputs[0].token_ids) for answer in answers)


def generate_batch(model: Any, prompts: list[list[int]], args: Namespace) -> int:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options = GenerationConfig(max_new_tokens=args.new, eos_token_id=-1, pad_token_id=0, **sampling)
    blocks = len(prompts) * -(-(args.prompt + args.new) // 256)
    batching = ContinuousBatchingConfig(
        num_blocks=-(-3 * blocks // 2),
        max_batch_tokens=min(8192, len(prompts) * args.prompt),
        allow_block_sharing=args.group > 1,
    )
    found = model.generate_batch(
        prompts,
        generation_config=options,
        continuous_batching_config=batching,
        progress_bar=False,
        persistent_manager=True,
    )
    return sum(len(o.generated_tokens) for o in found.values())


def generate(model: Any, prompts: list[list[int]], args: Namespace) -> int:
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.new,
        min_new_tokens=args.new,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )
    return out.numel() - ids.numel()


# What makes a peer's model or engine, and what samples with it.
PEERS: dict[str, tuple[Callable[..., Any], Callable[..., int]]] = {
    "generate_batch": (transformers_model, generate_batch),
    "generate": (transformers_model, generate),
    "vllm": (vllm_engine, vllm_generate),
}


def run_peer(name: str, config: ModelConfig, args: Namespace) -> None:
    """In the peer's process: a JSON line of each repeat, the first of which warms up."""
    device = torch.device(args.device)
    load, sample = PEERS[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load(config, args.model, device, dtype)
    for repeat in range(args.repeats + 1):
        torch.manual_seed(repeat)
        prompts = draw_prompts(config, args, repeat)
        start = synchronised(device)
        tokens = sample(model, prompts, args)
        seconds = synchronised(device) - start
        if tokens != args.sequences * args.new:
            raise RuntimeError(
                f"{tokens:,} tokens came back instead of {args.sequences * args.new:,}"
            )
        gib = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")
        print(json.dumps({"rate": tokens / seconds, "gib": gib}), flush=True)
    getattr(model, "destroy_cached_continuous_batching_manager", lambda: None)()


def measure_peer(name: str, args: Namespace) -> dict[str, Any]:
    """The peer's line, from what it had done when it ended or its time did."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    environment = dict(os.environ)
    if name == "vllm":
        paths = [args.vllm, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            out, errors = process.communicate(timeout=args.peer_seconds)
            said = [
                text.strip()[:200]
                for text in errors.splitlines()
                if re.match(r"[\w.]*(Error|Exception)\b", text)
            ]
            note = (
                ""
                if process.returncode == 0
                else (said or [f"exit status {process.returncode}"])[-1]
            )
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            note = f"stopped after {args.peer_seconds:.0f} s"
    sys.stderr.write(errors)
    found = [json.loads(text) for text in out.splitlines() if text.startswith('{"rate"')]
    line: dict[str, Any] = {
        "name": name if name == "vllm" else f"transformers {name}",
        "all": [entry["rate"] for entry in found[1:]],
        "note": note,
    }
    if not line["all"]:
        return line | {"failed": note}
    return line | {"gib": found[-1]["gib"]}


def in_table(line: dict[str, Any], mine: float) -> list[str]:
    if "failed" in line:
        return failed(line["name"], line, 7)
    middle = statistics.median(line["all"])
    gib = line["gib"]
    decode = statistics.median(line["decode"]) if "decode" in line else None
    share = f"{decode / line['roofline']:.1%}" if decode and "roofline" in line else ""
    name = f"{line['name']} ({line['note']})" if line.get("note") else line["name"]
    return [
        name,
        f"{middle:,.0f}",
        f"{min(line['all']):,.0f} … {max(line['all']):,.0f}",
        f"{decode:,.0f}" if decode else "",
        share,
        "" if gib != gib else f"{gib:.1f}",
        f"{mine / middle:.1f}",
    ]


def main() -> None:
    args = parse()
    config = SHAPES[args.shape] if args.model is None else read_model_config(args.model)
    if args.worker:
        return run_peer(args.worker, config, args)
    device = torch.device(args.device)
    mesh = make_mesh(device=args.device)
    model = (
        build_decoder(config, mesh, AS_RL)
        if args.model is None
        else load_pretrained(args.model, mesh, AS_RL)
    )
    if args.model is None:
        random_weights(model)
    engine = Engine(
        config,
        device,
        EngineOptions(
            max_num_seqs=args.sequences,
            kv_bytes=int(args.kv_gib * GIB),
            max_length=args.prompt + args.new + 1,
            use_cuda_graphs=not args.no_graphs,
            max_batch_tokens=max(args.batch_tokens, args.sequences),
            use_compile=False if args.no_compile else "auto",
        ),
    )
    engine.sync(model)
    lines = [measure_ours(engine, args)]
    turns = lines[0].pop("turns")
    mine = statistics.median(lines[0]["all"])
    lines[0]["gib"] = (
        torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else float("nan")
    )
    head(
        f"{hardware(device)}\n{args.shape if args.model is None else args.model.name}: "
        f"{args.sequences} sequences, {args.prompt} prompt + {args.new} sampled tokens, "
        f"{config.layers} layers",
        COLUMNS,
    )
    row(in_table(lines[0], mine))
    save(args.json, device, lines)
    prompts = draw_prompts(config, args, args.repeats)
    lines[0] |= {
        "sync_ms": measure_sync(engine, model, args.repeats),
        "gap": gap(model, prompts, turns),
    }
    save(args.json, device, lines)
    engine.release()
    del engine, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for name in filter(None, args.peers.split(",")):
        lines.append(measure_peer(name, args))
        row(in_table(lines[-1], mine))
        save(args.json, device, lines)
    sync = statistics.median(lines[0]["sync_ms"])
    found = lines[0]["gap"]
    weights = "random" if args.model is None else "real"
    print(
        f"\nweight sync {sync:.1f} ms · log-prob gap to the training forward ({weights} weights): "
        f"mean {found['mean']:.1e}, largest {found['max']:.1e}"
    )


COLUMNS = ["", "tok/s, all", "spread", "decode only", "of roofline", "GiB", "retool is ×"]


def parse() -> Namespace:
    parser = arguments(__doc__)
    parser.set_defaults(repeats=2)
    add = parser.add_argument
    add("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    add("--model", type=Path, help="a Hugging Face folder with real weights, instead of --shape")
    add("--sequences", type=int, default=256)
    add("--prompt", type=int, default=896)
    add("--new", type=int, default=128)
    add("--group", type=int, default=1, help="samples of each prompt")
    add("--batch-tokens", type=int, default=8192, help="of one step of ours")
    add("--kv-gib", type=float, default=24.0 if torch.cuda.is_available() else 0.25)
    add("--no-graphs", action="store_true")
    add("--no-compile", action="store_true")
    add(
        "--peers",
        type=some_of(PEERS),
        default="generate_batch,generate",
        help=f"of {', '.join(PEERS)}; empty: none",
    )
    add("--vllm", default="", help="folders that have vLLM, as in PYTHONPATH")
    add("--peer-seconds", type=float, default=90, help="of each peer, from its start")
    add("--worker", default="", choices=["", *PEERS], help=SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
