"""What existing scripts call our keys, and which of their keys have no effect here."""

from __future__ import annotations

from retool.config import options

_ARR = "actor_rollout_ref"
SYNONYMS = {
    f"{_ARR}.actor.optim.clip_grad": f"{_ARR}.actor.grad_clip",
    **{
        f"{_ARR}.actor.optim.{other}": f"{_ARR}.actor.optim.{ours}"
        for other, ours in options.OPTIM_SYNONYMS.items()
    },
    f"{_ARR}.actor.use_torch_compile": f"{_ARR}.model.use_compile",
    f"{_ARR}.actor.fsdp_config.dtype": f"{_ARR}.actor.fsdp_config.param_dtype",
    f"{_ARR}.actor.fsdp_config.offload_params": f"{_ARR}.actor.fsdp_config.param_offload",
    f"{_ARR}.ref.fsdp_config.param_offload": f"{_ARR}.ref.param_offload",
    f"{_ARR}.rollout.log_prob_max_token_len_per_gpu": f"{_ARR}.ref.log_prob_max_token_len_per_gpu",
    f"{_ARR}.rollout.multi_turn.tool_response_length": f"{_ARR}.rollout.multi_turn.max_tool_response_length",
    f"{_ARR}.model.custom_chat_template": "data.chat_template",
    f"{_ARR}.model.enable_activation_offload": f"{_ARR}.model.activation_offload",
    "algorithm.rollout_is": "algorithm.rollout_correction.rollout_is",
    "algorithm.rollout_is_threshold": "algorithm.rollout_correction.rollout_is_threshold",
    "reward_model.micro_batch_size_per_gpu": "reward_model.model.micro_batch_size",
    "reward_model.max_length": "reward_model.model.max_length",
    "reward_model.reward_kwargs.overlong_buffer_cfg.enable": "reward_model.overlong_buffer.enable",
    "reward_model.reward_kwargs.overlong_buffer_cfg.len": "reward_model.overlong_buffer.len",
    "reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor": "reward_model.overlong_buffer.penalty_factor",
}
# Accepted with any value, and read by nobody: what each does in verl, and why not here.
IGNORED = {
    "algorithm.lam": "is the λ of generalised advantage estimation, which needs a value model",
    "data.return_raw_chat": "keeps chat messages beside the tokens, as is always done here",
    f"{_ARR}.model.use_remove_padding": "packs sequences, as is always done here",
    f"{_ARR}.rollout.calculate_log_probs": "has the sampler return log-probabilities, as always here",
    f"{_ARR}.rollout.mode": "lets trajectories advance independently (async), as they always do here",
}
EXAMPLE = """
torchrun --nproc_per_node=2 -m retool.rl \\
    data.train_files=dapo_math_17k.parquet data.val_files=aime24.parquet \\
    actor_rollout_ref.model.path=checkpoints/sft/global_step_250/huggingface \\
    actor_rollout_ref.rollout.n=16 \\
    actor_rollout_ref.rollout.multi_turn.enable=true
"""
