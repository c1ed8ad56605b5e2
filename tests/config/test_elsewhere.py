"""Names that other trainers have for our keys, and words that aren't key=value: what to write instead."""

from __future__ import annotations

import pytest

from retool.config import help_text, leaves
from retool.config.elsewhere import ABSENT, LAUNCHERS, NAMES, absent, key_for
from retool.config.words import Reader
from retool.rl.config import RLConfig
from retool.rl.config.names import EXAMPLE as RL_EXAMPLE
from retool.rl.config.names import IGNORED
from retool.rl.config.names import SYNONYMS as RL_SYNONYMS
from retool.sft.config import EXAMPLE, SYNONYMS, SFTConfig

SFT_KEYS = [leaf.key for leaf in leaves(SFTConfig)]
RL_KEYS = [leaf.key for leaf in leaves(RLConfig)]


def remedies(text: str, schema: type = SFTConfig) -> list[str]:
    """Of the faults in these words."""
    reader = Reader(
        {leaf.key: leaf for leaf in leaves(schema)},
        SYNONYMS if schema is SFTConfig else RL_SYNONYMS,
    )
    reader.read(text.split())
    return [fault.remedy for fault in reader.faults]


def test_every_row_of_the_table_leads_to_a_key() -> None:
    for end in NAMES:
        assert any(f".{key}".endswith(f".{end}") for key in (*SFT_KEYS, *RL_KEYS)), end
    said = [name for names in (*NAMES.values(), *ABSENT.values()) for name in names.split()]
    ours = {key.rpartition(".")[2] for key in SFT_KEYS}
    for name in said:
        # No name leads away from a key that is called so
        meant = key_for(name, SFT_KEYS)
        assert meant is None or name not in ours or meant.endswith(f".{name}"), name
    assert not LAUNCHERS & set(said) - {"nnodes"}


@pytest.mark.parametrize(
    ("name", "sft", "rl"),
    [
        ("optim.learning_rate", "optim.lr", "actor_rollout_ref.actor.optim.lr"),
        ("model_name_or_path", "model.partial_pretrain", "actor_rollout_ref.model.path"),
        ("base_model", "model.partial_pretrain", "actor_rollout_ref.model.path"),
        (
            "per_device_train_batch_size",
            "data.micro_batch_size_per_gpu",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
        ),
        ("gradient_accumulation_steps", "data.train_batch_size", "data.train_batch_size"),
        ("sequence_len", "data.max_length", "data.max_response_length"),
        ("Max-Seq-Length", "data.max_length", "data.max_response_length"),
        ("num_train_epochs", "trainer.total_epochs", "trainer.total_epochs"),
        ("output_dir", "trainer.default_local_dir", "trainer.default_local_dir"),
        ("report_to", "trainer.logger", "trainer.logger"),
        ("warmup_ratio", "optim.warmup_steps_ratio", "actor_rollout_ref.actor.optim.warmup_steps_ratio"),
        ("max_grad_norm", "optim.clip_grad", "actor_rollout_ref.actor.grad_clip"),
        ("attn_implementation", "model.attn", "actor_rollout_ref.model.attn"),
        ("num_generations", None, "actor_rollout_ref.rollout.n"),
        ("beta", None, "actor_rollout_ref.actor.kl_loss_coef"),
        ("epsilon_high", None, "actor_rollout_ref.actor.clip_ratio_high"),
        ("reward_func", None, "custom_reward_function.path"),
        ("reward_funcs", None, "reward_model.functions"),
        ("reward_weights", None, "reward_model.weights"),
    ],
)  # fmt: skip
def test_names_of_other_trainers(name: str, sft: str | None, rl: str) -> None:
    assert (key_for(name, SFT_KEYS), key_for(name, RL_KEYS)) == (sft, rl)
    for schema, key in ((SFTConfig, sft), (RLConfig, rl)):
        (said,) = remedies(f"{name}=1", schema)
        assert key is None or said.startswith(f"Did you mean {key}? ")
        assert key is not None or "Did you mean" not in said


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("--learning_rate 1e-5", "Write optim.lr=1e-5;"),
        ("--learning-rate=1e-5", "Write optim.lr=1e-5;"),
        ("--model_name_or_path org/name", "Write model.partial_pretrain=org/name;"),
        ("--seed -1", "Write trainer.seed=-1;"),
        ("--bf16 true", "Write model.fsdp_config.param_dtype=bf16;"),
        ("--bf16", "Write model.fsdp_config.param_dtype=bf16;"),
        ("optim.lr 1e-5", "Write optim.lr=1e-5, without spaces;"),
        ("optim.lr = 1e-5", "Write optim.lr=1e-5, without spaces;"),
        ("optim.lr= 1e-5", "Write optim.lr=1e-5, without spaces;"),
        ("learning_rate 1e-5", "Write optim.lr=1e-5;"),
        ("--config x.yaml", "Write config=x.yaml;"),
        ("--config=x.yaml", "Write config=x.yaml;"),
        ("run.yaml", "Write config=run.yaml;"),
        ("train.jsonl", "Write data.train_files=train.jsonl;"),
        ("Qwen/Qwen2.5-0.5B", "Write model.partial_pretrain=Qwen/Qwen2.5-0.5B;"),
        ("--packing true", "Leave it out: sequences are always packed"),
        ("--lora_rank 8", "Leave it out: retool trains all weights"),
        ("model.lora_rank=8", "Leave it out: retool trains all weights"),
        ("actor.lora.alpha=8", "Leave it out: retool trains all weights"),
        ("critic.model.path=x", "Leave it out: there is no value model"),
        ("--nproc-per-node 2", "Options of torchrun stand before -m: torchrun --nproc-per-node=2"),
        ("--beta 0.1", "Write key=value, without dashes;"),
        ("trainer.nonsense=1", "--help trainer lists that group's keys."),
        ("data.val_batch_size=8", "Leave it out: preflight plans batches that fit"),
        ("ray_init.num_cpus=8", "Leave it out: one pip install and one process group"),
        ("hub_strategy=end", "Leave it out: checkpoints are in the run's folder"),
        ("trainer.enable=true", "--help trainer lists that group's keys."),
        ("--xyzzy", "Write key=value, without dashes;"),
    ],
)
def test_what_to_write_instead(text: str, way_out: str) -> None:
    (said,) = remedies(text)
    assert said.startswith(way_out)


def test_a_value_apart_takes_no_other_word() -> None:
    said = remedies(
        "--packing optim.learning_rate=1 --check --xyzzy --learning_rate 2 train.parquet"
    )
    assert [text.split(";")[0].split(":")[0] for text in said] == [
        "Leave it out",
        "Did you mean optim.lr? Peak learning rate.",
        "Write --check",
        "Write key=value, without dashes",
        "Write optim.lr=2",
        "Write data.train_files=train.parquet",
    ]


def test_what_is_absent_is_said_in_a_sentence() -> None:
    for name in ("lora_r", "model.lora.rank", "load_in_4bit", "optimizer", "logging_steps"):
        said = absent(name)
        assert said is not None and said.startswith("Leave it out: ") and said.endswith(".")
    assert absent("optim.lr") is None and absent("data.train_files") is None


# --- help ---


@pytest.mark.parametrize("columns", [60, 80, 300])
def test_help_is_as_wide_as_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for schema, example in ((SFTConfig, EXAMPLE), (RLConfig, RL_EXAMPLE)):
        lines = help_text(schema, "retool x", example, SYNONYMS, IGNORED).splitlines()
        prose = [line for line in lines if " " in line.strip() and "=" not in line]
        assert max(map(len, prose)) <= max(min(columns, 100), 80)
        assert max(map(len, lines)) <= 100


def test_help_of_a_group_and_of_a_word() -> None:
    def of(*topics: str) -> list[str]:
        text = help_text(RLConfig, "retool rl", RL_EXAMPLE, RL_SYNONYMS, IGNORED, topics)
        return [
            line.split()[0] for line in text.splitlines() if line[:2] == "  " and line[2] != " "
        ]

    rollout = [key for key in RL_KEYS if key.startswith("actor_rollout_ref.rollout.")]
    assert of("rollout") == rollout == of("actor_rollout_ref.rollout")
    assert of("overlong_buffer", "optim.lr") == [
        "reward_model.overlong_buffer.enable",
        "reward_model.overlong_buffer.len",
        "reward_model.overlong_buffer.penalty_factor",
        "actor_rollout_ref.actor.optim.lr",
    ]
    assert of("warmup") == ["actor_rollout_ref.actor.optim.warmup_steps_ratio"]
    assert of("learning_rate") == ["actor_rollout_ref.actor.optim.lr"]
    assert of("rollout_is_treshold") == ["algorithm.rollout_correction.rollout_is_threshold"]
    assert of("xyzzy") == []


def test_help_names_each_group_and_what_it_is() -> None:
    text = help_text(SFTConfig, "retool sft", EXAMPLE, SYNONYMS)
    assert "\nmodel.fsdp_config: How parameters are sharded.\n" in text
    assert "data.multiturn" in text.partition("--help GROUP")[2].partition("data.train_files")[0]
