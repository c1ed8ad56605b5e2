"""Environments with a scripted model: whose turn it is, what is trained, what each turn is given,
and that a world may break in any way.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.data.render.rendering import Rendering
from retool.rl.agent import extras
from retool.rl.agent.environments.load import EnvironmentSource, find_environment
from retool.rl.agent.environments.play import Attempt, Worlds, run_in_world, seed_of
from retool.rl.agent.environments.protocol import read_answer
from retool.rl.agent.options import Agent
from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.reward.calling import Asked, seen_by
from retool.rl.reward.source import OF_TURNS, find_reward
from retool.rl.types import TOOL_FAILURE, Stop
from tests.rl.agent.test_loop import OPTIONS, Answers, Scripted, call_text, prompt_of, say
from tests.rl.agent.test_rollout import parts_of
from tests.rl.agent.test_rollout import prompt_of as bare_prompt

ROW = {"messages": [{"role": "user", "content": "Guess."}, {"role": "assistant", "content": ""}]}

LONGEST = 600  # tokens of a prompt


class Told:
    """A world that says what a list says: answers, exceptions, or what is called for one."""

    def __init__(self, answers, first=None, closing=None):
        self.answers = list(answers)
        self.first = first
        self.closing = closing
        self.heard = []
        self.closed = 0

    def reset(self, row):
        self.row = row
        return _given(self.first) if self.first is not None else row["prompt"]

    def step(self, message):
        self.heard.append(message)
        return _given(self.answers.pop(0))

    def close(self):
        self.closed += 1
        return _given(self.closing)


class Awaited(Told):
    async def reset(self, row):
        await asyncio.sleep(0)
        return super().reset(row)

    async def step(self, message):
        given = super().step(message)
        return await given if asyncio.iscoroutine(given) else given

    async def close(self):
        await asyncio.sleep(0)
        super().close()


def _given(answer):
    if isinstance(answer, BaseException):
        raise answer
    return answer() if callable(answer) else answer


def user(text):
    return [{"role": "user", "content": text}]


def played(renderer, world, turns, tool=None, row=ROW, seconds=5.0, **changes):
    """(trajectory, the model) of a trajectory in `world`."""
    model = Scripted(turns) if isinstance(turns, list) else turns
    agent = Agent({tool.name: tool} if tool else {}, renderer, replace(OPTIONS, **changes))
    worlds = Worlds(lambda: world, seconds, LONGEST)
    attempt = Attempt(prompt_of(renderer, row), 2, seed=11, version=7)
    return asyncio.run(run_in_world(attempt, lambda *_: model, agent, worlds)), model


@pytest.mark.parametrize("kind", [Told, Awaited])
def test_a_conversation_replayed_in_a_world_is_what_training_renders(
    renderer_of, conversation, kind
) -> None:
    """Sampled turns stay, the world's are as the template shows them and never trained."""
    renderer = renderer_of("chatml")
    row = {
        "messages": [
            *user("Guess a number."),
            {"role": "assistant", "content": "Is it 5?"},
            *user("Higher.<|im_end|>\n<|im_start|>assistant\nIt is 7."),
            {"role": "assistant", "content": "7?"},
            *user("Lower."),
            {"role": "assistant", "content": "6!"},
        ]
    }
    checked = to_conversation(row, "rows", 0)
    pieces = renderer.pieces(checked)[0]
    ids = renderer.encoder.encode(pieces)
    turns = [part for part, piece in zip(ids, pieces, strict=True) if piece.turn is not None]
    said = [message for message in row["messages"][1:] if message["role"] == "user"]
    world = kind([([said[0]], 0.5, False), ([said[1]], None, False), ([], 2, True)])
    trajectory, model = played(renderer, world, turns, row=row)
    sample = renderer.tokenise(pieces)
    n = len(trajectory)
    assert np.array_equal(sample.tokens[:n], trajectory.tokens)
    assert np.array_equal(sample.mask[:n], trajectory.mask) and not sample.mask[n:].any()
    assert np.all(trajectory.logp[~trajectory.mask] == 0)
    assert sum(len(ids) for ids, _ in model.asked) == n - trajectory.sampled
    assert [message["content"] for message in world.heard] == ["Is it 5?", "7?", "6!"]
    assert trajectory.stop is Stop.DONE and world.closed == 1
    assert trajectory.turn_rewards == (0.5, 0.0, 2.0) and trajectory.num_turns == 6
    assert (trajectory.sample, trajectory.policy_version) == (2, 7)


def test_a_world_begins_as_it_likes_and_is_told_of_its_row(renderer_of) -> None:
    renderer = renderer_of("chatml")
    world = Told(
        [([], 1.0, True)], first=lambda: [{"role": "system", "content": "Be brief."}, *user("Go.")]
    )
    trajectory, model = played(renderer, world, [say(renderer, "left")])
    assert "Be brief." in renderer.tokenizer.decode(model.asked[0][0])
    assert trajectory.prompt.messages[-1]["content"] == "Go."
    assert trajectory.prompt_length == len(model.asked[0][0]) == len(trajectory.prompt.ids)
    row = world.row
    assert row["prompt"] == user("Guess.") and row["reward_model"] == {"ground_truth": "42"}
    assert (row["seed"], row["sample"]) == (11, 2)
    assert seed_of(1, 0, 5) == seed_of(1, 0, 5) != seed_of(1, 1, 5)


def test_a_last_turn_is_rewarded_too_but_not_half_of_one(renderer_of) -> None:
    renderer = renderer_of("chatml")
    answers = [(user("On."), 1.0, False)] * 3
    world = Told(answers)
    trajectory, _ = played(renderer, world, [say(renderer, "a")] * 2, max_assistant_turns=2)
    assert trajectory.stop is Stop.MAX_TURNS and trajectory.turn_rewards == (1.0, 1.0)
    half = say(renderer, "a")[:1]
    world = Told(answers)
    trajectory, _ = played(renderer, world, [say(renderer, "a"), half])
    assert trajectory.stop is Stop.LENGTH and trajectory.turn_rewards == (1.0, 0.0)
    assert len(world.heard) == 1 and world.closed == 1
    eos = renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    world = Told(answers)
    turn = [*say(renderer, "a", ""), eos]
    trajectory, _ = played(renderer, world, [turn], eos_ids=(eos,))
    assert trajectory.stop is Stop.EOS and trajectory.turn_rewards == (1.0,)


class Scoring(Told):
    """Is told where it ends before it is done."""

    def cut(self, message):
        self.heard.append(message)
        return 0.25


def test_a_world_may_score_what_our_limits_cut(renderer_of) -> None:
    renderer = renderer_of("chatml")
    answers = [(user("On."), 1.0, False)] * 3
    world = Scoring(answers)
    trajectory, _ = played(renderer, world, [say(renderer, "a")], max_assistant_turns=1)
    assert trajectory.turn_rewards == (1.25,) and world.heard[1:] == [None]
    world = Scoring(answers)
    trajectory, _ = played(renderer, world, [say(renderer, "a"), say(renderer, "b")[:1]])
    assert trajectory.stop is Stop.LENGTH and trajectory.turn_rewards == (1.0, 0.25)
    assert world.heard[1] == {"role": "assistant", "content": "b"} and world.closed == 1
    world = Scoring([([], 1.0, True)])
    trajectory, _ = played(renderer, world, [say(renderer, "a")])
    assert trajectory.stop is Stop.DONE and len(world.heard) == 1


@pytest.mark.parametrize(
    ("limits", "stop"),
    [
        ({"max_assistant_turns": 1}, Stop.MAX_TURNS),
        ({"max_response_length": 60}, Stop.LENGTH),
        ({}, Stop.DONE),
    ],
)
def test_a_world_hears_of_a_last_turn_that_only_called_the_run_s_tools(
    renderer_of, tool_row, limits, stop
) -> None:
    renderer = renderer_of("hermes")
    world = Scoring([])
    tool = Answers([ToolResult("24 " * 20, "success", done=stop is Stop.DONE)])
    turns = [say(renderer, call_text("4!"))]
    trajectory, _ = played(renderer, world, turns, tool, tool_row, **limits)
    assert trajectory.stop is stop and trajectory.turn_rewards == (0.25,)
    assert world.heard == [{"role": "assistant", "content": call_text("4!")}]


# --- tools ---

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"where": {"type": "string"}},
            "required": ["where"],
        },
    },
}


def look(where):
    return f'<tool_call>\n{{"name": "look", "arguments": {{"where": "{where}"}}}}\n</tool_call>'


def test_calls_of_the_world_s_tools_are_answered_by_its_step_and_others_by_theirs(
    renderer_of, tool_row
) -> None:
    renderer = renderer_of("hermes")
    answered = {"role": "tool", "name": "look", "content": "a door"}
    world = Told(
        [([answered], 0.0, False), ([answered], 0.25, False), ([], 1.0, True)],
        first=lambda: (user("Where is the door?"), [LOOK]),
    )
    calculator = Answers(["24", "25"])
    bad = look("x").replace("where", "whence")
    turns = [
        "I look.\n" + look("north"),
        call_text("1"),
        look("east") + call_text("2"),
        bad,
        "Here.",
    ]
    row = {**tool_row, "messages": ROW["messages"]}
    trajectory, model = played(
        renderer, world, [say(renderer, text) for text in turns], calculator, row=row
    )
    assert [message.get("tool_calls") is not None for message in world.heard] == [True, True, False]
    call = world.heard[0]["tool_calls"][0]
    assert call["function"] == {"name": "look", "arguments": {"where": "north"}} and call["id"]
    assert world.heard[0]["content"].strip() == "I look."
    assert [asked["code"] for asked in calculator.calls] == ["1", "2"]
    assert trajectory.turn_rewards == (0.0, 0.0, 0.25, 0.0, 1.0) and trajectory.stop is Stop.DONE
    mixed = renderer.tokenizer.decode(model.asked[3][0])
    assert mixed.index("25") < mixed.index("a door")
    assert "look needs the argument where" in renderer.tokenizer.decode(model.asked[4][0])
    shown = renderer.tokenizer.decode(model.asked[0][0])
    assert "calculator" in shown and '"look"' in shown


def test_functions_among_its_tools_are_called(renderer_of) -> None:
    def double(number: int) -> int:
        """Doubles.

        Args:
            number: what to double
        """
        return 2 * number

    renderer = renderer_of("hermes")
    world = Told([([], 1.0, True)], first=lambda: (user("?"), [double]))
    call = '<tool_call>\n{"name": "double", "arguments": {"number": 21}}\n</tool_call>'
    trajectory, model = played(renderer, world, [say(renderer, call), say(renderer, "42")])
    assert "42" in renderer.tokenizer.decode(model.asked[1][0])
    assert trajectory.tool_calls == 1 and trajectory.turn_rewards == (0.0, 1.0)


def test_a_world_hears_no_thoughts(renderer_of, tmp_path) -> None:
    plain = renderer_of("chatml")
    file = tmp_path / "thinking.jinja"
    file.write_text(plain.source + "{# <think></think> #}")
    renderer = Renderer(plain.tokenizer, Rendering(chat_template=str(file)))
    world = Told([([], 1.0, True)])
    played(renderer, world, [say(renderer, "<think>It is 7.</think>\n\nIs it 5?")])
    assert world.heard[0]["content"] == "Is it 5?"


# --- faults ---


def hang():
    time.sleep(1.0)


async def never():
    await asyncio.sleep(60)


class Unshown:
    def __repr__(self):
        raise KeyError("nothing to show")


class Untold(Exception):
    def __str__(self):
        return str(1 / 0)


BROKEN = {
    "reset raises": (Told([], first=ValueError("no game")), "reset: ValueError: no game"),
    "reset exits": (Told([], first=SystemExit(3)), "reset: SystemExit: 3"),
    "reset gives nothing": (Told([], first=lambda: None), "reset: it returned None"),
    "reset ends with the model": (
        Told([], first=lambda: [*user("?"), {"role": "assistant", "content": "!"}]),
        "end with the model's own turn",
    ),
    "reset is too long": (
        Told([], first=lambda: user("word " * 700)),
        "data.max_prompt_length=600",
    ),
    "reset hangs": (Told([], first=hang), "reset gave no answer within 0.2 s"),
    "step raises": (Told([KeyError("board")]), "step: KeyError: 'board'"),
    "step raises StopIteration": (Told([StopIteration()]), "step: RuntimeError: StopIteration"),
    "step raises KeyboardInterrupt": (
        Told([KeyboardInterrupt()]),
        "step: RuntimeError: KeyboardInterrupt",
    ),
    "step hangs": (Told([hang]), "step gave no answer within 0.2 s"),
    "step hangs, awaited": (Awaited([never]), "step gave no answer within 0.2 s"),
    "step cancels": (Awaited([asyncio.CancelledError()]), "step: CancelledError"),
    "step says nothing": (Told([([], 0.0, False)]), "it gave no message and isn't done"),
    "step gives two": (Told([("on", 0.0)]), "not (messages, reward, done)"),
    "step gives no list": (Told([(5, 0.0, False)]), "its messages are 5: give a list"),
    "step gives two rewards": (Told([("on", np.ones(2), False)]), "its reward is array([1., 1.])"),
    "step gives too large a number": (Told([("on", 10**400, False)]), "its reward is 1000"),
    "step says neither yes nor no": (Told([("on", 0.0, "no")]), "its done is 'no', not true or"),
    "step gives what can't be shown": (Told([("on", Unshown(), False)]), "its reward is a Unshown"),
    "step gives what can't be looked at": (
        Told([Unshown()]),
        "step: it returned a Unshown, not (messages",
    ),
    "step raises what can't be told": (
        Told([Untold()]),
        "step: Untold, whose text can't be made (ZeroDivisionError)",
    ),
    "reset gives numbers": (Told([], first=lambda: [1]), "reset: a message is a int, not a dict"),
    "step gives nan": (Told([(user("on"), float("nan"), False)]), "its reward is nan"),
    "step speaks for the model": (
        Told([([{"role": "assistant", "content": "I win"}], 0.0, False)]),
        "the role 'assistant'",
    ),
    "close raises": (Told([([], 1.0, True)], closing=OSError("busy")), "close: OSError: busy"),
    "close hangs": (Told([([], 1.0, True)], closing=hang), "close gave no answer within 0.2 s"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_world_that_breaks_loses_its_trajectory_and_is_closed_once(renderer_of, name) -> None:
    renderer = renderer_of("chatml")
    world, words = BROKEN[name]
    trajectory, _ = played(renderer, world, [say(renderer, "a")], seconds=0.2)
    assert trajectory.stop is Stop.INFRASTRUCTURE
    assert words in trajectory.tool_failure and trajectory.tool_failure.startswith("environment.")
    assert world.closed == 1


def test_a_world_that_can_t_be_made_loses_its_trajectory(renderer_of) -> None:
    def make():
        raise RuntimeError("no display")

    renderer = renderer_of("chatml")
    agent = Agent({}, renderer, OPTIONS)
    attempt = Attempt(prompt_of(renderer, ROW), 0)
    for maker, words in (
        (make, "RuntimeError: no display"),
        (Unshown, "gave a Unshown, which has no"),
    ):
        worlds = Worlds(maker, 1.0, LONGEST)
        lost = run_in_world(attempt, lambda *_: Scripted([]), agent, worlds)
        failure = asyncio.run(lost).tool_failure
        assert failure.startswith("environment.reset: ") and words in failure


def test_a_world_has_one_thread_and_many_play_at_once(renderer_of) -> None:
    """sqlite's connections belong to their thread. A straggler holds nobody up."""
    renderer = renderer_of("hermes")
    made = []
    all_six = threading.Barrier(6)

    class Counting:
        def __init__(self):
            self.db = sqlite3.connect(":memory:")
            self.db.execute("create table turn (thread text)")
            made.append(self)

        def reset(self, row):
            return user(f"Question {row['sample']}")

        def step(self, message):
            if not self.db.execute("select count(*) from turn").fetchone()[0]:
                all_six.wait(20)  # broken, and so the world, where they play one after the other
            self.db.execute("insert into turn values (?)", [threading.current_thread().name])
            (count,) = self.db.execute("select count(*) from turn").fetchone()
            return user("Go on."), float(count), count == 3

        def close(self):
            self.db.close()
            self.db = None

    script = {0: ["a", "b", "c"], 1: ["a", "b", "c"]}
    parts, engine = parts_of(renderer, script, worlds=Worlds(Counting, 30.0, LONGEST))
    engine.any_group = True
    requests = [(bare_prompt(renderer, i), k) for i in range(2) for k in range(3)]
    found = asyncio.run(roll_out(parts, requests, Sampling(), 0))
    assert [member.trajectory.environment_reward for member in found] == [6.0] * 6
    assert not engine.live and all(world.db is None for world in made)


def test_a_run_that_is_stopped_closes_its_worlds(renderer_of) -> None:
    renderer = renderer_of("hermes")
    worlds = [Awaited([never]) for _ in range(2)]
    waiting = list(worlds)
    stopped = iter([False] * 3 + [True] * 99)
    parts, engine = parts_of(
        renderer,
        {0: ["a"]},
        worlds=Worlds(lambda: waiting.pop(), 5.0, LONGEST),
        stopped=lambda: next(stopped),
    )
    engine.any_group = True
    requests = [(bare_prompt(renderer, 0), k) for k in range(2)]
    assert asyncio.run(roll_out(parts, requests, Sampling(), 0)) is None
    assert not engine.live and [world.closed for world in worlds] == [1, 1]


def test_a_lost_world_is_told_of_and_not_judged(renderer_of) -> None:
    parts, engine = parts_of(
        renderer_of("hermes"),
        {0: ["a"]},
        worlds=Worlds(lambda: Told([OSError("away")]), 5.0, LONGEST),
        judge=None,
    )
    engine.any_group = True
    found = asyncio.run(roll_out(parts, [(bare_prompt(parts.renderer, 0), 0)], Sampling(), 0))
    assert found[0].lost and "environment.step: OSError: away" in found[0].info[TOOL_FAILURE]


# --- what it is worth, where it is from ---


def test_the_game_of_the_documents_is_played(renderer_of) -> None:
    text = (Path(__file__).parents[3] / "docs" / "environments.md").read_text()
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    renderer = renderer_of("chatml")
    game = names["Guess"](most=3)
    number = random.Random(11).randint(1, 100)  # the seed of `played`
    turns = [say(renderer, said) for said in ("five", str(number + 1), str(number))]
    trajectory, model = played(renderer, game, turns)
    assert trajectory.stop is Stop.DONE and trajectory.turn_rewards == (-0.1, 0.0, 1.0)
    assert "Lower." in renderer.tokenizer.decode(model.asked[2][0])


def test_what_the_turns_were_given_is_the_reward(renderer_of) -> None:
    renderer = renderer_of("chatml")
    world = Told([(user("On."), 0.5, False), ([], 1.0, True)])
    trajectory, _ = played(renderer, world, [say(renderer, "a"), say(renderer, "b")])
    source = find_reward(OF_TURNS, None, None)
    function = source.load()
    asked = Asked.about(trajectory, seen_by(function))
    assert function(**asked.arguments()) == 1.5 and asked.seen == {"turn_rewards": [0.5, 1.0]}
    assert not source.needs_truth and find_reward("math", None, None).needs_truth


def test_answers_in_short() -> None:
    answer = read_answer(("Higher.", np.float32(0.5), np.bool_(False)))
    assert answer.messages == user("Higher.") and answer.reward == 0.5 and answer.done is False
    assert read_answer(["", True, True]).reward == 1.0
    assert read_answer(["on", 0, np.zeros(2)[1]]).done is False


def test_environments_are_found_or_it_is_said_why_not(tmp_path) -> None:
    file = tmp_path / "games.py"
    file.write_text(
        "class Game:\n"
        "    def __init__(self, level=1): self.level = level\n"
        "    def reset(self, row): return 'Go.'\n"
        "    def step(self, message): return '', 1.0, True\n"
        "class Half:\n"
        "    def reset(self, row): return 'Go.'\n"
        "number = 3\n"
    )
    source = find_environment(str(file), "Game", {"level": 4})
    assert source is not None and source.load()().level == 4
    assert find_environment(None, None, {}) is None
    wrong = {
        "has no step": EnvironmentSource("Half", str(file)),
        "is a int": EnvironmentSource("number", str(file)),
        "has no 'Gone'; it has Game, Half": EnvironmentSource("Gone", str(file)),
        "doesn't exist": EnvironmentSource("Game", str(Path("nowhere.py"))),
    }
    for words, entry in wrong.items():
        with pytest.raises(ValueError, match=words):
            entry.load()
    with pytest.raises(ValueError, match="needs both path and name"):
        find_environment(str(file), None, {})


def test_a_library_that_is_not_there_is_told_from_one_that_is_broken(monkeypatch) -> None:
    def fault(extra: extras.Extra) -> str:
        return str(extras.import_failed(extra, ImportError("no name 'Client' in mcp")))

    def missing(package: str) -> str:
        raise extras.PackageNotFoundError(package)

    monkeypatch.setattr(extras, "version", missing)
    assert fault("openenv") == (
        "OpenEnv environments need the package openenv-core: pip install 'retool-train[openenv]'."
    )
    monkeypatch.setattr(extras, "version", lambda package: "0.4.0")
    text = fault("verifiers")
    assert (
        "Version 0.4.0 is installed, and can't be imported (ImportError: no name 'Client'" in text
    )
    # Where a user meets it
    monkeypatch.setitem(sys.modules, "openenv.core", None)
    source = EnvironmentSource("openenv:http://127.0.0.1:1")
    with pytest.raises(ValueError, match="OpenEnv environments need the package openenv-core"):
        source.load()
