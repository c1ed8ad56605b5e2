"""What vLLM 0.22.1's server answers, over a model of transformers' on the CPU: its addresses, forms and
settings as its source has them, and where it goes on without a word.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from torch import Tensor
from transformers import Qwen2ForCausalLM

MAX_MODEL_LEN = 512
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def load(folder: Path) -> Any:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass
class Front:
    """`development`: VLLM_SERVER_DEV_MODE is 1. A prompt of `slow` is under way until `release`.
    `listed`: what another server would say of its models.
    """

    folder: Path
    development: bool = True
    logprobs_mode: str = "raw_logprobs"
    slow: tuple[int, ...] = ()
    listed: Any = None
    url: str = ""
    running: int = 0
    cached: dict[tuple[int, ...], Any] = field(default_factory=dict)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.model = load(self.folder)
        given = json.loads((self.folder / "generation_config.json").read_text())
        # `--generation-config auto`, which is the default
        self.defaults = {name: given.get(name) or value for name, value in NEUTRAL.items()}

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        if self.development:
            app.router.add_get("/server_info", self.server_info)
            app.router.add_post("/collective_rpc", self.collective_rpc)
            app.router.add_post("/reset_prefix_cache", self.reset_prefix_cache)
        return app

    async def models(self, request: web.Request) -> web.Response:
        card = {"id": "m", "owned_by": "vllm", "max_model_len": MAX_MODEL_LEN}
        listed = {"object": "list", "data": [card]} if self.listed is None else self.listed
        return web.json_response(listed)

    async def server_info(self, request: web.Request) -> web.Response:
        assert request.query["config_format"] == "json"
        model_config = {"logprobs_mode": self.logprobs_mode}
        return web.json_response({"vllm_config": {"model_config": model_config}})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["method"] == "reload_weights"
        self.model = load(Path(body["kwargs"]["weights_path"]))
        return web.json_response({"results": [None]})

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        """200 and no word, also where it keeps all because a request is under way."""
        preempts = request.query.get("reset_running_requests") == "true"
        if preempts or not self.running:
            self.cached.clear()
        return web.Response()

    async def completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body["prompt"]
        if len(prompt) + body["max_tokens"] > MAX_MODEL_LEN:
            error = {"message": "max_tokens is too large", "type": "BadRequestError", "code": 400}
            return web.json_response({"error": error}, status=400)
        self.running += 1
        if tuple(prompt) == self.slow:
            await self.release.wait()
        tokens, logp = self.sample(prompt, {**self.defaults, **body})
        self.running -= 1
        stops = body["stop_token_ids"]
        assert body["ignore_eos"] and body["return_token_ids"] and body["logprobs"] == 0
        choice = {
            "index": 0,
            "text": "",
            "logprobs": {"token_logprobs": logp, "tokens": [str(token) for token in tokens]},
            "finish_reason": "stop" if tokens[-1] in stops else "length",
            "token_ids": tokens,
        }
        return web.json_response({"object": "text_completion", "choices": [choice]})

    @torch.no_grad()
    def sample(self, prompt: list[int], asked: dict[str, Any]) -> tuple[list[int], list[float]]:
        """With what computed the prompt first, until that is forgotten."""
        model = self.cached.setdefault(tuple(prompt), self.model)
        generator = torch.Generator().manual_seed(asked["seed"])
        ids = list(prompt)
        logp = []
        while len(logp) < asked["max_tokens"]:
            logits = model(torch.tensor([ids])).logits[0, -1]
            likely = penalised(logits, ids, asked["repetition_penalty"])
            temperature = asked["temperature"] or 1.0
            token = int(likely.argmax())
            if asked["temperature"]:
                drawn_from = (likely / temperature).softmax(0)
                token = int(torch.multinomial(drawn_from, 1, generator=generator))
            raw = self.logprobs_mode == "raw_logprobs"
            told_of = logits if raw else likely / temperature
            logp.append(float(told_of.log_softmax(0)[token]))
            ids.append(token)
            if token in asked["stop_token_ids"]:
                break
        return ids[len(prompt) :], logp


def penalised(logits: Tensor, ids: list[int], penalty: float) -> Tensor:
    """Logits of tokens that are there already, made less likely (Keskar et al. 2019)."""
    seen = torch.tensor(ids).unique()
    changed = logits.clone()
    changed[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return changed


@contextmanager
def running(front: Front) -> Iterator[Front]:
    """Serve it on a thread; its `url` is known then."""
    loop = asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(front.app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        front.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def on_thread(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = on_thread(start())
    try:
        yield front
    finally:
        loop.call_soon_threadsafe(front.release.set)
        on_thread(runner.cleanup())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()
