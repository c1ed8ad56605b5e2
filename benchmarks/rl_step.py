"""A whole GRPO step, split into its parts, against TRL's GRPOTrainer on the same prompts, lengths
and samples.

    python benchmarks/rl_step.py --model FOLDER [--gpus 2] [--prompts 32] [--samples 8] \\
        [--prompt 256] [--response 256] [--engines native,vllm] [--json out.json]
    python benchmarks/rl_step.py --shape tiny --prompts 4 --prompt 64 --response 16        a look at it on the CPU

Each side is a job of its own (`--gpus` processes, by torchrun where there are several): `python -m
retool.rl` as users start it, with each of `--engines` (names of `rollout.name`), and TRL's trainer
with DDP, once with `generate`, once with transformers' continuous batching, and with `--ways vllm`
with vLLM in the same processes (its importance correction off, which would add a forward pass).
bf16 compute, fp32 master weights (continuous batching turns TRL's into bf16), one optimizer step
per batch, no reference, no recomputation. With random weights (FOLDER's, or fresh ones of
`--shape`) a sample ends early once in 76,000 tokens; *tokens* has the mean response. A step goes
from one optimizer step's end to the next one's, the first `--warm-up` not counted. *log-probs*: of
the old policy, which neither needs here, and what comes between sampling and the update.
TRL is looked for in `--trl` (folders for PYTHONPATH, or the Python of an environment that has it)
or where Python finds it. Its continuous batching gets a cache of three times what the samples need
(`benchmarks/rollout.py` says why not all of the device).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from table import arguments, attempt, failed, hardware, head, row, save

PARTS = ("gen", "tools", "reward", "log-probs", "update", "sync")
OURS = {
    "gen": "gen",
    "tools": "tools",
    "reward": "reward",
    "log-probs": "old_log_prob",
    "update": "update_actor",
    "sync": "sync_weights",
}
ARR = "actor_rollout_ref."


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    """Both sides' reward: cheap, and different within every group."""
    return len(solution_str) % 7 / 7


# --- what both sides read ---

TOKENIZER_FILES = (
    "chat_template.jinja",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def write_model(folder: Path, shape: str, tokenizer_of: Path | None = None) -> None:
    """A Qwen2 with random weights, a large vocabulary, and the tokenizer of a Qwen2.5's folder or a
    small one of its own.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from examples.quickstart import data
    from examples.quickstart import model as tiny
    from retool.data.template.choose import TEMPLATES

    ids: dict[str, Any] = {}
    if tokenizer_of:
        folder.mkdir(parents=True, exist_ok=True)
        for file in tokenizer_of.iterdir():
            if file.name in TOKENIZER_FILES:
                shutil.copyfile(file, folder / file.name)
        known: Any = AutoTokenizer.from_pretrained(folder)
        ids = {"eos_token_id": known.eos_token_id, "pad_token_id": known.pad_token_id}
    else:
        texts = [
            message["content"]
            for problem in data.make_problems(300, 0)
            for message in data.to_row(problem, "")["messages"]
        ]
        tokenizer = tiny.train_tokenizer(texts)
        tiny.write_tokenizer(folder, tokenizer, TEMPLATES["hermes"].read_text())
        ends = {"eos_token_id": tiny.TURN_END, "pad_token_id": tiny.END_OF_TEXT}
        ids = {name: tokenizer.token_to_id(text) for name, text in ends.items()}
    hidden, ffn, layers, heads = {"tiny": (64, 128, 2, 4), "qwen2.5-0.5b": (896, 4864, 24, 14)}[
        shape
    ]
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        **ids,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def write_prompts(path: Path, model: Path, count: int, tokens: int) -> None:
    """Conversations of exactly `tokens` tokens as the chat template renders them, all different."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    words = [
        w
        for w in (tokenizer.decode([i]) for i in range(300, 30_000))
        if w[:1] == " " and w[1:].isascii() and w[1:].isalpha()
    ][:2000]
    draw = random.Random(0)
    rows = []

    def messages(chosen: list[str]) -> list[dict[str, str]]:
        return [{"role": "user", "content": "".join(chosen)}]

    def length(chosen: list[str]) -> int:
        return len(
            tokenizer.apply_chat_template(
                messages(chosen), add_generation_prompt=True, return_dict=False
            )
        )

    blank = length(["a"])
    if tokens <= blank:
        raise ValueError(f"--prompt {tokens}: the chat template alone takes {blank} tokens.")
    while len(rows) < count:
        chosen = ["a", *draw.choices(words, k=tokens - blank)]
        if length(chosen) == tokens:
            rows.append(
                {
                    "data_source": "random",
                    "prompt": messages(chosen),
                    "reward_model": {"ground_truth": ""},
                }
            )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- retool ---


def run_retool(
    args: Namespace, model: Path, prompts: Path, folder: Path, engine: str
) -> list[dict[str, float]]:
    """The metrics of every step of the public command."""
    out = folder / f"retool-{engine}"
    shutil.rmtree(out, ignore_errors=True)
    words = [
        f"data.train_files={prompts}",
        f"data.train_batch_size={args.prompts}",
        f"data.max_prompt_length={args.prompt}",
        f"data.max_response_length={args.response}",
        "data.answer_format=null",
        f"{ARR}model.path={model}",
        f"{ARR}rollout.name={engine}",
        f"{ARR}rollout.n={args.samples}",
        "trainer.resume_mode=disable",
        "trainer.val_before_train=false",
        f"{ARR}actor.ppo_mini_batch_size={args.prompts}",
        f"{ARR}actor.ppo_max_token_len_per_gpu={args.tokens}",
        f"{ARR}model.enable_gradient_checkpointing=false",
        f"{ARR}rollout.max_num_seqs={max(1, args.prompts * args.samples // args.gpus)}",
        f"custom_reward_function.path={Path(__file__).resolve()}",
        "custom_reward_function.name=compute_score",
        f"trainer.total_training_steps={args.warm_up + args.repeats}",
        f"trainer.default_local_dir={out}",
        f"trainer.device={args.device}",
        f"{ARR}actor.checkpoint.save_contents=[hf_model]",
        *filter(None, args.overrides.split()),
    ]
    try:
        launch(args, ["-m", "retool.rl", *words], folder / f"retool-{engine}.log")
    except RuntimeError as error:
        print(f"retool with {engine}: {error}", file=sys.stderr, flush=True)
        if not (out / "metrics.jsonl").exists():
            raise
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [parts_of(line) for line in lines if "timing_s/step" in line]


def parts_of(line: dict[str, float]) -> dict[str, float]:
    """A step's seconds by part; waiting for tools and judges is inside sampling, and is taken out
    of it.
    """
    found = {part: line.get(f"timing_s/{name}", 0.0) for part, name in OURS.items()}
    found["gen"] -= found["tools"] + found["reward"]
    return {
        **found,
        "step": line["timing_s/step"],
        "tokens": line["response_length/mean"],
        "gib": line["perf/max_memory_allocated_gb"],
    }


# --- TRL ---


def run_trl(
    args: Namespace, model: Path, prompts: Path, folder: Path, way: str
) -> list[dict[str, float]]:
    """A job of its own, with the fused attention that runs."""
    out = folder / f"trl-{way}.json"
    why = ""
    batch = args.prompts * args.samples // args.gpus
    for kernel in ("flash_attention_2", "sdpa") if args.device == "cuda" else ("sdpa",):
        options = {
            "out": out,
            "prompts": prompts,
            "model": model,
            "way": way,
            "kernel": kernel,
            "steps": args.trl_warm_up + args.trl_repeats,
            "batch": batch,
            "micro": args.micro,
            "samples": args.samples,
            "response": args.response,
            "length": args.prompt + args.response,
            "cpu": args.device == "cpu",
            "blocks": 3 * batch * -(-(args.prompt + args.response) // 256),
        }
        out.unlink(missing_ok=True)
        try:
            worker = [str(Path(__file__).resolve()), "--worker", json.dumps(options, default=str)]
            launch(args, worker, folder / f"trl-{way}-{kernel}.log", args.trl)
        except RuntimeError as error:
            why = f"{kernel}: {error}"
            print(f"TRL with {way}, {why}", file=sys.stderr, flush=True)
        steps = json.loads(out.read_text()) if out.exists() else []
        if len(steps) > args.trl_warm_up:  # it may have failed later
            return steps
    raise RuntimeError(why)


def train_with_trl(options: dict[str, Any]) -> None:
    """In every process of TRL's job: the steps' seconds by part, written by the first."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    cuda = not options["cpu"]
    spent = dict[str, float]()
    steps = list[dict[str, float]]()

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Timed(GRPOTrainer):
        def _generate(self, *inputs: Any) -> Any:
            return clocked("gen", super()._generate, *inputs)

        def _calculate_rewards(self, *inputs: Any) -> Any:
            return clocked("reward", super()._calculate_rewards, *inputs)

        def _generate_and_score_completions(self, *inputs: Any) -> Any:
            return clocked("experience", super()._generate_and_score_completions, *inputs)

    def clocked(name: str, function: Any, *inputs: Any) -> Any:
        begin = now()
        found = function(*inputs)
        spent[name] = spent.get(name, 0.0) + now() - begin
        return found

    class Clock(TrainerCallback):
        end = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.end = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end = now()
            step = end - self.end
            self.end = end
            experience, gen, reward, sync = (
                spent.pop(name, 0.0) for name in ("experience", "gen", "reward", "sync")
            )
            steps.append(
                {
                    "gen": gen - sync,
                    "reward": reward,
                    "sync": sync,
                    "log-probs": experience - gen - reward,
                    "update": step - experience,
                    "step": step,
                }
            )

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "completions/mean_length" in logs:
                steps[-1]["tokens"] = logs["completions/mean_length"]
                steps[-1]["gib"] = (
                    torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
                )
            if trainer.accelerator.is_main_process:
                Path(options["out"]).write_text(json.dumps(steps))

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [compute_score("", completion[0]["content"], "", {}) for completion in completions]

    config = GRPOConfig(
        output_dir=str(Path(options["out"]).with_suffix("")),
        per_device_train_batch_size=options["micro"],
        gradient_accumulation_steps=options["batch"] // options["micro"],
        num_generations=options["samples"],
        max_steps=options["steps"],
        max_completion_length=options["response"],
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-6,
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        ddp_find_unused_parameters=False,
        use_vllm=options["way"] == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
        vllm_max_model_length=options["length"],
        vllm_importance_sampling_correction=False,
        use_transformers_continuous_batching=options["way"] == "continuous batching",
        disable_tqdm=True,
        transformers_continuous_batching_config={
            "num_blocks": options["blocks"],
            "max_batch_tokens": 8192 if cuda else 512,
        },
        model_init_kwargs={"dtype": "float32", "attn_implementation": options["kernel"]},
    )
    trainer = Timed(
        model=options["model"],
        reward_funcs=reward,
        args=config,
        callbacks=[Clock()],
        train_dataset=load_dataset(
            "json", data_files=options["prompts"], split="train"
        ).select_columns(["prompt"]),
        processing_class=AutoTokenizer.from_pretrained(options["model"]),
    )
    if config.use_vllm:
        sampler: Any = trainer.vllm_generation
        sampler.sync_weights = partial(clocked, "sync", sampler.sync_weights)
    trainer.train()


# --- the comparison ---


def launch(args: Namespace, words: list[str], log: Path, *folders: str) -> None:
    """torchrun (a single process needs none), quietly, with these folders first on Python's path; a
    file among them is the Python to use. RuntimeError with the log's first error when it fails.
    """
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes=1",
        f"--nproc_per_node={args.gpus}",
    ]
    python = next((place for place in folders if Path(place).is_file()), sys.executable)
    command = [python, *(launcher if args.gpus > 1 else []), *words]
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(
        filter(
            None,
            (
                *(f for f in folders if f != python),
                str(here),
                str(here.parent),
                os.environ.get("PYTHONPATH", ""),
            ),
        )
    )
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            status = process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes
            process.wait()
            raise RuntimeError(f"stopped after {args.timeout:.0f} s") from None
    if status:
        raise RuntimeError(f"exit status {status}: {cause(log.read_text(errors='replace'))}")


# As Python ends a traceback, or retool says what is wrong; torchrun and vLLM write something before it
EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: ?|\([\w ]*pid=\d+\) (?:ERROR [^\]]*\] )?)?"
    r"(error: .*|[\w.]*(?:Error|Exception|Refused|Gone|Interrupt)\b.*)"
)


def cause(log: str) -> str:
    """The exception that ended a job: the first one that its log has, as others follow from it; else
    the log's last line.
    """
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    ends = [found[1] for line in lines if (found := EXCEPTION.match(line))]
    own = [end for end in ends if "ChildFailed" not in end]
    return (own or lines[-1:] or ["it said nothing"])[0][:300]


def summary(run: Callable[[], list[dict[str, float]]], skipped: int, wanted: int) -> dict[str, Any]:
    """Medians over the counted steps of a job."""
    steps = run()[skipped:]
    if not steps:
        raise RuntimeError(f"it ended before step {skipped + 1}")
    note = f" ({len(steps)} of {wanted} steps)" if len(steps) < wanted else ""
    middle = {
        key: statistics.median(step.get(key, 0.0) for step in steps)
        for key in (*PARTS, "step", "tokens", "gib")
    }
    return {**middle, "steps": [step["step"] for step in steps], "note": note}


COLUMNS = ["seconds", *PARTS, "other", "step", "tokens", "GiB", "× retool"]


def in_table(line: dict[str, Any], base: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return failed(line["name"], line, len(COLUMNS))
    rest = line["step"] - sum(line[part] for part in PARTS)
    spread = f"{line['step']:.2f} ({min(line['steps']):.2f} … {max(line['steps']):.2f})"
    seconds = [f"{value:.2f}" for value in (*(line[part] for part in PARTS), rest)]
    against = "" if "failed" in base else f"{line['step'] / base['step']:.2f}"
    return [
        line["name"] + line["note"],
        *seconds,
        spread,
        f"{line['tokens']:.0f}",
        f"{line['gib']:.1f}",
        against,
    ]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return train_with_trl(json.loads(sys.argv[2]))
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument(
        "--model", type=Path, help="a Hugging Face folder; else one is made of --shape"
    )
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=("tiny", "qwen2.5-0.5b"))
    parser.add_argument(
        "--gpus", type=int, default=max(1, torch.cuda.device_count()), help="processes"
    )
    parser.add_argument("--prompts", type=int, default=32, help="of a step, on all GPUs")
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=256, help="tokens at most")
    parser.add_argument(
        "--tokens", type=int, default=16_384, help="retool's micro-batches, per GPU"
    )
    parser.add_argument(
        "--micro", type=int, default=16, help="TRL's micro-batches: samples per GPU"
    )
    parser.add_argument("--warm-up", type=int, default=2, help="retool's steps that don't count")
    parser.add_argument("--trl-warm-up", type=int, default=1)
    parser.add_argument("--trl-repeats", type=int, default=2)
    parser.add_argument(
        "--engines", default="native", help="of retool: names of rollout.name, as native,vllm"
    )
    parser.add_argument("--overrides", default="", help="more keys of retool's, as key=value …")
    parser.add_argument(
        "--ways",
        default="generate,continuous batching",
        help="of TRL to sample, vllm is another; empty: none",
    )
    parser.add_argument(
        "--trl", default="", help="folders that have TRL (and vLLM), as in PYTHONPATH, or a Python"
    )
    parser.add_argument("--timeout", type=float, default=240, help="seconds of a job")
    parser.add_argument("--logs", type=Path, help="keep the jobs' output here")
    args = parser.parse_args()
    args.micro = min(args.micro, args.prompts * args.samples // args.gpus)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.model is None:
            args.model = folder / "model"
            write_model(args.model, args.shape)
        prompts = folder / "prompts.jsonl"
        write_prompts(
            prompts,
            args.model,
            args.prompts * (args.repeats + max(args.warm_up, args.trl_warm_up)),
            args.prompt,
        )
        device = torch.device(args.device)
        lines = list[dict[str, Any]]()
        work = f"{args.prompts} prompts of {args.prompt} tokens × {args.samples} samples of {args.response}"
        head(f"{hardware(device)}, {args.gpus} processes\n{work}", COLUMNS)
        ways = {
            "retool" if engine == "native" else f"retool with {engine}": partial(
                run_retool, args, args.model, prompts, folder, engine
            )
            for engine in args.engines.split(",")
        }
        ways |= {
            f"TRL, {way}": partial(run_trl, args, args.model, prompts, folder, way)
            for way in filter(None, args.ways.split(","))
        }
        for name, run in ways.items():
            counts = (
                (args.warm_up, args.repeats)
                if name.startswith("retool")
                else (args.trl_warm_up, args.trl_repeats)
            )
            lines.append({"name": name, **attempt(partial(summary, run, *counts))})
            row(in_table(lines[-1], lines[0]))
            save(args.json, device, lines)


if __name__ == "__main__":
    main()
