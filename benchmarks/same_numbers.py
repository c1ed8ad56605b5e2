"""Has a change to the code changed a number?

Seeded runs of two revisions, every metric compared bit by bit.

    python benchmarks/same_numbers.py REVISION      # this tree against a commit, a tag or a branch

Runs short SFT and RL trainings on the CPU, on one and on two processes, with this tree and with a
checkout of REVISION, and compares each number that their metrics.jsonl hold, but for times, speeds
and memory. The exit status is 1 if one differs. Both revisions need the same installed packages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Differ from run to run
MEASURED = (
    "timing",
    "perf/",
    "tool/latency",
    "tool/queue_s",
    "time",
    "seconds",
)
# Where the interpreter is now, and where it was
TOOLS = (
    "retool.rl.agent.tools",
    "retool.rl.tools",
)
ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"

MAKE_DATA = """
import json, sys
from pathlib import Path
from examples.quickstart import data, model
problems = data.make_problems(40, seed=0)
folder = Path(sys.argv[1])
data.write_parquet(folder / "train.parquet", problems)
texts = [m["content"] for p in problems for m in data.to_row(p, "t")["messages"]]
tokenizer = model.train_tokenizer([*texts, json.dumps(data.TOOL)])
model.write_tokenizer(folder / "model", tokenizer, (Path(sys.argv[2])).read_text())
model.write_model(folder / "model", tokenizer, seed=0)
rows = [
    {
        "data_source": "shop",
        "prompt": [{"role": "user", "content": p[0].text}],
        "reward_model": {"ground_truth": str(p[0].answer)},
    }
    for p in problems
]
(folder / "prompts.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""

REWARD = '''
def digits(data_source, solution_str, ground_truth, extra_info=None):
    """The share of digits in what was said: something that a random model has more or less of."""
    return sum(c.isdigit() for c in solution_str) / max(1, len(solution_str))
'''

# name → (command, processes, overrides)
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "SFT, 1 process": ("sft", 1, ("data.shuffle=true",)),
    "SFT, packs cut for two": ("sft", 2, ("model.enable_gradient_checkpointing=true",)),
    "SFT, sequence-parallel 2": ("sft", 2, ("ulysses_sequence_parallel_size=2",)),
    "RL, 1 process": ("rl", 1, (f"{ACTOR}.use_kl_loss=true", f"{ACTOR}.entropy_coeff=0.01")),
    "RL, 2 processes": ("rl", 2, (f"{ACTOR}.clip_ratio_high=0.28", f"{ACTOR}.clip_ratio_c=10.0")),
    "RL, sequence-parallel 2": ("rl", 2, (f"{ACTOR}.ulysses_sequence_parallel_size=2",)),
    "RL, GSPO": ("rl", 1, (f"{ACTOR}.policy_loss.loss_mode=gspo",)),
}


def overrides(command: str, data: Path, out: Path) -> list[str]:
    """What every run of a command is asked for."""
    if command == "sft":
        return [
            f"data.train_files={data}/train.parquet",
            f"model.partial_pretrain={data}/model",
            f"trainer.default_local_dir={out}",
            "data.train_batch_size=4",
            "data.micro_batch_size_per_gpu=2",
            "data.num_workers=0",
            "optim.lr=1e-3",
            "trainer.total_training_steps=6",
            "trainer.save_freq=3",
        ]
    return [
        f"data.train_files={data}/prompts.jsonl",
        f"actor_rollout_ref.model.path={data}/model",
        f"trainer.default_local_dir={out}",
        "data.train_batch_size=4",
        "data.max_prompt_length=400",
        "data.max_response_length=48",
        f"{ACTOR}.ppo_mini_batch_size=2",
        f"{ACTOR}.optim.lr=1e-3",
        f"{ROLLOUT}.n=4",
        f"{ROLLOUT}.max_num_seqs=16",
        f"{ROLLOUT}.multi_turn.enable=true",
        f"{ROLLOUT}.multi_turn.max_assistant_turns=2",
        f"{ROLLOUT}.multi_turn.tool_config_path={data}/tools.yaml",
        f"custom_reward_function.path={data}/reward.py",
        "custom_reward_function.name=digits",
        "reward_model.num_workers=1",
        "trainer.total_training_steps=3",
        "trainer.save_freq=-1",
    ]


def run(tree: Path, name: str, data: Path, out: Path) -> list[dict[str, Any]]:
    """The metrics of one run of `RUNS` by the code in `tree`."""
    command, processes, more = RUNS[name]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    words = [
        sys.executable,
        *launcher,
        "-m",
        f"retool.{command}",
        *overrides(command, data, out),
        *more,
    ]
    done = subprocess.run(words, env=environment(tree), cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{name} in {tree} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [dict(numbers(json.loads(line))) for line in lines]


def numbers(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a line of metrics says that the same computation always says."""
    for name, value in entry.items():
        if not any(part in name for part in MEASURED):
            yield name, value


def environment(tree: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def differences(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """Each number that isn't bit for bit the same: line, name, before, after.

    What wasn't logged before is no difference: see `new_names`.
    """
    if len(before) != len(after):
        return [f"{len(before)} lines of metrics before, {len(after)} now"]
    found = []
    for index, (then, now) in enumerate(zip(before, after, strict=True)):
        for name in sorted(then):
            if repr(then[name]) != repr(now.get(name)):
                found.append(f"line {index}: {name} was {then[name]}, is {now.get(name)}")
    return found


def new_names(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[str]:
    """What is logged now and wasn't before."""
    return sorted(set().union(*after) - set().union(*before))


def make_data(tree: Path, folder: Path) -> None:
    """Rows, a tiny model, a reward: made by the code before, read by both."""
    folder.mkdir(parents=True)
    template = next((tree / "retool" / "data").rglob("hermes.jinja"))
    words = [sys.executable, "-c", MAKE_DATA, str(folder), str(template)]
    subprocess.run(words, env=environment(tree), cwd=tree, check=True)
    (folder / "reward.py").write_text(REWARD)


def importable(tree: Path, module: str) -> bool:
    """Whether the code in `tree` has a file or a folder for `module`."""
    path = tree / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def runs_of(
    tree: Path, data: Path, out: Path, names: Sequence[str], jobs: int
) -> dict[str, list[dict[str, Any]]]:
    """The metrics of all runs by the code in `tree`."""
    module = next(name for name in TOOLS if importable(tree, name))
    tools = (
        f"tools: [{{class_name: {module}.CodeInterpreter, config: {{num_workers: 1, default_timeout: "
        f"10}}}}]\n"
    )
    (data / "tools.yaml").write_text(tools)
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(
            lambda name: run(tree, name, data, out / name.replace(" ", "_").replace(",", "")), names
        )
        return dict(zip(names, found, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="the commit to compare with")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--keep",
        type=Path,
        help="keep the older revision's numbers here, and read them where they are",
    )
    asked = parser.parse_args()
    names = [name for name in RUNS if asked.only in name]
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        return compare(Path(folder), names, asked)


def compare(folder: Path, names: Sequence[str], asked: argparse.Namespace) -> int:
    keep = asked.keep or folder / "kept"
    if not (keep / "metrics.json").exists():
        tree = folder / "before"
        subprocess.run(
            ["git", "worktree", "add", "--detach", "-f", str(tree), asked.revision],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        try:
            make_data(tree, keep / "data")
            metrics = runs_of(
                tree,
                keep / "data",
                folder / "then",
                list(RUNS) if asked.keep else names,
                asked.jobs,
            )
            (keep / "metrics.json").write_text(json.dumps(metrics))
        finally:
            subprocess.run(
                ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True
            )
    before = json.loads((keep / "metrics.json").read_text())
    after = runs_of(ROOT, keep / "data", folder / "now", names, asked.jobs)
    changed = 0
    print(
        f"| run | metrics lines | numbers | different from {asked.revision} |\n|---|---:|---:|---:|"
    )
    for name in names:
        found = differences(before[name], after[name])
        changed += len(found)
        print(f"| {name} | {len(after[name])} | {sum(map(len, after[name]))} | {len(found)} |")
        for line in found[:5]:
            print(f"    {line}")
        for new in new_names(before[name], after[name]):
            print(f"    new: {new}")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
