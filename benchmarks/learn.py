"""A run that learns: SFT with a tool, then DAPO, from a real model to accuracy on questions it
hasn't seen.

    python benchmarks/learn.py --model SmolLM2-135M-Instruct --data gsm8k-tool-sft --out run \\
        [--gpus 2] [--json out.json]
    python benchmarks/learn.py … --sft-steps 3 --sft-batch 4 --rl-steps 1 --prompts 2 --samples 2 \\
        --questions 8 --response 48

Three commands, printed before each: validation of the model as it is (`--only alone,…`: without
the tool too), `python -m retool.sft` on conversations with a code interpreter, `python -m
retool.rl` from the SFT's export, on the questions of the same conversations (or of
`--questions-from`), programs run in the sandbox. DATA has train.parquet and test.parquet with the
columns messages, tools and answer; no test question is trained on. Accuracy is that of the
likeliest answer (temperature 0) to every test question. With `--seconds`, a command that takes too
long is asked to stop and saves, and the next goes on from there; DAPO validates every
`--test-every` steps, and every validation is a row as soon as it is through. `--only` spreads the
parts over several calls with the same `--out`; `--only dapo` goes on with a run of DAPO that was
there. To go on on another machine, bring of `--out`

    sft/   latest_checkpointed_iteration.txt, and of the step that it names the folder huggingface
    dapo/  latest_checkpointed_iteration.txt, the step that it names (6.4 GiB for a model of 0.5B),
           metrics.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from table import failed, hardware, head, row, save, some_of

from retool.metrics import read_jsonl

SOURCE = "gsm8k"
ARR = "actor_rollout_ref."


def questions(path: str) -> Iterator[dict[str, Any]]:
    """The questions of SFT conversations, in the schema of `retool.rl`: what `data.custom_cls`
    names.
    """
    import pyarrow.parquet as parquet

    for said in parquet.read_table(path, columns=["messages", "answer"]).to_pylist():
        prompt = [{"role": m["role"], "content": m["content"]} for m in said["messages"][:1]]
        yield {
            "data_source": SOURCE,
            "prompt": prompt,
            "reward_model": {"ground_truth": said["answer"]},
        }


# --- the three commands ---


def question_words(args: Namespace) -> list[str]:
    """Where questions come from: files of their own, or the conversations."""
    if args.questions_from:
        return [
            f"data.train_files={args.questions_from}/train_verl.parquet",
            f"data.val_files={args.questions_from}/test_verl.parquet",
        ]
    return [
        f"data.train_files={args.data}/train.parquet",
        f"data.val_files={args.data}/test.parquet",
        f"data.custom_cls.path={Path(__file__).resolve()}",
        "data.custom_cls.name=questions",
    ]


def template_words(args: Namespace) -> list[str]:
    return [f"data.chat_template={args.template}"] if args.template else []


def rl_words(args: Namespace, model: Path, out: Path) -> list[str]:
    """What validation and DAPO have alike."""
    return [
        *question_words(args),
        f"data.val_max_samples={args.questions}",
        *template_words(args),
        f"reward_model.num_workers={max(1, min(8, (os.cpu_count() or 1) // (2 * args.gpus)))}",
        "data.answer_format=null",
        f"data.train_batch_size={args.prompts}",
        "data.max_prompt_length=512",
        f"data.max_response_length={args.response}",
        "reward_model.name=math",
        f"{ARR}model.path={model}",
        f"{ARR}rollout.n={args.samples}",
        f"{ARR}rollout.max_num_seqs={args.sequences}",
        f"{ARR}rollout.val_kwargs.do_sample=false",
        f"{ARR}rollout.multi_turn.enable=true",
        *([f"{ARR}rollout.multi_turn.format=hermes"] if args.template == "hermes" else []),
        f"{ARR}rollout.multi_turn.max_assistant_turns=10",
        f"{ARR}rollout.multi_turn.max_tool_response_length=64",
        f"{ARR}rollout.multi_turn.tool_timeout_seconds=10",
        f"{ARR}actor.ppo_mini_batch_size={max(1, args.prompts // args.updates)}",
        f"{ARR}actor.ppo_max_token_len_per_gpu={args.tokens}",
        f"trainer.default_local_dir={out}",
        f"trainer.device={args.device}",
        f"trainer.resume_mode={'disable' if 'sft' in args.only else 'auto'}",
    ]


def dapo_words(args: Namespace) -> list[str]:
    """Asymmetric clipping, groups without a signal sampled anew, token mean."""
    return [
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=2",
        f"data.gen_batch_size={args.prompts * 3 // 2}",
        f"{ARR}actor.clip_ratio_low=0.2",
        f"{ARR}actor.clip_ratio_high=0.28",
        f"{ARR}actor.clip_ratio_c=10",
        f"{ARR}actor.optim.lr={args.rl_lr}",
        f"trainer.total_training_steps={args.rl_steps}",
        f"trainer.test_freq={args.test_every}",
    ]


def sft_words(args: Namespace, out: Path) -> list[str]:
    length = (
        [f"trainer.total_training_steps={args.sft_steps}"]
        if args.sft_steps
        else [f"trainer.total_epochs={args.sft_epochs}"]
    )
    return [
        f"data.train_files={args.data}/train.parquet",
        "data.max_length=2048",
        f"data.train_batch_size={args.sft_batch}",
        f"data.max_token_len_per_gpu={args.tokens}",
        *template_words(args),
        f"data.cache_dir={args.out}/cache",
        f"model.partial_pretrain={args.model}",
        f"optim.lr={args.sft_lr}",
        f"trainer.default_local_dir={out}",
        f"trainer.device={args.device}",
        "trainer.resume_mode=disable",
        *length,
        *args.sft_keys,
    ]


def words_of(args: Namespace, part: str) -> list[str]:
    """key=value of a part's command."""
    out = args.out / part
    if part == "sft":
        return sft_words(args, out)
    if part in ("before", "alone"):
        plain = [f"{ARR}rollout.multi_turn.enable=false"] if part == "alone" else []
        words = rl_words(args, args.model, out)
        return [*words, "trainer.val_only=true", *args.rl_keys, *plain]
    return [*rl_words(args, newest(args.out / "sft"), out), *dapo_words(args), *args.rl_keys]


def run(args: Namespace, part: str, limit: float, report: Callable[[float], None]) -> None:
    """Run a part for at most about `limit` seconds (then it is asked to stop, and saves); what it
    has reported every two.

    RuntimeError if it fails.
    """
    module = "retool.sft" if part == "sft" else "retool.rl"
    words = words_of(args, part)
    log = args.out / f"{part}.log"
    several = args.gpus > 1
    processes = f"--nproc_per_node={args.gpus}"
    said = [*(["torchrun", processes] if several else ["python"]), "-m", module, *words]
    print("\n" + " \\\n    ".join(shlex.quote(word) for word in said), file=sys.stderr, flush=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", processes]
    command = [sys.executable, *(launcher if several else []), "-m", module, *words]
    here = Path(__file__).resolve().parent
    begin = time.monotonic()
    path = os.pathsep.join(
        filter(None, (str(here), str(here.parent), os.environ.get("PYTHONPATH", "")))
    )
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(args.stopping),
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None and time.monotonic() - begin < limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            report(time.monotonic() - begin)
        if process.poll() is None:
            print(f"{part}: asked to stop after {limit:.0f} s", file=sys.stderr, flush=True)
            process.send_signal(signal.SIGTERM)  # torchrun passes it on
            try:
                process.wait(args.stopping)
            except subprocess.TimeoutExpired:
                process.kill()  # its processes end with it
    seconds = time.monotonic() - begin
    time.sleep(1.5)  # until the last validation's file is old enough
    report(seconds)
    ended = re.findall(
        r"^(?:(?:finished|asked to stop) at|validated) step .*$",
        log.read_text(errors="replace"),
        re.MULTILINE,
    )
    if not ended:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise RuntimeError(
            f"{module} ended with status {process.returncode} after {seconds:.0f} s, see {log}"
        )
    print(f"{part}: {ended[-1]} ({seconds:.0f} s)", file=sys.stderr, flush=True)


# --- what came of it ---


def newest(folder: Path) -> Path:
    """The export of a run's last checkpoint."""
    step = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    return next(
        path for path in (folder / f"global_step_{step}").rglob("huggingface") if path.is_dir()
    )


def validations(folder: Path) -> list[tuple[int, list[dict[str, Any]]]]:
    """(step, its answers) of every validation of a run; one that may still be being written isn't
    there yet.
    """
    files = [
        file
        for file in sorted((folder / "report").glob("val_*.jsonl"))
        if time.time() - file.stat().st_mtime > 1
    ]
    return [
        (int(file.stem[4:]), [json.loads(line) for line in file.read_text().splitlines()])
        for file in files
    ]


def line_of(name: str, answers: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Counts over a validation's answers.

    A malformed call is one that was answered with an error of the call, not of the program.
    """
    turns = [segment for answer in answers for segment in answer["segments"]]
    calls = sum(s["role"] == "assistant" and "<tool_call>" in s["text"] for s in turns)
    return {
        "name": name,
        "questions": len(answers),
        "right": sum(answer["info"]["acc"] == 1 for answer in answers),
        "calls": calls,
        "boxed": sum(
            "\\boxed{" in s["text"] for answer in answers for s in answer["segments"][-1:]
        ),
        "seconds": seconds,
        "unfinished": sum(answer["stop"] in ("length", "max_turns") for answer in answers),
    }


COLUMNS = [
    "",
    "right answers (± standard error)",
    "questions",
    "boxed",
    "cut off",
    "calls per question",
    "seconds of its command",
]


def in_table(line: dict[str, Any]) -> list[str]:
    if "failed" in line:
        return failed(line["name"], line, len(COLUMNS))
    n = line["questions"]
    shares = [f"{line[name] / n:.1%}" for name in ("right", "boxed", "unfinished")]
    error = 100 * (line["right"] / n * (1 - line["right"] / n) / n) ** 0.5
    return [
        line["name"],
        f"{shares[0]} ± {error:.1f}",
        str(n),
        *shares[1:],
        f"{line['calls'] / n:.2f}",
        f"{line['seconds']:.0f}",
    ]


def progress(folder: Path) -> str:
    """What DAPO's steps took and called, and the share of right answers among all that it sampled."""
    path = folder / "metrics.jsonl"
    entries = read_jsonl(path) if path.exists() else []
    steps = [entry for entry in entries if "timing_s/step" in entry]
    if not steps:
        return "no step of DAPO was finished"
    seconds = sum(entry["timing_s/step"] for entry in steps) / len(steps)
    calls, wrong = (
        sum(entry.get(f"tool/{name}", 0) for entry in steps) for name in ("calls", "errors")
    )
    return (
        f"{len(steps)} steps of DAPO, {seconds:.1f} s each: {right_answers(steps)}{calls:,.0f} tool "
        f"calls in what was trained on, {wrong:,.0f} of them failed"
    )


def right_answers(steps: Sequence[dict[str, Any]]) -> str:
    """The share of right answers among everything sampled (temperature 1), groups without a signal
    too, in the first and the last five steps that sampled; nothing without DAPO's filter.

    A step whose groups are all left over from the step before samples nothing, and has no share.
    """
    rounds = [
        entry for entry in steps if "filter/metric_mean" in entry and entry["filter/groups_sampled"]
    ]
    if not rounds:
        return ""
    first, last = (
        sum(entry["filter/metric_mean"] * entry["filter/groups_sampled"] for entry in part)
        / sum(entry["filter/groups_sampled"] for entry in part)
        for part in (rounds[:5], rounds[-5:])
    )
    return (
        f"{first:.1%} of the sampled answers right in the first five that sampled any, "
        f"{last:.1%} in the last; "
    )


PARTS = ("before", "sft", "dapo")
NAMES = {"alone": "the model, without the tool", "before": "the model"}


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    lines = list[dict[str, Any]]()
    shown = set[tuple[str, int]]()
    spent = dict[str, float]()
    end = time.monotonic() + args.seconds
    head(f"{hardware(device)}, {args.gpus} processes", COLUMNS)

    def show(line: dict[str, Any]) -> None:
        lines.append(line)
        row(in_table(line))
        save(args.json, device, lines)

    def report(part: str, seconds: float) -> None:
        """Rows of the validations that are new."""
        spent[part] = seconds
        for step, answers in validations(args.out / part):
            if (part, step) not in shown:
                shown.add((part, step))
                later = f"and {step} steps of DAPO" if step else "after SFT"
                name = NAMES.get(part, later)
                show(
                    line_of(
                        name,
                        answers,
                        spent.get("sft", float("nan")) if name == "after SFT" else seconds,
                    )
                )

    for part in (*(["alone"] if "alone" in args.only else []), *PARTS):
        if part not in args.only.split(","):
            report(part, float("nan"))
            continue
        try:
            run(
                args,
                part,
                end - time.monotonic() - args.stopping if part == "dapo" else args.seconds / 3,
                partial(report, part),
            )
        except (RuntimeError, OSError) as error:  # without SFT there is nothing to go on from
            show({"name": part, "failed": str(error)})
    print(f"\n{progress(args.out / 'dapo')}")


def arguments() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a Hugging Face folder")
    add("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    add(
        "--questions-from",
        type=Path,
        help="folder with train_verl.parquet and test_verl.parquet, in the schema of retool.rl; "
        "left out: the questions of --data's conversations",
    )
    add(
        "--template",
        default="hermes",
        help="a chat template by name; empty: the model's own",
    )
    add("--out", type=Path, required=True, help="folder for everything that is made")
    add("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="processes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--questions", type=int, default=-1, help="test questions; -1 = all")
    add("--sft-epochs", type=int, default=3)
    add("--sft-steps", type=int, default=0, help="instead of --sft-epochs")
    add("--sft-batch", type=int, default=64, help="conversations of an optimizer step")
    add("--sft-lr", type=float, default=3e-4)
    add("--tokens", type=int, default=32_768, help="of micro-batches, per GPU")
    add("--rl-steps", type=int, default=40)
    add("--prompts", type=int, default=32, help="questions of a step of DAPO")
    add("--samples", type=int, default=16, help="answers to each")
    add("--updates", type=int, default=4, help="optimizer steps of a step")
    add("--rl-lr", type=float, default=1e-5)
    add("--response", type=int, default=768, help="tokens at most, tool output included")
    add("--sequences", type=int, default=384, help="that decode at once, per GPU")
    add("--test-every", type=int, default=10, help="steps of DAPO between validations")
    add(
        "--only",
        type=some_of((*PARTS, "alone")),
        default=",".join(PARTS),
        help="parts to run; of the others, what --out has is shown. `alone` is one more: the model "
        "without the tool",
    )
    add(
        "--seconds",
        type=float,
        default=1e9,
        help="of all three commands; the first two get up to a third each, DAPO what is left",
    )
    stopping = 40 if torch.cuda.is_available() else 300
    add(
        "--stopping",
        type=int,
        default=stopping,
        help="seconds for a command to finish its step and save once it is asked to stop",
    )
    add("--sft-keys", nargs="*", default=[], help="more key=value for retool.sft")
    add("--rl-keys", nargs="*", default=[], help="more key=value for retool.rl")
    add("--json", type=Path, help="save the lines here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
