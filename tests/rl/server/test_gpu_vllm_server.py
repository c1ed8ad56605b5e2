"""vLLM's own server on a GPU as `rollout.name=server`: token ids and log-probabilities are the
trainer's, new weights arrive, and a run of two steps trains on what it samples.

The server is started once for the file; it takes most of the time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import Qwen2Config

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import SamplingParams, TurnDone
from retool.model.build import ModelOptions
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import make_mesh
from retool.rl.server.engine import ServerEngine
from retool.rl.server.fleet import ServerOptions
from tests.engine.models import forced, prompts
from tests.ranks import free_port
from tests.rl.test_command import ARR, run_on_gpus, steps, words
from tests.rl.test_gpu_vllm import LEAST_EQUAL, MOST_GAP, equal_share, write_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,  # tests that run at once would start a server each
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
START_SECONDS = 150
LONGEST = 700
TEMPERATURE = 0.7
SETTINGS = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def folder(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `work`, whose generation_config.json asks for a penalty as Qwen2.5's does."""
    folder = tmp_path_factory.mktemp("server") / "work"
    shutil.copytree(work, folder)
    write_model(folder / "model", Qwen2Config.from_pretrained(folder / "model").vocab_size)
    file = folder / "model" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.5}))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """vLLM's server as users start it, without graphs: they take most of a start."""
    port = free_port()
    options = {
        "--model": str(folder / "model"),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--max-model-len": str(LONGEST),
        "--kv-cache-memory-bytes": str(1 << 30),
        "--gpu-memory-utilization": "0.02",
        "--logprobs-mode": "processed_logprobs",
    }
    pairs = [word for pair in options.items() for word in pair]
    module = "vllm.entrypoints.openai.api_server"
    path = os.pathsep.join(sys.path)
    log = folder / "server.log"
    begin = time.perf_counter()
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *pairs, "--enforce-eager"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SETTINGS, "PYTHONPATH": path},
            start_new_session=True,  # its engine is a process of its own
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not answers(url):
            late = time.perf_counter() > begin + START_SECONDS
            assert server.poll() is None and not late, log.read_text()[-6000:]
            time.sleep(0.2)
        print(f"\nvLLM's server starts in {time.perf_counter() - begin:.1f} s")
        yield url
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def model(folder: Path) -> Sharded:
    return load_pretrained(folder / "model", make_mesh(), ModelOptions(trained=False))


def roll(engine: Any, asked: list[list[int]], params: SamplingParams) -> dict[Any, TurnDone]:
    """A turn for each prompt."""
    found: dict[Any, TurnDone] = {}
    for number, ids in enumerate(asked):
        engine.start(number, ids, params, group=number)
    while not engine.idle():
        for turn in engine.step():
            found[turn.key] = turn
            engine.drop(turn.key)
    return found


def gap(model: Sharded, asked: list[list[int]], found: dict[Any, TurnDone]) -> float:
    """Mean |log p of the server - the trainer's| over what it sampled."""
    apart = []
    for number, ids in enumerate(asked):
        turn = found[number]
        truth = forced(model, [*ids, *turn.tokens], TEMPERATURE)[-len(turn.tokens) :]
        apart.append((truth.cpu() - torch.tensor(turn.logp)).abs())
    return float(torch.cat(apart).mean())


def test_its_tokens_are_of_the_trainers_weights_before_and_after_an_update(
    url: str, model: Sharded, folder: Path, tmp_path: Path
) -> None:
    vocab = Qwen2Config.from_pretrained(folder / "model").vocab_size
    asked = prompts(64, 200, vocab)
    drawn = SamplingParams(max_tokens=32, temperature=TEMPERATURE, seed=(1, 2))
    likeliest = SamplingParams(max_tokens=8, temperature=0)
    options = ServerOptions((url,), max_length=LONGEST, temperature=TEMPERATURE)
    engine = ServerEngine(options, tmp_path, folder / "model")
    before = model.compute.clone()
    firsts = []
    try:
        for scale in (1.0, 0.7, 1.0):
            model.compute.copy_(before * scale)
            begin = time.perf_counter()
            engine.sync(model)
            seconds = time.perf_counter() - begin
            found = roll(engine, asked, drawn)
            apart = gap(model, asked, found)
            print(f"\nweights in {seconds:.2f} s; mean |Δ log p| {apart:.4f}")
            assert apart < MOST_GAP
            again = roll(engine, asked, drawn)
            assert equal_share(again, found) >= LEAST_EQUAL, "the seed gives the draws"
            firsts.append([turn.tokens[0] for turn in roll(engine, asked, likeliest).values()])
    finally:
        model.compute.copy_(before)
        engine.close()
    assert firsts[0] != firsts[1], "the new weights didn't arrive"
    same = sum(one == other for one, other in zip(firsts[0], firsts[2], strict=True))
    assert same >= LEAST_EQUAL * len(asked)


def test_a_run_of_two_steps(url: str, folder: Path, tmp_path: Path) -> None:
    """On every GPU that is here, up to two; the server shares the first."""
    more = [
        "trainer.total_training_steps=2",
        "data.max_response_length=200",
        f"{ARR}rollout.name=server",
        f"{ARR}rollout.server.urls=[{url}]",
        f"{ARR}rollout.temperature={TEMPERATURE}",
        f"{ARR}actor.optim.lr=1e-4",
    ]
    printed = run_on_gpus(words(folder, tmp_path / "run", *more))
    assert f"rollout.name=server: {url} sample" in printed
    found = steps(tmp_path / "run")
    assert len(found) == 2
    for entry in found:
        print(
            f"\nstep {entry['step']}: gap {entry['training/rollout_logp_diff_mean']:.4f}, "
            f"sync {entry['timing_s/sync_weights']:.2f} s, gen {entry['timing_s/gen']:.2f} s"
        )
        assert entry["training/rollout_logp_diff_mean"] < MOST_GAP
