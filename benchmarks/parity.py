"""One policy, three ways to compute it, on a real model and real prompts: the engine, the training
forward, transformers.

    python benchmarks/parity.py --model FOLDER --data gsm8k/test_verl.parquet [--prompts 8] \\
        [--new 64] [--dtype fp32] [--json out.json]

*greedy*: the engine decodes all prompts together (temperature 0), transformers' `generate` each
alone; tokens that agree up to where a prompt's two continuations part, and how far apart the two
likeliest tokens were there (log-probabilities, of transformers). *gap*: |log p of the engine − log
p of the training forward, or of transformers'| over tokens sampled at temperature 1. DATA has a
column `prompt` of messages. Without a GPU: float32.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from rollout import gap
from table import arguments, attempt, failed, hardware, head, row, save

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone
from retool.model.build import DTYPES, ModelOptions
from retool.model.catalogue.families import read_model_config
from retool.parallel.mesh import make_mesh
from retool.perf import GIB

NAMES = ("bf16", "fp16", "fp32")


def read_prompts(folder: Path, data: Path, count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = parquet.read_table(data, columns=["prompt"]).slice(0, count).to_pylist()
    return [
        tokenizer.apply_chat_template(
            r["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for r in rows
    ]


def decode(
    engine: Engine, prompts: list[list[int]], new: int, temperature: float
) -> list[TurnDone]:
    """A turn per prompt, in order; none ends early."""
    for i, prompt in enumerate(prompts):
        engine.start(
            (temperature, i),
            prompt,
            SamplingParams(max_tokens=new, temperature=temperature, seed=(0, i)),
        )
    turns: list[TurnDone] = []
    while not engine.idle():
        turns += engine.step()
    for i in range(len(prompts)):
        engine.drop((temperature, i))
    return sorted(turns, key=lambda turn: turn.key[1])  # pyright: ignore[reportIndexIssue]


@torch.no_grad()
def greedy(
    theirs: Any, prompts: list[list[int]], turns: list[TurnDone], new: int
) -> dict[str, Any]:
    same = []
    margins = []
    for prompt, turn in zip(prompts, turns, strict=True):
        ids = torch.tensor([prompt], device=theirs.device)
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, len(prompt) :].tolist()
        same.append(
            next(
                (i for i, (a, b) in enumerate(zip(tokens, turn.tokens, strict=True)) if a != b), new
            )
        )
        if same[-1] < new:
            best = out.logits[same[-1]][0].float().log_softmax(-1).topk(2).values
            margins.append(float(best[0] - best[1]))
    return {
        "agree": sum(same),
        "of": new * len(prompts),
        "parted": len(margins),
        "margin": max(margins, default=0.0),
    }


@torch.no_grad()
def gap_to_theirs(theirs: Any, prompts: list[list[int]], turns: list[TurnDone]) -> dict[str, float]:
    differences = []
    for prompt, turn in zip(prompts, turns, strict=True):
        ids = torch.tensor([[*prompt, *turn.tokens]], device=theirs.device)
        logp = (
            theirs(ids)
            .logits[0, len(prompt) - 1 : -1]
            .float()
            .log_softmax(-1)
            .gather(1, ids[0, len(prompt) :, None])[:, 0]
        )
        differences.append(np.abs(logp.cpu().numpy() - np.array(turn.logp)))
    flat = np.concatenate(differences)
    return {"mean": float(flat.mean()), "max": float(flat.max())}


def in_table(line: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return failed(line["name"], line, 2)
    if "mean" in line:
        return [line["name"], f"mean {line['mean']:.1e}, largest {line['max']:.1e}"]
    parted = (
        f"; {line['parted']} part where two tokens are within {line['margin']:.1e}"
        if line["parted"]
        else ""
    )
    return [line["name"], f"{line['agree']:,} of {line['of']:,} tokens{parted}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="parquet with a column prompt")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens of each")
    parser.add_argument(
        "--dtype", choices=NAMES, default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument(
        "--narrow",
        action="store_true",
        help="the residual stream in the compute dtype, not in fp32 as `retool.rl` has it",
    )
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    device = torch.device(args.device)
    dtype = DTYPES[args.dtype]
    lines = list[dict[str, Any]]()
    prompts = read_prompts(args.model, args.data, args.prompts)
    mesh = make_mesh(device=args.device)
    model = load_pretrained(
        args.model, mesh, ModelOptions(param_dtype=dtype, fp32_residual=not args.narrow)
    )
    longest = max(map(len, prompts)) + args.new + 1
    engine = Engine(
        read_model_config(args.model),
        device,
        EngineOptions(
            max_num_seqs=len(prompts),
            kv_bytes=GIB // 2,
            max_length=longest,
            max_batch_tokens=max(2048, len(prompts)),
        ),
    )
    engine.sync(model)
    likeliest = decode(engine, prompts, args.new, 0.0)
    sampled = decode(engine, prompts, args.new, 1.0)
    theirs: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    theirs = theirs.to(device).eval()
    head(
        f"{hardware(device)}\n{args.model.name}, {args.dtype}: {len(prompts)} prompts × {args.new} tokens",
        ["", "agreement"],
    )
    rows = {
        "greedy tokens, engine and transformers": partial(
            greedy, theirs, prompts, likeliest, args.new
        ),
        "gap, engine and training forward": partial(gap, model, prompts, sampled, len(prompts)),
        "gap, engine and transformers": partial(gap_to_theirs, theirs, prompts, sampled),
    }
    for name, run in rows.items():
        lines.append({"name": name, **attempt(run)})
        row(in_table(lines[-1]))
        save(args.json, device, lines)


if __name__ == "__main__":
    main()
