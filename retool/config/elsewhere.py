"""The names that our keys have in other programs: Hugging Face's Trainer and TRL, verl and
OpenRLHF, Axolotl and LLaMA-Factory.

These names aren't accepted: the same word can count something else there (a batch per GPU, say). They
are understood well enough to name the key that is meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# The end of a key of ours → its names elsewhere. A command that has no such key passes the row over.
NAMES = {
    "model.partial_pretrain": (
        "model model_name model_id model_path model_name_or_path base_model hf_model checkpoint "
        "pretrained_model_name_or_path pretrain init_from actor_model_path"
    ),
    "model.path": (
        "model model_name model_id model_path model_name_or_path base_model hf_model checkpoint "
        "pretrained_model_name_or_path partial_pretrain pretrain init_from actor_model_path"
    ),
    "model.attn": (
        "attn_implementation flash_attn flash_attention use_flash_attn use_flash_attention_2 "
        "sdp_attention attention attention_backend"
    ),
    "model.enable_gradient_checkpointing": (
        "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
        "activation_checkpoint recompute use_gradient_checkpointing"
    ),
    "model.impl": "model_impl implementation model_implementation",
    "model.use_compile": "torch_compile compile use_torch_compile torch_compile_mode",
    "fsdp_config.param_dtype": "bf16 fp16 torch_dtype precision mixed_precision amp compute_dtype",
    "fsdp_config.param_offload": "cpu_offload fsdp_cpu_offload offload_params",
    "fsdp_config.optimizer_offload": "offload_optimizer optim_offload adam_offload",
    "optim.lr": "learning_rate actor_learning_rate peak_lr max_lr",
    "optim.betas": "adam_beta1 adam_beta2 adam_betas",
    "optim.lr_scheduler": "scheduler lr_schedule lr_decay_style lr_scheduler_kwargs",
    "optim.warmup_steps_ratio": (
        "warmup_ratio warmup_steps lr_warmup_steps num_warmup_steps lr_warmup_ratio warmup"
    ),
    "optim.min_lr_ratio": "min_lr lr_min cosine_min_lr_ratio min_learning_rate",
    "optim.clip_grad": (
        "max_grad_norm gradient_clipping clip_grad_norm grad_clip grad_norm_clip gradient_clip_val"
    ),
    "actor.grad_clip": (
        "max_grad_norm gradient_clipping clip_grad_norm clip_grad grad_norm_clip gradient_clip_val"
    ),
    "data.train_batch_size": (
        "batch_size global_batch_size gradient_accumulation_steps rollout_batch_size "
        "generation_batch_size steps_per_generation total_batch_size"
    ),
    "data.micro_batch_size_per_gpu": (
        "per_device_train_batch_size micro_batch_size micro_train_batch_size per_device_batch_size "
        "per_gpu_train_batch_size micro_batch_size_per_device"
    ),
    "actor.ppo_micro_batch_size_per_gpu": (
        "per_device_train_batch_size micro_batch_size micro_train_batch_size per_device_batch_size "
        "ppo_micro_batch_size micro_batch_size_per_gpu"
    ),
    "actor.ppo_mini_batch_size": "mini_batch_size num_mini_batches",
    "actor.ppo_epochs": "num_iterations num_ppo_epochs",
    "data.max_length": (
        "max_seq_length max_seq_len max_len cutoff_len sequence_len seq_length model_max_length "
        "block_size context_length max_prompt_length max_response_length"
    ),
    "data.max_prompt_length": "prompt_max_len prompt_length max_input_length",
    "data.max_response_length": (
        "max_completion_length max_new_tokens max_tokens response_length generate_max_len "
        "max_length max_seq_length max_seq_len cutoff_len sequence_len"
    ),
    "data.train_files": (
        "train_file dataset dataset_name datasets data_path data_files data_dir train_data "
        "train_dataset training_data prompt_data dataset_path train_path"
    ),
    "data.val_files": (
        "val_file validation_file eval_file eval_files eval_data eval_dataset test_file test_files "
        "test_datasets val_data validation_data val_set_size test_size "
        "val_size val_split_ratio eval_split_ratio validation_split_percentage"
    ),
    "data.train_max_samples": "max_train_samples max_samples num_train_samples",
    "data.val_max_samples": "max_eval_samples max_val_samples",
    "multiturn.messages_key": (
        "dataset_text_field text_column text_field messages_column conversations_key "
        "field_messages conversation_column"
    ),
    "data.prompt_key": "prompt_column input_key query_column field_instruction",
    "data.response_key": "response_column output_key completion_column field_output",
    "data.num_workers": (
        "dataloader_num_workers dataset_num_proc preprocessing_num_workers dataset_processes num_proc"
    ),
    "data.chat_template": "chat_template_path chat_template_jinja template custom_chat_template",
    "ulysses_sequence_parallel_size": (
        "sequence_parallel_size sequence_parallel_degree context_parallel_size "
        "context_parallel_degree ulysses_size ulysses_degree sp sp_size cp cp_size"
    ),
    "fsdp_config.expert_parallel_size": (
        "expert_model_parallel_size expert_parallel_degree expert_parallel ep_size ep"
    ),
    "trainer.default_local_dir": (
        "output_dir output out_dir save_dir save_path checkpoint_dir ckpt_dir ckpt_path logging_dir"
    ),
    "trainer.default_hdfs_dir": "hdfs_dir remote_dir upload_dir",
    "trainer.project_name": "project wandb_project",
    "trainer.experiment_name": "run_name exp_name wandb_name wandb_run_name wandb_run_id",
    "trainer.logger": "report_to loggers use_wandb use_tensorboard",
    "trainer.total_epochs": "num_train_epochs epochs num_epochs max_epochs n_epochs num_episodes",
    "trainer.total_training_steps": "max_steps total_steps train_iters num_steps num_train_steps",
    "trainer.save_freq": "save_steps saves_per_epoch save_interval save_strategy save_every",
    "trainer.test_freq": (
        "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval val_interval "
        "eval_freq do_eval eval_every"
    ),
    "trainer.max_ckpt_to_keep": (
        "save_total_limit max_ckpt_num max_actor_ckpt_to_keep keep_last_n max_checkpoints"
    ),
    "trainer.resume_mode": (
        "resume resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir load_ckpt"
    ),
    "data.train_split": "dataset_train_split split train_split",
    "data.val_split": "dataset_test_split dataset_eval_split test_split eval_split",
    "data.name": "dataset_config dataset_config_name subset",
    "trainer.seed": "seed random_seed data_seed",
    "trainer.n_gpus_per_node": "n_gpus num_gpus gpus num_processes devices",
    "trainer.nnodes": "num_machines num_nodes",
    "trainer.deterministic": "full_determinism",
    "trainer.device": "use_cpu no_cuda use_cuda",
    # --- reinforcement learning ---
    "trainer.val_before_train": "eval_on_start eval_before_train",
    "ref.log_prob_max_token_len_per_gpu": (
        "log_prob_micro_batch_size_per_gpu log_prob_micro_batch_size forward_micro_batch_size_per_gpu"
    ),
    "rollout.n": (
        "num_generations group_size n_samples_per_prompt num_samples num_return_sequences "
        "samples_per_prompt rollout_n"
    ),
    "rollout.temperature": "temperature sampling_temperature",
    "rollout.top_p": "top_p",
    "rollout.top_k": "top_k",
    "rollout.name": "use_vllm vllm_mode rollout_backend inference_backend",
    "rollout.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "rollout.tensor_model_parallel_size": "vllm_tensor_parallel_size tensor_parallel_size tp tp_size",
    "multi_turn.tool_config_path": "tools tool_config tools_path tool_path tools_file",
    "multi_turn.max_assistant_turns": "max_turns max_tool_calling_iterations max_steps_per_episode",
    "actor.kl_loss_coef": "beta kl_beta init_kl_coef kl_loss_coeff kl_coeff",
    "actor.clip_ratio": "epsilon eps_clip cliprange clip_range clip_eps",
    "actor.clip_ratio_low": "epsilon_low eps_clip_low",
    "actor.clip_ratio_high": "epsilon_high eps_clip_high",
    "actor.entropy_coeff": "entropy_coef ent_coef entropy_loss_coef",
    "actor.loss_agg_mode": "loss_type loss_aggregation",
    "algorithm.adv_estimator": "advantage_estimator advantage estimator",
    "algorithm.norm_adv_by_std_in_grpo": "scale_rewards",
    "algorithm.mask_truncated": "mask_truncated_completions overlong_filtering filter_overlong",
    "filter_groups.enable": "dynamic_sampling dynamic_filtering",
    "reward_model.functions": "reward_funcs reward_functions rewards",
    "reward_model.weights": "reward_weights",
    "custom_reward_function.path": (
        "reward reward_func reward_fn reward_function reward_model_path rm_path "
        "custom_rm_path remote_rm_url reward_model_name_or_path"
    ),
}
# What there is nothing for here, by its names elsewhere, and what to do
LEAVE_OUT = "Leave it out: "
ABSENT = {
    "retool trains all weights: it has no LoRA, adapters or quantised weights.": (
        "lora_rank lora_r lora_alpha lora_dropout lora_target_modules lora_modules target_modules "
        "use_peft use_lora use_qlora peft_config adapter finetuning_type load_in_4bit load_in_8bit"
    ),
    "retool trains all weights: none can be frozen.": (
        "freeze freeze_layers freeze_modules freeze_trainable_layers freeze_trainable_modules "
        "freeze_parameters trainable_parameters trainable_modules unfrozen_parameters"
    ),
    "the optimizer is AdamW, with optim.lr, .betas and .weight_decay.": (
        "optimizer optim optim_args adam_epsilon optim_target_modules"
    ),
    "sequences are always packed without padding, and don't attend to each other.": (
        "packing sample_packing padding_free pad_to_sequence_len pad_mode packing_strategy "
        "use_dynamic_batch group_by_length eval_packing neat_packing"
    ),
    "only what the assistant wrote is trained.": (
        "assistant_only_loss completion_only_loss train_on_inputs train_on_prompt roles_to_train "
        "train_on_eos"
    ),
    "every assistant turn is trained; weight: 0 in a message keeps it as context.": (
        "mask_history train_on_last_turn_only train_last_turn_only last_turn_only"
    ),
    "a run goes to its last step. Save and validate often (trainer.save_freq, trainer.test_freq), and "
    "take the checkpoint that validates best.": (
        "early_stopping early_stopping_patience early_stopping_threshold load_best_model_at_end "
        "metric_for_best_model greater_is_better"
    ),
    "nothing is added to the loss, and nothing is dropped out.": (
        "neftune_noise_alpha label_smoothing_factor label_smoothing dropout attention_dropout"
    ),
    "files are always streamed, and read once: the tokens are cached.": (
        "streaming dataset_streaming keep_in_memory load_from_cache_file overwrite_cache"
    ),
    "retool's own kernels compute log-probabilities without keeping all logits.": (
        "use_liger use_liger_kernel use_liger_loss liger_kernel use_fused_kernels cut_cross_entropy unsloth"
    ),
    "retool shards by itself: see --help fsdp_config.": (
        "deepspeed fsdp zero_stage fsdp_transformer_layer_cls_to_wrap accelerator_config zero_dp"
    ),
    "every step is logged.": "logging_steps log_every logging_strategy log_interval",
    "preflight plans batches that fit, in validation too.": (
        "per_device_eval_batch_size eval_batch_size val_batch_size auto_find_batch_size"
    ),
    "what the model is, its config.json says.": "model_type tokenizer_type architecture",
    "checkpoints are in the run's folder; trainer.default_hdfs_dir copies them elsewhere.": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision"
    ),
    "models read and write text; there are no images.": "image_key images image_column video_key",
    "one pip install and one process group: no Ray, no server to sample with.": (
        "hybrid_engine load_format enable_chunked_prefill swap_space vllm_server_host"
    ),
    "every trajectory is written to the report folder of the run.": (
        "rollout_data_dir validation_data_dir log_completions num_completions_to_print"
    ),
    "ranks always get equal shares of the work.": "balance_batch balance_dp_token",
    "the tokenizer is the model's own.": "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path",
    "the reference is the model that the run began with.": "ref_model sync_ref_model reference_model",
    "there is no value model: advantages come from the group.": "critic_warmup vf_coef value_model",
}
# What a part of a dotted name begins with that says it of all that follows
ABSENT_PARTS = {
    "lora": "lora_rank",
    "qlora": "use_qlora",
    "peft": "use_peft",
    "critic": "value_model",
    "ray": "hybrid_engine",
}
# torchrun's options, and those of them that take no value
LAUNCHERS = frozenset(
    "nproc_per_node nnodes node_rank master_addr master_port standalone max_restarts rdzv_backend "
    "rdzv_endpoint rdzv_id rdzv_conf local_addr log_dir redirects tee local_ranks_filter role "
    "monitor_interval signals_to_handle shutdown_timeout".split()
)
FLAGS = frozenset({"standalone"})


def plain(name: str) -> str:
    """The last part of a dotted name as these tables write it."""
    return name.lstrip("-").rpartition(".")[2].replace("-", "_").lower()


def is_elsewhere(name: str) -> bool:
    """Whether another program uses this name for something that a command of ours has a key for."""
    return plain(name) in _OURS


def key_for(name: str, known: Iterable[str]) -> str | None:
    """Which of the `known` keys another program's `name` means."""
    keys = list(known)
    for end in _OURS.get(plain(name), ()):
        for key in keys:
            if key == end or key.endswith("." + end):
                return key
    return None


def absent(name: str) -> str | None:
    """A sentence on what to do about a name for which there is nothing here; None for other names."""
    last = plain(name)
    for part in name.lstrip("-").lower().replace("-", "_").split("."):
        last = ABSENT_PARTS.get(part.partition("_")[0], last)
    return _ABSENT.get(last)


def _by_name(table: dict[str, str]) -> Iterator[tuple[str, str]]:
    for meaning, names in table.items():
        for name in names.split():
            yield name, meaning


_OURS: dict[str, list[str]] = {}
for _name, _end in _by_name(NAMES):
    _OURS.setdefault(_name, []).append(_end)
_ABSENT = {name: LEAVE_OUT + meaning for name, meaning in _by_name(ABSENT)}
