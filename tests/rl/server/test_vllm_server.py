"""`rollout.name=server` over what vLLM 0.22.1's server answers: whatever the model's folder or its start
says, tokens and log-probabilities are those that training is told they are.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import pytest
import torch

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.engine import Engine, EngineOptions, SamplingParams
from retool.model.build import ModelOptions
from retool.model.catalogue.families import read_model_config
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh
from retool.rl.server.dialects import DIALECTS
from retool.rl.server.fleet import ServersGone
from tests.llm.models import write_model
from tests.rl.server.test_servers import GREEDY, PROMPTS, engine_of, roll, scored, tokens_of
from tests.rl.server.vllm_front import Front, load, running

SLOW = (40, 41, 42)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen2.5's, whose generation_config.json asks for a penalty."""
    folder = write_model(tmp_path_factory.mktemp("front") / "model")
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "repetition_penalty": 1.6}))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Sharded:
    alone = Mesh(0, 1, 1, 1, torch.device("cpu"))
    options = ModelOptions(trained=False, param_dtype=torch.float32, master_dtype=torch.float32)
    return load_pretrained(folder, alone, options)


def test_no_penalty_of_the_models_folder_comes_between(
    folder: Path, trained: Sharded, tmp_path: Path
) -> None:
    own = Engine(read_model_config(folder), torch.device("cpu"), EngineOptions())
    own.sync(trained)
    with running(Front(folder, logprobs_mode="processed_logprobs")) as front:
        with engine_of((front.url,), tmp_path, folder, temperature=0.7) as servers:
            servers.sync(trained)
            assert tokens_of(roll(servers, GREEDY)) == tokens_of(roll(own, GREEDY))
            params = SamplingParams(max_tokens=6, temperature=0.7, stop_ids=(3, 4, 5))
            drawn = roll(servers, params)
    reference = load(folder)
    for key, (turn,) in drawn.items():
        wanted = scored(reference, PROMPTS[key], turn.tokens, 0.7)
        assert turn.logp == pytest.approx(wanted, abs=2e-5)


def test_nothing_is_kept_of_old_weights_while_a_given_up_request_still_runs(
    folder: Path, trained: Sharded, tmp_path: Path
) -> None:
    before = trained.compute.clone()
    with running(Front(folder, slow=SLOW)) as front:
        with engine_of((front.url,), tmp_path, folder) as servers:
            servers.sync(trained)
            roll(servers, GREEDY)
            servers.start("given up", SLOW, GREEDY)
            end = time.monotonic() + 30
            while not front.running:
                assert time.monotonic() < end
                time.sleep(0.001)
            servers.drop("given up")
            own = Engine(read_model_config(folder), torch.device("cpu"), EngineOptions())
            try:
                trained.compute.copy_(before.flip(0))
                servers.sync(trained)
                own.sync(trained)
            finally:
                trained.compute.copy_(before)
            assert front.running == 1
            assert tokens_of(roll(servers, GREEDY)) == tokens_of(roll(own, GREEDY))


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({"development": False}, "VLLM_SERVER_DEV_MODE=1"),
        ({"logprobs_mode": "raw_logprobs"}, r"0\.7: start it with --logprobs-mode processed_log"),
        ({"listed": ["m"]}, r"/v1/models answered \['m'\]"),
        pytest.param({"listed": {"data": None}}, "names no model: None", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_cant_be_used_says_why(
    start: dict[str, object], said: str, folder: Path, trained: Sharded, tmp_path: Path
) -> None:
    with running(Front(folder, **start)) as front:  # type: ignore[arg-type]
        with engine_of((front.url,), tmp_path, folder, temperature=0.7) as servers:
            with warnings.catch_warnings(), pytest.raises(ServersGone, match=said):
                warnings.simplefilter("ignore")
                servers.sync(trained)


def test_a_top_k_that_leaves_out_nothing_is_said_as_all_servers_know_it() -> None:
    """SGLang 0.5.23 answers 400 to 0."""
    for dialect in DIALECTS.values():
        for top_k, said in ((0, -1), (-1, -1), (7, 7)):
            params = SamplingParams(max_tokens=1, top_k=top_k)
            body = dialect.ask("m", [5], params, 0).body
            assert body.get("sampling_params", body)["top_k"] == said
