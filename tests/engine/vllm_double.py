"""What retool asks of vLLM 0.22.1, played by transformers on the CPU: the engine, its parameters and
outputs, with the names of vLLM's. It is strict where vLLM is, or would go wrong without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from retool.engine.vllm import start
from retool.rl.preflight import show

VERSION = "0.22.1"


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams(SimpleNamespace):
    """Only what is asked for, and checked as there."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        assert self.detokenize is False and self.ignore_eos is True
        assert self.output_kind is RequestOutputKind.FINAL_ONLY
        assert self.logprobs == 0 and self.flat_logprobs is True
        assert self.top_k >= 0 and 0 <= self.seed < 1 << 63 and self.max_tokens >= 1


class CuMemAllocator:
    """Of which a process has one."""

    instance: CuMemAllocator | None = None

    def get_current_usage(self) -> int:
        return 1 << 20


class LLMEngine:
    """One token of every request a step. `log` has what it was told."""

    def __init__(self, arguments: SimpleNamespace) -> None:
        self.arguments = arguments
        assert arguments.skip_tokenizer_init and arguments.load_format == "dummy"
        assert arguments.logprobs_mode == "processed_logprobs"
        assert arguments.enable_sleep_mode and arguments.enable_prefix_caching
        assert arguments.distributed_executor_backend == "external_launcher"
        config = AutoConfig.from_pretrained(arguments.model)
        dtype = getattr(torch, arguments.dtype)
        self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.model.load_weights = self._load_weights  # type: ignore[assignment]
        self.asleep: set[str] = set()
        self.stale = False
        self.requests: dict[str, Any] = {}
        self.log: list[Any] = []
        self._lose_weights()
        if self.alone:
            CuMemAllocator.instance = CuMemAllocator()

    # Whether it takes the process for itself, as it does there
    alone = False

    @classmethod
    def from_engine_args(cls, arguments: SimpleNamespace) -> LLMEngine:
        return cls(arguments)

    def _lose_weights(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(torch.nan)

    def _load_weights(self, pairs: list[tuple[str, Tensor]]) -> set[str]:
        assert "weights" not in self.asleep, "weights were written where no memory is"
        mine = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, value in pairs:
                mine[name].copy_(value)
        self.stale = True
        return {name for name, _ in pairs}

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self.model)]

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        assert "kv_cache" not in self.asleep
        assert reset_running_requests or not self.requests
        self.stale = False
        return True

    def sleep(self, level: int) -> None:
        assert level == 2 and not self.asleep
        self.requests.clear()
        self.asleep = {"weights", "kv_cache"}
        self._lose_weights()

    def wake_up(self, tags: list[str]) -> None:
        assert set(tags) <= self.asleep
        self.asleep -= set(tags)

    def add_request(self, name: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        assert isinstance(name, str) and name not in self.requests
        assert prompt["type"] == "token"
        ids = prompt["prompt_token_ids"]
        if not 0 < len(ids) < self.arguments.max_model_len:
            raise ValueError(f"a prompt of {len(ids)} tokens")
        generator = torch.Generator().manual_seed(params.seed)
        self.requests[name] = SimpleNamespace(
            ids=list(ids), begin=len(ids), params=params, logp=[], generator=generator
        )
        self.log.append((name, list(ids)))
        return name

    def abort_request(self, names: list[str]) -> None:
        self.log.append(list(names))
        for name in names:
            self.requests.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    @torch.no_grad()
    def step(self) -> list[Any]:
        assert not self.asleep and not self.stale and self.requests
        outputs = []
        for name, request in list(self.requests.items()):
            self._draw(request)
            reason = self._ended(request)
            if reason is not None:
                outputs.append(self._output(name, request, reason))
                del self.requests[name]
        return outputs

    def _draw(self, request: Any) -> None:
        logits = self.model(torch.tensor([request.ids])).logits[0, -1].float()
        temperature = request.params.temperature
        logp = torch.log_softmax(logits / (temperature or 1.0), 0)
        if temperature:
            token = int(torch.multinomial(logp.exp(), 1, generator=request.generator))
        else:
            token = int(logp.argmax())
        request.ids.append(token)
        request.logp.append(float(logp[token]))

    def _ended(self, request: Any) -> str | None:
        if request.ids[-1] in request.params.stop_token_ids:
            return "stop"
        full = len(request.ids) >= self.arguments.max_model_len
        if full or len(request.logp) >= request.params.max_tokens:
            return "length"
        return None

    def _output(self, name: str, request: Any, reason: str) -> Any:
        answer = SimpleNamespace(
            token_ids=request.ids[request.begin :],
            logprobs=SimpleNamespace(logprobs=request.logp),
            finish_reason=reason,
        )
        prompt = request.ids[: request.begin]
        return SimpleNamespace(
            request_id=name, prompt_token_ids=prompt, outputs=[answer], finished=True
        )


def install(patch: pytest.MonkeyPatch) -> None:
    """Let `import vllm` find this, until the test is over."""
    package = ModuleType("vllm")
    package.__spec__ = ModuleSpec("vllm", None)
    package.EngineArgs = SimpleNamespace  # type: ignore[attr-defined]
    package.LLMEngine = LLMEngine  # type: ignore[attr-defined]
    package.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    params = ModuleType("vllm.sampling_params")
    params.RequestOutputKind = RequestOutputKind  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "vllm", package)
    memory = ModuleType("vllm.device_allocator.cumem")
    memory.CuMemAllocator = CuMemAllocator  # type: ignore[attr-defined]
    patch.setattr(CuMemAllocator, "instance", None)
    patch.setitem(sys.modules, "vllm.sampling_params", params)
    patch.setitem(sys.modules, "vllm.device_allocator.cumem", memory)
    patch.setattr(show, "vllm_version", lambda: VERSION)
    for name in (*start.ENVIRONMENT, "RANK", "LOCAL_RANK"):
        patch.setenv(name, os.environ.get(name, start.ENVIRONMENT.get(name, "0")))
