"""Rollout backends: what existing scripts name, what there is, and what a backend must have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest

from retool.config import parse
from retool.engine import Engine, RolloutEngine, find_backend
from retool.engine.backend import BACKENDS, MEANING_NATIVE
from retool.rl.config import RLConfig
from retool.rl.config.rollout import RolloutConfig
from retool.rl.preflight.memory import SERVER
from retool.rl.preflight.show import in_words
from retool.rl.server.dialects import DIALECTS
from retool.rl.server.engine import ServerEngine
from tests.rl.test_config import REQUIRED


def test_every_name_of_the_configuration_is_a_backend_or_means_native() -> None:
    names = get_args(get_type_hints(RolloutConfig)["name"])
    assert set(names) == {*BACKENDS, *MEANING_NATIVE, SERVER}
    assert {find_backend(name) for name in names if name != SERVER} == {Engine}


@pytest.mark.parametrize("name", MEANING_NATIVE)
def test_the_plans_first_line_says_what_a_name_means(name: str) -> None:
    config = parse(RLConfig, [*REQUIRED, f"actor_rollout_ref.rollout.name={name}"])
    report: Any = SimpleNamespace(config=config, model=None)
    said = f"rollout.name={name} means native here: the in-process engine samples."
    topic, text = next(in_words(report))
    assert topic == "engine" and text.startswith(said)
    assert ("use rollout.name=server" in text) == (name in DIALECTS)


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        ValueError, match=r"rollout.name=tensorrt: .* There is native, vllm, hf; vllm"
    ):
        find_backend("tensorrt")


def test_every_backend_has_the_whole_protocol() -> None:
    wanted = {
        name
        for part in RolloutEngine.__mro__
        for name in vars(part)
        if not name.startswith("_") and callable(getattr(part, name))
    }
    assert {"start", "extend", "drop", "step", "idle", "sync", "release", "follow", "end"} < wanted
    for backend in (*BACKENDS.values(), ServerEngine):
        assert wanted <= set(dir(backend))
