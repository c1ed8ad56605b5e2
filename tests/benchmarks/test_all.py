"""Every benchmark runs at a tiny size, leaves each row as soon as it has it, and survives a row
that fails.
"""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import warm
from tests.ranks import run_ranks

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ALONE = {  # one process; arguments → rows
    "agent_loop": ("--trajectories 8 --repeats 1 --answers 20,3000", 4),
    "checkpoint": ("--shape tiny --repeats 1 --rows 0 1 2", 3),
    "borrowed": ("--shape tiny --tokens 64 --length 16 --repeats 1", 6),
    "attention": ("--heads 4/2x16 --packs 32×1k,sorted --repeats 1", 2),
    "decode": ("--shape tiny --at 4x20 --steps 1", 1),
    "fsdp_overlap": ("--scale 2048", 3),
    "gated": ("--shapes 8x16x8 --repeats 1", 2),
    "host": ("--shape narrow --layers 1 --tokens 16 --repeats 1 --compile no", 1),
    "logprobs": ("--tokens 512 --vocab 4096 --dim 32 --repeats 1", 7),
    "long_context": ("--lengths 64,128", 4),
    "memory": ("--shape tiny --scale 1024 --rows 0.5b-none,0.5b-offload", 2),
    "packing": ("--steps 1", 8),
    "rl_step": (
        "--shape tiny --prompts 2 --samples 2 --prompt 40 --response 4 --warm-up 0 --repeats 1 --ways= --gpus 1 --device cpu",
        1,
    ),
    "rollout": ("--shape tiny --sequences 4 --prompt 12 --new 6 --repeats 1 --group 2 --peers=", 1),
    "rollout_host": ("--sequences 4 --prompt 16 --calls 1 --tokens 20 --repeats 1 --rate 0,100", 2),
    "sandbox": ("--seconds 0.05 --callers 1 --calls 0", 6),
    "sft": ("--shape tiny --scale 1024 --repeats 1 --rows full,padded", 2),
    "traffic": ("--models qwen2.5-0.5b --gpus 16 --gbit 400", 3),
    "ulysses": ("--shape tiny --lengths 32 --repeats 1", 2),
}
TOGETHER = {  # two, as torchrun starts them
    "checkpoint": ("--shape tiny --repeats 1", 5),
    "fsdp_overlap": ("--scale 1024 --sp 2", 3),
    "long_context": ("--lengths 64", 3),
    "memory": ("--shape tiny --scale 1024 --rows 0.5b-none,0.5b-held", 2),
    "sft": ("--shape tiny-experts --scale 1024 --repeats 1 --rows full,experts-4k-ep2", 2),
    "ulysses": ("--shape tiny --lengths 32 --repeats 1", 4),
}


def benchmark(name: str) -> ModuleType:
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["lines"]


def rows_of(text: str) -> list[list[str]]:
    """Cells of everything below a table's head."""
    return [
        line.strip("|").split("|")
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("|  |", "| tokens", "| pack |"))
    ]


# The slowest to start are tried with the slow tests.
SLOW = ("borrowed", "fsdp_overlap", "rl_step", "sandbox")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ALONE]
)
def test_runs_and_leaves_its_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script as users start it: `python benchmarks/NAME.py`, but for the interpreter, which is
    there already.
    """
    words, rows = ALONE[name]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", warm.Popen)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [name, *words.split(), "--json", str(tmp_path / "out.json")])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert len(lines := lines_of(tmp_path / "out.json")) == rows
    assert not [line for line in lines if "failed" in line]
    assert len(rows_of(capsys.readouterr().out)) >= rows


def fail_at(module: ModuleType, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second measurement raises."""
    inner = module.measure
    calls = []

    def measure(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return inner(*args)

    monkeypatch.setattr(module, "measure", measure)


def test_a_row_that_fails_says_why_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark("logprobs")
    monkeypatch.setattr(
        sys,
        "argv",
        ["logprobs", *ALONE["logprobs"][0].split(), "--json", str(tmp_path / "out.json")],
    )
    fail_at(module, MemoryError("no room\nat all"), monkeypatch)
    module.main()
    lines = lines_of(tmp_path / "out.json")
    assert [line.get("failed") for line in lines] == [None, "MemoryError: no room", *[None] * 5]
    assert rows_of(capsys.readouterr().out)[1][:2] == [" dense ", " failed: MemoryError: no room "]


def test_killed_it_has_left_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = benchmark("logprobs")
    monkeypatch.setattr(
        sys,
        "argv",
        ["logprobs", *ALONE["logprobs"][0].split(), "--json", str(tmp_path / "out.json")],
    )
    fail_at(module, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    assert [line["name"] for line in lines_of(tmp_path / "out.json")] == ["three products"]
    assert len(rows_of(capsys.readouterr().out)) == 1


def attempts(rank_that_fails: int) -> tuple[dict[str, Any], str]:
    """A row that fails on one rank, then one that the other rank never comes back from."""
    from retool.parallel.mesh import make_mesh

    table = benchmark("table")
    mesh = make_mesh()

    def row() -> dict[str, Any]:
        if mesh.rank == rank_that_fails:
            raise MemoryError("no room")
        return {"ms": 1}

    first = table.attempt(row)
    begin = time.monotonic()
    try:
        table.attempt(lambda: time.sleep(4 * (mesh.rank != rank_that_fails)) or {}, patience=1)
    except RuntimeError as error:
        return first, f"{time.monotonic() - begin < 3} {str(error)[:80]}"
    return first, "nothing"


@pytest.mark.slow
def test_ranks_agree_on_a_failure_and_wait_for_none_that_is_lost() -> None:
    (a, _), (b, waited) = run_ranks(attempts, 2, 1)
    assert a == b == {"failed": "rank 1: MemoryError: no room"}
    assert waited.startswith("True")


LOGS = {
    "[rank0]:   File 'a.py', line 3\n[rank0]: torch.OutOfMemoryError: CUDA is full\nRuntimeError: b\n"
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: x": "torch.OutOfMemoryError: CUDA is full",
    "warning: an Error is near\nerror: rollout.n is 1\nChildFailedError: x": "error: rollout.n is 1",
    "(EngineCore pid=77) ERROR 11-30 10:00:00 [core.py:11] ValueError: no room\nlate": "ValueError: no room",
    "Killed\n\n": "Killed",
    "": "it said nothing",
}


def test_a_job_that_failed_shows_its_cause() -> None:
    cause = benchmark("rl_step").cause
    assert {log: cause(log) for log in LOGS} == LOGS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    benchmark("rl_step").write_model(folder, "tiny")
    return folder


def test_parity_of_a_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.quickstart.data import make_problems, write_questions

    write_questions(tmp_path / "questions.parquet", make_problems(2, 0))
    words = [
        "--model",
        model,
        "--data",
        tmp_path / "questions.parquet",
        "--new",
        6,
        "--json",
        tmp_path / "out.json",
    ]
    monkeypatch.setattr(sys, "argv", ["parity", *map(str, words)])
    benchmark("parity").main()
    greedy, ours, theirs = lines_of(tmp_path / "out.json")
    assert greedy["agree"] == greedy["of"] == 12 and max(ours["max"], theirs["max"]) < 1e-5


def questions(folder: Path) -> None:
    """train.parquet and test.parquet for the learning run."""
    from examples.quickstart.data import make_problems, write_parquet

    for name, count in (("train", 8), ("test", 2)):
        write_parquet(folder / f"{name}.parquet", make_problems(count, count))


def test_rendering_of_conversations(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions(tmp_path)
    words = [tmp_path / "train.parquet", model, "--repeats", 1, "--json", tmp_path / "out.json"]
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["rendering", *map(str, words)])
    runpy.run_path(str(BENCHMARKS / "rendering.py"), run_name="__main__")
    own, hermes = lines_of(tmp_path / "out.json")
    assert (own["template"], hermes["template"]) == ("its own", "hermes")
    assert min(hermes[way] for way in ("transformers", "render", "dataset", "audit")) > 0


LEARN = "--gpus 1 --device cpu --questions 2 --response 16 --sft-steps 1 --sft-batch 2 --tokens 2048 --prompts 2 --samples 2 --updates 1 --test-every 1"


def test_no_benchmark_is_left_out() -> None:
    elsewhere = {
        "table",
        "kernels",
        "parity",
        "learn",
        "peer_sft",
        "peers",
        "published",
        "rendering",
        "same_numbers",
        "workloads",
    }  # no benchmark, or with a test of its own
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == {*ALONE, *elsewhere}


def test_a_step_that_samples_nothing_has_no_share_of_right_answers(tmp_path: Path) -> None:
    """Its groups are left over; the share is that of all questions, however many a step had."""
    shares = [(30, 0.2), (0, None), (10, 0.4), (0, 0.0), (8, 1.0)]
    entries = [
        {"step": i, "timing_s/step": 2.0, "filter/groups_sampled": n, "tool/calls": 7}
        | ({} if share is None else {"filter/metric_mean": share})
        for i, (n, share) in enumerate(shares)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    said = benchmark("learn").progress(tmp_path)
    assert (
        said.startswith("5 steps of DAPO, 2.0 s each: 37.5% of the sampled answers")
        and "35 tool" in said
    )
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "timing_s/step": 2.0}\n')
    assert "right" not in benchmark("learn").progress(tmp_path), "without DAPO's filter"


@pytest.mark.slow
def test_the_learning_run_in_three_calls(model: Path, tmp_path: Path, repository: Path) -> None:
    questions(tmp_path)
    command = [
        sys.executable,
        str(BENCHMARKS / "learn.py"),
        "--model",
        str(model),
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "run"),
        *LEARN.split(),
    ]
    trained = ["the model", "after SFT", "and 1 steps of DAPO"]
    for parts, steps, rows in (
        ("before", 1, trained[:1]),
        ("sft,dapo", 1, trained),
        ("dapo", 2, [*trained, "and 2 steps of DAPO"]),
    ):
        # A random model's answers are all wrong: nothing would be left
        trains = [
            "--rl-keys",
            "algorithm.filter_groups.enable=false",
        ]
        ran = subprocess.run(
            [
                *command,
                *trains,
                "--only",
                parts,
                "--rl-steps",
                str(steps),
                "--json",
                str(tmp_path / "out.json"),
            ],
            cwd=repository,
            capture_output=True,
            text=True,
            timeout=170,
        )
        lines = lines_of(tmp_path / "out.json")
        assert [line["name"] for line in lines] == rows, ran.stderr[-2000:]
        assert len(rows_of(ran.stdout)) == len(rows) and all(
            line["questions"] == 2 for line in lines
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
def test_runs_on_two_ranks(name: str, tmp_path: Path, repository: Path) -> None:
    words, rows = TOGETHER[name]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(BENCHMARKS / f"{name}.py"),
    ]
    ran = subprocess.run(
        [*command, *words.split(), "--json", str(tmp_path / "out.json")],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(lines := lines_of(tmp_path / "out.json")) == rows and not [
        line for line in lines if "failed" in line
    ]


@pytest.mark.slow
def test_a_peer_has_a_process_and_a_time_of_its_own(tmp_path: Path, repository: Path) -> None:
    command = [
        sys.executable,
        str(BENCHMARKS / "rollout.py"),
        *"--shape tiny --sequences 4 --prompt 12 --new 6 --repeats 1".split(),
    ]
    out = str(tmp_path / "out.json")
    subprocess.run(
        [*command, "--json", out], cwd=repository, check=True, capture_output=True, timeout=150
    )
    lines = lines_of(tmp_path / "out.json")
    assert [line["name"] for line in lines] == [
        "retool",
        "transformers generate_batch",
        "transformers generate",
    ]
    assert all(len(line["all"]) == 1 and line["all"][0] > 0 for line in lines)
    ran = subprocess.run(
        [*command, "--peer-seconds", "0.5", "--json", out],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert [line.get("failed") for line in lines_of(tmp_path / "out.json")] == [
        None,
        *["stopped after 0 s"] * 2,
    ]
    assert len(rows_of(ran.stdout)) == 3
