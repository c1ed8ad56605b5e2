"""`rollout.name=server` over two servers of ours, in both dialects: the same tokens and log-probs as the
engine in the process, other weights after every update, servers that fail.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import pytest
import torch
from transformers import Qwen2ForCausalLM

from retool.checkpoint.hf.pretrained import load_pretrained
from retool.config import parse
from retool.engine import Engine, EngineOptions, SamplingParams, TurnDone
from retool.llm.llm import LLM
from retool.llm.sampling import SamplingParams as LLMParams
from retool.model.build import ModelOptions
from retool.model.catalogue.families import read_model_config
from retool.parallel.fsdp import Sharded
from retool.parallel.mesh import Mesh
from retool.rl.config import RLConfig
from retool.rl.preflight.servers import server_faults
from retool.rl.server.dialects import DIALECTS, mark_of
from retool.rl.server.engine import ServerEngine
from retool.rl.server.fleet import Fleet, Server, ServerOptions, ServerRefused, ServersGone
from retool.rl.server.sender import Sender, Ticket, _Lost, _read, _require_own_weights
from retool.rl.server.weights import _load
from tests.llm.models import write_model
from tests.rl.test_config import REQUIRED
from tests.serve.server import serving

PROMPTS = {"a": [5, 6, 7, 8], "b": [9, 10, 11], "c": [30, 31, 32, 33, 34], "d": [7, 7]}
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("servers") / "model")


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape: what training makes of it."""
    return write_model(tmp_path_factory.mktemp("servers") / "trained", seed=3)


@pytest.fixture(scope="module")
def trained(trained_folder: Path) -> Sharded:
    alone = Mesh(0, 1, 1, 1, torch.device("cpu"))
    options = ModelOptions(trained=False, param_dtype=torch.float32, master_dtype=torch.float32)
    return load_pretrained(trained_folder, alone, options)


@pytest.fixture(scope="module")
def urls(folder: Path) -> Iterator[tuple[str, str]]:
    """Two servers that begin with the old weights."""
    with LLM(folder, device="cpu", max_num_seqs=4) as one, LLM(folder, device="cpu") as other:
        with serving(one) as first, serving(other) as second:
            yield first.url, second.url


@contextmanager
def engine_of(urls: tuple[str, ...], shared: Path, folder: Path, **more: Any) -> Iterator[Any]:
    engine = ServerEngine(ServerOptions(urls, **more), shared, folder)
    try:
        yield engine
    finally:
        engine.close()


def roll(engine: Any, params: SamplingParams, again: tuple[int, ...] = ()) -> dict[str, Any]:
    """All prompts' turns; with `again` a second turn after these ids."""
    turns: dict[str, list[TurnDone]] = {key: [] for key in PROMPTS}
    for key, ids in PROMPTS.items():
        engine.start(key, ids, params, group=key)
    end = time.monotonic() + 60
    while not engine.idle():
        assert time.monotonic() < end
        for turn in engine.step():
            turns[turn.key].append(turn)
            if again and len(turns[turn.key]) == 1:
                engine.extend(turn.key, again, params)
            else:
                engine.drop(turn.key)
    return turns


@pytest.mark.parametrize("dialect", ["auto", "sglang"])
def test_tokens_and_log_probs_are_of_the_trainers_weights(
    dialect: str,
    urls: tuple[str, str],
    trained: Sharded,
    trained_folder: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    """Over two turns: greedy tokens are the engine's own, log-probabilities transformers'."""
    reference = Qwen2ForCausalLM.from_pretrained(trained_folder, dtype=torch.float32)
    own = Engine(read_model_config(folder), torch.device("cpu"), EngineOptions())
    own.sync(trained)
    with engine_of(urls, tmp_path, folder, dialect=dialect) as servers:
        servers.sync(trained)
        greedy = roll(servers, GREEDY, again=(12, 13))
        assert tokens_of(greedy) == tokens_of(roll(own, GREEDY, again=(12, 13)))
        stops = (3, 4, 5, 6, 7, 8, 9)
        params = SamplingParams(max_tokens=6, temperature=0.7, stop_ids=stops, seed=(1, 2))
        found = roll(servers, params, again=(12, 13))
        assert tokens_of(roll(servers, params, again=(12, 13))) == tokens_of(found)
    # SGLang ends a turn at the tokenizer's own end, too
    ends = {*stops, reference.config.eos_token_id} if dialect == "sglang" else stops
    for key, turns in found.items():
        ids = list(PROMPTS[key])
        for turn in turns:
            assert turn.logp == pytest.approx(scored(reference, ids, turn.tokens, 0.7), abs=2e-5)
            assert turn.reason == ("stop" if turn.tokens[-1] in ends else "length")
            ids += [*turn.tokens, 12, 13]
    assert not list(tmp_path.iterdir()), "weights are left behind"


def tokens_of(turns: dict[str, list[TurnDone]]) -> dict[str, list[list[int]]]:
    return {key: [turn.tokens for turn in mine] for key, mine in turns.items()}


def scored(reference: Any, ids: list[int], tokens: list[int], temperature: float) -> list[float]:
    """Log-probabilities of `tokens` after `ids`."""
    with torch.no_grad():
        logits = reference(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


@pytest.mark.slow
def test_a_server_that_dies_leaves_its_work_to_the_others(
    trained: Sharded, trained_folder: Path, folder: Path, tmp_path: Path
) -> None:
    """And is back with the next weights, once something answers at its address again; without any the
    run ends with what happened to each.
    """
    long = SamplingParams(max_tokens=80, temperature=0)
    with LLM(trained_folder, device="cpu") as one, LLM(folder, device="cpu") as other:
        with serving(one) as stays:
            with serving(other) as dies:
                urls = (stays.url, dies.url)
                port = int(dies.url.rpartition(":")[2])
                engine = ServerEngine(ServerOptions(urls, retries=1), tmp_path, folder)
                engine.sync(trained)
                for number in range(6):
                    engine.start(number, [5, 6, number], long, group=number)
                wait_until(lambda: dies.site.engine.under_way > 0)
            with pytest.warns(UserWarning, match=r"is left out, 1 server\(s\) go on"):
                turns = {turn.key: turn.tokens for turn in until_idle(engine)}
            want = one.generate([[5, 6, n] for n in range(6)], LLM_GREEDY)
            assert [turns[n] for n in range(6)] == [o.outputs[0].token_ids for o in want]
            assert [server.lost == "" for server in engine.fleet.servers] == [True, False]
            for number in range(6):
                engine.drop(number)

            with serving(other, port=port):
                engine.sync(trained)
                assert len(engine.fleet.there) == 2
                assert tokens_of(roll(engine, GREEDY))
        engine.start("z", [5], GREEDY)
        with warnings.catch_warnings(), pytest.raises(ServersGone) as ended:
            warnings.simplefilter("ignore")
            until_idle(engine)
        engine.drop("z")
        assert all(url in str(ended.value) for url in urls)
        engine.close()


LLM_GREEDY = LLMParams(max_tokens=80, temperature=0, ignore_eos=True)


def until_idle(engine: Any) -> list[TurnDone]:
    turns = []
    while not engine.idle():
        turns += engine.step()
    return turns


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_full_server_is_asked_again(trained: Sharded, folder: Path, tmp_path: Path) -> None:
    with LLM(folder, device="cpu") as llm, serving(llm, most=2) as served:
        with engine_of((served.url,), tmp_path, folder, retries=0) as engine:
            engine.sync(trained)
            assert all(roll(engine, GREEDY).values())
        assert served.site.engine.counts.refused > 0


def test_what_a_server_refuses_ends_the_run(
    urls: tuple[str, str], trained: Sharded, folder: Path, tmp_path: Path
) -> None:
    """A request that is wrong is wrong for every server: none is left out."""
    with engine_of(urls, tmp_path, folder) as engine:
        engine.sync(trained)
        engine.start("a", [10**6], GREEDY)
        with pytest.raises(ServerRefused, match="token id 1,000,000"):
            until_idle(engine)
        assert len(engine.fleet.there) == 2
        # A dropped sequence's answer is nobody's
        engine.drop("a")
        engine.start("a", [5], GREEDY)
        engine.drop("a")
        engine.start("a", [6], GREEDY)
        (turn,) = until_idle(engine)
        assert turn.key == "a" and len(turn.tokens) == 6


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["auto", "sglang"])
def test_a_server_with_other_weights_is_left_out(
    dialect: str,
    urls: tuple[str, str],
    trained: Sharded,
    folder: Path,
    tmp_path: Path,
) -> None:
    """It was started again in mid-step, or another run brought its own; until the next update."""

    def tokens(engine: Any) -> dict[int, list[int]]:
        """Of prompts that both are asked for."""
        for number in range(4):
            engine.start(number, [5, 6, number], GREEDY, group=number)
        found = {turn.key: turn.tokens for turn in until_idle(engine)}
        for number in found:
            engine.drop(number)
        return found

    with engine_of(urls, tmp_path, folder, dialect=dialect) as engine:
        engine.sync(trained)
        want = tokens(engine)
        httpx.post(urls[1] + "/collective_rpc", json=reload(folder)).raise_for_status()
        with pytest.warns(UserWarning, match="other weights than it was given"):
            assert tokens(engine) == want
        assert [server.url for server in engine.fleet.there] == [urls[0]]
        engine.sync(trained)
        assert len(engine.fleet.there) == 2 and tokens(engine) == want


def reload(folder: Path) -> dict[str, Any]:
    return {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}


def test_a_mark_counts_where_it_is_one() -> None:
    """Other servers may say anything in this field, until they have said the mark."""
    server = Server("http://x", DIALECTS["sglang"], mark=mark_of("/run/retool-weights-1"))
    _require_own_weights(server, "default")
    _require_own_weights(server, server.mark)
    for other in ("default", mark_of("/other/retool-weights-1")):
        with pytest.raises(_Lost, match="other weights"):
            _require_own_weights(server, other)
    _require_own_weights(server, "")


@pytest.mark.parametrize("logp", ["NaN", "null", "-Infinity"])
def test_log_probabilities_are_numbers(logp: str) -> None:
    server = Server("http://x", DIALECTS["sglang"])
    meta = f'{{"output_token_logprobs": [[{logp}, 5, null]], "finish_reason": {{"type": "stop"}}}}'
    with pytest.raises(ServerRefused, match="an answer of another form"):
        _read(server, f'{{"meta_info": {meta}}}')


def test_a_server_that_takes_no_connection(
    urls: tuple[str, str],
    trained: Sharded,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told as that, and not as a request that took too long."""

    def silent(*_: object, **__: object) -> None:
        raise aiohttp.ConnectionTimeoutError("Connection timeout to host")

    with engine_of(urls, tmp_path, folder, retries=0) as engine:
        engine.sync(trained)
        monkeypatch.setattr(aiohttp.ClientSession, "post", silent)
        engine.start("a", [5], GREEDY)
        with warnings.catch_warnings(), pytest.raises(ServersGone, match="no connection within 10"):
            warnings.simplefilter("ignore")
            until_idle(engine)
        engine.drop("a")


def test_a_server_that_never_answers() -> None:
    """It takes the connection, and is silent: it is left out after `timeout_s`."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fleet = Fleet.of([url])
        fleet.servers[0].dialect = DIALECTS["vllm"]
        sender = Sender(fleet, ServerOptions((url,), timeout_s=0.2))
        try:
            sender.send(Ticket("a", "a", [5], GREEDY, 0))
            ((_, outcome),) = sender.take(20)
        finally:
            sender.close()
    assert isinstance(outcome, ServersGone) and "more than 0.2 seconds" in str(outcome)


def test_each_turn_of_a_conversation_draws_anew(tmp_path: Path) -> None:
    """Whatever is said in between, and the same each time."""
    params = SamplingParams(max_tokens=2, seed=(1, 2))

    def seeds() -> list[int]:
        engine = ServerEngine(ServerOptions(("http://x",)), tmp_path, tmp_path)
        sent: list[Ticket] = []
        engine._sender = SimpleNamespace(send=sent.append)  # type: ignore[assignment]
        engine.start("a", [5, 6], params)
        for _ in range(2):
            engine.extend("a", [7], params)
        return [ticket.seed for ticket in sent]

    assert len(set(seeds())) == 3 and seeds() == seeds()


def test_weights_that_a_server_says_it_has_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"success": False, "message": "shapes differ"}
    request = httpx.Request("POST", "http://x")
    monkeypatch.setattr(
        httpx, "post", lambda *_, **__: httpx.Response(200, json=said, request=request)
    )
    server = Server("http://x", DIALECTS["sglang"])
    with pytest.raises(ValueError, match="update_weights_from_disk: shapes differ"):
        _load(server, ServerOptions(("http://x",)), Path("/weights"))


def test_servers_that_cant_be_used_are_named(
    urls: tuple[str, str], trained: Sharded, folder: Path, tmp_path: Path
) -> None:
    with engine_of(urls, tmp_path, folder, max_length=5000) as engine:
        with warnings.catch_warnings(), pytest.raises(ServersGone, match="--max-model-len"):
            warnings.simplefilter("ignore")
            engine.sync(trained)
    (tmp_path / "file").write_text("")
    with engine_of(urls, tmp_path / "file", folder) as engine:
        with pytest.raises(ValueError, match=r"can't be written.*rollout\.server\.weights_dir"):
            engine.sync(trained)


def test_prompts_of_a_group_go_to_one_server_unless_it_is_busy() -> None:
    fleet = Fleet.of(["http://a", "http://b"])
    first = fleet.choose("group")
    assert all(fleet.choose("group") is first for _ in range(3))
    first.under_way = 50
    other = fleet.choose("group")
    assert other is not first
    fleet.leave_out(first, "gone")
    assert {fleet.choose(n) for n in range(9)} == {other}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["name=server"], "names no server"),
        (["server.urls=[http://x:1]"], "rollout.name is native"),
        (["name=server", "server.urls=[x]"], "is no address"),
        (["name=server", "server.urls=[http://x:1,http://x:1]"], "twice"),
        (["name=server", "server.urls=[http://x:1]", "top_p=0.9"], "val_kwargs may"),
        (
            ["name=server", "server.urls=[http://x:1]", "tensor_model_parallel_size=2"],
            "servers sample",
        ),
    ],
)
def test_keys_that_dont_fit(words: list[str], said: str) -> None:
    full = [f"actor_rollout_ref.rollout.{word}" for word in words]
    config = parse(RLConfig, [*REQUIRED, *full])
    (fault,) = server_faults(config, reach=False)
    assert said in str(fault)


def test_an_address_where_nothing_answers(urls: tuple[str, str]) -> None:
    full = f"actor_rollout_ref.rollout.server.urls=[{urls[0]},http://127.0.0.1:9]"
    name = "actor_rollout_ref.rollout.name=server"
    config = parse(RLConfig, [*REQUIRED, name, full])
    (fault,) = server_faults(config, reach=True)
    assert "http://127.0.0.1:9" in fault.where and "can't be reached" in fault.problem
