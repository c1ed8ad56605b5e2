"""Runs in an environment: what it gives is learnt from, what breaks is counted, and a run that is
killed goes on as if nothing had been.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import retool
from retool.config import read
from retool.preflight.world import read_world
from retool.rl.__main__ import main
from retool.rl.agent.environments.load import find_environment
from retool.rl.api import _with_world
from retool.rl.config import RLConfig
from retool.rl.preflight.plan import Held, RLReport
from retool.rl.preflight.world import with_environment
from tests.faults import planned
from tests.rl.agent.worlds import Digits
from tests.rl.killed import kill_in_mid_step, told
from tests.rl.test_command import ARR, TORCHRUN, steps, words

WORLDS = Path(__file__).parent / "agent" / "worlds.py"
WORLD = f"{ARR}rollout.multi_turn.environment"


@pytest.fixture(scope="module")
def brief(work, tmp_path_factory) -> Path:
    """`work` with a model whose turns end after ten tokens or so.

    One dimension is alike for all tokens, so that the output has it too; the end of a turn has more
    of it.
    """
    folder = tmp_path_factory.mktemp("brief") / "work"
    shutil.copytree(work, folder)
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    end = AutoTokenizer.from_pretrained(folder / "model").convert_tokens_to_ids("<|im_end|>")
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] = 20.0
    embedding[end, 0] = 20.8
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def played(work: Path, out: Path, *more: str) -> list[str]:
    """A small run in `Digits`, rewarded by it."""
    given = [word for word in words(work, out) if not word.startswith("custom_reward_function")]
    return [
        *given,
        f"{WORLD}.path={WORLDS}",
        f"{WORLD}.name=Digits",
        "data.max_response_length=120",
        "trainer.total_training_steps=2",
        *more,
    ]


def calls_of(log: Path) -> dict[str, Counter[str]]:
    """How often each world was asked for what."""
    found: dict[str, Counter[str]] = {}
    for line in log.read_text().splitlines():
        what, world = line.split()
        found.setdefault(world, Counter())[what] += 1
    return found


def test_a_run_learns_from_what_its_world_gives_and_counts_what_breaks(brief, tmp_path) -> None:
    log = tmp_path / "calls"
    more = [f"{WORLD}.kwargs.log={log}", f"{WORLD}.kwargs.broken=step"]
    assert main(played(brief, tmp_path / "run", *more, "trainer.total_training_steps=1")) == 0
    entries = steps(tmp_path / "run")
    for entry in entries:
        assert 1 <= entry["stop/infrastructure"] <= 4 and entry["stop/done"] > 2
        assert entry["critic/score/max"] == entry["environment/reward/max"] > 0
        assert entry["num_turns/max"] == 6 and entry["actor/grad_norm"] > 0
    calls = calls_of(log)
    assert len(entries) == 1 and len(calls) == 1 + 16, "preflight's, and a step's"
    seeds = Counter(world.split("/")[0] for world in calls)
    assert sorted(seeds.values()) == [1, 4, 4, 4, 4], "a question's answers have one seed"
    assert all(each["reset"] == each["close"] == 1 for each in calls.values())


@pytest.mark.slow
def test_preflight_tries_a_world_and_shows_it(brief, tmp_path, capfd) -> None:
    more = [f"{WORLD}.kwargs={{broken: reset}}"]
    broken = tmp_path / "broken.py"
    broken.write_text(
        WORLDS.read_text().replace("self.sample == 1", "self.broken").replace("Digits", "Broken")
    )
    run = played(brief, tmp_path / "run", *more, f"{WORLD}.path={broken}", f"{WORLD}.name=Broken")
    assert main(["--check", *run]) == 1
    said = capfd.readouterr().out
    assert WORLD in said and "reset: OSError: the game server is away" in said
    said = planned(main, played(brief, tmp_path / "run"), capfd)
    assert "reward: environment" in said and "environment: Digits in" in said


BROKEN = ("reset", "step", "close")


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_two_ranks_lose_what_breaks_and_hangs_and_nothing_else(brief, tmp_path, broken) -> None:
    """Sample 1 of each question breaks and sample 2 hangs: half of the samples are left."""
    log = tmp_path / "calls"
    kwargs = [f"{WORLD}.kwargs.{key}" for key in (f"log={log}", f"broken={broken}", "hangs=true")]
    more = [*kwargs, f"{WORLD}.timeout_seconds=2", f"{ARR}rollout.max_lost_share=0.6"]
    run = subprocess.run(
        [*TORCHRUN, *played(brief, tmp_path / "run", *more)],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert run.returncode == 0, run.stderr
    lost = [entry["stop/infrastructure"] for entry in steps(tmp_path / "run")]
    if broken == "step":  # a turn that doesn't end isn't told the world
        assert all(4 <= count <= 8 for count in lost)
    else:
        assert lost == [8, 8]
    calls = calls_of(log)
    assert len(calls) == 1 + 2 * 16
    assert all(each["reset"] == each["close"] == 1 for each in calls.values())
    assert "the game server is away" in run.stderr or "gave no answer within 2 s" in run.stderr


@pytest.mark.slow
def test_killed_in_mid_step_a_run_in_a_world_goes_on_as_if_nothing_had_been(
    brief, tmp_path
) -> None:
    common = [
        "trainer.deterministic=true",
        "trainer.total_training_steps=4",
        "trainer.save_freq=1",
        "algorithm.filter_groups.enable=true",
        "data.gen_batch_size=5",
    ]
    whole = [*TORCHRUN, *played(brief, tmp_path / "whole", *common)]
    subprocess.run(whole, check=True, capture_output=True, timeout=170)
    out = tmp_path / "killed"
    command = [*TORCHRUN, *played(brief, out, *common)]
    kill_in_mid_step(command, out, (1, 3))
    subprocess.run(command, check=True, capture_output=True, timeout=170)
    whole_run, killed_run = (told(tmp_path / folder, "tool/") for folder in ("whole", "killed"))
    assert whole_run == killed_run and any(entry["stop/done"] for entry in whole_run)


@pytest.mark.slow
def test_in_the_sandbox_a_world_gives_what_it_gives_in_the_process(brief, tmp_path) -> None:
    same_bits = "trainer.deterministic=true"
    apart = [f"{WORLD}.sandboxed=true", f"{ARR}rollout.multi_turn.tool_isolation=best_effort"]
    assert main(played(brief, tmp_path / "here", same_bits)) == 0
    assert main(played(brief, tmp_path / "apart", same_bits, *apart)) == 0
    for here, there in zip(steps(tmp_path / "here"), steps(tmp_path / "apart"), strict=True):
        same = ("environment/reward/mean", "critic/score/mean", "stop/done", "num_turns/mean")
        assert [here[name] for name in same] == pytest.approx([there[name] for name in same])
        assert there["stop/infrastructure"] == 0 < there["stop/done"]


# --- from Python ---


def test_a_program_gives_its_class_or_names_one(tmp_path) -> None:
    keys: dict[str, Any] = {}
    held = _with_world(Digits, keys, Held())
    assert keys == {f"{WORLD}.path": "<program>", f"{WORLD}.name": "Digits"}
    report = read(RLConfig, [], options={**keys, f"{WORLD}.kwargs": {"broken": "step"}})
    report = with_environment(RLReport(report.config, read_world(1, 1, True, {})[0]), held)
    assert report.environment is not None and not report.faults
    made = report.environment.load()()
    assert isinstance(made, Digits) and made.broken == "step"
    assert _with_world(None, keys, held) is held
    _with_world("openenv:http://127.0.0.1:8000", keys, Held())
    assert keys == {f"{WORLD}.path": None, f"{WORLD}.name": "openenv:http://127.0.0.1:8000"}
    named = _with_world("some/games.py/Guess", keys, Held())
    assert keys == {f"{WORLD}.path": "some/games.py", f"{WORLD}.name": "Guess"}
    assert named.environment is None
    with pytest.raises(ValueError, match="gave its own class 'Digits', which is in no file"):
        find_environment("<program>", "Digits", {})


@pytest.mark.slow
def test_a_program_s_class_is_what_the_command_s_file_is(brief, tmp_path) -> None:
    assert main(played(brief, tmp_path / "command")) == 0
    rows = [json.loads(line) for line in (brief / "train.jsonl").read_text().splitlines()]
    result = retool.rl(
        brief / "model",
        rows,
        environment=Digits,
        batch_size=4,
        num_generations=4,
        max_prompt_length=400,
        max_completion_length=120,
        learning_rate=1e-2,
        max_steps=2,
        output_dir=tmp_path / "program",
        options={f"{ARR}rollout.max_num_seqs": 16, "reward_model.num_workers": 1},
        quiet=True,
    )
    (last,) = steps(tmp_path / "command")[1:]
    assert result.last["environment/reward/mean"] == pytest.approx(
        last["environment/reward/mean"], rel=1e-6
    )
    assert result.last["critic/score/mean"] == pytest.approx(last["critic/score/mean"], rel=1e-6)
