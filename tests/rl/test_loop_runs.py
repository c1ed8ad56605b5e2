"""Runs with a loop of the user's: what it samples is learnt from, what breaks is counted, and a run
that is killed goes on as if nothing had been.
"""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from retool.config import read
from retool.data.packing import Budget
from retool.parallel.collectives import gather_objects
from retool.parallel.mesh import make_mesh
from retool.preflight.world import read_world
from retool.rl.__main__ import main
from retool.rl.agent.loops.play import OwnLoop
from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.api import _with_loop
from retool.rl.config import RLConfig
from retool.rl.metrics import tool_metrics
from retool.rl.objective.batching import Row, rank_batches
from retool.rl.preflight.plan import Held, RLReport
from retool.rl.preflight.world import with_loop
from retool.rl.state import regroup
from retool.rl.types import TOOL_FAILURE, trainable
from tests import warm
from tests.faults import planned
from tests.ranks import run_ranks
from tests.rl.agent import own_loops
from tests.rl.agent.test_rollout import parts_of, prompt_of
from tests.rl.killed import kill_in_mid_step, told
from tests.rl.test_command import ARR, TORCHRUN, steps, words
from tests.rl.test_environment_runs import brief

__all__ = ["brief"]
LOOPS = Path(__file__).parent / "agent" / "own_loops.py"
LOOP = f"{ARR}rollout.agent"


def played(work: Path, out: Path, name: str, *more: str) -> list[str]:
    """A small run with a loop of `own_loops`, rewarded by what that gives."""
    given = [word for word in words(work, out) if not word.startswith("custom_reward_function")]
    return [
        *given,
        "reward_model.name=environment",
        f"{LOOP}.path={LOOPS}",
        f"{LOOP}.name={name}",
        "data.max_response_length=60",
        "trainer.total_training_steps=2",
        *more,
    ]


def test_a_run_learns_from_every_sequence_and_counts_what_breaks(brief, tmp_path) -> None:
    run = played(
        brief, tmp_path / "run", "compacting_or_breaking", "trainer.total_training_steps=1"
    )
    assert main(run) == 0
    (entry,) = steps(tmp_path / "run")
    assert entry["stop/infrastructure"] == 4 and entry["agent/sequences/max"] == 3
    assert entry["training/rollout_logp_diff_mean"] < 1e-5 and entry["actor/grad_norm"] > 0
    assert (
        entry["environment/reward/mean"] == entry["critic/score/mean"] > 0
        and entry["num_turns/max"] >= 6
    )
    (file,) = (tmp_path / "run" / "report").glob("train_*.jsonl*")
    assert len(file.read_text().splitlines()) == 8


# --- two ranks ---


def on_a_rank(renderer: Any) -> dict[str, Any]:
    """What a step makes of `breaking` and of sequences of uneven number, on this rank."""
    mesh = make_mesh(device="cpu")
    own = OwnLoop(own_loops.breaking, "breaking", 0.3, 1000)
    parts, engine = parts_of(renderer, {0: ["a"], 1: ["b"]}, own_loop=own)
    engine.any_group = True
    prompts = [prompt_of(renderer, index) for index in range(2)]
    mine = [(prompt, k) for prompt in prompts[mesh.rank :: 2] for k in range(4)]
    found = asyncio.run(roll_out(parts, mine, Sampling(), 0))
    own.threads.end()
    members = [member for part in gather_objects(found, mesh.world_group) for member in part or []]
    groups = regroup(prompts, members)
    # As many sequences as the rank's number says
    sizes = [3, 5]
    cut = tuple(range(2, 2 * sizes[mesh.rank], 2))
    length = 2 * sizes[mesh.rank]
    rows = [
        Row(*(values[:length] for values in (row.tokens, row.mask, *[row.logp] * 4)), cuts=cut)
        for row in [member.trajectory for member in members[:1]]
    ]
    everyone = [one for part in gather_objects(rows, mesh.world_group) for one in part]
    batches = rank_batches(everyone, "token-mean", 10, mesh.rank, 2, 1, Budget(4))
    return {
        "metrics": tool_metrics(members),
        "told": sorted({str(member.info.get(TOOL_FAILURE)) for member in members if member.lost}),
        "trainable": len(trainable(groups)),
        "batches": len(batches),
        "sequences": sum(batch.pack.real_tokens // 2 for batch in batches),
    }


def test_two_ranks_count_what_breaks_and_share_uneven_sequences(renderer_of) -> None:
    first, second = run_ranks(on_a_rank, 2, renderer_of("hermes"))
    for found in (first, second):
        assert found["metrics"]["stop/infrastructure"] == 6
        assert found["metrics"]["stop/no_call"] == 2
        assert found["trainable"] == 0, "a single one of several is compared with nobody"
        raised, late, nothing = found["told"]
        assert "OSError: the notebook is away (" in raised and "returned None" in nothing
        assert "within 0.3 s" in late
    assert first["batches"] == second["batches"] == 2
    assert first["sequences"] + second["sequences"] == 8


@pytest.mark.slow
def test_a_run_on_two_ranks_loses_what_breaks_and_nothing_else(brief, tmp_path) -> None:
    more = [f"{LOOP}.timeout_seconds=2", f"{ARR}rollout.max_lost_share=1.0", f"{ARR}rollout.n=8"]
    run = [*TORCHRUN, *played(brief, tmp_path / "run", "breaking", *more)]
    done = warm.run(run, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for entry in steps(tmp_path / "run"):
        assert entry["stop/infrastructure"] == 24
        assert sum(entry[f"stop/{why}"] for why in ("no_call", "length", "eos")) == 8
    assert "agent.breaking: " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sp", [1, 2])
def test_a_run_on_two_ranks_trains_what_one_trains(brief, tmp_path, sp) -> None:
    """Sequences in any number, on any layout: the same losses."""
    more = ["trainer.deterministic=true", f"{ARR}actor.ppo_max_token_len_per_gpu=400"]
    one = played(brief, tmp_path / "one", "compacting", *more)
    assert main(one) == 0
    two = played(
        brief,
        tmp_path / "two",
        "compacting",
        *more,
        f"{ARR}actor.ulysses_sequence_parallel_size={sp}",
    )
    done = warm.run([*TORCHRUN, *two], timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert ours["agent/sequences/max"] == 3
        for name in ("actor/pg_loss", "actor/grad_norm", "critic/score/mean", "actor/entropy"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_killed_in_mid_step_a_run_with_a_loop_goes_on_as_if_nothing_had_been(
    brief, tmp_path
) -> None:
    common = [
        "trainer.deterministic=true",
        "trainer.total_training_steps=4",
        "trainer.save_freq=1",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=score",
        "data.gen_batch_size=5",
    ]
    whole = [*TORCHRUN, *played(brief, tmp_path / "whole", "compacting", *common)]
    subprocess.run(whole, check=True, capture_output=True, timeout=270)
    out = tmp_path / "killed"
    command = [*TORCHRUN, *played(brief, out, "compacting", *common)]
    kill_in_mid_step(command, out, (1, 3), patience=250)
    subprocess.run(command, check=True, capture_output=True, timeout=270)
    whole_run, killed_run = (told(tmp_path / folder, "tool/") for folder in ("whole", "killed"))
    assert whole_run == killed_run and any(entry["agent/sequences/max"] == 3 for entry in whole_run)


# --- before the run, and from Python ---


@pytest.mark.slow
def test_preflight_finds_the_loop_and_shows_it(brief, tmp_path, capfd) -> None:
    said = planned(main, played(brief, tmp_path / "run", "compacting"), capfd)
    assert "loop: compacting in" in said and "plays every trajectory" in said


def test_a_program_gives_its_function_or_names_one(tmp_path) -> None:
    def report(keys: dict[str, Any], held: Held) -> RLReport:
        config = read(RLConfig, [], options=keys).config
        return with_loop(RLReport(config, read_world(1, 1, True, {})[0]), held)

    keys: dict[str, Any] = {}
    held = _with_loop(own_loops.compacting, keys, Held())
    assert keys == {f"{LOOP}.path": "<program>", f"{LOOP}.name": "compacting"}
    found = report(keys, held)
    assert found.loop is not None and found.loop.load() is own_loops.compacting
    named: dict[str, Any] = {}
    assert _with_loop(f"{LOOPS}/compacting", named, Held()) == Held()
    assert report(named, Held()).loop is not None
    for given, words_of in {"no_such": "it has", "Path": "has no 'Path'"}.items():
        (fault,) = report({**named, f"{LOOP}.name": given}, Held()).faults
        assert fault.where == LOOP and words_of in fault.problem
