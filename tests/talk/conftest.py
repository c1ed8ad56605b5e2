"""A small model with a tokenizer and a template, and an engine that plays turns back to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from examples.quickstart import data, model
from retool.data.template.choose import TEMPLATES
from retool.engine import EngineOptions, TurnDone
from retool.llm.llm import LLM
from retool.llm.sampling import SamplingParams
from retool.rl.agent.tools.interpreter import CodeInterpreter, InterpreterConfig
from retool.rl.agent.tools.load import close_tools
from retool.talk.agent import Talker, make_talker


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: what it says means nothing."""
    folder = tmp_path_factory.mktemp("talk") / "model"
    template = TEMPLATES["hermes"].read_text()
    tokenizer = model.train_tokenizer(model.render(data.make_problems(60, seed=0), template))
    model.write_tokenizer(folder, tokenizer, template)
    model.write_model(folder, tokenizer, 1)
    return folder


@pytest.fixture(scope="session")
def own_llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, device="cpu", max_num_seqs=4) as llm:
        yield llm


@dataclass
class PlayedBack:
    """Gives the turns of `script[prompt]` in order, as many tokens at a time as it is asked for.

    `script` has texts by the key of a sequence; one without an end is cut off. `waits` are called
    before a step.
    """

    llm: LLM
    script: dict[Any, list[str]]
    prompts: dict[Any, list[list[int]]] = field(default_factory=dict)
    left: dict[Any, list[int]] = field(default_factory=dict)
    queue: list[tuple[Any, int]] = field(default_factory=list)
    before_step: Any = None
    dropped: list[Any] = field(default_factory=list)
    seeds: dict[Any, Any] = field(default_factory=dict)

    options = EngineOptions(max_num_seqs=2)
    scheduler = SimpleNamespace(max_length=900)

    def start(self, key, ids, params, group=None):
        self.prompts[key] = [list(ids)]
        self.left[key] = []
        self.seeds[key] = params.seed
        self._ask(key, params)

    def extend(self, key, ids, params):
        if ids:
            self.prompts[key].append(list(ids))
        self._ask(key, params)

    def _ask(self, key, params):
        if not self.left[key]:
            text = self.script[key].pop(0)
            self.left[key] = list(self.llm.renderer.encode(["x", text])[1])
        self.queue.append((key, params.max_tokens))

    def step(self):
        if self.before_step:
            self.before_step()
        key, most = self.queue.pop(0)
        ids = self.left[key][:most]
        self.left[key] = self.left[key][most:]
        ended = ids[-1] in self.llm.renderer.end_of_turn_ids
        logp = [-1.0] * len(ids)
        return [TurnDone(key, ids, logp, logp, "stop" if ended else "length")]

    def idle(self):
        return not self.queue

    def drop(self, key):
        self.dropped.append(key)
        self.queue = [entry for entry in self.queue if entry[0] != key]

    def text(self, key, number=-1):
        """What the model was given."""
        return self.llm.tokenizer.decode(self.prompts[key][number], skip_special_tokens=False)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[CodeInterpreter]:
    tool = CodeInterpreter(InterpreterConfig(isolation="best_effort", workers=1))
    yield tool
    asyncio.run(close_tools([tool]))


@pytest.fixture
def talker_of(own_llm: LLM, interpreter: CodeInterpreter, monkeypatch: pytest.MonkeyPatch):
    """Makes a talker whose model says what a script says: (talker, engine)."""

    def make(
        script: dict[Any, list[str]], tools: bool = True, **sampling: Any
    ) -> tuple[Talker, PlayedBack]:
        engine = PlayedBack(own_llm, {key: list(turns) for key, turns in script.items()})
        monkeypatch.setattr(own_llm, "engine", engine)
        given = [interpreter] if tools else []
        params = SamplingParams(**{"max_tokens": 400, "seed": 0, **sampling})
        return make_talker(own_llm, given, params), engine

    return make
