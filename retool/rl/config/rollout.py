"""`actor_rollout_ref.rollout.*`: sampling, in training and validation, with tools and turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from retool.config import option
from retool.config.options import DTYPE_SPELLINGS, AutoDtype


@dataclass(frozen=True)
class ValKwargsConfig:
    """Sampling in validation."""

    temperature: float = option(1.0, "0 = the likeliest token.", minimum=0)
    top_p: float = option(
        1.0, "Smallest set of tokens with that much probability.", above=0, maximum=1
    )
    top_k: int = option(-1, "The k likeliest tokens; -1 = all.", minimum=-1)
    n: int = option(1, "Samples per question.", minimum=1)
    do_sample: bool = option(True, "false: the likeliest token, as temperature 0.")


@dataclass(frozen=True)
class EnvironmentConfig:
    """A world of yours that answers the model, with or without tools."""

    path: str | None = option(None, "A Python file.")
    name: str | None = option(
        None,
        "The class in it: reset(row) -> messages[, tools]; step(message) -> (messages, reward, done); "
        "close() if it likes. Each trajectory has an object of its own. Without a path: "
        "verifiers:TASKSET, or openenv:CLASS-OR-URL.",
    )
    kwargs: dict[str, Any] = option({}, "What it is made with, e.g. {difficulty: 3}.")
    sandboxed: bool = option(
        False,
        "Run the file's code in the sandbox of this machine, with tool_isolation and tool_workers.",
    )
    timeout_seconds: float = option(
        120.0, "A call of it that takes longer loses the trajectory, which is counted.", above=0
    )


@dataclass(frozen=True)
class MultiTurnConfig:
    """Tools and turns."""

    enable: bool = option(False, "Let the model call tools.")
    max_user_turns: int | None = option(
        None, "Rounds of tool output; null = no limit but the others.", minimum=1
    )
    max_assistant_turns: int | None = option(
        None, "Turns of the model; null = no limit but the others.", minimum=1
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
        512, "Tokens of tool output per call; the rest is cut, with a marker.", minimum=1
    )
    tool_response_truncate_side: Literal["left", "middle", "right"] = option(
        "middle", "Where it is cut: left loses the beginning."
    )
    max_parallel_calls: int = option(
        1, "Calls of one turn that are run; the others are answered that they weren't.", minimum=1
    )
    tool_timeout_seconds: float = option(
        120.0,
        (
            "A tool that takes longer is given up, whatever its own limit; a program's clock starts when it "
            "does, not while it waits."
        ),
        above=0,
    )
    tool_workers: int | None = option(
        None,
        (
            "Programs of the code interpreter that run at once on a node; null = the tool's num_workers, at "
            "most one a core (or 4)."
        ),
        minimum=1,
    )
    tool_isolation: Literal["auto", "strict", "best_effort"] = option(
        "auto",
        "strict: programs aren't run where a guarantee of the sandbox can't be given (`doctor` "
        "tells); best_effort: say so and run them; auto: the tool's own, else strict.",
    )
    tool_session: bool = option(
        False, "The code interpreter's variables and files live on between the calls of an answer."
    )
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)


@dataclass(frozen=True)
class AgentConfig:
    """A loop of yours in the place of ours."""

    path: str | None = option(None, "A Python file.")
    name: str | None = option(
        None,
        "The function in it: async (row, generate, tools) -> the turn that is its answer. It plays every "
        "trajectory.",
    )
    timeout_seconds: float = option(
        1800.0, "A trajectory that takes it longer is lost, which is counted.", above=0
    )


@dataclass(frozen=True)
class ServerConfig:
    """Servers that sample, for `rollout.name=server`."""

    urls: tuple[str, ...] = option((), "Their addresses, such as http://host:8000.")
    dialect: Literal["auto", "vllm", "sglang"] = option(
        "auto", "How they are asked; auto = as each says that it is."
    )
    weights_dir: str | None = option(
        None,
        "A folder of this run alone that the servers see too: weights are handed over there; null = "
        "trainer.default_local_dir.",
    )
    timeout_s: float = option(
        600.0, "A server that takes longer for an answer is left out.", above=0
    )
    retries: int = option(
        3, "A request that fails is sent so often again before its server is left out.", minimum=0
    )


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling."""

    name: Literal["native", "vllm", "sglang", "hf", "server"] = option(
        "native",
        "Our engine; vllm, where it is installed (else native, as sglang and hf mean); or servers.",
    )
    n: int = option(16, "Samples per prompt.", minimum=1)
    temperature: float = option(1.0, "Of the policy, in training too.", above=0)
    top_p: float = option(
        1.0, "Smallest set of tokens with that much probability.", above=0, maximum=1
    )
    top_k: int = option(-1, "The k likeliest tokens; -1 = all.", minimum=-1)
    tensor_model_parallel_size: int = option(
        1, "GPUs that share one copy of the engine's weights.", minimum=1
    )
    gpu_memory_utilization: float = option(
        0.5, "Share of the free memory that the KV cache may take.", above=0, maximum=1
    )
    max_num_seqs: int = option(256, "Sequences that decode at once per GPU.", minimum=1)
    max_num_batched_tokens: int = option(8192, "Tokens of one engine step.", minimum=1)
    enforce_eager: bool = option(False, "No CUDA graphs.")
    free_cache_engine: bool | Literal["auto"] = option(
        "auto",
        "Free the engine's memory during the update; auto = where the update doesn't fit beside it.",
    )
    dtype: AutoDtype = option("auto", "auto = as training.", spellings=DTYPE_SPELLINGS)
    enable_rollout_routing_replay: bool = option(
        False, "Train each token through the experts that sampled it; for mixtures of experts."
    )
    max_lost_share: float = option(
        0.3,
        (
            "Samples lost to infrastructure (a dead sandbox, no room in the engine) aren't trained on; more "
            "than this share in"
        ),
        minimum=0,
        maximum=1,
    )
    max_lost_steps: int = option(
        3, "so many steps in a row ends the run with the cause.", minimum=1
    )
    server: ServerConfig = field(default_factory=ServerConfig)
    multi_turn: MultiTurnConfig = field(default_factory=MultiTurnConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)
