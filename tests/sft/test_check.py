"""`--check` is the run: whatever the run would be refused for, `--check` says in the same words,
before anything is touched.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from retool.checkpoint.format.checksums import write_archive
from retool.checkpoint.format.folder import CHECKSUMS, DATA, recorded_files
from retool.checkpoint.shards.states import data_state
from retool.config import read
from retool.config.options import (
    AdamWConfig,
    CheckpointConfig,
    DecoderConfig,
    FSDPConfig,
    RunOptions,
    TrainerConfig,
)
from retool.data.template.choose import TEMPLATES
from retool.model.attention import flash as attention_flash
from retool.parallel.mesh import make_mesh
from retool.preflight.world import Box, check_attention, check_device
from retool.run.resume import to_resume
from retool.sft.__main__ import main
from retool.sft.config import SYNONYMS, SFTConfig
from retool.sft.preflight import preflight
from tests.faults import another_model, contents, planned, refused
from tests.sft.test_command import words

FEW = {"trainer__total_training_steps": 2}


@pytest.fixture(scope="module")
def begun(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is there of a run after its first step: `run/`, two files of other rows, other models."""
    folder = tmp_path_factory.mktemp("begun")
    rows = pq.read_table(work / "train.parquet")
    pq.write_table(rows.slice(0, 20), folder / "a.parquet")
    pq.write_table(rows.slice(20, 20), folder / "b.parquet")
    another_model(work / "model", folder / "tuned")
    another_model(
        work / "model",
        folder / "theta",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    )
    another_model(work / "model", folder / "narrow", {"num_hidden_layers": 1, "layer_types": None})
    assert main(command(work, folder, folder / "run", trainer__total_training_steps=1)) == 0
    lost = command(work, folder, folder / "lost", trainer__total_training_steps=1)
    assert main([*lost, "trainer.checkpoint.save_contents=[model,hf_model]"]) == 0
    return folder


def command(work: Path, begun: Path, out: Path, **changed: Any) -> list[str]:
    files = f"[{begun}/a.parquet,{begun}/b.parquet]"
    return words(
        work,
        out,
        **{"data__train_files": files, "model__fsdp_config__model_dtype": "fp32", **changed},
    )


@pytest.fixture
def out(begun: Path, tmp_path: Path) -> Path:
    """A copy of the run to try to go on with."""
    shutil.copytree(begun / "run", tmp_path / "run")
    return tmp_path / "run"


def test_the_run_goes_on_where_nothing_is_another(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Moved and renamed files are the same files, another lr is told, and `--check` changes
    nothing.
    """
    for name in ("a", "b"):
        shutil.copy(begun / f"{name}.parquet", out.parent / f"moved_{name}.parquet")
    shutil.copytree(work / "model", out.parent / "elsewhere")
    moved = {
        "data__train_files": f"[{out.parent}/moved_a.parquet,{out.parent}/moved_b.parquet]",
        "model__partial_pretrain": out.parent / "elsewhere",
        "optim__lr": 2e-3,
    }
    before = contents(out)
    text = planned(main, command(work, begun, out, **FEW, **moved), capfd)
    assert f"goes on from {out}/global_step_1" in text
    assert "note: optim.lr: then 0.001, now 0.002.\n" in text
    assert "note: trainer.total_training_steps: then 1, now 2.\n" in text
    assert contents(out) == before
    assert main(command(work, begun, out, **FEW, **moved)) == 0
    assert (out / "global_step_2").is_dir() and "lr: 0.002" in (out / "config.yaml").read_text()


def test_what_is_probably_not_meant_is_noted_before_the_start(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = command(
        work, begun, out, trainer__total_training_steps=1, data__val_files=begun / "a.parquet"
    )
    text = planned(main, done, capfd)
    assert "nothing is left to train: step 1 of 1 is done; raise trainer.total_epochs" in text
    assert (
        "a.parquet is in data.train_files and in data.val_files: val/loss is of rows that are trained."
        in text
    )


SWAPPED = {"data__train_files": "[{begun}/b.parquet,{begun}/a.parquet]"}
ANOTHER: dict[str, tuple[dict[str, str], list[str]]] = {
    "batch size": (
        {"data__train_batch_size": "5"},
        ["data.train_batch_size=5: ", "data.train_batch_size: then 4, now 5"],
    ),
    "fewer rows": ({"data__train_max_samples": "30"}, ["training samples: then 40, now 30"]),
    "order of files": (
        SWAPPED,
        [
            "data.train_files=[{begun}/b.parquet,{begun}/a.parquet]: ",
            "their content and order: then ",
        ],
    ),
    "seed": ({"data__seed": "7"}, ["data.seed=7: ", "then 1, now 7"]),
    "no shuffling": ({"data__shuffle": "false"}, ["data.shuffle: then true, now false"]),
    "a cut": ({"data__max_length": "700", "data__truncation": "right"}, ["their tokens: then "]),
    "weights": (
        {"model__partial_pretrain": "{begun}/tuned"},
        ["model.partial_pretrain={begun}/tuned: ", "the model's weights: then "],
    ),
    "config": (
        {"model__partial_pretrain": "{begun}/theta"},
        ["the model's rope_theta: then ", ", now 777.0"],
    ),
}


@pytest.mark.parametrize("name", ANOTHER)
def test_another_run_is_refused_by_name_and_its_way_out_is_one(
    work: Path, begun: Path, out: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changed, expected = ANOTHER[name]
    changed = {key: value.format(begun=begun) for key, value in changed.items()}
    (fault,) = refused(main, command(work, begun, out, **FEW, **changed), out, capfd)
    assert all(part.format(begun=begun) in fault for part in expected), fault
    assert f"{out}/global_step_1 is of another run" in fault
    asked = [word for word in fault.split() if word.startswith("trainer.resume_")]
    assert len(asked) == 2 and asked[1].endswith("global_step_1")
    if name == "weights":
        assert "it goes on all the same" in planned(
            main, [*command(work, begun, out, **FEW, **changed), *asked], capfd
        )


def test_the_way_out_is_taken(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = {
        "data__train_files": f"[{begun}/b.parquet,{begun}/a.parquet]",
        "model__partial_pretrain": begun / "tuned",
    }
    both = refused(main, command(work, begun, out, **FEW, **changed), out, capfd)
    assert len(both) == 2, "everything at once"
    asked = [word for word in both[0].split() if word.startswith("trainer.resume_")]
    assert main([*command(work, begun, out, **FEW, **changed), *asked]) == 0
    assert f"resumed from {out}/global_step_1 (step 1)" in capfd.readouterr().out
    assert main(command(work, begun, out, trainer__total_training_steps=3, **changed)) == 0, (
        "from here on it is that run"
    )


def test_samples_of_the_same_lengths_with_other_tokens_are_others(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where a template shows today's date: same rows, same counts."""
    rows = pq.read_table(begun / "a.parquet").to_pylist()
    rows[0], rows[1] = rows[1], rows[0]
    pq.write_table(pa.Table.from_pylist(rows), out.parent / "a.parquet")
    files = {"data__train_files": f"[{out.parent}/a.parquet,{begun}/b.parquet]"}
    (fault,) = refused(main, command(work, begun, out, **FEW, **files), out, capfd)
    assert (
        "their content and order" in fault
        and "their tokens" not in fault
        and "training samples" not in fault
    )


def test_a_run_keeps_the_day_that_its_template_shows(
    work: Path,
    begun: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Begun one day, it goes on the next over the same tokens; another date is another run's, and
    named.
    """
    (tmp_path / "dated.jinja").write_text(
        "{{- strftime_now('%d %b %Y') }}\n" + TEMPLATES["hermes"].read_text()
    )
    asked = command(
        work,
        begun,
        tmp_path / "run",
        data__chat_template=tmp_path / "dated.jinja",
        trainer__save_freq=1,
    )
    monkeypatch.setattr("retool.preflight.resume.today", lambda: "2026-11-29")
    assert main([*asked, "trainer.total_training_steps=1"]) == 0
    assert "template_date: '2026-11-29'" in (tmp_path / "run" / "config.yaml").read_text()
    monkeypatch.setattr("retool.preflight.resume.today", lambda: "2026-11-30")
    longer = [*asked, "trainer.total_training_steps=2"]
    assert "goes on from" in planned(main, longer, capfd)
    faults = refused(main, [*longer, "data.template_date=2026-11-30"], tmp_path / "run", capfd)
    assert any(
        "the date in the chat template: then 2026-11-29, now 2026-11-30" in fault
        for fault in faults
    ), faults
    assert main(longer) == 0 and (tmp_path / "run" / "global_step_2").is_dir()
    assert (
        "strftime_now"
        in (tmp_path / "run" / "global_step_2" / "huggingface" / "chat_template.jinja").read_text()
    )
    fresh = [
        *asked[:2],
        f"trainer.default_local_dir={tmp_path}/other",
        *asked[3:],
        "trainer.total_training_steps=1",
    ]
    assert (
        main(fresh) == 0
        and "template_date: '2026-11-30'" in (tmp_path / "other" / "config.yaml").read_text()
    )


def test_a_model_of_another_shape_is_refused_however_it_is_asked(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(begun / "narrow", out.parent / "narrow")
    tensors = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not re.search(r"layers\.[123]\.", name)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    narrow = command(work, begun, out, **FEW, model__partial_pretrain=folder)
    (fault,) = refused(main, narrow, out, capfd)
    assert "the model's layers: then 2, now 1" in fault
    asked = [word for word in fault.split() if word.startswith("trainer.resume_")]
    (fault,) = refused(main, [*narrow, *asked], out, capfd)
    assert (
        "does not fit the model" in fault
        and "Give model.partial_pretrain the model that it is of" in fault
    )


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))


STATES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    "data.pt is damaged": (
        lambda out: damage(out / "global_step_1" / DATA),
        [],
        ["data.pt", "damaged", "from an older one"],
    ),
    "extra state is damaged": (
        lambda out: damage(out / "global_step_1" / "extra_state_world_size_1_rank_0.pt"),
        [],
        ["extra_state_world_size_1", "damaged"],
    ),
    "saved by the other command": (
        lambda out: as_saved_by(out, "retool.rl"),
        [],
        ["saved by python -m retool.rl", "global_step_1/huggingface and another"],
    ),
    "path of nothing": (lambda out: None, ["{out}/global_step_9"], ["is not a folder"]),
    "path of a run": (lambda out: None, ["{out}"], ["It is a run's folder", "global_step_1"]),
    "path of a model": (lambda out: None, ["{work}/model"], ["It is a model, to begin a run with"]),
    "path of an export": (
        lambda out: None,
        ["{out}/global_step_1/huggingface"],
        ["It is a part of a checkpoint: give {out}/global_step_1."],
    ),
    "path of a torn one": (
        lambda out: (out / "global_step_1" / "model_world_size_1_rank_0.pt").write_bytes(b"PK"),
        ["{out}/global_step_1"],
        ["is not complete", "2 bytes instead of"],
    ),
    "path of one without optimizer": (
        lambda out: None,
        ["{begun}/lost/global_step_1"],
        ["saved without the optimizer", "huggingface"],
    ),
}


def as_saved_by(out: Path, name: str) -> None:
    """Make a checkpoint say that another command wrote it."""
    top = out / "global_step_1"
    state = data_state(top)
    entry = write_archive(top / DATA, {**state, "run": {**state["run"], "command": name}})
    content = json.loads((top / CHECKSUMS).read_text())
    (top / CHECKSUMS).write_text(
        json.dumps({**content, "files": {**recorded_files(top), DATA: entry}})
    )


@pytest.mark.parametrize("name", STATES)
def test_a_checkpoint_that_is_no_place_to_go_on_from(
    work: Path, begun: Path, out: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, path, expected = STATES[name]
    places = {"out": out, "work": work, "begun": begun}
    spoil(out)
    asked = [f"trainer.resume_from_path={entry.format(**places)}" for entry in path]
    more = [*asked, "trainer.resume_mode=resume_path"] if asked else []
    faults = refused(main, [*command(work, begun, out, **FEW), *more], out, capfd)
    assert len(faults) == 1 and all(part.format(**places) in faults[0] for part in expected), faults


def test_checkpoints_without_an_optimizer_are_no_place_to_go_on_from_by_themselves(
    work: Path, begun: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(begun / "lost", tmp_path / "run")
    (fault,) = refused(main, command(work, begun, tmp_path / "run", **FEW), tmp_path / "run", capfd)
    assert (
        fault.startswith(f"trainer.default_local_dir={tmp_path}/run: ")
        and "saved without the optimizer" in fault
    )
    assert f"give model.partial_pretrain={tmp_path}/run/global_step_1/huggingface" in fault


def test_what_the_run_before_saved_meanwhile_is_taken_if_it_is_this_runs(
    work: Path, begun: Path, tmp_path: Path
) -> None:
    """It was just ending while this one read its data."""
    out = tmp_path / "run"
    mine, another = (
        preflight(
            read(SFTConfig, command(work, begun, out, **FEW, **changed), SYNONYMS), environment={}
        )
        for changed in ({}, {"data__seed": 9})
    )
    assert not mine.faults and mine.resume is None and to_resume(mine, make_mesh()) is mine
    shutil.copytree(begun / "run", out)
    assert to_resume(mine, make_mesh()).resume == out / "global_step_1"
    with pytest.raises(ValueError, match=r"data\.seed: then 1, now 9"):
        to_resume(another, make_mesh())


def test_keys_of_the_data_reach_its_reading(work: Path, begun: Path, tmp_path: Path) -> None:
    thinking = pq.read_table(begun / "b.parquet").append_column("deep", pa.array([True] * 20))
    pq.write_table(thinking, tmp_path / "b.parquet")
    changed = {
        "data__train_files": tmp_path / "b.parquet",
        "data__val_files": tmp_path / "b.parquet",
        "data__val_max_samples": 3,
        "data__multiturn__enable_thinking_key": "deep",
    }
    parsed = read(SFTConfig, command(work, begun, tmp_path / "run", **changed), SYNONYMS)
    report = preflight(parsed, environment={})
    assert not report.faults, report.faults
    assert report.val is not None and report.val.said.rows == 3
    assert "deep" not in report.val.forms[0].partition("not read")[2]
    wrong = thinking.set_column(thinking.num_columns - 1, "deep", pa.array([7] * 20))
    pq.write_table(wrong, tmp_path / "b.parquet")
    faults = preflight(parsed, environment={}).faults
    assert "'deep' is 7, not true or false" in "\n".join(map(str, faults))


def test_without_a_fallback_a_torn_checkpoint_is_a_fault(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in (out / "global_step_1").rglob("*.pt"):
        file.write_bytes(file.read_bytes()[:-100])
    asked = [*command(work, begun, out, **FEW), "trainer.resume_fallback=false"]
    (fault,) = refused(main, asked, out, capfd)
    assert "is not complete" in fault
    assert "have the newest whole one taken: trainer.resume_fallback=true" in fault


def test_a_refused_run_from_the_start_moves_nothing(
    work: Path, begun: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(
        main,
        [*command(work, begun, out, **FEW), "trainer.resume_mode=disable", "trainer.device=cuda"],
        out,
        capfd,
    )


def short_embedding(work: Path, folder: Path) -> Path:
    """The model with one row fewer than the highest token id of its data needs."""
    shutil.copytree(work / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    rows = len(tensors["model.embed_tokens.weight"]) - 5
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    short = {
        name: tensor[:rows].clone()
        if name in ("model.embed_tokens.weight", "lm_head.weight")
        else tensor
        for name, tensor in tensors.items()
    }
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows_of(*rows: object) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows)) and None
    )


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FRESH: dict[str, tuple[list[str], list[str]]] = {
    "configuration, processes, devices and stores": (
        [
            "optim.lrr=1",
            "data.train_batch_size=many",
            "trainer.logger=[consol]",
            "trainer.default_hdfs_dir=nosuch://b",
            "data.template_date=yesterday",
            "ulysses_sequence_parallel_size=99",
            "model.fsdp_config.fsdp_size=2",
            "trainer.device=cuda",
            "model.attn=flash3",
            "trainer.resume_mode=resume_path",
            "trainer.max_ckpt_to_keep=0",
        ],
        [
            "unknown key optim.lrr. Did you mean optim.lr?",
            "data.train_batch_size=many: is not an integer",
            "trainer.logger=consol: is not known",
            "nosuch:// is no kind of store",
            "data.template_date=yesterday: is no date.",
            "=99: does not fit 1 process",
            "=99: exceeds the model's 4 query heads",
            "fsdp_size=2: does not fit 1 processes",
            "this machine has no usable GPU",
            "trainer.device_memory_gb=80",
            "model.attn=flash3: needs a GPU",
            "needs trainer.resume_from_path",
            "max_ckpt_to_keep=0: must be",
        ],
    ),
    "no such file": (["data.train_files={tmp}/none.parquet"], ["none.parquet doesn't exist"]),
    "no such column": (["data.multiturn.messages_key=chat"], ["no column 'chat'"]),
    "no such template": (["data.chat_template=none.jinja"], ["none.jinja"]),
    "no such model": (["model.partial_pretrain={tmp}/none"], ["is no folder"]),
    "rows of another shape": (["data.train_files={tmp}/rows.jsonl"], ["row 0", "robot"]),
    "a sample too long": (["data.max_length=20"], ["more than data.max_length=20"]),
    "no full batch": (["data.train_batch_size=53"], ["Use at most 52."]),
    "a row function": (
        ["data.custom_cls.path={tmp}/none.py", "data.custom_cls.name=rows"],
        ["none.py doesn't exist"],
    ),
    "a file for a folder": (
        ["trainer.default_local_dir={tmp}/rows.jsonl"],
        ["is a file, not a folder"],
    ),
    "a run for a model": (
        ["model.partial_pretrain={begun}/run"],
        ["is a run's folder, not a model's.", "{begun}/run/global_step_1/huggingface."],
    ),
    "a checkpoint for a model": (
        ["model.partial_pretrain={begun}/run/global_step_1"],
        ["model is in {begun}/run/global_step_1/huggingface"],
    ),
    "a model for a run": (["trainer.default_local_dir={begun}/tuned"], ["is a model's folder"]),
    "a checkpoint for a run": (
        ["trainer.default_local_dir={begun}/run/global_step_1"],
        ["is a checkpoint", "to go on from it, {begun}/run."],
    ),
    "variables that aren't set": (
        ["model.partial_pretrain=", "trainer.default_local_dir="],
        [
            "model.partial_pretrain=: is empty",
            "trainer.default_local_dir=: is empty",
            "shell variable",
        ],
    ),
    "dashes, spaces and signs": (
        ["-check", "--optim.lr=1", "=", "optim.lr"],
        [
            "Write --check;",
            "Write optim.lr=1, without spaces and dashes;",
            "Write optim.lr=…, without spaces;",
        ],
    ),
    "a file of another command": (
        ["config={tmp}/rl.yaml"],
        ["config={tmp}/rl.yaml: 20 of its 20 keys are none of this command's."],
    ),
    "weights that are not the config's": (
        ["model.partial_pretrain={tmp}/short_config"],
        ["does not fit the model"],
    ),
    "tokens without an embedding, and no word of what ends a text": (
        ["model.partial_pretrain={tmp}/short"],
        [
            "train.parquet, row ",
            "rows. The tokenizer isn't this model's",
            "generation_config.json holds no token ids as eos_token_id ('never')",
        ],
    ),
}


@pytest.fixture(scope="module")
def wrong(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and models that are refused."""
    folder = tmp_path_factory.mktemp("wrong")
    rows_of({"messages": [{"role": "robot", "content": "x"}, *TALK]})(folder)
    (folder / "rl.yaml").write_text("".join(f"actor_rollout_ref.key{i}: 1\n" for i in range(20)))
    short_embedding(work, folder / "short")
    (folder / "short" / "generation_config.json").write_text('{"eos_token_id": "never"}')
    another_model(work / "model", folder / "short_config", {"hidden_size": 8})
    return folder


@pytest.mark.parametrize("name", FRESH)
def test_the_check_of_a_new_run_is_the_run(
    work: Path,
    begun: Path,
    wrong: Path,
    tmp_path: Path,
    name: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    more, expected = FRESH[name]
    places = {"tmp": wrong, "begun": begun}
    faults = refused(
        main,
        [*words(work, tmp_path / "run", **FEW), *(word.format(**places) for word in more)],
        tmp_path,
        capfd,
    )
    assert all(part.format(**places) in "\n".join(faults) for part in expected), faults
    assert not (tmp_path / "run").exists() and len(faults) <= len(more) + 3, "no flood"


@pytest.mark.parametrize(
    ("attn", "capability", "installed", "reason"),
    [
        ("flash3", (9, 0), [], "needs the package flash_attn_interface"),
        ("flash4", (10, 0), ["flash_attn"], "needs the package flash_attn.cute"),
        (
            "flash3",
            (8, 0),
            ["flash_attn_interface"],
            "is made for GPUs of compute capability 9, and this one has 8.0",
        ),
        (
            "flash4",
            (9, 0),
            ["flash_attn", "flash_attn.cute"],
            "is made for GPUs of compute capability 10, and this one has 9.0",
        ),
        ("cudnn", (8, 0), [], "needs a Hopper or later GPU"),
    ],
)
def test_attention_that_this_gpu_has_not_is_refused_in_preflight(
    attn: str,
    capability: tuple[int, int],
    installed: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(
        attention_flash, "find_spec", lambda name: True if name in installed else None
    )
    # type: ignore[arg-type]
    options = RunOptions(
        TrainerConfig(),
        DecoderConfig(attn=attn),
        FSDPConfig(),
        AdamWConfig(),
        CheckpointConfig(),
        1,
    )
    (fault,) = check_attention(options, 64, Box())
    assert fault.where == f"model.attn={attn}" and reason in fault.problem


def test_a_run_is_not_planned_for_more_memory_than_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 << 30)
    )
    (fault,) = check_device("auto", 1, Box(memory=80))
    assert fault.where == "trainer.device_memory_gb=80" and "GPU has 24.0 GiB" in fault.problem
    assert not list(check_device("auto", 1, Box(memory=20))) and not list(
        check_device("auto", 8, Box(elsewhere=True, memory=80))
    )


def test_cudnn_cannot_take_large_heads_on_any_box() -> None:
    options = RunOptions(
        TrainerConfig(),
        DecoderConfig(attn="cudnn"),
        FSDPConfig(),
        AdamWConfig(),
        CheckpointConfig(),
        1,
    )
    (fault,) = check_attention(options, 192, Box(elsewhere=True, memory=80))
    assert "head dimensions up to 128, not 192" in fault.problem


def test_gpus_elsewhere_can_be_planned_for_once_their_memory_is_known(
    work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    box = [
        "trainer.n_gpus_per_node=2",
        "trainer.device=cuda",
        "ulysses_sequence_parallel_size=2",
        "--check",
    ]
    asked = words(work, tmp_path / "run")
    assert main([*asked, *box]) == 1 and "trainer.device_memory_gb=80" in capfd.readouterr().out
    assert main([*asked, *box, "trainer.device_memory_gb=80"]) == 0
    assert "fits in 80 GiB" in capfd.readouterr().out
