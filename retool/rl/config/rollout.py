"""`actor_rollout_ref.rollout.*`: sampling, in training and validation, with tools and turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from retool.config import option
from retool.config.options import DTYPE_SPELLINGS, AutoDtype

# Near 0 logits become infinite; long before that only the likeliest token is ever drawn
LEAST_TEMPERATURE = 1e-6
MOST_TEMPERATURE = 1e6


@dataclass(frozen=True)
class ValKwargsConfig:
    """Sampling in validation."""

    temperature: float = option(
        1.0,
        "Temperature in validation; 0 = always the likeliest token.",
        minimum=0,
        maximum=MOST_TEMPERATURE,
    )
    top_p: float = option(
        1.0,
        "Sample from the smallest set of tokens that has this probability together.",
        above=0,
        maximum=1,
    )
    top_k: int = option(-1, "Sample from the k likeliest tokens; -1 = all.", minimum=-1)
    n: int = option(1, "Samples per question.", minimum=1)
    do_sample: bool = option(True, "false = always the likeliest token, as with temperature 0.")


@dataclass(frozen=True)
class EnvironmentConfig:
    """A world of your own that answers the model, with or without tools."""

    path: str | None = option(None, "A Python file.")
    name: str | None = option(
        None,
        "The class in that file: reset(row) -> messages[, tools]; step(message) -> "
        "(messages, reward, done); optionally close(). Each trajectory has an object "
        "of its own. Without a path: verifiers:TASKSET, or openenv:CLASS-OR-URL.",
    )
    kwargs: dict[str, Any] = option({}, "Arguments of the class, e.g. {difficulty: 3}.")
    sandboxed: bool = option(
        False,
        "Run the file's code in the sandbox of this machine, with tool_isolation and tool_workers.",
    )
    timeout_seconds: float = option(
        120.0,
        "If a call of the environment takes longer, its trajectory is lost, and counted as such.",
        above=0,
    )


@dataclass(frozen=True)
class MultiTurnConfig:
    """Tools and turns."""

    enable: bool = option(False, "Let the model call tools.")
    max_user_turns: int | None = option(
        None, "Rounds of tool output in an answer, at most; null = no limit.", minimum=1
    )
    max_assistant_turns: int | None = option(
        None, "Turns of the model in an answer, at most; null = no limit.", minimum=1
    )
    tool_config_path: str | None = option(
        None, "Tools as YAML; null = the code interpreter on this machine."
    )
    tools: tuple[str, ...] | None = option(
        None,
        "Tools by name: code_interpreter, or a function, object or class of yours as FILE.py/NAME; null = "
        "those of tool_config_path.",
    )
    format: str = option(
        "auto",
        "How the model writes calls: hermes, qwen3_coder, llama3_json, … or FILE.py/function; auto = as "
        "the chat template shows them.",
    )
    max_tool_response_length: int = option(
        512, "Tokens of tool output per call, at most; the rest is cut, with a marker.", minimum=1
    )
    tool_response_truncate_side: Literal["left", "middle", "right"] = option(
        "middle", "Where longer output is cut: left = at the beginning."
    )
    max_parallel_calls: int = option(
        1,
        "Calls of one turn that are run, at most; for each further call the model is "
        "told that it wasn't.",
        minimum=1,
    )
    tool_timeout_seconds: float = option(
        120.0,
        (
            "A tool that takes longer is given up, whatever its own limit. A "
            "program's time counts from its start; waiting for a worker doesn't "
            "count."
        ),
        above=0,
    )
    tool_workers: int | None = option(
        None,
        (
            "Programs of the code interpreter that run at once on a machine; null = "
            "the tool's num_workers, at most one per core (or 4)."
        ),
        minimum=1,
    )
    tool_isolation: Literal["auto", "strict", "best_effort"] = option(
        "auto",
        "If this machine can't give a guarantee of the sandbox (`retool sandbox "
        "doctor` tells): strict = run no programs; best_effort = say so and run them; "
        "auto = as the tool's configuration says, else strict.",
    )
    tool_session: bool = option(
        False, "Keep the code interpreter's variables and files between the calls of an answer."
    )
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)


@dataclass(frozen=True)
class AgentConfig:
    """A loop of your own, instead of retool's."""

    path: str | None = option(None, "A Python file.")
    name: str | None = option(
        None,
        "The function in that file: async (row, generate, tools) -> the turn that is "
        "the answer. It plays every trajectory.",
    )
    timeout_seconds: float = option(
        1800.0,
        "If the function takes longer, its trajectory is lost, and counted as such.",
        above=0,
    )


@dataclass(frozen=True)
class ServerConfig:
    """Servers that sample, for `rollout.name=server`."""

    urls: tuple[str, ...] = option((), "Their addresses, such as http://host:8000.")
    dialect: Literal["auto", "vllm", "sglang"] = option(
        "auto", "The kind of the servers; auto = each says what it is."
    )
    weights_dir: str | None = option(
        None,
        "Folder in which weights are handed over: it belongs to this run alone, and "
        "the servers see it under the same path; null = trainer.default_local_dir.",
    )
    timeout_s: float = option(
        600.0, "A server that takes longer for an answer is left out.", above=0
    )
    retries: int = option(
        3, "How often a failed request is sent again before its server is left out.", minimum=0
    )


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling."""

    name: Literal["native", "vllm", "sglang", "hf", "server"] = option(
        "native",
        "What samples: native = retool's engine; vllm = vLLM, if it is installed, "
        "else native; server = servers; sglang = native; hf = native, or "
        "transformers' batching for models of transformers.",
    )
    n: int = option(16, "Samples per prompt.", minimum=1)
    temperature: float = option(
        1.0,
        "Temperature of the policy, when it samples and when it is trained.",
        minimum=LEAST_TEMPERATURE,
        maximum=MOST_TEMPERATURE,
    )
    top_p: float = option(
        1.0,
        "Sample from the smallest set of tokens that has this probability together.",
        above=0,
        maximum=1,
    )
    top_k: int = option(-1, "Sample from the k likeliest tokens; -1 = all.", minimum=-1)
    tensor_model_parallel_size: int = option(
        1, "GPUs that share one copy of the engine's weights.", minimum=1
    )
    gpu_memory_utilization: float = option(
        0.5, "Share of the free memory that the KV cache may take.", above=0, maximum=1
    )
    max_num_seqs: int = option(
        256, "Sequences that are decoded at once on each GPU, at most.", minimum=1
    )
    max_num_batched_tokens: int = option(
        8192,
        "Tokens that one step of the engine computes, at most; max_num_seqs where that is more.",
        minimum=1,
    )
    enforce_eager: bool = option(False, "Sample without CUDA graphs.")
    free_cache_engine: bool | Literal["auto"] = option(
        "auto",
        "Free the engine's memory during the update; auto = if the update doesn't fit beside it.",
    )
    dtype: AutoDtype = option(
        "auto", "Dtype of the engine's weights; auto = as in training.", spellings=DTYPE_SPELLINGS
    )
    enable_rollout_routing_replay: bool = option(
        False, "For mixtures of experts: train each token through the experts that sampled it."
    )
    max_lost_share: float = option(
        0.3,
        (
            "Samples lost to infrastructure (a dead sandbox, no room in the engine) "
            "aren't trained on. If more than this share is lost in max_lost_steps "
            "steps in a row, the run ends with the cause."
        ),
        minimum=0,
        maximum=1,
    )
    max_lost_steps: int = option(
        3,
        "The run ends after so many steps in a row in which more than max_lost_share was lost.",
        minimum=1,
    )
    server: ServerConfig = field(default_factory=ServerConfig)
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)
