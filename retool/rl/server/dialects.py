"""How vLLM's and SGLang's servers are asked for tokens and told of new weights: token ids in, token
ids with their log-probabilities out. As vLLM 0.22.1 and 0.33.0 and SGLang 0.5.23 have it.

[Note: which log-probabilities] Ours and SGLang's are of softmax(logits / temperature). vLLM's are of
softmax(logits) unless it was started with `--logprobs-mode processed_logprobs`; with a temperature
of 1, and nothing filtered, all of these are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from retool.engine import SamplingParams

MARK = "weights-"  # which every `mark_of` begins with
VLLM = "vllm"
SGLANG = "sglang"
# Servers fill what a request leaves open from the model's generation_config.json or from their own
# settings, and a penalty would change both draws and log-probabilities
NO_PENALTIES = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
EVERY_TOKEN = -1  # as top_k; 0 is refused by SGLang
# Where vLLM tells how it was started, and which setting of it gives log-probabilities like ours
VLLM_SETTINGS = "/server_info?config_format=json"
LOGPROBS_MODE = "processed_logprobs"
# What `/v1/models` says in `owned_by`; ours speaks both
DIALECT_OF_OWNER = {"vllm": VLLM, "sglang": SGLANG, "retool": VLLM}


class Call(NamedTuple):
    """A request: POST `body` as JSON to `path`."""

    path: str
    body: Mapping[str, Any]


class Sampled(NamedTuple):
    """What a server sampled. `reason` is OpenAI's: "stop", "length", or another one of its own.
    `mark` is of the weights that it was sampled with, "" where the server doesn't say.
    """

    tokens: list[int]
    logp: list[float]
    reason: str
    mark: str = ""


def mark_of(folder: str) -> str:
    """A short mark of the weights in a folder that nobody writes to again."""
    return f"{MARK}{hashlib.blake2b(folder.encode(), digest_size=8).hexdigest()}"


@dataclass(frozen=True)
class Dialect:
    """One kind of server: `ask(model, ids, params, seed)` is the request for a turn, `read` takes its
    response; `load(folder, mark)` are the requests for other weights, in order, and `loaded` says
    why one wasn't done. `way_out`: where it has no such address.
    """

    ask: Callable[[str, Sequence[int], SamplingParams, int], Call]
    read: Callable[[Any], Sampled]
    load: Callable[[str, str], list[Call]]
    loaded: Callable[[Mapping[str, Any]], str | None]
    way_out: str


def _ask_vllm(model: str, ids: Sequence[int], params: SamplingParams, seed: int) -> Call:
    body = {
        "model": model,
        "prompt": list(ids),
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k if params.top_k > 0 else EVERY_TOKEN,
        "seed": seed,
        **NO_PENALTIES,
        "stop_token_ids": list(params.stop_ids),
        "ignore_eos": True,  # only `stop_ids` end a turn
        "skip_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
    }
    return Call("/v1/completions", body)


def _read_vllm(response: Any) -> Sampled:
    (choice,) = response["choices"]
    logp = choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
    mark = str(response.get("system_fingerprint") or "")
    return Sampled(list(choice["token_ids"]), list(logp), str(choice["finish_reason"]), mark)


def _load_vllm(folder: str, mark: str) -> list[Call]:
    reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    # What it has computed of prompts is of the old weights. Where it still computes for somebody it
    # would keep that, and not say so: a request that was given up ends there a little later than here
    forget = "/reset_prefix_cache?reset_running_requests=true"
    return [Call("/collective_rpc", reload), Call(forget, {})]


def _ask_sglang(model: str, ids: Sequence[int], params: SamplingParams, seed: int) -> Call:
    sampling = {
        "max_new_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k if params.top_k > 0 else EVERY_TOKEN,
        "sampling_seed": seed,
        **NO_PENALTIES,
        # With ignore_eos it would ignore these too
        "stop_token_ids": list(params.stop_ids),
        "skip_special_tokens": False,
    }
    body = {"input_ids": list(ids), "sampling_params": sampling, "return_logprob": True}
    return Call("/generate", body)


def _read_sglang(response: Any) -> Sampled:
    meta = response["meta_info"]
    pairs = meta["output_token_logprobs"]
    tokens = [int(entry[1]) for entry in pairs]
    logp = [entry[0] for entry in pairs]
    mark = str(meta.get("weight_version") or "")
    return Sampled(tokens, logp, str(meta["finish_reason"]["type"]), mark)


def _load_sglang(folder: str, mark: str) -> list[Call]:
    body = {"model_path": folder, "weight_version": mark, "flush_cache": True}
    return [Call("/update_weights_from_disk", body)]


def _loaded(response: Mapping[str, Any]) -> str | None:
    """Both say `success` where they say anything, and vLLM only since 0.26."""
    if response.get("success", True):
        return None
    return str(response.get("message") or "it says no more")


def logprobs_mode(settings: Mapping[str, Any]) -> str:
    """What vLLM's settings say of its log-probabilities; "" where they are of another form."""
    match settings:
        case {"vllm_config": {"model_config": {"logprobs_mode": str(mode)}}}:
            return mode
        case _:
            return ""


DIALECTS = {
    VLLM: Dialect(
        _ask_vllm,
        _read_vllm,
        _load_vllm,
        _loaded,
        "start it with VLLM_SERVER_DEV_MODE=1 in its environment, which lets its weights be changed",
    ),
    SGLANG: Dialect(
        _ask_sglang,
        _read_sglang,
        _load_sglang,
        _loaded,
        "start a version of SGLang that has it",
    ),
}
