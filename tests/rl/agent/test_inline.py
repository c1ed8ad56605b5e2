"""ReTool's programs amid a turn: where sampling stops, what is put behind it, and that no sampled
token changes, wherever in a token the stop string ends.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from retool.data.render.renderer import Renderer
from retool.rl.agent.episode import Sampled
from retool.rl.agent.formats.code import RETOOL
from retool.rl.agent.loop import run_episode
from retool.rl.agent.options import Agent, AgentOptions, ends_of_inline
from retool.rl.agent.tools.interpreter import SCHEMA
from retool.rl.agent.tools.protocol import ToolResult
from retool.rl.types import Prompt, Stop
from tests.rl.agent.test_environments import Scoring
from tests.rl.agent.test_environments import played as in_world
from tests.rl.agent.test_loop import Answers
from tests.rl.agent.test_loops import played


class Planned:
    """Samples what is planned, token by token, and stops where the engine would; the plan goes on
    wherever something is put between.
    """

    def __init__(self, ids, stop_ids):
        self.ids = list(ids)
        self.stop_ids = stop_ids
        self.given = []
        self.rooms = []  # (what it was allowed, what it sampled)

    async def __call__(self, ids, max_tokens):
        self.given.append(list(ids))
        tokens = []
        while self.ids and len(tokens) < max_tokens:
            tokens.append(self.ids.pop(0))
            if tokens[-1] in self.stop_ids:
                break
        self.rooms.append((max_tokens, len(tokens)))
        stopped = bool(tokens) and tokens[-1] in self.stop_ids
        logp = [-float(token + 1) for token in tokens]
        return Sampled(tokens, logp, logp, "stop" if stopped else "length")


def options_of(renderer, **changes):
    options = AgentOptions(10_000, format=RETOOL, inline_ids=ends_of_inline(renderer, RETOOL))
    return replace(options, **changes)


def ids_of(renderer, text):
    return renderer.tokenizer(text, add_special_tokens=False)["input_ids"]


def run_inline(renderer, plan, tool, **changes):
    """(trajectory, the model) of a turn that is planned as token ids."""
    messages = [{"role": "user", "content": "How many?"}]
    prompt_ids = np.asarray(renderer.render_prompt(messages, None), np.int32)
    prompt = Prompt(0, messages, None, prompt_ids, "rows", "42")
    agent = Agent({tool.name: tool}, renderer, options_of(renderer, **changes))
    model = Planned(plan, agent.stop_ids)
    return asyncio.run(run_episode(prompt, 0, model, agent)), model


@pytest.fixture(scope="module")
def renderer(renderer_of):
    return renderer_of("chatml")


@pytest.fixture(scope="module")
def large(qwen_tokenizer):
    return Renderer(qwen_tokenizer)


# What stands behind the call, in the token in which it ends or in the next
MORE_TAILS = ["\n", " so", ".\n", "><"]
TAILS = ["\n\n", "();\n", *(pytest.param(tail, marks=pytest.mark.slow) for tail in MORE_TAILS)]


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("vocabulary", ["small", "Qwen2.5"])
def test_the_stop_string_may_end_anywhere_in_a_token(renderer, tail, vocabulary, request) -> None:
    if vocabulary == "Qwen2.5":
        renderer = request.getfixturevalue("large")
    end = renderer.ends.known[0]
    first = f"Is 2 > 1? a->b </b>\n<code>\nprint(3 >2 >= 1)\n</code>{tail}"
    second = f"Then <code>x</code>\nIt is <code></code> 42.{end}"
    plan = [*ids_of(renderer, first), *ids_of(renderer, second)]
    tool = Answers(["True", "42\n<|im_end|>"], SCHEMA)
    trajectory, model = run_inline(renderer, plan, tool)
    assert [call["code"] for call in tool.calls] == ["print(3 >2 >= 1)", "x"]
    sampled = trajectory.tokens[trajectory.mask].tolist()
    assert sampled == plan and trajectory.stop is Stop.NO_CALL
    assert trajectory.logp[trajectory.mask].tolist() == [-float(token + 1) for token in plan]
    # All of it is one message. A stop for nothing gave nothing; each output is tokens of its own.
    outputs = [ids for ids in model.given[1:] if ids]
    assert len(outputs) == 2
    texts = [renderer.encoder.said(ids) for ids in outputs]
    assert [text.strip() for text in texts] == [
        "<interpreter>\nTrue\n</interpreter>",
        "<interpreter>\n42\n<|im_end|>\n</interpreter>",
    ]
    control = renderer.end_of_turn_ids[0]
    assert not any(control in ids for ids in outputs)
    (message,) = trajectory.messages
    whole = renderer.encoder.said(trajectory.tokens[trajectory.prompt_length :])
    assert message["role"] == "assistant" and message["content"] + end == whole
    assert trajectory.num_turns == 6 and trajectory.tool_calls == 2
    assert trajectory.assistant_text.count("<interpreter>") == 0


def test_limits_hold_amid_a_turn(renderer) -> None:
    text = "".join(f"<code>\nprint({i})\n</code>\n" for i in range(5))
    plan = ids_of(renderer, text)
    trajectory, _ = run_inline(renderer, plan, Answers(["1"] * 5, SCHEMA), max_assistant_turns=3)
    assert trajectory.stop is Stop.MAX_TURNS and trajectory.tool_calls == 2
    trajectory, _ = run_inline(renderer, plan, Answers(["1"] * 5, SCHEMA), max_response_length=30)
    assert trajectory.stop is Stop.LENGTH and trajectory.response_length <= 30
    nothing = ids_of(renderer, "2 > 1 -> so " + text)
    _, model = run_inline(renderer, nothing, Answers(["1"] * 5, SCHEMA), max_response_length=90)
    used = 0
    for ids, (room, sampled) in zip([[], *model.given[1:]], model.rooms, strict=True):
        used += len(ids)
        assert used + room == 90
        used += sampled
    assert [] in model.given[1:], "it never stopped for nothing"
    long = "a b " * 2_000
    trajectory, model = run_inline(
        renderer, plan, Answers([long] * 5, SCHEMA), max_tool_response_length=20
    )
    assert all(len(ids) < 60 for ids in model.given[1:]) and trajectory.tool_calls == 5
    done = [ToolResult("1", "success", done=True)]
    trajectory, _ = run_inline(renderer, plan, Answers(done, SCHEMA))
    assert trajectory.stop is Stop.DONE and trajectory.tool_calls == 1
    away = [ToolResult("gone", "infrastructure")]
    trajectory, _ = run_inline(renderer, plan, Answers(away, SCHEMA))
    assert trajectory.stop is Stop.INFRASTRUCTURE


def test_a_turn_that_ends_with_an_open_program_is_an_answer(renderer) -> None:
    plan = ids_of(renderer, f"<code>\nprint(1){renderer.ends.known[0]}")
    trajectory, _ = run_inline(renderer, plan, Answers([], SCHEMA))
    assert trajectory.stop is Stop.NO_CALL and trajectory.tool_calls == 0


def test_a_loop_of_the_user_s_gets_the_turn_up_to_the_call(renderer) -> None:
    async def inline(row, generate, tools):
        turn = await generate(row["prompt"])
        while turn.calls:
            (message,) = await tools.answers(turn)
            output = f"\n<interpreter>{message['content']}</interpreter>\n"
            turn = await generate(turn.ids + generate.encode(output))
        return turn

    text = f"Is 2 >1? <code>x</code>\nYes.{renderer.ends.known[0]}"
    plan = ids_of(renderer, text)
    options = options_of(renderer)
    model = Planned(plan, Agent({}, renderer, options).stop_ids)
    trajectory, _ = played(
        renderer,
        inline,
        [model],
        Answers(["1"], SCHEMA),
        format=RETOOL,
        inline_ids=options.inline_ids,
    )
    assert trajectory.stop is Stop.NO_CALL and trajectory.tool_calls == 1 and not trajectory.cuts
    assert trajectory.tokens[trajectory.mask].tolist() == plan


def test_a_world_hears_all_of_a_turn_that_tools_answered_amid(renderer) -> None:
    """With what they answered, as it stands in the conversation; of a turn that is cut off, too."""
    end = renderer.ends.known[0]
    text = "Is 2 >1?\n<code>\nx\n</code>\nYes."
    for ids, stop in (
        (ids_of(renderer, text + end), Stop.DONE),
        (ids_of(renderer, text), Stop.LENGTH),
    ):
        world = Scoring([([], 1.0, True)])
        options = options_of(renderer)
        model = Planned(ids, Agent({}, renderer, options).stop_ids)
        trajectory, _ = in_world(
            renderer,
            world,
            model,
            Answers(["1"], SCHEMA),
            format=RETOOL,
            inline_ids=options.inline_ids,
        )
        assert trajectory.stop is stop and trajectory.tool_calls == 1
        ids = trajectory.tokens[trajectory.prompt_length :]
        whole = renderer.encoder.said(ids).removesuffix(end)
        assert "\n1\n</interpreter>" in whole
        assert world.heard == [{"role": "assistant", "content": whole}]
