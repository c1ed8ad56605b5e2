"""Configuration: what is accepted, what is refused, and that everything refused is said at once."""

from __future__ import annotations

import shlex
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from retool.config import (
    REQUIRED,
    ConfigError,
    Fault,
    help_text,
    leaves,
    nearest,
    option,
    parse,
    read,
    to_dict,
)
from retool.config.redact import HIDDEN, redact
from retool.sft.config import EXAMPLE, SYNONYMS, SFTConfig, contradictions

NEEDED = ["data.train_files=a.parquet", "model.partial_pretrain=/m"]
PUBLISHED = """
    data.train_files=/d/train.parquet data.val_files=/d/eval.parquet
    data.max_length=16384 data.train_batch_size=16
    data.multiturn.enable=true data.multiturn.messages_key=messages data.multiturn.tools_key=tools
    data.micro_batch_size_per_gpu=2
    model.partial_pretrain=/models/m model.strategy=fsdp
    trainer.default_local_dir=/out trainer.project_name=wuxibin-multiturn-sft
    trainer.experiment_name=multiturn-sft-Qwen2.5-0.5B-Instruct
    trainer.logger='["console"]' trainer.total_epochs=2
    ulysses_sequence_parallel_size=2 use_remove_padding=true
"""
DEFAULTS = {  # the contract's table
    "data.val_files": None,
    "data.train_max_samples": -1,
    "data.val_max_samples": -1,
    "data.train_batch_size": 256,
    "data.micro_batch_size_per_gpu": None,
    "data.max_token_len_per_gpu": None,
    "data.max_length": 4096,
    "data.truncation": "error",
    "data.multiturn.enable": True,
    "data.multiturn.messages_key": "messages",
    "data.multiturn.tools_key": "tools",
    "data.multiturn.enable_thinking_key": "enable_thinking",
    "data.multiturn.history": "error",
    "data.shuffle": True,
    "data.seed": 1,
    "data.num_workers": None,
    "data.apply_chat_template_kwargs": {},
    "data.custom_cls.path": None,
    "data.custom_cls.name": None,
    "data.chat_template": None,
    "model.strategy": "fsdp",
    "model.attn": "auto",
    "model.enable_gradient_checkpointing": "auto",
    "model.activation_offload": False,
    "model.fp32_residual": "auto",
    "model.fsdp_config.model_dtype": "fp32",
    "model.fsdp_config.param_dtype": "auto",
    "model.fsdp_config.reduce_dtype": "fp32",
    "model.fsdp_config.param_offload": False,
    "model.fsdp_config.optimizer_offload": False,
    "model.fsdp_config.fsdp_size": -1,
    "model.fsdp_config.expert_parallel_size": 1,
    "model.fsdp_config.reshard_after_forward": "auto",
    "model.fsdp_config.forward_prefetch": True,
    "model.trust_remote_code": False,
    "model.use_compile": "auto",
    "model.impl": "auto",
    "optim.lr": 1e-5,
    "optim.betas": [0.9, 0.95],
    "optim.weight_decay": 0.01,
    "optim.clip_grad": 1.0,
    "optim.lr_scheduler": "cosine",
    "optim.warmup_steps_ratio": 0.1,
    "optim.min_lr_ratio": 0.0,
    "ulysses_sequence_parallel_size": 1,
    "use_remove_padding": True,
    "trainer.default_local_dir": "checkpoints/retool-sft/test",
    "trainer.default_hdfs_dir": None,
    "trainer.project_name": "retool-sft",
    "trainer.experiment_name": "test",
    "trainer.logger": ["console"],
    "trainer.total_epochs": 1,
    "trainer.total_training_steps": None,
    "trainer.save_freq": -1,
    "trainer.test_freq": -1,
    "trainer.max_ckpt_to_keep": None,
    "trainer.resume_mode": "auto",
    "trainer.resume_from_path": None,
    "trainer.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
    "trainer.seed": 1,
    "trainer.nnodes": None,
    "trainer.n_gpus_per_node": None,
    "trainer.device": "auto",
    "trainer.deterministic": False,
    "trainer.max_grad_skips": 3,
}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict) and prefix + name != "data.apply_chat_template_kwargs"
        out |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return out


def sft(*words: str) -> SFTConfig:
    return parse(SFTConfig, [*NEEDED, *words], SYNONYMS)


def test_the_published_command_line_word_for_word() -> None:
    config = parse(SFTConfig, shlex.split(PUBLISHED), SYNONYMS)
    assert config.data.train_files == ("/d/train.parquet",) and config.data.val_files == (
        "/d/eval.parquet",
    )
    assert (
        config.data.max_length,
        config.data.train_batch_size,
        config.data.micro_batch_size_per_gpu,
    ) == (16384, 16, 2)
    assert config.trainer.logger == ("console",) and config.trainer.total_epochs == 2
    assert config.ulysses_sequence_parallel_size == 2 and config.use_remove_padding is True
    assert not list(contradictions(config))


def test_every_key_of_the_contract_and_its_default() -> None:
    got = flat(to_dict(sft()))
    assert {key: got[key] for key in DEFAULTS} == DEFAULTS
    assert all(leaf.doc.endswith((".", "?")) and "\n" not in leaf.doc for leaf in leaves(SFTConfig))


@pytest.mark.parametrize(
    ("text", "files"),
    [
        ("a.parquet", ("a.parquet",)),
        ("[a,b]", ("a", "b")),
        ("['a','b']", ("a", "b")),
        ('["a b.parquet"]', ("a b.parquet",)),
        ("'a.parquet'", ("a.parquet",)),
        ("hdfs://host:9000/x.parquet", ("hdfs://host:9000/x.parquet",)),
        ("s3://bucket/*.jsonl", ("s3://bucket/*.jsonl",)),
        ("/data/a=b.parquet", ("/data/a=b.parquet",)),
        ("007", ("007",)),
    ],
)
def test_list_forms(text: str, files: tuple[str, ...]) -> None:
    assert sft(f"data.train_files={text}").data.train_files == files


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("optim.lr=1e-6", "optim.lr", 1e-6),
        ("optim.lr=2", "optim.lr", 2.0),
        ("optim.betas=[0.9,0.99]", "optim.betas", [0.9, 0.99]),
        ("optim.betas=(0.9,0.99)", "optim.betas", [0.9, 0.99]),
        ("use_remove_padding=False", "use_remove_padding", False),
        ("trainer.project_name=007", "trainer.project_name", "007"),
        ("trainer.project_name=1e5", "trainer.project_name", "1e5"),
        ("trainer.experiment_name=a: b # c", "trainer.experiment_name", "a: b # c"),
        ("trainer.save_freq=after_each_epoch", "trainer.save_freq", "after_each_epoch"),
        ("trainer.save_freq=30", "trainer.save_freq", 30),
        ("data.max_token_len_per_gpu=16_384", "data.max_token_len_per_gpu", 16384),
        ("data.chat_template=None", "data.chat_template", None),
        ("data.chat_template=null", "data.chat_template", None),
        ("data.truncation='drop'", "data.truncation", "drop"),
        ("model.enable_gradient_checkpointing=True", "model.enable_gradient_checkpointing", True),
        (
            "model.enable_gradient_checkpointing=selective",
            "model.enable_gradient_checkpointing",
            "selective",
        ),
        ("model.enable_activation_offload=True", "model.activation_offload", True),
        ("model.activation_offload=auto", "model.activation_offload", "auto"),
        ("trainer.checkpoint.async_save=false", "trainer.checkpoint.async_save", False),
        ("+trainer.seed=3", "trainer.seed", 3),
        ("++trainer.seed=3", "data.seed", 3),
        ("trainer.device_memory_gb=80", "trainer.device_memory_gb", 80.0),
        ("model.strategy=fsdp2", "model.strategy", "fsdp"),
        ("model.fsdp_config.param_dtype=bfloat16", "model.fsdp_config.param_dtype", "bf16"),
        ("model.path=/other", "model.partial_pretrain", "/other"),
        ("engine.strategy=fsdp2", "model.strategy", "fsdp"),
        ("engine.ulysses_sequence_parallel_size=2", "ulysses_sequence_parallel_size", 2),
        ("model.use_remove_padding=false", "use_remove_padding", False),
        ("data.messages_key=chat", "data.multiturn.messages_key", "chat"),
        ("optim.lr_scheduler_type=constant", "optim.lr_scheduler", "constant"),
        ("optim.lr_warmup_steps_ratio=0.2", "optim.warmup_steps_ratio", 0.2),
        (
            "data.apply_chat_template_kwargs={enable_thinking: false}",
            "data.apply_chat_template_kwargs",
            {"enable_thinking": False},
        ),
        (
            'data.apply_chat_template_kwargs={"a":{"b":[1,2]}}',
            "data.apply_chat_template_kwargs",
            {"a": {"b": [1, 2]}},
        ),
        (
            "data.apply_chat_template_kwargs.enable_thinking=true",
            "data.apply_chat_template_kwargs",
            {"enable_thinking": True},
        ),
        (
            "trainer.default_local_dir=x/${trainer.project_name}/${optim.lr}",
            "trainer.default_local_dir",
            "x/retool-sft/1e-05",
        ),
    ],
)
def test_values(word: str, key: str, value: object) -> None:
    got = flat(to_dict(sft(word)))[key]
    assert got == value and type(got) is type(value)


def test_a_path_at_home_is_no_folder_called_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("trainer: {default_local_dir: ~/runs/a}")
    words = ["config=~/run.yaml", "trainer.project_name=~me"]
    parsed = read(SFTConfig, words, options={"data.cache_dir": "~/cache"})
    assert parsed.config.trainer.default_local_dir == f"{tmp_path}/runs/a"
    assert parsed.config.data.cache_dir == f"{tmp_path}/cache"
    assert parsed.config.trainer.project_name == "~me"


@pytest.mark.parametrize(
    "word",
    [
        "data.train_files=${DATA}/train.parquet",
        "data.val_files=[a.parquet,'${DATA}/val.parquet']",
        "data.apply_chat_template_kwargs={date: '${DATE}'}",
    ],
)
def test_a_shell_variable_in_single_quotes_is_a_fault(word: str) -> None:
    parsed = read(SFTConfig, ["data.train_files=a", "model.partial_pretrain=m", word])
    (fault,) = parsed.faults
    assert fault.where == word.partition("=")[0] and "not found" in fault.problem
    assert parsed.config.data.apply_chat_template_kwargs == {}


def test_every_synonym_leads_to_a_key() -> None:
    keys = {leaf.key for leaf in leaves(SFTConfig)}
    assert set(SYNONYMS.values()) <= keys and not set(SYNONYMS) & keys


def test_every_fault_at_once() -> None:
    as_typed = [  # faults that quote the word
        "optim.lr_schedular=cosine",
        "optim.lr_scheduler=cosin",
        "data.max_length=abc",
        "--foo",
        "data=3",
        "nonsense=1",
        "trainer.seed=null",
        "config=/no/such.yaml",
        "data.apply_chat_template_kwargs={x:1}",
        "trainer.logger=[a",
        "model.strategy=megatron",
    ]
    words = [
        *as_typed,
        "optim.lr=-1",
        "trainer.default_local_dir=${trainer.projct_name}",
        "optim.betas=[0.9,1.0]",
    ]
    with pytest.raises(ConfigError) as raised:
        parse(SFTConfig, words, SYNONYMS)
    said = {fault.where: f"{fault.problem} {fault.remedy}" for fault in raised.value.faults}
    by_key = [
        "optim.lr=-1.0",
        "trainer.default_local_dir",
        "optim.betas=1.0",
        "data.train_files",
        "model.partial_pretrain",
    ]
    assert sorted(said) == sorted(as_typed + by_key)
    assert len(raised.value.faults) == len(said)
    assert "Did you mean optim.lr_scheduler?" in said["optim.lr_schedular=cosine"]
    assert (
        "cosine or wsd or constant" in said["optim.lr_scheduler=cosin"]
        and "Did you mean cosine?" in said["optim.lr_scheduler=cosin"]
    )
    assert "an integer" in said["data.max_length=abc"] and "above 0" in said["optim.lr=-1.0"]
    assert "space after a colon" in said["data.apply_chat_template_kwargs={x:1}"]
    assert "required" in said["data.train_files"] and "fsdp" in said["model.strategy=megatron"]
    assert all(where in str(raised.value) for where in said)


@pytest.mark.parametrize("words", [["data.train_file=a"], ["--train-files", "a"]])
def test_a_key_that_is_offered_for_another_is_not_said_to_lack(words: list[str]) -> None:
    parsed = read(SFTConfig, [*words, "model.partial_pretrain=m"], SYNONYMS)
    (fault,) = parsed.faults
    assert "data.train_files" in fault.remedy and parsed.meant == {"data.train_files"}


def test_faulty_values_leave_a_whole_configuration_to_go_on_with() -> None:
    parsed = read(SFTConfig, ["data.max_length=abc", "trainer.save_freq=soon"], SYNONYMS)
    assert len(parsed.faults) == 4
    assert (
        parsed.config.data.max_length == 4096
        and parsed.config.data.train_files == ()
        and parsed.config.model.partial_pretrain == ""
    )


@pytest.mark.parametrize(
    ("typo", "key"),
    [
        ("data.train_batch_sise", "data.train_batch_size"),
        ("train_batch_size", "data.train_batch_size"),
        ("trainer.lr", "optim.lr"),
        ("data.ulysses_sequence_parallel_size", "ulysses_sequence_parallel_size"),
        ("model.partial_pretain", "model.partial_pretrain"),
    ],
)
def test_nearest_key(typo: str, key: str) -> None:
    assert nearest(typo, [leaf.key for leaf in leaves(SFTConfig)]) == key


def test_a_file_comes_first_and_later_words_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data:\n  train_files: [x.parquet]\n  max_length: 100\n  apply_chat_template_kwargs: {a: 1}\n"
        "model: {path: /m}\noptim:\n  lr: 1e-3\n  lrr: 2\ntrainer.seed: 9\n"
    )
    parsed = read(
        SFTConfig,
        ["data.max_length=50", f"config={file}", "optim.lr=2e-3", "data.train_batch_size=8"],
        SYNONYMS,
    )
    assert [f.where for f in parsed.faults] == [f"optim.lrr in {file}"]
    config = parsed.config
    assert (
        config.data.max_length,
        config.optim.lr,
        config.data.train_batch_size,
        config.trainer.seed,
    ) == (100, 2e-3, 8, 9)
    assert config.model.partial_pretrain == "/m" and config.data.apply_chat_template_kwargs == {
        "a": 1
    }
    file.write_text("a: [1")
    assert "readable YAML" in read(SFTConfig, [f"config={file}"], SYNONYMS).faults[0].problem
    file.write_text("- 1")
    assert "list" in read(SFTConfig, [f"config={file}"], SYNONYMS).faults[0].problem


def test_a_dump_reads_back_to_the_same_configuration(tmp_path: Path) -> None:
    config = sft(
        "optim.lr=3e-6",
        "data.val_files=[a,b]",
        "data.apply_chat_template_kwargs={enable_thinking: true}",
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(redact(to_dict(config)), sort_keys=False))
    assert parse(SFTConfig, [f"config={tmp_path}/config.yaml"], SYNONYMS) == config


def test_configurations_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        sft().trainer.seed = 2  # pyright: ignore


@pytest.mark.parametrize(
    ("recompute", "fault"), [("true", False), ("auto", False), ("selective", True), ("false", True)]
)
def test_activations_are_offloaded_under_full_recomputation_only(
    recompute: str, fault: bool
) -> None:
    found = list(
        contradictions(
            sft("model.activation_offload=auto", f"model.enable_gradient_checkpointing={recompute}")
        )
    )
    assert [f.where for f in found] == ["model.activation_offload=auto"] * fault


def test_contradictions() -> None:
    config = sft(
        "data.custom_cls.path=x.py",
        "trainer.resume_mode=resume_path",
        "trainer.save_freq=0",
        "model.fsdp_config.fsdp_size=0",
        "trainer.checkpoint.save_contents=[optimizer,weights]",
    )
    where = [fault.where for fault in contradictions(config)]
    assert where == [
        "trainer.checkpoint.save_contents=weights",
        "trainer.checkpoint.save_contents",
        "trainer.resume_mode=resume_path",
        "trainer.save_freq=0",
        "model.fsdp_config.fsdp_size=0",
        "data.custom_cls",
    ]
    assert [f.where for f in contradictions(sft("trainer.resume_from_path=/x"))] == [
        "trainer.resume_from_path=/x"
    ]


def test_help_documents_every_key() -> None:
    text = help_text(SFTConfig, "python -m retool.sft", EXAMPLE, SYNONYMS)
    for leaf in leaves(SFTConfig):
        assert f"  {leaf.key}  (" in text
    titles = [line.partition(":")[0] for line in text.splitlines() if line.startswith("data")]
    assert titles == ["data", "data.multiturn", "data.custom_cls"]  # each group once, as a whole
    assert (
        "required" in text
        and "default 1e-05" in text
        and "model.path" in text
        and "torchrun" in text
        and "default [0.9,0.95]" in text
    )
    words = shlex.split(EXAMPLE.replace("\\\n", " "))
    assert (
        parse(
            SFTConfig, [w for w in words if "=" in w and not w.startswith("-")], SYNONYMS
        ).data.train_batch_size
        == 16
    )


@dataclass(frozen=True)
class Inner:
    """Inner."""

    kind: Literal["x", "y"] = option("x", "Kind.")
    several: tuple[int, ...] = option((1,), "Several.", minimum=0)


@dataclass(frozen=True)
class Outer:
    """Another command's configuration."""

    inner: Inner = field(default_factory=Inner)
    name: str = option(REQUIRED, "Name.")
    limit: int | None = option(None, "Limit.", minimum=1, maximum=5)


def test_it_serves_another_command() -> None:
    assert parse(Outer, ["inner.several=[1,2]", "name=n", "limit=5"]) == Outer(
        Inner("x", (1, 2)), "n", 5
    )
    faults = read(Outer, ["inner.several=[-1]", "limit=6"]).faults
    assert [f.where for f in faults] == ["name", "inner.several=-1", "limit=6"]
    assert str(faults[2]) == "limit=6: must be at least 1 and at most 5. Limit."
    assert str(Fault("a", "is b.")) == "a: is b."


def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    dirty = {
        "api_key": "xyz",
        "nested": {"password": "p", "list": ["https://me:pw@host/x", "plain"]},
        "hf_token": "t",
        "name": "run-0123456789abcdef",
        "url": "s3://b/x?X-Amz-Signature=abc&y=1",
        "text": "use hf_abcdefghijklmnopqrst now",
        "prompt_key": "prompt",
        "messages_key": "messages",
        "max_token_len_per_gpu": 5,
        "empty": None,
    }
    clean = redact(dirty)
    assert clean == {
        "api_key": HIDDEN,
        "nested": {"password": HIDDEN, "list": [f"https://{HIDDEN}@host/x", "plain"]},
        "hf_token": HIDDEN,
        "name": f"run-{HIDDEN}",
        "url": f"s3://b/x?X-Amz-Signature={HIDDEN}&y=1",
        "text": f"use {HIDDEN} now",
        "prompt_key": "prompt",
        "messages_key": "messages",
        "max_token_len_per_gpu": 5,
        "empty": None,
    }


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("--data.max_length=100", "Write data.max_length=100, without spaces and dashes"),
        ("data.max_length", "Write data.max_length=…, without spaces;"),
        ("--nproc_per_node=2", "before -m: torchrun --nproc_per_node=2 -m"),
        ("100", "Write data.train_files=train.parquet"),
    ],
)
def test_a_word_that_is_no_key_and_value(word: str, way_out: str) -> None:
    (fault,) = read(SFTConfig, [*NEEDED, word], SYNONYMS).faults
    assert fault.where == word and way_out in fault.remedy and "--help" in fault.remedy


def test_thoughts_are_left_out_or_written_but_not_both() -> None:
    assert not list(contradictions(sft("data.drop_reasoning=true"))) and not list(
        contradictions(sft("data.reasoning_in_content=true"))
    )
    assert [
        f.where
        for f in contradictions(sft("data.drop_reasoning=true", "data.reasoning_in_content=true"))
    ] == ["data.drop_reasoning"]
