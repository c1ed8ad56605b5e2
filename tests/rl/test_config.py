"""The command line: the published overrides word for word, synonyms, and what is refused."""

from __future__ import annotations

import pytest

from retool.config import help_text, leaves, parse, read
from retool.preflight.plan import World, setting_of
from retool.rl.config import RLConfig, run_options
from retool.rl.config.names import EXAMPLE, IGNORED, SYNONYMS
from retool.rl.objective.advantages import ESTIMATORS
from retool.rl.objective.losses import LOSSES
from retool.rl.preflight.keys import contradictions, notes
from retool.sft.config import SFTConfig
from retool.sft.config import run_options as sft_options

PUBLISHED = """
algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False algorithm.kl_ctrl.kl_coef=0.0
data.train_files=['train.parquet'] data.val_files=['val.parquet'] data.return_raw_chat=True
data.train_batch_size=512 data.max_prompt_length=2048 data.max_response_length=16384
data.filter_overlong_prompts=True data.truncation='error'
data.custom_cls.path=recipe.py data.custom_cls.name=CustomRLHFDataset
custom_reward_function.path=recipe.py custom_reward_function.name=compute_score
actor_rollout_ref.model.path=sft/global_step_250/huggingface actor_rollout_ref.model.use_remove_padding=True
actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.kl_loss_coef=0.0
actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 actor_rollout_ref.actor.clip_ratio_c=10.0
actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.use_dynamic_bsz=True
actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.ppo_max_token_len_per_gpu=18432
actor_rollout_ref.actor.ulysses_sequence_parallel_size=2
actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=73728
actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.mode=async actor_rollout_ref.rollout.tensor_model_parallel_size=2
actor_rollout_ref.rollout.multi_turn.enable=True actor_rollout_ref.rollout.multi_turn.max_user_turns=8
actor_rollout_ref.rollout.multi_turn.max_assistant_turns=8 actor_rollout_ref.rollout.multi_turn.tool_config_path=tools.yaml
actor_rollout_ref.rollout.multi_turn.format=hermes actor_rollout_ref.rollout.gpu_memory_utilization=0.9
actor_rollout_ref.rollout.n=16 actor_rollout_ref.rollout.val_kwargs.top_p=0.6 actor_rollout_ref.rollout.val_kwargs.temperature=1.0
actor_rollout_ref.rollout.val_kwargs.n=30
trainer.logger=['console','wandb'] trainer.project_name=wuxibin_retool trainer.experiment_name=qwen2.5-05b_dapo
trainer.n_gpus_per_node=2 trainer.nnodes=1 trainer.val_before_train=True trainer.log_val_generations=20
trainer.save_freq=30 trainer.test_freq=5 trainer.default_local_dir=out trainer.total_epochs=1
""".split()
REQUIRED = ["data.train_files=a.parquet", "actor_rollout_ref.model.path=m"]
ARR = "actor_rollout_ref."


def faults_of(*words: str) -> list[str]:
    parsed = read(RLConfig, [*REQUIRED, *words], SYNONYMS, IGNORED)
    return [str(fault) for fault in (*parsed.faults, *contradictions(parsed.config))]


def test_the_published_command_parses_word_for_word() -> None:
    config = parse(RLConfig, PUBLISHED, SYNONYMS, IGNORED)
    assert list(contradictions(config)) == []
    actor = config.actor_rollout_ref.actor
    rollout = config.actor_rollout_ref.rollout
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.2, 0.28, 10.0)
    assert (
        rollout.n,
        rollout.val_kwargs.n,
        rollout.multi_turn.max_user_turns,
        rollout.multi_turn.format,
    ) == (16, 30, 8, "hermes")
    assert config.trainer.logger == ("console", "wandb") and config.data.train_files == (
        "train.parquet",
    )
    assert (
        actor.fsdp_config.param_offload
        and actor.optim.lr == 1e-6
        and config.data.truncation == "error"
    )
    assert not list(notes(config))


def test_defaults_of_the_contract() -> None:
    config = parse(RLConfig, REQUIRED)
    actor = config.actor_rollout_ref.actor
    rollout = config.actor_rollout_ref.rollout
    assert (
        config.algorithm.norm_adv_by_std_in_grpo
        and config.algorithm.rollout_correction.rollout_is is None
    )
    assert config.algorithm.rollout_correction.rollout_is_threshold == 2.0
    assert (actor.ppo_epochs, actor.entropy_coeff, actor.grad_clip) == (1, 0.0, 1.0)
    assert LOSSES["vanilla"].aggregated_by(actor.loss_agg_mode) == "token-mean"
    assert (actor.policy_loss.loss_mode, rollout.temperature, rollout.top_p, rollout.top_k) == (
        "vanilla",
        1.0,
        1.0,
        -1,
    )
    multi = rollout.multi_turn
    assert (
        multi.max_tool_response_length,
        multi.tool_response_truncate_side,
        multi.max_parallel_calls,
    ) == (512, "middle", 1)
    assert rollout.name == "native" and actor.clip_ratio_low == actor.clip_ratio_high == 0.2
    assert config.reward_model.timeout_seconds == 2.0 and config.reward_model.memory_mb == 2048
    assert (
        parse(
            RLConfig, [*REQUIRED, ARR + "actor.clip_ratio=0.3"]
        ).actor_rollout_ref.actor.clip_ratio_high
        == 0.3
    )


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        (ARR + "actor.kl_loss_type=low_var_kl", "kl_loss_type", "k3"),
        (ARR + "actor.kl_loss_type=kl", "kl_loss_type", "k1"),
        (ARR + "actor.optim.clip_grad=0.5", "grad_clip", 0.5),
        (ARR + "actor.strategy=fsdp2", "strategy", "fsdp"),
    ],
)
def test_synonyms(word: str, key: str, value: object) -> None:
    assert (
        getattr(parse(RLConfig, [*REQUIRED, word], SYNONYMS).actor_rollout_ref.actor, key) == value
    )


def test_synonyms_name_keys_that_exist() -> None:
    known = {leaf.key for leaf in leaves(RLConfig)}
    assert set(SYNONYMS.values()) <= known and not set(SYNONYMS) & known
    assert not set(IGNORED) & {*known, *SYNONYMS}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("algorithm.adv_estimator=gae", "a value model"),
        ("algorithm.adv_estimator=remax", "greedy rollout"),
        ("algorithm.adv_estimator=grop", "Did you mean grpo?"),
        (ARR + "actor.policy_loss.loss_mode=gsop", "Did you mean gspo?"),
        (ARR + "actor.policy_loss.loss_mode=x", "Use vanilla, gspo, cispo, or file.py/function."),
        (ARR + "rollout.name=tensorrt", "native or vllm or sglang or hf"),
        (ARR + "rollout.multi_turn.format=hermess", "Did you mean hermes?"),
        (ARR + "rollout.modes=async", "Did you mean actor_rollout_ref.rollout.mode?"),
        (ARR + "actor.ppo_mini_batch_size=100", "Use 64 or 128"),
        (ARR + "actor.ppo_mini_batch_size=1024", "Use at most 512"),
        (ARR + "actor.clip_ratio_low=1.5", "never negative"),
        (ARR + "actor.use_dynamic_bsz=false", "ppo_micro_batch_size_per_gpu"),
        (ARR + "rollout.n=1", "nothing to compare"),
        (ARR + "rollout.temperature=0", "at least 1e-06"),
        (ARR + "rollout.top_k=0", "Use -1"),
        (ARR + "rollout.val_kwargs.temperature=1e-40", "Use 0 for the likeliest token"),
        (ARR + "actor.loss_agg_mode=token_mean", "token-mean"),
        (
            f"{ARR}actor.loss_agg_mode=token-mean {ARR}actor.policy_loss.loss_mode=gspo",
            "averaged by seq-mean-token-mean. Leave it out",
        ),
        (
            f"{ARR}actor.loss_agg_mode=seq-mean-token-sum {ARR}actor.policy_loss.loss_mode=cispo",
            "averaged by token-mean. Leave it out",
        ),
        (
            ARR + "rollout.multi_turn.max_asistant_turns=3",
            "Did you mean actor_rollout_ref.rollout.multi_turn.max_assistant_turns?",
        ),
        ("trainer.save_freq=0", "no number of steps"),
        ("data.custom_cls.path=x.py", "both path and name"),
        ("trainer.resume_mode=resume_path", "needs trainer.resume_from_path"),
        ("trainer.val_only=true", "nothing to validate on. Give data.val_files"),
        ("data.train_files=[]", "names no file"),
    ],
)
def test_what_is_refused_and_the_way_out(word: str, said: str) -> None:
    faults = faults_of(*word.split())
    assert len(faults) == 1 and said in faults[0], faults


@pytest.mark.parametrize(
    ("mode", "published"),
    [("vanilla", "token-mean"), ("gspo", "seq-mean-token-mean"), ("cispo", "token-mean")],
)
def test_a_loss_brings_its_own_aggregation(mode: str, published: str) -> None:
    words = [*REQUIRED, f"{ARR}actor.policy_loss.loss_mode={mode}"]
    assert LOSSES[mode].aggregated_by(None) == published
    same = parse(RLConfig, [*words, f"{ARR}actor.loss_agg_mode={published}"])
    assert not list(contradictions(same))
    clips = " ".join(notes(parse(RLConfig, words)))
    assert ("its paper clips at 0.0003 and 0.0004" in clips) == (mode == "gspo")


def test_help_names_every_loss_and_estimator() -> None:
    """The dicts are the only lists; the keys' documentation names what is in them."""
    documented = {leaf.key: leaf.doc for leaf in leaves(RLConfig)}
    assert all(name in documented[ARR + "actor.policy_loss.loss_mode"] for name in LOSSES)
    assert all(name in documented["algorithm.adv_estimator"] for name in ESTIMATORS)


def test_what_would_do_nothing_is_noted() -> None:
    words = [
        ARR + "rollout.multi_turn.tool_config_path=t.yaml",
        "data.gen_batch_size=2",
        "trainer.test_freq=5",
    ]
    found = " ".join(notes(parse(RLConfig, [*REQUIRED, *words])))
    assert all(
        part in found
        for part in ("no tool is called", "without algorithm.filter_groups", "validates nothing")
    ), found


def test_every_key_of_the_contract_is_there() -> None:
    """Those that the published command has not, with every value that the contract names."""
    values = {
        "algorithm.": "norm_adv_by_std_in_grpo=false gamma=0.9 lam=0.9 kl_ctrl.type=adaptive "
        "kl_ctrl.horizon=5 kl_ctrl.target_kl=0.2 filter_groups.enable=true "
        "filter_groups.metric=score filter_groups.max_num_gen_batches=3 "
        "rollout_correction.rollout_is=token rollout_correction.rollout_is=sequence "
        "rollout_correction.rollout_is=null rollout_correction.rollout_is_threshold=3 "
        "use_kl_in_reward=true adv_estimator=grpo adv_estimator=rloo "
        "adv_estimator=reinforce_plus_plus adv_estimator=reinforce_plus_plus_baseline",
        "data.": "gen_batch_size=8 shuffle=false seed=3 chat_template=hermes answer_format=null",
        ARR
        + "actor.": "ppo_epochs=2 entropy_coeff=0.1 loss_agg_mode=token-mean loss_agg_mode=seq-mean-token-sum loss_agg_mode=seq-mean-token-mean"
        " loss_agg_mode=seq-mean-token-sum-norm policy_loss.loss_mode=cispo "
        "policy_loss.loss_mode=vanilla policy_loss.loss_mode=gspo kl_loss_type=k1 kl_loss_type=k2 "
        "kl_loss_type=k3 kl_loss_type=low_var_kl kl_loss_type=abs kl_loss_type=k1+ "
        "kl_loss_type=k3+ grad_clip=0.5",
        ARR
        + "rollout.": "temperature=0.7 top_p=0.9 top_k=50 max_num_seqs=8 calculate_log_probs=false mode=sync free_cache_engine=true name=native"
        " name=sglang name=hf multi_turn.max_tool_response_length=9 "
        "multi_turn.tool_response_truncate_side=left multi_turn.max_parallel_calls=3 "
        "multi_turn.format=code_block multi_turn.format=retool",
        "reward_model.": "overlong_buffer.enable=true overlong_buffer.len=5 overlong_buffer.penalty_factor=2 name=retool name=math",
        "trainer.": "resume_mode=disable max_ckpt_to_keep=2 deterministic=true",
    }
    rounds = list[dict[str, str]]()  # a key's values in as many readings, and other keys beside it
    for prefix, entries in values.items():
        for entry in entries.split():
            key = entry.partition("=")[0]
            free = next((known for known in rounds if prefix + key not in known), None)
            if free is None:
                rounds.append(free := {})
            free[prefix + key] = prefix + entry
    assert len(rounds) == 7
    for words in rounds:
        assert faults_of(*words.values()) == [], words


@pytest.mark.parametrize(
    ("words", "wanted"),
    [([], (False, True)), (["true"], (True, True)), (["false"], (False, False))],
)
def test_who_adds_up_in_fp32(words: list[str], wanted: tuple[bool, bool]) -> None:
    """By itself the command that samples, so that sampler and trainer agree better; the memory plan
    knows.
    """
    sft = parse(
        SFTConfig,
        [
            "data.train_files=a.parquet",
            "model.partial_pretrain=m",
            *(f"model.fp32_residual={w}" for w in words),
        ],
    )
    rl = parse(RLConfig, [*REQUIRED, *(f"{ARR}model.fp32_residual={w}" for w in words)])
    for config, options, expected in (
        (sft, sft_options(sft), wanted[0]),
        (rl, run_options(rl), wanted[1]),
    ):
        assert (
            options.fp32_residual is setting_of(options, World(1, 1, 1)).fp32_residual is expected
        ), type(config)


def test_every_fault_at_once() -> None:
    assert (
        len(
            faults_of(
                "algorithm.adv_estimator=gae",
                "trainer.save_freq=0",
                ARR + "rollout.name=x",
                "trainer.nonsense=1",
            )
        )
        == 4
    )


def test_help_lists_every_key() -> None:
    text = help_text(RLConfig, "python -m retool.rl", EXAMPLE, SYNONYMS, IGNORED)
    assert all(leaf.key in text and leaf.doc for leaf in leaves(RLConfig))
    assert all(f"  {key}" in text for key in IGNORED)
