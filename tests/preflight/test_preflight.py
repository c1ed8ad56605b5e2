"""Preflight: each bad input gets its sentence, all of them at once, and a sound run gets its plan."""

from __future__ import annotations

import io
import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from retool.config import Fault, read
from retool.config.options import (
    AdamWConfig,
    CheckpointConfig,
    DecoderConfig,
    FSDPConfig,
    RunOptions,
    TrainerConfig,
)
from retool.data.loader import StepOrder, step_batch
from retool.data.packing import LEAST_ROOM, shared_room
from retool.data.template import time_and_memory
from retool.model.config import DynamicScaling, ModelConfig
from retool.model.costs import parameter_count
from retool.model.hub import find_model
from retool.parallel.mesh import make_mesh
from retool.perf import GIB
from retool.preflight import machine
from retool.preflight.machine import check_output
from retool.preflight.plan import (
    Choice,
    World,
    checkpoint_bytes,
    choose,
    host_bytes,
    kept_checkpoints,
)
from retool.preflight.show import show_faults, show_plan, traffic_plan
from retool.preflight.world import check_mesh, read_world
from retool.sft.__main__ import main
from retool.sft.config import SYNONYMS, SFTConfig
from retool.sft.plan import TOKENS_TO_FILL_A_GPU, SFTReport, packing_of, records, why_unrecorded
from retool.sft.preflight import preflight
from retool.sft.show import in_words, rows_read
from retool.sft.train import make_packing

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TOOL = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
ROW = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (two shards and an index), train.parquet (10 rows) and val.jsonl (3
    rows).
    """
    root = tmp_path_factory.mktemp("sound")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *SPECIALS])}, []))
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    raw.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' "
        "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tokenizer.save_pretrained(root / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    Qwen2ForCausalLM(config).save_pretrained(root / "model", max_shard_size="40KB")
    assert (root / "model" / "model.safetensors.index.json").exists()
    pq.write_table(pa.Table.from_pylist([ROW] * 10), root / "train.parquet")
    (root / "val.jsonl").write_text("\n".join(json.dumps(ROW) for _ in range(3)))
    return root


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def words(root: Path, *more: str) -> list[str]:
    return [
        f"data.train_files={root}/train.parquet",
        f"model.partial_pretrain={root}/model",
        "data.train_batch_size=4",
        f"trainer.default_local_dir={root}/out",
        f"data.cache_dir={root}/cache",
        "trainer.device=cpu",
        "data.num_workers=0",
        *more,
    ]


def check(
    root: Path, *more: str, environment: dict[str, str] | None = None, planning: bool = False
) -> SFTReport:
    return preflight(read(SFTConfig, words(root, *more), SYNONYMS), planning, environment or {})


def said(report: SFTReport) -> str:
    return "\n".join(map(str, report.faults))


def test_a_sound_run_has_no_fault_and_a_plan(run: Path) -> None:
    seen: list[int] = []
    parsed = read(
        SFTConfig,
        words(
            run,
            f"data.val_files={run}/val.jsonl",
            "trainer.total_epochs=3",
            "optim.warmup_steps_ratio=0.5",
        ),
        SYNONYMS,
    )
    report = preflight(parsed, environment={}, progress=seen.append)
    assert report.faults == () and not (run / "out").exists()
    assert (
        report.model is not None
        and report.folder == run / "model"
        and report.choice is not None
        and report.choice.fits is None
    )
    assert (
        report.train is not None
        and report.val is not None
        and (len(report.train.dataset), len(report.val.dataset)) == (10, 3)
    )
    assert (report.steps_per_epoch, report.steps) == (2, 6) and seen == [10, 3]
    # Every byte and every special is a token here
    assert report.longest == len("_user\n2+2?_\n" + "_assistant\n4_\n")
    plan = dict(in_words(report))
    assert (
        "2 layers, 4/2 heads of 8" in plan["model"]
        and "10 rows" in plan["data"]
        and "its last 2 samples left out" in plan["data"]
    )
    assert (
        "6 optimizer steps; warm-up over 3" in plan["schedule"]
        and "cosine to 0" in plan["schedule"]
    )
    assert (
        f"{run}/out" in plan["written"]
        and "hf_model" in plan["written"]
        and "after the last step" in plan["written"]
    )
    assert preflight(parsed, environment={}).faults == ()


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def write_template(text: str) -> Callable[[Path], object]:
    return lambda root: (root / "model" / "chat_template.jinja").write_text(text)


def huge_template(root: Path) -> None:
    with (root / "model" / "chat_template.jinja").open("wb") as file:
        file.truncate(20_000_000_000)  # takes no room on the disk


def remove_template(root: Path) -> None:
    (root / "model" / "chat_template.jinja").unlink(missing_ok=True)
    edit(root / "model" / "tokenizer_config.json", chat_template=None)


def remove_tokenizer(root: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (root / "model" / name).unlink(missing_ok=True)


def into_checkpoint(inside: str, kept: str = "*") -> Callable[[Path], None]:
    """The model's folder becomes a checkpoint that has, of the model's files, those `kept`."""

    def change(root: Path) -> None:
        files = [(file.name, file.read_bytes()) for file in (root / "model").glob(kept)]
        shutil.rmtree(root / "model")
        (root / "model" / inside).mkdir(parents=True)
        for name, data in files:
            (root / "model" / inside / name).write_bytes(data)

    return change


def shards(root: Path) -> list[Path]:
    return sorted((root / "model").glob("model-*.safetensors"))


def cut_shard(root: Path) -> None:
    data = shards(root)[0].read_bytes()
    shards(root)[0].write_bytes(data[: len(data) // 2])


def reshape_weight(root: Path) -> None:
    tensors = load_file(shards(root)[0])
    name = next(iter(tensors))
    save_file(
        {**tensors, name: tensors[name].reshape(-1)[:7].clone()}, shards(root)[0], {"format": "pt"}
    )


def write_rows(*rows: object) -> Callable[[Path], object]:
    return lambda root: (root / "train.jsonl").write_text(
        "\n".join(json.dumps(row) for row in rows)
    )


JSONL = "data.train_files={root}/train.jsonl"


@pytest.mark.parametrize(
    ("spoil", "more", "expected"),
    [
        (
            lambda r: (r / "train.parquet").unlink(),
            [],
            ["data.train_files=", "train.parquet doesn't exist"],
        ),
        (lambda r: (r / "train.parquet").write_bytes(b""), [], ["train.parquet is empty"]),
        (
            lambda r: (r / "train.parquet").write_bytes(b"PAR1 no PAR1"),
            [],
            ["isn't a readable parquet file"],
        ),
        (
            lambda r: None,
            ["data.multiturn.messages_key=chat"],
            ["no column 'chat'; it has messages"],
        ),
        (lambda r: (r / "empty").mkdir(), ["data.train_files={root}/empty"], ["has no .parquet"]),
        (write_rows({"messages": "hello"}), [JSONL], ["row 0", "isn't a list of messages"]),
        (
            write_rows({"messages": [{"role": "robot", "content": "x"}]}),
            [JSONL],
            ["row 0", "robot"],
        ),
        (write_rows({"messages": [{"role": "assistant", "content": "x"}]}), [JSONL], ["row 0"]),
        (write_rows({"messages": [{"role": "user", "content": "x"}]}), [JSONL], ["row 0"]),
        (
            lambda r: None,
            ["data.max_length=10"],
            ["row 0", "data.max_length=10", "data.truncation=drop"],
        ),
        (
            lambda r: None,
            ["data.train_batch_size=11"],
            ["data.train_batch_size=11", "10 training samples", "Use at most 10."],
        ),
        (
            lambda r: edit(r / "model" / "config.json", model_type="mamba"),
            [],
            ["model_type 'mamba'", "llama, ministral, mistral"],
        ),
        (
            lambda r: edit(r / "model" / "config.json", hidden_size=None),
            [],
            ["config.json: lacks 'hidden_size'"],
        ),
        (
            lambda r: (r / "model" / "config.json").unlink(),
            [],
            ["has no config.json. Give a Hugging Face"],
        ),
        (
            into_checkpoint("huggingface"),
            [],
            ["has no config.json", "model is in", "model/huggingface: give that"],
        ),
        (
            into_checkpoint("actor/huggingface"),
            [],
            ["has no config.json", "model is in", "model/actor/huggingface: give that"],
        ),
        (
            into_checkpoint("actor/huggingface", "config.json"),
            [],
            ["python -m retool.checkpoint merge", "and give DIR"],
        ),
        (lambda r: (r / "model" / "config.json").write_text("{"), [], ["config.json"]),
        (
            lambda r: (r / "model" / "config.json").write_text("[" * 200_000),
            [],
            ["config.json is no JSON file", "nested without end"],
        ),
        (
            lambda r: (r / "model" / "config.json").write_text("[]"),
            [],
            ["config.json holds a list, not a JSON object"],
        ),
        (
            lambda r: edit(r / "model" / "config.json", num_hidden_layers=2e9),
            [],
            ["num_hidden_layers=2000000000.0 is no whole number"],
        ),
        (
            lambda r: edit(r / "model" / "config.json", num_hidden_layers=-1),
            [],
            ["num_hidden_layers=-1 is no whole number"],
        ),
        (
            lambda r: edit(r / "model" / "config.json", num_attention_heads=0),
            [],
            ["num_attention_heads=0 is no whole number"],
        ),
        (
            lambda r: edit(r / "model" / "config.json", hidden_size="64"),
            [],
            ["hidden_size='64' is no whole number"],
        ),
        (
            lambda r: edit(r / "model" / "config.json", num_hidden_layers=1_000, layer_types=None),
            [],
            ["does not fit the model", "is missing"],
        ),
        (
            write_template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
            [],
            ["was stopped: it calls itself without end"],
        ),
        (
            write_template("{{ 'x' * 20000000000 }}"),
            [],
            ["was stopped: it makes more text than there is memory for"],
        ),
        (
            write_template(
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            ),
            [],
            ["it computes for more than"],
        ),
        (
            lambda r: (r / "model" / "tokenizer_config.json").write_text("[" * 200_000),
            [],
            ["tokenizer_config.json", "isn't a JSON object"],
        ),
        (huge_template, [], ["chat_template.jinja: has 20,000,000,000 bytes"]),
        (remove_template, [], ["has no chat template", "data.chat_template=hermes"]),
        (remove_tokenizer, [], ["has no tokenizer"]),
        (lambda r: shards(r)[1].unlink(), [], ["lacks model-00002-of"]),
        (cut_shard, [], ["Fetch it again"]),
        (reshape_weight, [], ["does not fit the model", "is [7], the model has"]),
        (lambda r: shutil.rmtree(r / "model"), [], ["model is no folder"]),
        (
            lambda r: (r / "out").write_text("a file"),
            [],
            ["trainer.default_local_dir=", "is a file, not a folder"],
        ),
        (
            lambda r: None,
            ["trainer.default_local_dir=/proc/no/such"],
            ["trainer.default_local_dir=/proc/no/such", "can't be written"],
        ),
        (
            lambda r: (r / "disk").symlink_to("unmounted"),
            ["trainer.default_local_dir={root}/disk/run"],
            ["disk is a link to unmounted, which isn't there", "Mount or make that"],
        ),
        (
            lambda r: None,
            ["trainer.default_local_dir={root}/" + "x" * 256],
            ["can't be written: File name too long", "Choose another"],
        ),
        (
            lambda r: None,
            ["trainer.default_local_dir=s3://bucket/run"],
            ["=s3://bucket/run", "is an address", "trainer.default_hdfs_dir takes"],
        ),
        (
            lambda r: None,
            ["ulysses_sequence_parallel_size=2"],
            ["does not fit 1 process", "or start 2: torchrun --nproc_per_node=2"],
        ),
        (
            lambda r: None,
            ["trainer.n_gpus_per_node=2"],
            ["trainer.n_gpus_per_node=2", "there is no launcher", "--nproc_per_node=2"],
        ),
        (
            lambda r: None,
            ["data.chat_template=missing.jinja"],
            ["data.chat_template=missing.jinja", "no such file"],
        ),
        # The template itself is longer than a name may be
        (
            lambda r: None,
            ["data.chat_template='" + "Be brief. " * 30 + "'"],
            ["data.chat_template=Be brief. Be brief.", "Give a Jinja file"],
        ),
        (lambda r: None, ["model.attn=varlen"], ["model.attn=varlen", "needs a GPU"]),
        (
            lambda r: None,
            ["model.attn=cudnn", "trainer.deterministic=true"],
            ["model.attn=cudnn", "no fixed order", "needs a GPU"],
        ),
        (
            lambda r: None,
            ["trainer.resume_mode=resume_path", "trainer.resume_from_path=/none"],
            ["trainer.resume_from_path=/none", "not a folder"],
        ),
        (
            lambda r: None,
            ["trainer.resume_mode=resume_path", "trainer.resume_from_path={root}"],
            ["holds no model_world_size"],
        ),
        (
            lambda r: None,
            ["data.custom_cls.path=/none.py", "data.custom_cls.name=rows"],
            ["/none.py doesn't exist"],
        ),
        (lambda r: None, ["optim.lr=-1"], ["optim.lr=-1", "above 0"]),
    ],
)
def test_bad_input(
    run: Path,
    spoil: Callable[[Path], object],
    more: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time_and_memory, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(time_and_memory, "TICK_S", 0.05)
    spoil(run)
    report = check(run, *(word.format(root=run) for word in more))
    text = said(report)
    assert report.faults and all(part in text for part in expected), text


def test_a_run_from_the_start_says_what_becomes_of_the_one_before(run: Path) -> None:
    (run / "out" / "global_step_3").mkdir(parents=True)
    report = check(run, "trainer.resume_mode=disable")
    assert not report.faults and any(
        "global_step_3 and what else" in note and "previous_N" in note for note in report.notes
    )
    assert not any("previous" in note for note in check(run).notes)


def test_everything_at_once_and_exit_status(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards(run)[0].unlink()
    write_rows({"messages": 3}, ROW, {"messages": [{"role": "robot", "content": ""}]})(run)
    (run / "out").write_text("")
    bad = words(
        run,
        f"data.val_files=[{run}/val.jsonl,{run}/none.jsonl]",
        "trainer.logger=[console,nothing]",
        "optim.lrr=1",
        "ulysses_sequence_parallel_size=5",
        "trainer.n_gpus_per_node=7",
    )
    assert main([*bad, "--check"]) == 1
    text = capsys.readouterr().out
    for part in (
        "optim.lrr=1",
        "nothing",
        "lacks model-00001",
        "none.jsonl doesn't exist",
        "is a file",
        "does not fit 7",
        "4 query heads",
    ):
        assert part in text
    rows = check(run, f"data.train_files={run}/train.jsonl")
    assert "row 0" in said(rows) and "row 2" in said(rows) and "row 1" not in said(rows)
    assert "audit" in rows.faults[-3].remedy and "lacks model-00001" in said(rows)


def test_check_prints_the_plan_and_starts_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(run), "--check"]) == 0
    out = capsys.readouterr().out
    assert "schedule: 2 optimizer steps" in out and "memory:" in out and not (run / "out").exists()
    assert "network:" not in out, "one machine"
    assert main(["--help"]) == 0 and "data.train_files" in capsys.readouterr().out


def test_a_plan_for_another_box(run: Path) -> None:
    report = check(
        run,
        "trainer.n_gpus_per_node=4",
        "trainer.nnodes=2",
        "trainer.device=auto",
        "trainer.device_memory_gb=80",
        "ulysses_sequence_parallel_size=2",
        planning=True,
    )
    assert report.faults == () and report.world == World(8, 2, 4)
    assert (
        report.choice is not None
        and report.choice.fits is True
        and report.choice.recompute == "none"
    )
    assert (
        "8 on 2 machine(s): 4 data-parallel × 2 sequence-parallel"
        in dict(in_words(report))["processes"]
    )
    network = dict(in_words(report))["network"]
    assert "a step from each GPU in exchanges that leave the machine" in network
    assert "% of its time at 400 Gbit/s" in network and "% of its time at 100 Gbit/s" in network
    assert "with model.fsdp_config.fsdp_size=4" in network, "a tiny model waits for latency alone"
    plan = traffic_plan(report, tokens=80_000, divided=0.25)
    assert (plan.shards, plan.sp, plan.ep, plan.per_machine, plan.divided) == (8, 2, 1, 4, 0.25)


@pytest.mark.parametrize(("whole", "divided"), [("true", 0.0), ("false", 1.0)])
def test_documents_that_stay_whole_are_planned_without_exchanges(
    run: Path, monkeypatch: pytest.MonkeyPatch, whole: str, divided: float
) -> None:
    report = check(
        run,
        "trainer.n_gpus_per_node=2",
        "trainer.device_memory_gb=80",
        "trainer.device=auto",
        "ulysses_sequence_parallel_size=2",
        f"data.keep_documents_whole={whole}",
        planning=True,
    )
    asked = list[float]()
    words = "retool.sft.show.traffic_words"
    monkeypatch.setattr(words, lambda *args: asked.append(args[3]) or "")
    list(in_words(report))
    assert asked == [divided]


def test_what_cannot_be_recorded_is_told_where_it_was_asked_for(run: Path) -> None:
    report = check(run, "data.record_micro_batches=true")
    assert any("record_micro_batches" in note and "needs a GPU" in note for note in report.notes)
    assert records(report)
    left = replace(report.config.data, record_micro_batches="auto")
    auto = replace(report, config=replace(report.config, data=left))
    assert records(auto) and records(replace(auto, world=World(2, 1, 2)))
    assert not records(replace(auto, world=World(4, 2, 2)))
    bits = replace(report.config.trainer, deterministic=True)
    assert not records(replace(auto, config=replace(auto.config, trainer=bits)))
    planned = replace(report.config.trainer, device="auto", device_memory_gb=80.0)
    report = replace(report, config=replace(report.config, trainer=planned))
    assert "no memory left" in why_unrecorded(report)
    choice = report.choice
    assert choice is not None and not packing_of(report, 0, 1, 1).recorded
    report = replace(report, choice=replace(choice, recorded=LEAST_ROOM - 1))
    assert "so large" in why_unrecorded(report)
    assert shared_room([[1]], packing_of(report, 0, 1, 1)) == LEAST_ROOM
    report = replace(report, choice=replace(choice, recorded=LEAST_ROOM))
    assert not why_unrecorded(report) and packing_of(report, 0, 1, 1).recorded
    plain = replace(report.config.model, attn="reference")
    assert "plain formula" in why_unrecorded(
        replace(report, config=replace(report.config, model=plain))
    )
    assert isinstance(report.model, ModelConfig)
    stretched = replace(report.model, rope_scaling=DynamicScaling(2.0, 64))
    assert "rope changes" in why_unrecorded(replace(report, model=stretched))


def test_what_cannot_fit_says_what_would(run: Path) -> None:
    settings = [
        "trainer.device=auto",
        "data.micro_batch_size_per_gpu=4",
        "model.enable_gradient_checkpointing=false",
        "use_remove_padding=false",
    ]
    hopeless = check(
        run, *settings, "data.max_length=20000000", "trainer.device_memory_gb=8", planning=True
    )
    (fault,) = hopeless.faults
    assert (
        fault.where == "memory" and "a GPU has 8.0" in fault.problem and "combine" in fault.remedy
    ), fault
    tight = check(
        run, *settings, "data.max_length=1000000", "trainer.device_memory_gb=7", planning=True
    )
    assert tight.choice is not None and tight.choice.fits is False
    assert any(
        "data.micro_batch_size_per_gpu=1" in text
        for text in (*tight.notes, *(f.remedy for f in tight.faults))
    )


@pytest.mark.parametrize(("fill", "expected"), [("true", 1), ("false", 4)])
def test_short_samples_share_a_micro_batch_within_the_plan(
    run: Path, fill: str, expected: int
) -> None:
    long = {
        "messages": [
            {"role": "user", "content": "2+2?" * 40},
            {"role": "assistant", "content": "4"},
        ]
    }
    pq.write_table(pa.Table.from_pylist([ROW] * 4 + [long] * 4), run / "train.parquet")
    report = check(run, "data.micro_batch_size_per_gpu=1", f"data.fill_micro_batches={fill}")
    assert report.train is not None and report.choice is not None
    assert ("room for the 1 longest" if fill == "true" else "4 micro-batches of 1 samples") in dict(
        in_words(report)
    )["a step"]
    packing = make_packing(report, make_mesh())
    assert packing.room == report.choice.tokens
    order = StepOrder(4, seed=0, shuffle=False)
    for step, count in ((0, expected), (1, 4)):
        packs = step_batch(step, report.train.dataset, order, packing).micro_batches
        assert (
            len(packs) == count and max(pack.real_tokens for pack in packs) <= report.choice.tokens
        )


def test_a_micro_batch_is_filled_where_memory_allows(run: Path) -> None:
    box = ["trainer.device=auto", "data.micro_batch_size_per_gpu=1"]
    chosen = {
        name: check(run, *box, *more, planning=True).choice
        for name, more in {
            "roomy": ["trainer.device_memory_gb=80"],
            "tight": ["trainer.device_memory_gb=1.05"],
            "exact": ["trainer.device_memory_gb=80", "data.fill_micro_batches=false"],
        }.items()
    }
    tokens = {name: choice.tokens for name, choice in chosen.items() if choice is not None}
    assert tokens["roomy"] == TOKENS_TO_FILL_A_GPU and tokens["tight"] == tokens["exact"] < 100
    assert chosen["roomy"] is not None and chosen["roomy"].reshard, "one process gathers nothing"


def test_a_micro_batch_is_not_filled_at_the_price_of_the_compute_copy(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def but_for_the_copy(*args: Any, **more: Any) -> Choice:
        choice = choose(*args, **more)
        return replace(choice, keep_copy=choice.tokens < TOKENS_TO_FILL_A_GPU)

    monkeypatch.setattr("retool.sft.plan.choose", but_for_the_copy)
    choice = check(
        run,
        "trainer.device=auto",
        "data.micro_batch_size_per_gpu=1",
        "trainer.device_memory_gb=80",
        planning=True,
    ).choice
    assert choice is not None and choice.tokens < 100 and choice.keep_copy


def test_notes(run: Path) -> None:
    report = check(
        run,
        "data.train_batch_size=2",
        "trainer.save_freq=99",
        "trainer.test_freq=2",
        "trainer.n_gpus_per_node=4",
        "data.micro_batch_size_per_gpu=1",
        "data.max_token_len_per_gpu=99",
        planning=True,
    )
    text = "\n".join(report.notes)
    assert (
        "leaves 2 of 4 data-parallel groups idle" in text
        and "trainer.save_freq=99" in text
        and "trainer.test_freq=2 does nothing without data.val_files" in text
        and "isn't used" in text
    )
    assert "positions" not in text
    edit(run / "model" / "config.json", max_position_embeddings=8)
    assert "more than the 8 positions" in "\n".join(check(run).notes)


@pytest.mark.parametrize(
    ("environment", "nodes", "each", "planning", "world", "faults"),
    [
        ({}, None, None, False, World(1, 1, 1), 0),
        ({}, None, 2, False, World(1, 1, 1), 1),
        ({}, 2, 4, True, World(8, 2, 4), 0),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None, None, False, World(4, 2, 2), 0),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 2, 2, False, World(4, 2, 2), 0),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 1, 4, True, World(4, 2, 2), 2),
        ({"WORLD_SIZE": "2"}, 1, 2, False, World(2, 1, 2), 0),
    ],
)
def test_world(
    environment: dict[str, str],
    nodes: int | None,
    each: int | None,
    planning: bool,
    world: World,
    faults: int,
) -> None:
    got, trouble = read_world(nodes, each, planning, environment)
    assert got == world and len(trouble) == faults


def test_mesh_faults_name_the_legal_values() -> None:
    def faults(processes: int, sp: int, fsdp_size: int, heads: int) -> list[Fault]:
        options = RunOptions(
            TrainerConfig(),
            DecoderConfig(),
            FSDPConfig(fsdp_size=fsdp_size),
            AdamWConfig(),
            CheckpointConfig(),
            sp,
        )
        return list(check_mesh(options, processes, heads))

    assert [str(f) for f in faults(2, 8, -1, 14)] == [
        "ulysses_sequence_parallel_size=8: does not fit 2 processes: it must divide the world size. Use 1 or 2."
    ]
    assert [f.remedy for f in faults(8, 8, 3, 6)] == ["Use 1, 2 or 4.", "Use -1, 1, 2, 4 or 8."]
    assert not faults(6, 3, 2, 14)


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert not list(check_output(tmp_path / "a" / "b", free / 2)) and not list(tmp_path.iterdir())
    (fault,) = check_output(tmp_path / "a" / "b", free + 10 * GIB)
    assert "GiB for a checkpoint" in fault.problem


def test_tables_show_hostile_text_as_text() -> None:
    faults = [Fault("[red]key[/red]\x1b[2J", "is wrong.\x07", "[link=http://x]way[/link]")]
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, width=140, color_system=None)
        show_faults(faults, console)
        show_plan([("data", "[bold]1[/bold]\nline 2")], ["mind [this]\x1b]0;x"], console)
        text = out.getvalue()
        assert (
            "[red]key[/red]" in text
            and "[link=http://x]way[/link]" in text
            and "[bold]1[/bold]" in text
            and "[this]" in text
        )
        assert "\x1b[2J" not in text and "\x07" not in text and "\x1b]0" not in text
    assert "1 fault, nothing started" in text and "data: line 2" in text


def test_hub_ids_resolve_to_the_local_copy(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    snapshot = tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(sound / "model", snapshot)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_model(str(sound / "model")) == sound / "model"
    with pytest.raises(ValueError, match="org/other is no local folder"):
        find_model("org/other")
    for name in ("./org/tiny", "/no/such/model", "justaname"):
        with pytest.raises(ValueError, match="is no folder"):
            find_model(name)


def test_checkpoints_that_will_fill_the_disk_are_a_note(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["trainer.total_epochs=5", "trainer.save_freq=2"]
    report = check(run, *more)
    assert kept_checkpoints(report) == 5 and report.steps == 10 and not report.notes
    assert kept_checkpoints(check(run, *more, "trainer.max_ckpt_to_keep=2")) == 3
    assert (
        kept_checkpoints(check(run)) == 1
        and kept_checkpoints(
            check(run, "trainer.save_freq=after_each_epoch", "trainer.total_epochs=3")
        )
        == 3
    )
    model = report.model
    assert model is not None
    each = checkpoint_bytes(report)
    # type: ignore[attr-defined]
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, int(3.5 * each))
    )
    (note,) = check(run, *more).notes
    assert "5 checkpoints" in note and "add trainer.max_ckpt_to_keep=2" in note
    assert not check(run, *more, "trainer.max_ckpt_to_keep=2").notes


def test_offloading_needs_host_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpus = ["trainer.device=auto", "trainer.device_memory_gb=80", "trainer.n_gpus_per_node=2"]
    more = [*on_gpus, "model.fsdp_config.optimizer_offload=true"]
    plan = check(run, *more, planning=True)
    assert plan.model is not None and host_bytes(plan) == 8 * parameter_count(plan.model), (
        "two moments of four bytes, on one machine"
    )
    assert "GiB of host memory on each machine" in dict(in_words(plan))["memory"]
    assert "host memory" not in dict(in_words(check(run, *on_gpus, planning=True)))["memory"]
    monkeypatch.setattr(machine, "host_memory", lambda: host_bytes(plan))
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
    text = said(check(run, *more, environment=launched))
    assert "model.fsdp_config.optimizer_offload=true" in text and "of this machine's memory" in text


def test_a_taken_port_and_a_store_without_client_stand_in_the_same_table(run: Path) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = str(server.getsockname()[1])
        launched = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        text = said(
            check(
                run,
                "trainer.default_hdfs_dir=nosuch://bucket",
                "data.train_batch_size=11",
                environment=launched,
            )
        )
    assert (
        f"MASTER_PORT={port}" in text
        and "nosuch://bucket" in text
        and "data.train_batch_size=11" in text
    )


def test_fused_attention_in_fp32_is_refused_and_half_a_checkpoint_noted(run: Path) -> None:
    more = [
        "trainer.device=auto",
        "trainer.device_memory_gb=80",
        "model.fsdp_config.param_dtype=fp32",
    ]
    text = said(check(run, *more, "model.attn=varlen", planning=True))
    assert (
        "model.attn=varlen: computes in bfloat16 or float16, not float32. Use model.attn=auto, or model.fsdp_config.param_dtype=bf16."
        in text
    )
    (note,) = check(run, "trainer.checkpoint.save_contents=[model,hf_model]").notes
    assert (
        note
        == "trainer.checkpoint.save_contents leaves out optimizer: a run can't be resumed from these checkpoints."
    )


def test_the_plan_counts_tokens_of_a_step(run: Path) -> None:
    report = check(run)
    assert report.train is not None
    lengths = report.train.dataset.lengths
    trained = report.train.dataset.trained
    assert (
        f"{4 * lengths[0]} tokens on average, {4 * trained[0]} of them trained"
        in dict(in_words(report))["a step"]
    )


def test_rows_are_counted_while_they_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with rows_read(Console(file=out, force_terminal=True, width=100)) as progress:
        parsed = read(SFTConfig, words(run), SYNONYMS)
        assert preflight(parsed, environment={}, progress=progress).faults == ()
    assert "10 rows rendered and tokenised" in out.getvalue()
    monkeypatch.setattr("retool.data.progress.SECONDS_BETWEEN_LINES", 0.0)
    piped = io.StringIO()
    with rows_read(Console(file=piped)) as progress:
        progress(2_000)
    assert piped.getvalue().startswith("2,000 rows rendered and tokenised, ")


def test_the_plan_says_what_was_taken_for_what(run: Path) -> None:
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    (run / "chats.json").write_text(json.dumps([{"conversations": turns}] * 4))
    (run / "sums.csv").write_text("instruction,input,output\n2+2?,,4\n")
    report = check(run, f"data.train_files={run}/chats.json", f"data.val_files={run}/sums.csv")
    assert not report.faults, said(report)
    plan = dict(in_words(report))["data"]
    assert "\nchats.json: ShareGPT; human → user, gpt → assistant" in plan
    assert plan.endswith("\nsums.csv: Alpaca; instruction + input → user, output → assistant")
