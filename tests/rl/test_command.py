"""`python -m retool.rl` as users start it: a run that learns, the published overrides on two ranks,
resuming, stopping, faults.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retool.engine import memory
from retool.metrics import collapse, read_jsonl
from retool.rl import train
from retool.rl.__main__ import main
from retool.rl.objective.filter import UnusableSamples
from retool.rl.objective.policy import update_step
from tests import warm
from tests.rl.killed import kill_in_mid_step, steps, told
from tests.rl.test_config import PUBLISHED

REWARDS = Path(__file__).parent / "reward" / "reward_functions.py"
ARR = "actor_rollout_ref."
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nnodes=1",
    "--nproc_per_node=2",
    "-m",
    "retool.rl",
]


def run_on_gpus(given: list[str]) -> str:
    """What `retool.rl` printed, of a process on each GPU that is here, up to two."""
    gpus = min(2, torch.cuda.device_count())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={gpus}", "-m", "retool.rl"]
    done = subprocess.run(
        [*command, *given],
        capture_output=True,
        text=True,
        timeout=170,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def words(work: Path, out: Path, *more: str) -> list[str]:
    """A small run without tools that rewards digits."""
    return [
        f"data.train_files={work}/train.jsonl",
        f"{ARR}model.path={work}/model",
        f"trainer.default_local_dir={out}",
        "data.train_batch_size=4",
        "data.max_prompt_length=400",
        "data.max_response_length=12",
        f"{ARR}rollout.n=4",
        f"{ARR}actor.ppo_mini_batch_size=4",
        f"{ARR}actor.optim.lr=1e-2",
        f"{ARR}rollout.max_num_seqs=16",
        "trainer.save_freq=-1",
        f"custom_reward_function.path={REWARDS}",
        "custom_reward_function.name=digits",
        "reward_model.num_workers=1",
        *more,
    ]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(
        folder / f"global_step_{step}" / "actor" / "model_world_size_1_rank_0.pt", weights_only=True
    )


def test_it_learns_what_is_rewarded(work, tmp_path) -> None:
    assert (
        main(
            words(
                work,
                tmp_path / "run",
                "trainer.total_training_steps=14",
                f"{ARR}rollout.n=8",
                f"{ARR}actor.ppo_mini_batch_size=2",
                f"data.val_files={work}/val.jsonl",
                f"{ARR}rollout.val_kwargs.n=2",
            )
        )
        == 0
    )
    entries = steps(tmp_path / "run")
    scores = [entry["critic/score/mean"] for entry in entries]
    assert [entry["step"] for entry in entries] == list(range(1, 15))
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.15, scores
    assert all(entry["training/rollout_logp_diff_mean"] < 1e-5 for entry in entries)
    assert all(abs(entry["actor/ppo_kl"]) < 0.5 for entry in entries)
    validations = [
        entry
        for entry in read_jsonl(tmp_path / "run" / "metrics.jsonl")
        if "val-core/shop/acc/mean@2" in entry
    ]
    assert [entry["step"] for entry in validations] == [0, 14]
    assert validations[1]["val-aux/shop/score/mean@2"] > validations[0]["val-aux/shop/score/mean@2"]


def test_fp16_brings_sampler_and_trainer_together(work, tmp_path) -> None:
    found = {}
    for dtype in ("bf16", "fp16"):
        assert (
            main(
                words(
                    work,
                    tmp_path / dtype,
                    "trainer.total_training_steps=2",
                    f"{ARR}actor.fsdp_config.param_dtype={dtype}",
                )
            )
            == 0
        )
        found[dtype] = steps(tmp_path / dtype)
    # Of both steps together: what a step's kernels round differs between machines
    for name, most in (
        ("mean", 0.7),
        ("max", 0.5),
    ):
        coarse, fine = (
            sum(entry[f"training/rollout_logp_diff_{name}"] for entry in entries)
            for entries in found.values()
        )
        assert fine < most * coarse
    assert all(
        entry["actor/skipped_updates"] == 0 < entry["actor/grad_norm"] for entry in found["fp16"]
    )


def test_a_run_that_trained_nothing_ends_with_an_error_and_no_export(
    work, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr(
        train, "update_step", lambda *args: replace(update_step(*args), skipped=True)
    )
    assert main(words(work, tmp_path / "run", "trainer.total_training_steps=1")) == 1
    said = capfd.readouterr().err
    assert (
        "nothing was trained" in said and f"python -m retool.checkpoint verify {work}/model" in said
    )
    assert not list((tmp_path / "run").glob("global_step_*"))


NAMES = """actor/{pg_loss,pg_clipfrac,pg_clipfrac_lower,ppo_kl,entropy,grad_norm,lr} critic/{score,rewards,advantages,returns}/{mean,max,min}
{response_length,prompt_length}/{mean,max,min,clip_ratio} num_turns/{mean,max,min} tool/{calls,errors,timeouts,latency,queue_s}
stop/{eos,no_call,done,max_turns,length,infrastructure,aborted} reward/{exceptions,timeouts,killed}
timing_s/{gen,tools,reward,loop,old_log_prob,adv,update_actor,sync_weights,step,testing,save_checkpoint}
perf/{throughput,rollout_tokens_per_second,max_memory_allocated_gb} training/rollout_{logp,probs}_diff_{mean,max,std}
training/rollout_actor_kl_k3""".split()  # and actor/kl_loss, timing_s/ref, filter/* and perf/mfu where there is such a thing


def spelt_out(names: list[str]) -> set[str]:
    """Names with each of the alternatives in their braces."""
    found = set()
    for parts in (re.split(r"\{(.*?)\}", name) for name in names):
        found |= {
            "".join(chosen)
            for chosen in itertools.product(
                *(part.split(",") if i % 2 else [part] for i, part in enumerate(parts))
            )
        }
    return found


def test_the_published_command_on_two_ranks(work, tmp_path, repository) -> None:
    """Every override as published but for paths, sizes and the logger; with sequence-parallel
    training and a split engine.
    """
    out = tmp_path / "run"
    recipe = repository / "examples" / "retool_recipe.py"
    changed = {
        "data.train_files": f"['{work}/train.jsonl']",
        "data.val_files": f"['{work}/val.jsonl']",
        "data.custom_cls.path": recipe,
        "custom_reward_function.path": recipe,
        f"{ARR}model.path": f"{work}/model",
        "data.train_batch_size": 4,
        "data.max_response_length": 24,
        f"{ARR}actor.ppo_mini_batch_size": 2,
        f"{ARR}rollout.n": 2,
        f"{ARR}rollout.val_kwargs.n": 2,
        "trainer.logger": "['console']",
        "trainer.default_local_dir": out,
        f"{ARR}rollout.multi_turn.tool_config_path": f"{work}/tools.yaml",
    }
    keys = {
        **dict(word.split("=", 1) for word in PUBLISHED),
        **changed,
        "trainer.total_training_steps": 1,
        f"{ARR}rollout.max_num_seqs": 8,
        "reward_model.num_workers": 1,
    }
    command = [*TORCHRUN, *(f"{key}={value}" for key, value in keys.items())]
    done = warm.run(command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (
        "engine: rollout.name=vllm means native here" in done.stdout
        and "1 engine(s) of 2" in done.stdout
    )
    (entry,) = steps(out)
    names = spelt_out(NAMES)
    assert len(names) > 60 and names <= set(entry), names - set(entry)
    (validation,) = [
        e
        for e in read_jsonl(out / "metrics.jsonl")
        if e["step"] == 0 and "val-core/shop/acc/mean@2" in e
    ]
    wanted = [
        "val-core/shop/acc/{mean@2,best@2/mean,maj@2/mean}",
        "val-aux/shop/num_turns/{min,max,mean}",
        "val-aux/shop/acc/{std@2,worst@2/mean,best@2/std}",
    ]
    assert spelt_out(wanted) <= set(validation)
    assert entry["stop/length"] + entry["stop/no_call"] + entry["stop/max_turns"] == 8
    actor = out / "global_step_1" / "actor"
    files = {
        f"{kind}_world_size_2_rank_{r}.pt"
        for kind in ("model", "optim", "extra_state")
        for r in (0, 1)
    }
    assert (
        files <= {p.name for p in actor.iterdir()}
        and (out / "latest_checkpointed_iteration.txt").read_text() == "1"
    )
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(actor / "huggingface")
    lines = [
        json.loads(line) for line in (out / "report" / "val_000001.jsonl").read_text().splitlines()
    ]
    assert (
        len(lines) == 6
        and {line["split"] for line in lines} == {"val"}
        and lines[0]["ground_truth"]
    )


@pytest.mark.slow
def test_the_number_of_ranks_changes_nothing(work, tmp_path) -> None:
    """The same tokens are sampled, and the same losses and gradients computed, by one process and
    by two.
    """
    common = [
        "trainer.total_training_steps=3",
        f"{ARR}actor.ppo_mini_batch_size=2",
        f"{ARR}actor.loss_agg_mode=seq-mean-token-mean",
    ]
    assert main(words(work, tmp_path / "one", *common)) == 0
    subprocess.run(
        [*TORCHRUN, *words(work, tmp_path / "two", *common)],
        check=True,
        capture_output=True,
        timeout=170,
    )
    for one, two in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert (
            one["critic/score/mean"] == two["critic/score/mean"]
            and one["response_length/mean"] == two["response_length/mean"]
        )
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/ppo_kl", "actor/entropy"):
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


FILTER = (
    "algorithm.filter_groups.enable=true",
    "algorithm.filter_groups.metric=score",
    "data.gen_batch_size=6",
    "trainer.deterministic=true",
)
SAME = (
    "critic/score/mean",
    "actor/pg_loss",
    "actor/grad_norm",
    "actor/lr",
    "response_length/mean",
    "filter/groups_reused",
    "filter/groups_kept",
)


def test_resuming_changes_no_bit(work, tmp_path) -> None:
    """With groups kept from step to step and the epoch (24 prompts) ending on the way, resumed
    after each step.
    """
    try:
        whole = tmp_path / "whole"
        common = [
            *FILTER,
            "trainer.total_training_steps=4",
            "trainer.save_freq=1",
            f"{ARR}actor.optim.lr_scheduler=cosine",
        ]
        assert main(words(work, whole, *common)) == 0
        reference = [[entry[name] for name in SAME] for entry in steps(whole)]
        assert any(entry["filter/groups_reused"] for entry in steps(whole)), (
            "no group was kept: the test tests nothing"
        )
        for k in (2, 3):
            out = tmp_path / f"from{k}"
            again = [
                "trainer.resume_mode=resume_path",
                f"trainer.resume_from_path={whole}/global_step_{k}",
            ]
            assert main(words(work, out, *common, *again)) == 0
            assert [[entry[name] for name in SAME] for entry in steps(out)] == reference[k:]
            assert all(
                torch.equal(a, weights(whole, 4)[name]) for name, a in weights(out, 4).items()
            )
    finally:
        torch.use_deterministic_algorithms(False)


def test_groups_without_a_signal_are_counted_and_end(work, tmp_path, capsys) -> None:
    flat = [
        "custom_reward_function.name=never",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=score",
    ]
    assert (
        main(
            words(
                work,
                tmp_path / "a",
                *flat,
                "algorithm.filter_groups.max_num_gen_batches=2",
                "trainer.total_training_steps=2",
            )
        )
        == 1
    )
    (entry,) = steps(tmp_path / "a")  # of the first step: the run ends with the second
    assert (entry["filter/groups_no_signal"], entry["filter/gen_batches"]) == (
        8,
        2,
    ) and "actor/pg_loss" not in entry
    assert (
        "nothing was trained: no group of a step had answers whose score" in capsys.readouterr().err
    )
    assert (
        main(
            words(
                work,
                tmp_path / "b",
                *flat,
                "data.gen_batch_size=1",
                f"{ARR}rollout.n=2",
                "trainer.total_training_steps=1",
            )
        )
        == 1
    )
    assert "too easy or too hard" in capsys.readouterr().err


def test_what_was_trained_is_saved_where_nothing_more_can_be_learnt(
    work, tmp_path, monkeypatch, capsys
) -> None:
    def spent(run, state, times):
        if state.step == 2:
            raise UnusableSamples("all too easy")
        return collect(run, state, times)

    collect = train.collect
    with monkeypatch.context() as patch:
        patch.setattr(train, "collect", spent)
        assert main(words(work, tmp_path, "trainer.total_training_steps=3")) == 1
    assert "all too easy" in capsys.readouterr().err
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert main(words(work, tmp_path, "trainer.total_training_steps=3")) == 0
    assert [entry["step"] for entry in steps(tmp_path)] == [1, 2, 3]


def test_validation_alone_gives_the_likeliest_answers_and_trains_nothing(
    work, tmp_path, capsys
) -> None:
    alone = [
        "trainer.val_only=true",
        f"data.val_files={work}/val.jsonl",
        f"{ARR}rollout.val_kwargs.do_sample=false",
        f"{ARR}rollout.val_kwargs.n=2",  # with draws of their own, if there were any
    ]
    assert main(words(work, tmp_path, *alone, "trainer.log_val_generations=2")) == 0
    assert not list(tmp_path.glob("global_step_*")) and not steps(tmp_path)
    lines = (tmp_path / "report" / "val_000000.jsonl").read_text().splitlines()
    answers = [json.loads(line)["segments"] for line in lines]
    assert len(answers) == 6 and answers[::2] == answers[1::2]
    said = capsys.readouterr().out
    assert "nothing is trained" in said and "optimizer step" not in said
    shown = [
        line.split(" → ")
        for line in said.splitlines()
        if line.startswith("val/generations, step 0: ")
    ]
    assert len({question for question, _, _ in shown}) == 2


@pytest.mark.slow  # each of these with its formula: test_plain
def test_everything_at_once(work, tmp_path) -> None:
    """KL in reward and loss, entropy, GSPO, overlong shaping, correction, two epochs, micro-batches
    by count: one step runs.
    """
    more = [
        "algorithm.use_kl_in_reward=true",
        "algorithm.kl_ctrl.type=adaptive",
        f"{ARR}actor.use_kl_loss=true",
        f"{ARR}actor.entropy_coeff=0.01",
        f"{ARR}actor.policy_loss.loss_mode=gspo",
        "reward_model.overlong_buffer.enable=true",
        # As long as an answer: the mean penalty follows from the mean length
        "reward_model.overlong_buffer.len=12",
        "algorithm.rollout_correction.rollout_is=sequence",
        f"{ARR}actor.ppo_epochs=2",
        f"{ARR}actor.use_dynamic_bsz=false",
        f"{ARR}actor.ppo_micro_batch_size_per_gpu=3",
        f"{ARR}actor.loss_agg_mode=seq-mean-token-mean",
        f"{ARR}rollout.top_p=0.9",
        f"{ARR}actor.ppo_mini_batch_size=2",
        "algorithm.adv_estimator=reinforce_plus_plus",
        "trainer.total_training_steps=2",
    ]
    assert main(words(work, tmp_path / "run", *more)) == 0
    first, second = steps(tmp_path / "run")
    assert (
        first["timing_s/ref"] > 0
        and first["actor/kl_loss"] >= 0
        and second["actor/kl_loss"] > 0
        and first["actor/reward_kl_penalty"] == pytest.approx(0, abs=1e-5)
    )
    assert second["actor/reward_kl_penalty_coeff"] < first["actor/reward_kl_penalty_coeff"] == 0.001
    assert (
        first["critic/rewards/mean"] < first["critic/score/mean"]
        and 0 < first["rollout_correction/mean"] < 1
    )
    length = second["response_length/mean"]
    kl = second["actor/reward_kl_penalty"] * second["actor/reward_kl_penalty_coeff"] * length
    too_long = length / 12
    assert second["critic/rewards/mean"] == pytest.approx(
        second["critic/score/mean"] - too_long - kl, rel=1e-9
    )


def test_the_gap_is_measured_where_the_samplers_log_probabilities_are_the_old_ones(
    work, tmp_path
) -> None:
    """At any temperature and top-p, by the first of the step's updates; a step without a forward
    pass of its own has its times too.
    """
    more = [
        "algorithm.rollout_correction.bypass_mode=true",
        f"{ARR}rollout.temperature=0.7",
        f"{ARR}rollout.top_p=0.6",
        f"{ARR}actor.ppo_mini_batch_size=2",
    ]
    assert main(words(work, tmp_path / "run", *more, "trainer.total_training_steps=1")) == 0
    (entry,) = steps(tmp_path / "run")
    assert 0 < entry["training/rollout_logp_diff_mean"] < 1e-5 and entry["actor/entropy"] > 1
    assert entry["timing_s/old_log_prob"] == 0 < entry["timing_s/gen"]


@pytest.mark.slow
def test_killed_in_mid_step_two_ranks_go_on_as_if_nothing_had_been(work, tmp_path) -> None:
    """kill -9 of launcher and workers, three times, at any moment of a step; with groups kept from
    step to step.
    """
    common = [
        *FILTER,
        "trainer.total_training_steps=5",
        "trainer.save_freq=1",
        f"{ARR}actor.ppo_mini_batch_size=2",
    ]
    subprocess.run(
        [*TORCHRUN, *words(work, tmp_path / "whole", *common)],
        check=True,
        capture_output=True,
        timeout=170,
    )
    out = tmp_path / "killed"
    command = [*TORCHRUN, *words(work, out, *common)]
    kill_in_mid_step(command, out, (1, 2, 3), pause=0.07)
    subprocess.run(command, check=True, capture_output=True, timeout=170)
    whole_run, killed_run = (told(tmp_path / folder) for folder in ("whole", "killed"))
    assert whole_run == killed_run and any(entry["filter/groups_reused"] for entry in whole_run)


@pytest.mark.slow
def test_asked_to_stop_in_the_middle_of_sampling(work, tmp_path) -> None:
    """SIGTERM ends the run within seconds, with a checkpoint of the last whole step from which it
    goes on.
    """
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "retool.rl",
        *words(work, out, "trainer.total_training_steps=500", "data.max_response_length=200"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or not steps(out):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, text
    done = steps(out)[-1]["step"]
    assert (
        f"asked to stop at step {done} of 500" in text
        and (out / f"global_step_{done}" / "actor").is_dir()
    )
    assert (
        main(
            words(
                work,
                out,
                f"trainer.total_training_steps={done + 1}",
                "data.max_response_length=200",
            )
        )
        == 0
    )
    assert [entry["step"] for entry in steps(out)] == list(range(1, done + 2))


def test_every_fault_in_one_report(work, tmp_path, capsys) -> None:
    wrong = [
        f"{ARR}rollout.tensor_model_parallel_size=4",
        f"{ARR}actor.ulysses_sequence_parallel_size=8",
        "algorithm.adv_estimator=gae",
        "custom_reward_function.name=nothing",
        f"{ARR}rollout.multi_turn.enable=true",
        f"{ARR}rollout.multi_turn.tool_config_path=none.yaml",
        "trainer.n_gpus_per_node=2",
    ]
    assert main([*words(work, tmp_path / "run", *wrong), "--check"]) == 1
    said = capsys.readouterr().out
    assert said.startswith(("5 faults", "6 faults")), said
    for part in (
        "tensor_model_parallel_size=4: does not fit 2 processes: it must divide the world size. Use 1 or 2",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=8",
        "a value model",
        "has no 'nothing'",
        "none.yaml doesn't exist",
    ):
        assert part in said, said
    assert not (tmp_path / "run").exists()


def test_the_plan_of_a_sound_run(work, tmp_path, capsys) -> None:
    os.environ.pop("WORLD_SIZE", None)
    assert main([*words(work, tmp_path / "run", "trainer.total_epochs=2"), "--check"]) == 0
    said = capsys.readouterr().out
    assert (
        "4 prompts × 4 samples = 16 trajectories" in said and "12 steps, 12 optimizer steps" in said
    )


def test_check_plans_the_memory_of_another_box(work, tmp_path, capsys) -> None:
    box = ["trainer.device=auto", "trainer.n_gpus_per_node=2", "trainer.device_memory_gb=80"]
    assert main([*words(work, tmp_path / "run", *box), "--check"]) == 0
    said = capsys.readouterr().out
    assert (
        all(
            f"{phase} " in said
            for phase in ("load", "sync", "rollout", "log-probs", "update", "optimizer", "save")
        )
        and "fits in 80" in said
    )
    assert re.search(
        r"engine: weights 0\.0\d GiB, cache \d\d\.\d\d GiB with room for [\d,.]+ sequences of 412 tokens; \w+ \w+ the update",
        said,
    ), said
    assert (
        main(
            [
                *words(work, tmp_path / "run", *box, f"{ARR}rollout.gpu_memory_utilization=1e-7"),
                "--check",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "the engine's cache may have no room for a sequence of 412 tokens" in said, said


def test_a_reward_function_that_always_raises_is_a_fault_and_nothing_starts(
    work, tmp_path, capsys
) -> None:
    assert main(words(work, tmp_path / "run", "custom_reward_function.name=raises")) == 1
    said = capsys.readouterr().out
    assert (
        "custom_reward_function: it fails on a made answer to the first question of shop" in said
        and "train.jsonl, row 0" in said
    )
    assert re.search(
        r'File ".*reward_functions.py", line \d+, in raises\n.*\n  LookupError: no judge today',
        said,
    ), said
    assert "reward_model.trial_answer=null" in said and "reward/worker.py" not in said
    assert not (tmp_path / "run").exists()


def test_a_reward_function_that_fails_on_a_whole_step_ends_the_run_with_its_traceback(
    work, tmp_path, capsys
) -> None:
    """What was trained before is saved; the same holds for a validation."""
    broken = ["custom_reward_function.name=raises_on_real", "trainer.total_training_steps=4"]
    assert main(words(work, tmp_path / "run", *broken)) == 1
    said = capsys.readouterr().err
    assert (
        "error: the reward function failed on 16 of the 16 answers of step 1" in said
        and "max_failed_share" not in said
    )
    assert re.search(
        r'File ".*reward_functions.py", line \d+, in raises\n.*\nLookupError: no judge today', said
    ), said
    assert (
        main(
            words(
                work,
                tmp_path / "run",
                *broken,
                f"data.val_files={work}/val.jsonl",
                "trainer.val_only=true",
            )
        )
        == 1
    )
    assert "failed on 3 of the 3 answers of the validation after step 0" in capsys.readouterr().err


def test_a_reward_function_that_fails_on_a_share_is_counted_and_ends_the_run_above_it(
    work, tmp_path, capsys, recwarn
) -> None:
    more = [
        "custom_reward_function.name=raises_on_some",
        f"data.val_files={work}/val.jsonl",
        "trainer.total_training_steps=1",
        "reward_model.floor=-3",
    ]
    assert main(words(work, tmp_path / "run", *more)) == 0
    (entry,) = steps(tmp_path / "run")
    assert (
        0 < entry["reward/exceptions"] < 8
        and entry["critic/score/min"] == -3 < entry["critic/score/max"]
    )
    assert any(
        "gave no score (LookupError: not this one)" in str(warning.message) for warning in recwarn
    )
    assert "not this one" in (tmp_path / "run" / "report" / "train_000001.jsonl").read_text()
    assert "val-aux/reward/exceptions" in next(
        e for e in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "val-core/shop/acc/mean@1" in e
    )
    capsys.readouterr()
    assert (
        main(
            words(
                work,
                tmp_path / "other",
                *more,
                "reward_model.max_failed_share=0.01",
                "trainer.val_before_train=false",
            )
        )
        == 1
    )
    said = capsys.readouterr().err
    assert re.search(
        r"failed on \d of the 16 answers of step 1.*or raise reward_model.max_failed_share=0.01",
        said,
    ), said
    assert "LookupError: not this one" in said


def test_prompts_that_the_cache_can_not_hold_are_aborted_counted_and_trained_without(
    work, tmp_path, monkeypatch, capsys
) -> None:
    # Two pages of 16 tokens, fewer than most prompts have
    monkeypatch.setattr(memory, "MAX_CPU_KV_BYTES", 3 * 4096)
    assert (
        main(
            words(
                work,
                tmp_path / "run",
                "trainer.total_training_steps=4",
                f"data.val_files={work}/val.jsonl",
            )
        )
        == 1
    )
    for entry in steps(tmp_path / "run"):
        assert (
            entry["stop/aborted"] >= 8
            and entry["stop/aborted"] + entry["stop/length"] + entry["stop/no_call"] == 16
        )
        assert entry["response_length/min"] == 0 and entry.get("actor/skipped_updates", 0) == 0
        assert (
            ("actor/grad_norm" in entry)
            == ("critic/score/mean" in entry)
            == (entry["stop/aborted"] < 16)
        )
    assert (
        "the engine's cache has no room" in capsys.readouterr().err
        and len(steps(tmp_path / "run")) == 3
    )


def test_a_sampler_that_disagrees_with_the_trainer_is_told(
    work, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(collapse, "DISAGREEMENT", -1.0)
    assert main(words(work, tmp_path / "run", "trainer.total_training_steps=2")) == 0
    printed = capsys.readouterr().out
    assert "step 1: since step 1 sampler and trainer disagree" in printed
    assert printed.count("sampler and trainer disagree") == 1
