"""What an RL run is refused for, in one table, and what is only noted: the checks that SFT has too,
under RL's keys.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retool.config import Fault, read
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.parallel.mesh import Mesh
from retool.preflight import machine
from retool.preflight.plan import (
    checkpoint_bytes,
    host_bytes,
    kept_checkpoints,
)
from retool.rl import build
from retool.rl.agent.tools import interpreter
from retool.rl.agent.tools.session import InterpreterSession
from retool.rl.config import RLConfig
from retool.rl.config.names import IGNORED, SYNONYMS
from retool.rl.preflight import checks
from retool.rl.preflight.checks import RLReport, preflight
from retool.rl.preflight.memory import engine_options
from retool.rl.preflight.show import in_words
from retool.rl.preflight.tool_turns import call_format, show_tool_turn
from retool.sandbox.fusion_client import unreachable

ACTOR = "actor_rollout_ref.actor."
ROLLOUT = "actor_rollout_ref.rollout."


def check(
    work: Path,
    out: Path,
    *more: str,
    planning: bool = False,
    environment: dict[str, str] | None = None,
) -> RLReport:
    words = [
        f"data.train_files={work}/train.jsonl",
        f"actor_rollout_ref.model.path={work}/model",
        f"trainer.default_local_dir={out}",
        "data.train_batch_size=8",
        f"{ACTOR}ppo_mini_batch_size=8",
        "actor_rollout_ref.rollout.n=2",
        "data.max_response_length=64",
        "reward_model.name=math",
        *more,
    ]
    return preflight(read(RLConfig, words, SYNONYMS, IGNORED), planning, environment or {})


def said(report: RLReport) -> str:
    return "\n".join(map(str, report.faults))


def test_a_sound_run_has_a_plan(work: Path, tmp_path: Path) -> None:
    report = check(
        work,
        tmp_path / "out",
        "trainer.device=cpu",
        "trainer.total_epochs=2",
        "trainer.save_freq=2",
    )
    assert (
        report.faults == ()
        and report.steps == 6
        and kept_checkpoints(report) == 3
        and checkpoint_bytes(report) > 0
    )
    plan = dict(in_words(report))
    assert "1 layers, 4/2 heads of 16" in plan["model"] and "(predicted): load" in plan["memory"]
    assert "report/" in plan["written"] and "every 2 steps" in plan["written"]
    assert "network" not in plan
    two = ["trainer.nnodes=2", "trainer.n_gpus_per_node=2", "trainer.device_memory_gb=80"]
    elsewhere = check(work, tmp_path / "out", *two, planning=True)
    assert "% of its time at 400 Gbit/s" in dict(in_words(elsewhere))["network"]


def test_keys_reach_what_they_name(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "_open_backend", lambda config: None)  # starts no sandbox
    monkeypatch.setattr(checks, "sandbox_faults", lambda *_: [])
    opened = list[tuple[object, ...]]()
    monkeypatch.setattr(build, "ServerEngine", lambda *arguments: opened.append(arguments))
    multi = f"{ROLLOUT}multi_turn."
    report = check(
        work,
        tmp_path / "out",
        "trainer.device=cpu",
        f"data.val_files={work}/train.jsonl",
        "data.val_max_samples=3",
        f"{ROLLOUT}name=server",
        f"{ROLLOUT}server.urls=[http://127.0.0.1:1]",
        f"{ROLLOUT}server.weights_dir={tmp_path}/handed",
        f"{ROLLOUT}max_num_seqs=16",
        f"{ROLLOUT}max_num_batched_tokens=300",
        f"{multi}enable=true",
        f"{multi}tool_session=true",
        f"{multi}tool_isolation=best_effort",
        f"{multi}tool_workers=1",
        f"{multi}tool_timeout_seconds=7",
        planning=True,
    )
    assert report.val is not None and len(report.val.prompts) == 3
    options = engine_options(report.config)
    assert (options.max_num_seqs, options.max_batch_tokens) == (16, 300)
    (tool,) = report.tools
    assert isinstance(tool, InterpreterSession)
    limits = tool.interpreter.config
    assert (limits.workers, limits.default_timeout) == (1, 7)
    assert (limits.isolation, limits.session) == ("best_effort", True)
    build.open_engine(report, Mesh(0, 1, 1, 1, torch.device("cpu")), 1)
    ((_, weights, _),) = opened
    assert weights == tmp_path / "handed"


def test_files_that_are_not_there_are_told_with_a_model_that_is_not(
    work: Path, tmp_path: Path
) -> None:
    none = tmp_path / "none.jsonl"
    files = (f"data.train_files={none}", f"data.val_files={none}")
    report = check(work, tmp_path / "out", f"actor_rollout_ref.model.path={tmp_path}/model", *files)
    assert [fault.where for fault in report.faults] == [
        "actor_rollout_ref.model.path",
        "data.train_files",
        "data.val_files",
    ]


def test_every_machine_check_stands_in_one_table(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1))  # type: ignore[attr-defined]
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = str(server.getsockname()[1])
        launched = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        asked = [
            "actor_rollout_ref.model.use_compile=true",
            "trainer.default_hdfs_dir=nosuch://b",
            "actor_rollout_ref.model.attn=varlen",
        ]
        asked += [
            f"{ACTOR}ulysses_sequence_parallel_size=2",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        ]
        text = said(check(work, tmp_path / "out", *asked, environment=launched))
    for expected in (
        f"MASTER_PORT={port}",
        "actor_rollout_ref.model.use_compile=true: needs a C compiler",
        "trainer.default_hdfs_dir=nosuch://b",
        "for a checkpoint",
        "actor_rollout_ref.model.attn=varlen: needs a GPU",
        f"{ACTOR}ulysses_sequence_parallel_size=2: does not fit",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2: does not fit",
    ):
        assert expected in text


def test_a_template_that_can_not_show_a_tools_answer_is_refused_before_a_tool_is_called(
    work: Path, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('only users here') }}{% endif %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}{{ tools }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "chat.jinja").write_text(template)
    turns = "actor_rollout_ref.rollout.multi_turn."
    more = [
        f"data.chat_template={tmp_path}/chat.jinja",
        f"{turns}enable=true",
        f"{turns}tool_config_path={work}/tools.yaml",
        "trainer.device=cpu",
    ]
    refused = check(work, tmp_path / "out", *more)
    assert "data.chat_template: the chat template refuses it: only users here" in said(refused)
    assert not check(work, tmp_path / "out", more[0], "trainer.device=cpu").faults
    silent = template.replace("{{ raise_exception('only users here') }}{% endif %}", "{% else %}")
    silent = silent.replace("{% endfor %}", "{% endif %}{% endfor %}")
    (tmp_path / "chat.jinja").write_text(silent)
    assert refused.renderer is not None
    renderer = Renderer(refused.renderer.tokenizer, Rendering(str(tmp_path / "chat.jinja")))
    with pytest.raises(ValueError, match="leaves out what a tool answers"):
        show_tool_turn(replace(refused, renderer=renderer))


FORMAT = "actor_rollout_ref.rollout.multi_turn.format"


def test_the_plan_and_the_identity_say_how_calls_are_read(work: Path, tmp_path: Path) -> None:
    turns = "actor_rollout_ref.rollout.multi_turn."
    more = [f"{turns}enable=true", f"{turns}tool_isolation=best_effort", "trainer.device=cpu"]
    report = check(work, tmp_path / "out", *more, "reward_model.trial_answer=null")
    assert not report.faults, said(report)
    told = dict(in_words(report))["tools"]
    assert told.endswith("calls are read as hermes (of the chat template)")
    assert report.identity["how calls are written"].value == "hermes"
    (tmp_path / "own.py").write_text("def broken(text, tools):\n    return text.nothing")
    wrong = f"{tmp_path}/own.py/broken"
    report = replace(report, config=read(RLConfig, [f"{FORMAT}={wrong}"], {}, {}).config)
    faults: list[Fault] = []
    assert call_format(report, faults) is None
    assert str(faults[0]).startswith(f"{FORMAT}: {wrong} raises AttributeError")


def test_a_sandbox_server_that_is_not_there_or_runs_nothing_is_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "TRIAL_SECONDS", 0.3)
    turns = "actor_rollout_ref.rollout.multi_turn."
    url = "http://127.0.0.1:{}/run_code"
    more = [
        f"{turns}enable=true",
        f"{turns}tool_config_path={tmp_path}/tools.yaml",
        "trainer.device=cpu",
    ]
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = url.format(server.getsockname()[1])
        tool = f"tools: [{{class_name: retool.rl.agent.tools.CodeInterpreter, config: {{sandbox_fusion_url: '{there}'}}}}]"
        (tmp_path / "tools.yaml").write_text(tool)
        (fault,) = check(work, tmp_path / "out", *more).faults
        assert (
            fault.where == f"sandbox_fusion_url={there}"
            and "programs don't run there: no answer within 0.3 s" in fault.problem
        )
        assert not check(work, tmp_path / "out", *more, environment={"LOCAL_RANK": "1"}).faults, (
            "one process of a machine tries"
        )
    (fault,) = check(work, tmp_path / "out", *more).faults
    assert (
        fault.where == f"sandbox_fusion_url={there}"
        and "refused" in fault.problem
        and "sandbox serve" in fault.remedy
    )


@pytest.mark.parametrize(
    "url",
    ["http:///run_code", "http://[::1", "http://127.0.0.1:99999/", "http://no.such.host.invalid/"],
)
def test_an_address_that_is_none_is_unreachable(url: str) -> None:
    assert unreachable(url)


REWARDS = Path(__file__).parent / "reward" / "reward_functions.py"


def test_the_reward_is_asked_once_for_each_source_before_the_run(
    work: Path, tmp_path: Path
) -> None:
    """A source that only the validation has counts too; a made answer of the user's own can be
    given, or none.
    """
    row = {"data_source": "other", "prompt": "1+1?", "reward_model": {"ground_truth": ""}}
    (tmp_path / "val.jsonl").write_text(json.dumps(row))
    own = [
        "reward_model.name=null",
        f"custom_reward_function.path={REWARDS}",
        "trainer.device=cpu",
        f"data.val_files={tmp_path}/val.jsonl",
    ]
    for name, more, expected in (
        ("asynchronous", [], None),
        (
            "by_the_source",
            [],
            "custom_reward_function: it fails on a made answer to the first question of other .*row 0.:(?s:.*)KeyError: 'other'",
        ),
        ("raises", ["reward_model.trial_answer=null"], None),
        ("raises_on_real", ["reward_model.trial_answer=four"], "LookupError: no judge today"),
        (
            "slow",
            ["reward_model.timeout_seconds=0.1"],
            r"reward_model.timeout_seconds=0.1: the reward took \d.\d s .* Raise it to \d",
        ),
        (
            "compute_score",
            ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=bleu"],
            r"filter_groups.metric=bleu: the reward gives no such number (?s:.*)It gives acc, \w+, .*: name one",
        ),
        (
            "compute_score",
            ["reward_model.trial_answer=die"],
            "fails on a made answer to the first question of shop .*: Abnormal termination",
        ),
    ):
        text = said(
            check(work, tmp_path / "out", *own, f"custom_reward_function.name={name}", *more)
        )
        assert re.search(expected, text) if expected else not text, (name, text)


def test_a_truth_is_only_needed_where_the_reward_is_ours(work: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"data_source": "x", "prompt": "1+1?"}))
    more = [
        f"data.train_files={tmp_path}/rows.jsonl",
        "trainer.device=cpu",
        "data.train_batch_size=1",
        f"{ACTOR}ppo_mini_batch_size=1",
    ]
    assert "or use a reward of your own that needs none (custom_reward_function.path)" in said(
        check(work, tmp_path / "out", *more)
    )
    assert not check(
        work, tmp_path / "out", *more, f"reward_model.name={REWARDS}/asynchronous"
    ).faults


def test_offloading_needs_host_memory(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["trainer.device_memory_gb=80", f"{ACTOR}fsdp_config.optimizer_offload=true"]
    needed = host_bytes(check(work, tmp_path / "out", *more, planning=True))
    assert needed > 0
    monkeypatch.setattr(machine, "host_memory", lambda: needed)
    assert f"{ACTOR}fsdp_config.optimizer_offload=true: needs" in said(
        check(work, tmp_path / "out", *more)
    )


def test_kernels_that_cannot_compute_in_fp32_are_refused(work: Path, tmp_path: Path) -> None:
    wide = [f"{ACTOR}fsdp_config.param_dtype=fp32", "trainer.device_memory_gb=80"]
    text = said(
        check(work, tmp_path / "out", *wide, "actor_rollout_ref.model.attn=varlen", planning=True)
    )
    assert (
        "actor_rollout_ref.model.attn=varlen: computes in bfloat16 or float16, not float32" in text
        and "param_dtype=bf16" in text
    )
    assert not check(
        work, tmp_path / "out", *wide, "actor_rollout_ref.model.attn=reference", planning=True
    ).faults


def test_a_run_from_the_start_sets_the_one_before_aside_unless_it_only_validates(
    work: Path, tmp_path: Path
) -> None:
    (tmp_path / "global_step_30").mkdir()
    anew = ["trainer.resume_mode=disable", "trainer.device=cpu"]
    for more, moved in (
        ([], True),
        (["trainer.val_only=true", f"data.val_files={work}/val.jsonl"], False),
    ):
        report = check(work, tmp_path, *anew, *more)
        assert not report.faults and any("global_step_30" in note for note in report.notes) == moved


@pytest.mark.parametrize(
    ("contents", "note"),
    [("[hf_model]", "model and optimizer"), ("[model,optimizer]", "other random numbers")],
)
def test_checkpoints_that_are_no_place_to_resume_from_are_noted(
    work: Path, tmp_path: Path, contents: str, note: str
) -> None:
    report = check(
        work, tmp_path / "out", "trainer.device=cpu", f"{ACTOR}checkpoint.save_contents={contents}"
    )
    assert (
        note in "\n".join(report.notes) and f"{ACTOR}checkpoint.save_contents" in report.notes[-1]
    )
