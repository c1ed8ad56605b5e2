"""Loops of the user's with a scripted model: the same tokens as the run's own loop, several sequences
of one trajectory, and that a function may break in any way.
"""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retool.rl.agent.environments.play import Attempt
from retool.rl.agent.loops import Ending, TrajectoryOver, threads
from retool.rl.agent.loops.load import LoopSource, find_loop
from retool.rl.agent.loops.play import OwnLoop, run_own_loop
from retool.rl.agent.options import Agent
from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.objective.advantages import place_turn_rewards
from retool.rl.state import group_from_plain, group_to_plain
from retool.rl.types import TOOL_FAILURE, Group, Scored, Stop
from tests.rl.agent.test_environments import Unshown, Untold
from tests.rl.agent.test_loop import OPTIONS, Answers, Scripted, call_text, episode, prompt_of, say
from tests.rl.agent.test_rollout import Tool, called, parts_of
from tests.rl.agent.test_rollout import prompt_of as bare_prompt

ROW = {"messages": [{"role": "user", "content": "Guess."}, {"role": "assistant", "content": ""}]}


async def ordinary(row, generate, tools):
    """What the run's own loop does."""
    messages = row["prompt"]
    while True:
        turn = await generate(messages)
        if not turn.calls:
            return turn
        messages = [*messages, turn.message, *await tools.answers(turn)]


def user(text):
    return {"role": "user", "content": text}


def played(renderer, function, turns, tool=None, row=ROW, seconds=5.0, most=20_000, **changes):
    """(trajectory, the models of its contexts): context k plays `turns[k]` back."""
    models = [Scripted(part) if isinstance(part, list) else part for part in turns]
    agent = Agent({tool.name: tool} if tool else {}, renderer, replace(OPTIONS, **changes))
    own = OwnLoop(function, "mine", seconds, most)
    attempt = Attempt(prompt_of(renderer, row), 2, seed=11, version=7)
    try:
        lost = run_own_loop(attempt, lambda number, ids: models[number], agent, own)
        return asyncio.run(lost), models
    finally:
        own.threads.end()


LIMITS = {
    "plenty": {},
    "turns": {"max_assistant_turns": 2},
    "tools": {"max_user_turns": 1},
    "tokens": {"max_response_length": 90},
    "answers": {"max_tool_response_length": 8, "max_parallel_calls": 1},
}


@pytest.mark.parametrize("limits", LIMITS)
def test_a_loop_that_does_what_ours_does_trains_what_ours_trains(
    renderer_of, tool_row, limits
) -> None:
    renderer = renderer_of("hermes")
    texts = ["I look.\n" + call_text("1") + call_text("2"), call_text("3"), "The answer is 42."]
    answers = ["one " * 30, ToolResult("two", "error"), "<|im_end|>"]
    turns = [say(renderer, text) for text in texts]
    changes = LIMITS[limits]
    ours, asked = episode(renderer, tool_row, list(turns), Answers(answers), **changes)
    theirs, models = played(
        renderer, ordinary, [list(turns)], Answers(answers), row=tool_row, **changes
    )
    for name in ("tokens", "mask", "logp", "logp_behaviour"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    same = ("prompt_length", "stop", "num_turns", "tool_calls", "tool_errors", "messages")
    for name in (*same, "assistant_text", "tool_uses", "turn_rewards", "policy_version", "cuts"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert models[0].asked == asked.asked and theirs.sample == 2 and not theirs.cuts


# --- several sequences ---


async def compacting(row, generate, tools):
    """Goes on from a summary."""
    asked = [*row["prompt"]]
    asked.append((await generate(asked)).message)
    asked.append(user("Sum up."))
    summary = await generate(asked, max_tokens=50)
    turn = await generate([*row["prompt"], user("So far: " + summary.text)])
    return Ending(turn, reward=2)


def test_a_cut_context_is_several_sequences_each_with_its_own_prompt(renderer_of) -> None:
    renderer = renderer_of("chatml")
    turns = [[say(renderer, "a long thought"), say(renderer, "it is 42")], [say(renderer, "42!")]]
    trajectory, models = played(renderer, compacting, turns)
    assert trajectory.stop is Stop.NO_CALL and len(trajectory.cuts) == 1
    first, second = (trajectory.tokens[span] for span in trajectory.spans)
    row = [user("Guess."), user("So far: it is 42")]
    assert second[: -len(turns[1][0])].tolist() == renderer.render_prompt(row)
    assert models[1].asked[0][0] == renderer.render_prompt(row)
    whole, _ = episode(renderer, ROW, [turns[0][0]], None)
    assert np.array_equal(first[: len(whole)], whole.tokens)
    masks = [trajectory.mask[span] for span in trajectory.spans]
    assert [mask.sum() for mask in masks] == [sum(map(len, turns[0])), len(turns[1][0])]
    sampled = [token for part in turns for turn in part for token in turn]
    assert trajectory.tokens[trajectory.mask].tolist() == sampled
    assert np.all((trajectory.logp != 0) == trajectory.mask)
    assert trajectory.response_lengths == [len(first) - whole.prompt_length, len(turns[1][0])]
    assert trajectory.assistant_text == "a long thought\nit is 42\n42!"
    said = [message["content"] for message in trajectory.messages]
    assert said == ["a long thought", "Sum up.", "it is 42", "So far: it is 42", "42!"]
    assert trajectory.turn_rewards == (0.0, 0.0, 2.0)


def test_a_context_that_forks_begins_with_the_very_tokens_and_trains_its_own_alone(
    renderer_of, tool_row
) -> None:
    """Two ways from one turn, asked for at once, and one given as tokens."""

    async def forking(row, generate, tools):
        turn = await generate(row["prompt"])
        messages = [*row["prompt"], turn.message]
        one, two = await asyncio.gather(
            generate([*messages, user("A?")]), generate([*messages, user("B?")])
        )
        three = await generate(two.ids + generate.encode("More."), max_tokens=30)
        assert [turn.number, one.number, two.number, three.number] == [0, 1, 2, 3]
        assert three.room < two.room and generate.decode(one.tokens[:-1]) == one.text == "one"
        await tools.call("calculator", {"code": "1"})
        return one

    renderer = renderer_of("hermes")
    turns = [
        [say(renderer, "first"), say(renderer, "one")],
        [say(renderer, "two"), say(renderer, "3")],
    ]
    tool = Answers([ToolResult("1", "success", 0.5, reward=0.25)])
    trajectory, models = played(renderer, forking, turns, tool, row=tool_row)
    first, second = (trajectory.tokens[span] for span in trajectory.spans)
    n = trajectory.prompt_length + len(turns[0][0])
    assert np.array_equal(first[:n], second[:n])
    (cut,) = trajectory.cuts
    assert not trajectory.mask[cut : cut + n].any() and trajectory.mask[n - 1]
    sampled = [token for part in turns for turn in part for token in turn]
    assert trajectory.tokens[trajectory.mask].tolist() == sampled
    assert models[1].asked[1][0] == renderer.encoder.data_ids("More.")
    # In the order of the tokens, whatever was sampled first
    assert trajectory.turn_rewards == (0.0, 0.0, 0.0, 0.25) and trajectory.tool_uses[0].turn == 3
    member = Scored(trajectory.without_texts(), 1.0, 1.0)
    plain = group_to_plain(Group(trajectory.prompt, [member]))
    (again,) = group_from_plain(plain, lambda index: trajectory.prompt).members
    assert again.trajectory.cuts == (cut,)
    assert np.array_equal(again.trajectory.tokens, trajectory.tokens)


def test_a_turn_that_goes_on_with_nothing_said_to_it_is_a_turn_of_its_own(
    renderer_of, tool_row
) -> None:
    """In a second sequence, too: what each is given stands on its own last token."""

    async def going_on(row, generate, tools):
        turn = await generate(row["prompt"], max_tokens=2)
        await tools.call("calculator", {"code": "1"})
        turn = await generate(turn.ids, max_tokens=3)
        await generate("Another.", max_tokens=1)
        await tools.call("calculator", {"code": "2"})
        other = await generate(generate.encode("A third."))
        await generate(other.ids)
        assert turn.number == 1 and other.number == 3
        return Ending(turn, reward=4.0)

    renderer = renderer_of("hermes")
    ids = say(renderer, "one two three four")
    turns = [[ids[:2], ids[2:5]], [ids[:1]], [ids[:3], ids[3:4]]]
    tool = Answers([ToolResult("", "success", reward=1.0), ToolResult("", "success", reward=2.0)])
    trajectory, _ = played(renderer, going_on, turns, tool, row=tool_row)
    assert trajectory.num_turns == 6  # nobody said anything between
    assert trajectory.turn_rewards == (1.0, 4.0, 2.0, 0.0, 0.0) and len(trajectory.joins) == 2
    member = Scored(trajectory.without_texts(), 1.0, 1.0)
    plain = group_to_plain(Group(trajectory.prompt, [member]))
    (again,) = group_from_plain(plain, lambda index: trajectory.prompt).members
    trained = again.trajectory
    placed = place_turn_rewards(trained.turn_rewards, 7.0, trained.mask, trained.joins)
    assert placed[trained.mask].tolist() == [0, 1, 0, 0, 4, 2, 0, 0, 0, 0]


def test_what_tools_give_is_the_turn_s_that_they_answer(renderer_of, tool_row) -> None:
    """Two ways that are gone at once: the first is answered when the second has ended."""

    async def abreast(row, generate, tools):
        prompt = row["prompt"]
        one, two = await asyncio.gather(generate(prompt), generate([*prompt, user("Or?")]))
        await tools.answers(one)
        return two

    renderer = renderer_of("hermes")
    turns = [[say(renderer, call_text("1"))], [say(renderer, "two")]]
    tool = Answers([ToolResult("1", "success", reward=0.5)])
    trajectory, _ = played(renderer, abreast, turns, tool, row=tool_row)
    assert [use.turn for use in trajectory.tool_uses] == [0]
    assert trajectory.turn_rewards == (0.5, 0.0)


def test_what_ends_our_loop_ends_theirs_unless_it_has_another_way(renderer_of) -> None:
    async def talking(row, generate, tools):
        asked = [*row["prompt"]]
        while True:
            asked += [(await generate(asked)).message, user("On.")]

    async def catching(row, generate, tools):
        try:
            return await talking(row, generate, tools)
        except TrajectoryOver as over:
            assert over.stop is Stop.LENGTH
            return await generate([user("Be brief.")])

    renderer = renderer_of("chatml")
    turns = [[say(renderer, "word " * 9)] * 9, [say(renderer, "ok")]]
    trajectory, _ = played(renderer, talking, turns, max_response_length=40)
    assert trajectory.stop is Stop.LENGTH and not trajectory.cuts
    trajectory, _ = played(renderer, talking, turns, most=50)
    assert trajectory.stop is Stop.LENGTH and len(trajectory) <= 50
    trajectory, _ = played(renderer, talking, turns, max_assistant_turns=3)
    assert trajectory.stop is Stop.MAX_TURNS and trajectory.num_turns == 6
    trajectory, _ = played(renderer, catching, turns, max_response_length=40)
    assert trajectory.stop is Stop.NO_CALL and len(trajectory.cuts) == 1


class Slow(Scripted):
    """As a model: others are asked before it has answered."""

    async def __call__(self, ids, max_tokens):
        await asyncio.sleep(0.05)
        return await super().__call__(ids, max_tokens)


def test_turns_that_are_asked_for_at_once_are_no_more_than_allowed(renderer_of) -> None:
    async def at_once(row, generate, tools):
        ways = [generate(f"Way {number}.") for number in range(3)]
        *found, over = await asyncio.gather(*ways, return_exceptions=True)
        assert isinstance(over, TrajectoryOver) and over.stop is Stop.MAX_TURNS
        return found[0]

    renderer = renderer_of("chatml")
    models = [Slow([say(renderer, "ok")]) for _ in range(3)]
    trajectory, _ = played(renderer, at_once, models, max_assistant_turns=2)
    assert trajectory.stop is Stop.NO_CALL and len(trajectory.cuts) == 1


def test_tools_with_a_state_say_when_it_is_over(renderer_of, tool_row) -> None:
    renderer = renderer_of("hermes")
    tool = Answers([ToolResult("won", "success", reward=1.0, done=True)])
    trajectory, _ = played(renderer, ordinary, [[say(renderer, call_text("1"))]], tool, tool_row)
    assert trajectory.stop is Stop.DONE and trajectory.turn_rewards == (1.0,)
    assert trajectory.messages[-1]["content"] == "won"


# --- faults ---


async def no_await(row, generate, tools):
    return generate(row["prompt"]).text


async def no_await_of_a_result(row, generate, tools):
    return generate(row["prompt"])


async def raises(row, generate, tools):
    await generate(row["prompt"])
    raise KeyError("board")


async def exits(row, generate, tools):
    raise SystemExit(3)


async def never(row, generate, tools):
    await asyncio.sleep(60)


async def blocks(row, generate, tools):
    time.sleep(1.0)


async def nothing(row, generate, tools):
    await generate(row["prompt"])


async def garbage(row, generate, tools):
    return "42"


async def leaves(row, generate, tools):
    turn = await generate(row["prompt"])
    task = asyncio.create_task(generate(row["prompt"]))
    await asyncio.sleep(0)
    assert not task.done()
    return turn


async def bad_reward(row, generate, tools):
    return Ending(await generate(row["prompt"]), reward=float("nan"))


async def bad_messages(row, generate, tools):
    return await generate([{"role": "nobody", "content": "?"}])


async def bad_ids(row, generate, tools):
    return await generate([10**9])


async def own_turn_last(row, generate, tools):
    turn = await generate(row["prompt"])
    return await generate([*row["prompt"], turn.message])


async def unshown(row, generate, tools):
    await generate(row["prompt"])
    return Unshown()


async def untold(row, generate, tools):
    raise Untold


async def bad_call(row, generate, tools):
    await generate(row["prompt"])
    await tools.call("calculator", "1 + 1")


BROKEN = {
    unshown: "it returned a Unshown, not the turn",
    untold: "Untold, whose text can't be made",
    bad_call: "tools.call was given 'calculator' and '1 + 1': give a tool's name",
    no_await: "generate wasn't awaited: write `await generate(…)`. AttributeError",
    no_await_of_a_result: "generate wasn't awaited",
    raises: "mine: KeyError: 'board' (",
    exits: "SystemExit: 3",
    never: "it didn't return within 0.3 s",
    blocks: "it didn't return within 0.3 s",
    nothing: "it returned None, not the turn that is its answer",
    garbage: "it returned '42'",
    leaves: "it returned while generate was still under way",
    bad_reward: "its reward is nan",
    bad_messages: "ValueError|RowError",
    bad_ids: "generate was given the token 1000000000",
    own_turn_last: "end with the model's own turn",
}


@pytest.mark.parametrize("function", BROKEN, ids=lambda function: function.__name__)
def test_a_loop_that_breaks_loses_its_trajectory(renderer_of, function) -> None:
    renderer = renderer_of("chatml")
    slow = function is leaves
    turns = [[say(renderer, "a")], sleeping if slow else [say(renderer, "b")]]
    trajectory, _ = played(renderer, function, turns, seconds=0.3)
    assert trajectory.stop is Stop.INFRASTRUCTURE
    assert any(words in trajectory.tool_failure for words in BROKEN[function].split("|"))
    assert trajectory.tool_failure.startswith("agent.mine: ")


async def sleeping(ids, max_tokens):
    """A turn that takes long."""
    await asyncio.sleep(60)


def test_a_tool_that_broke_loses_the_trajectory_whatever_the_loop_makes_of_it(
    renderer_of, tool_row
) -> None:
    async def hiding(row, generate, tools):
        turn = await generate(row["prompt"])
        try:
            await tools.answers(turn)
        except Exception:
            return turn

    renderer = renderer_of("hermes")
    tool = Answers([ConnectionError("away")])
    trajectory, _ = played(renderer, hiding, [[say(renderer, call_text("1"))]], tool, tool_row)
    assert trajectory.stop is Stop.INFRASTRUCTURE
    assert trajectory.tool_failure == "calculator: ConnectionError: away"


def test_nobody_samples_for_a_trajectory_that_is_over(renderer_of) -> None:
    kept = []

    async def keeping(row, generate, tools):
        kept.append(generate)
        return await generate(row["prompt"])

    async def stealing(row, generate, tools):
        return await kept[0](row["prompt"])

    renderer = renderer_of("chatml")
    turns = [[say(renderer, "a")]]
    assert played(renderer, keeping, turns)[0].stop is Stop.NO_CALL
    trajectory, _ = played(renderer, stealing, turns)
    assert "the trajectory is over" in trajectory.tool_failure


def test_an_error_of_the_engine_s_ends_the_run(renderer_of) -> None:
    async def hiding(row, generate, tools):
        try:
            return await generate(row["prompt"])
        except Exception:
            return None

    with pytest.raises(IndexError):
        played(renderer_of("chatml"), hiding, [[]])


# --- in a rollout ---


def test_loops_wait_for_each_other_s_turns_and_block_nobody(renderer_of) -> None:
    """Sample 1 of each question blocks its thread; the engine goes on, and is empty at the end."""
    renderer = renderer_of("hermes")

    async def some(row, generate, tools):
        if row["sample"] == 1:
            time.sleep(1.0)
        return await ordinary(row, generate, tools)

    own = OwnLoop(some, "some", 0.4, 1000)
    parts, engine = parts_of(renderer, {0: [called("1"), "42"], 1: ["7"]}, Tool(0.01), own_loop=own)
    engine.any_group = True
    requests = [(bare_prompt(renderer, i), k) for i in range(2) for k in range(3)]
    begin = time.perf_counter()
    found = asyncio.run(roll_out(parts, requests, Sampling(), 0))
    own.threads.end()
    assert time.perf_counter() - begin < 3.0 and not engine.live
    assert [member.lost for member in found] == [False, True, False] * 2
    assert [member.score for member in found if not member.lost] == [1.0, 1.0, 0.0, 0.0]
    assert "agent.some: it didn't return within 0.4 s" in found[1].info[TOOL_FAILURE]


def test_who_shares_a_thread_with_one_that_blocked_goes_on(monkeypatch) -> None:
    monkeypatch.setattr(threads, "MOST_THREADS", 1)
    monkeypatch.setattr(threads, "SECONDS_TO_ANSWER", 0.05)
    shared = threads.LoopThreads()

    async def blocking():
        await asyncio.sleep(0.05)
        time.sleep(0.4)

    async def waiting():
        await asyncio.sleep(0.2)
        return "done"

    async def both():
        other = asyncio.create_task(shared.run(waiting, 3.0))
        await asyncio.sleep(0)
        gone = await shared.run(blocking, 0.1)
        return gone, await other

    try:
        gone, other = asyncio.run(both())
    finally:
        shared.end()
    assert gone.cancelled() and other.done() and other.result() == "done"
    assert not shared._threads


def test_what_is_cancelled_while_it_blocks_cleans_up_though_the_run_ends() -> None:
    shared = threads.LoopThreads()
    go_on = threading.Event()
    cleaned = threading.Event()

    async def blocking():
        go_on.wait(10)
        try:
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    async def cancelled():
        work = asyncio.create_task(shared.run(blocking, 10))
        await asyncio.sleep(0.05)
        work.cancel()
        await asyncio.wait({work})

    asyncio.run(cancelled())
    shared.end()
    go_on.set()
    assert cleaned.wait(2)


def test_a_thread_that_somebody_blocks_who_was_cancelled_is_not_idle(monkeypatch) -> None:
    """A run was asked to stop, say, or an engine failed: those that are sampled next go on."""
    monkeypatch.setattr(threads, "MOST_THREADS", 1)
    shared = threads.LoopThreads()
    go_on = threading.Event()
    cleaned = threading.Event()

    async def blocking():
        try:
            go_on.wait(10)
            await asyncio.sleep(0)
        finally:
            cleaned.set()

    async def name():
        return threading.get_ident()

    async def both():
        first = asyncio.create_task(shared.run(blocking, 10))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.wait({first})
        before = (await shared.run(name, 5.0)).result()
        go_on.set()
        assert cleaned.wait(5)
        blocked = shared._threads[0]
        while blocked.is_blocked:
            await asyncio.sleep(0.01)
        return before, (await shared.run(name, 5.0)).result()

    try:
        before, after = asyncio.run(both())
    finally:
        go_on.set()
        shared.end()
    assert before != after  # what isn't blocked any more is used again


def test_contexts_draw_for_themselves_and_the_first_as_ours(renderer_of) -> None:
    async def twice(row, generate, tools):
        await asyncio.gather(generate(row["prompt"]), generate(row["prompt"]))
        return await generate([user("Again.")])

    renderer = renderer_of("hermes")
    own = OwnLoop(twice, "twice", 5.0, 1000)
    parts, engine = parts_of(renderer, {0: ["a"], (0, 0): ["b"]}, own_loop=own)
    engine.any_group = True
    found = asyncio.run(roll_out(parts, [(bare_prompt(renderer, 0), 0)], Sampling(seed=9), 5))
    own.threads.end()
    assert list(engine.seeds.values()) == [(9, 0, 5, 0, 0), (9, 0, 5, 0, 0, 1), (9, 0, 5, 0, 0, 2)]
    assert len(found[0].trajectory.cuts) == 2 and not engine.live


# --- where it is from ---


def test_loops_are_found_or_it_is_said_why_not(tmp_path: Path) -> None:
    file = tmp_path / "loops.py"
    file.write_text(
        "import functools\n"
        "async def good(row, generate, tools, temperature=1.0): ...\n"
        "def plain(row, generate, tools): ...\n"
        "async def short(row): ...\n"
        "class Kind: ...\n"
        "class Called:\n"
        "    async def __call__(self, row, generate, tools): ...\n"
        "called = Called()\n"
    )
    for name in ("good", "called"):
        source = find_loop(str(file), name)
        assert source is not None and callable(source.load())
    assert find_loop(None, None) is None
    wrong = {
        "plain": "'plain' is no coroutine function: write async def plain",
        "short": "can't be called",
        "Kind": "is a class: give a function",
        "gone": "has no 'gone'",
    }
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            LoopSource(name, str(file)).load()
    with pytest.raises(ValueError, match="needs both path and name"):
        find_loop(str(file), None)
    with pytest.raises(ValueError, match="in no file"):
        find_loop("<program>", "mine")


def test_the_loop_of_the_documents_compacts(renderer_of, tool_row) -> None:
    text = (Path(__file__).parents[3] / "docs" / "loops.md").read_text()
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    renderer = renderer_of("hermes")
    turns = [
        [say(renderer, call_text("1")), say(renderer, "It said one.")],
        [say(renderer, "The answer is 1.")],
    ]
    trajectory, models = played(
        renderer, names["compacting"], turns, Answers(["one"]), tool_row, most=1_000
    )
    assert trajectory.stop is Stop.NO_CALL and len(trajectory.cuts) == 1
    assert "So far: It said one." in renderer.tokenizer.decode(models[1].asked[0][0])
