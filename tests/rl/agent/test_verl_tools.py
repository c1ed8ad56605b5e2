"""verl's tools and verl's rows: classes written for it run as they are, a row offers its own tools
and gives them its arguments.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retool.rl.agent.rollout import Sampling, roll_out
from retool.rl.agent.tools.function import FunctionTool
from retool.rl.agent.tools.load import load_tools
from retool.rl.agent.tools.of_row import schemas_offered
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.data import PromptOptions, load_prompts
from retool.rl.reward.calling import Asked
from retool.rl.types import Prompt, Stop
from tests.rl.agent.test_rollout import parts_of

# As somebody writes it for verl: a table of instances, and both ways of reading create_kwargs
TOOL = """
from typing import Any, Optional
from uuid import uuid4

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse
from verl.utils.rollout_trace import rollout_trace_op

class Judge(BaseTool):
    made = []

    def __init__(self, config: dict, tool_schema: OpenAIFunctionToolSchema):
        super().__init__(config, tool_schema)
        self._instances = {}
        self.events = []
        Judge.made.append(self)

    async def create(self, instance_id: Optional[str] = None, ground_truth=None, **kwargs):
        instance_id = instance_id or str(uuid4())
        same = kwargs.get("create_kwargs", {}).get("ground_truth")
        self._instances[instance_id] = {"truth": ground_truth, "reward": 0.0}
        self.events.append(("create", ground_truth, same))
        return instance_id, ToolResponse()

    @rollout_trace_op
    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs):
        answer = str(parameters.get("answer", ""))
        self._instances[instance_id]["answer"] = answer
        reward = await self.calc_reward(instance_id)
        better = reward > self._instances[instance_id]["reward"]
        self._instances[instance_id]["reward"] = reward
        self.events.append(("execute", kwargs.get("tolerance")))
        text = f"{self.config['prefix']} {answer=} {reward=}"
        return ToolResponse(text=text), 0.0 if better else -0.05, {"tries": 1}

    async def calc_reward(self, instance_id: str, **kwargs) -> float:
        one = self._instances[instance_id]
        return float(one.get("answer") == one["truth"])

    async def release(self, instance_id: str, **kwargs) -> None:
        self.events.append(("release", kwargs.get("why")))
        del self._instances[instance_id]

class Texts(Judge):
    async def create(self, instance_id, **kwargs):
        return await super().create(instance_id, **kwargs)

    async def execute(self, instance_id: str, parameters: str, **kwargs):
        return f"got {parameters}", None, {}

class Pictures(Judge):
    async def execute(self, instance_id, parameters, **kwargs):
        return ToolResponse(image=[b"png"]), 0.0, {}

class Breaks(Judge):
    async def calc_reward(self, instance_id, **kwargs):
        raise KeyError("no score")
"""
CONFIG = """
tools:
  - class_name: {name}
    config:
      type: native
      prefix: judged
    tool_schema:
      type: function
      function:
        name: judge
        description: Judges an answer.
        parameters:
          type: object
          properties:
            answer: {{type: string, description: The answer., enum: null}}
          required: [answer]
"""
ROW = {
    "need_tools_kwargs": True,
    "tools_kwargs": {
        "judge": {
            "create_kwargs": {"ground_truth": "42"},
            "execute_kwargs": {"tolerance": 0.5},
            "release_kwargs": {"why": "over"},
        }
    },
}


def load(folder: Path, name: str = "Judge", dotted: str = "") -> AnyTool:
    file = folder / "written_for_verl.py"
    file.write_text(TOOL)
    (folder / "tools.yaml").write_text(CONFIG.format(name=dotted or f"{file}/{name}"))
    (tool,) = load_tools(folder / "tools.yaml")
    return tool


def run(renderer, tools: list[AnyTool], turns: list[str], extra: dict[str, Any]):
    schemas = [tool.schema for tool in tools]
    messages = [{"role": "user", "content": "?"}]
    offered = schemas_offered(schemas, extra)
    ids = np.asarray(renderer.render_prompt(messages, offered), np.int32)
    prompt = Prompt(0, messages, offered, ids, "rows", "42", extra)
    parts, _ = parts_of(renderer, {0: turns})
    parts = type(parts)(
        parts.engine,
        parts.judge,
        {tool.name: tool for tool in tools},
        renderer,
        parts.agent,
    )
    (scored,) = asyncio.run(roll_out(parts, [(prompt, 0)], Sampling(), 0))
    trajectory = scored.trajectory
    return trajectory, renderer.tokenizer.decode(trajectory.tokens[trajectory.prompt_length :])


def judge(answer: str, name: str = "judge") -> str:
    return (
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'answer': answer}})}\n</tool_call>"
    )


@pytest.mark.parametrize("dotted", ["", "written_for_verl.Judge"])
def test_a_tool_of_verl_s_runs_as_it_is(renderer_of, tmp_path, monkeypatch, dotted) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "written_for_verl", raising=False)
    tool = load(tmp_path, dotted=dotted)
    assert tool.schema["function"]["parameters"]["properties"]["answer"]["type"] == "string"
    turns = [judge("7"), judge("42"), "So 42."]
    trajectory, text = run(renderer_of("hermes"), [tool], turns, ROW)
    assert trajectory.stop is Stop.NO_CALL and trajectory.turn_rewards == (-0.05, 0.0, 0.0)
    assert trajectory.tool_scores == {"judge": 1.0} and "judged answer='42' reward=1.0" in text
    assert tool.made.events == [
        ("create", "42", "42"),
        ("execute", 0.5),
        ("execute", 0.5),
        ("release", "over"),
    ]
    assert not tool.made._instances
    assert Asked.about(trajectory).extra["rollout_reward_scores"] == {"judge": 1.0}


def test_the_stand_in_is_gone_once_the_class_is_loaded(tmp_path) -> None:
    load(tmp_path)
    assert not [name for name in sys.modules if name.split(".")[0] == "verl"]


def test_older_forms_of_its_methods(renderer_of, tmp_path) -> None:
    tool = load(tmp_path, "Texts")
    trajectory, text = run(renderer_of("hermes"), [tool], [judge("7"), "42"], ROW)
    assert 'got {"answer": "7"}' in text and trajectory.turn_rewards == ()


def test_what_it_can_t_do_is_counted(renderer_of, tmp_path) -> None:
    pictures, text = run(
        renderer_of("hermes"), [load(tmp_path, "Pictures")], [judge("7"), "x"], ROW
    )
    assert pictures.tool_failed_calls == 1 and "images, which no model here reads" in text
    broken = load(tmp_path, "Breaks")
    with pytest.warns(UserWarning, match="the tool judge did not close .*no score"):
        trajectory, _ = run(renderer_of("hermes"), [broken], ["42"], ROW)
        trajectory, _ = run(renderer_of("hermes"), [broken], [judge("7"), "42"], ROW)
    assert trajectory.tool_failed_calls == 1
    assert trajectory.tool_failed_closes == 1 and not broken.made._instances, "it is released"


# --- rows ---


def twice(x: int, offset: int = 0) -> int:
    """Doubles a number.

    Args:
        x: The number.
        offset: Is added.
    """
    return 2 * x + offset


def test_a_row_offers_its_own_tools_with_its_arguments(renderer_of, tmp_path) -> None:
    tools = [load(tmp_path), FunctionTool(twice)]
    call = '<tool_call>\n{"name": "twice", "arguments": {"x": 4}}\n</tool_call>'
    only = {"need_tools_kwargs": True, "tools_kwargs": {"twice": {"execute_kwargs": {"offset": 1}}}}
    _, text = run(renderer_of("hermes"), tools, [call, "9"], only)
    assert "\n9\n</tool_response>" in text
    trajectory, text = run(renderer_of("hermes"), tools, [judge("7"), "9"], only)
    assert "judge" in text and trajectory.tool_errors == 1 and not tools[0].made.events
    none = {"need_tools_kwargs": True, "tools_kwargs": {}}
    trajectory, _ = run(renderer_of("hermes"), tools, [call], none)
    assert trajectory.stop is Stop.NO_CALL and trajectory.tool_calls == 0
    _, text = run(renderer_of("hermes"), tools, [call, "8"], {"tools_kwargs": {"judge": {}}})
    assert "\n8\n</tool_response>" in text, "without need_tools_kwargs all tools are offered"


def write(folder: Path, extras: list[Any]) -> str:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}?"}],
            "reward_model": {"ground_truth": "4"},
            "extra_info": extra,
        }
        for i, extra in enumerate(extras)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_prompts_show_the_tools_of_their_rows(renderer_of, tmp_path) -> None:
    renderer = renderer_of("hermes")
    schemas = [load(tmp_path).schema, FunctionTool(twice).schema]
    some = {
        "need_tools_kwargs": True,
        "tools_kwargs": {"judge": {"create_kwargs": {}}, "twice": None},
    }
    none = {"need_tools_kwargs": True, "tools_kwargs": {}}
    file = write(tmp_path, [some, none, {"level": 1}])
    prompts, _ = load_prompts([file], renderer, schemas, PromptOptions())
    texts = [renderer.tokenizer.decode(prompt.ids) for prompt in prompts]
    assert [("judge" in text, "twice" in text) for text in texts] == [
        (True, False),
        (False, False),
        (True, True),
    ]
    assert [len(prompt.tools or ()) for prompt in prompts] == [1, 0, 2]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"jugde": {}},
            r"row 0: extra_info.tools_kwargs.jugde: the run has no such tool, only judge",
        ),
        ([1], "extra_info.tools_kwargs is a list, not a mapping"),
        ({"judge": 3}, "tools_kwargs.judge is a int, not a mapping"),
        ({"judge": {"create_kwargs": 3}}, "judge.create_kwargs is a int, not a mapping"),
    ],
)
def test_faults_of_a_row_s_tools_are_told_before_the_run(
    renderer_of, tmp_path, given, named
) -> None:
    schemas = [load(tmp_path).schema]
    file = write(tmp_path, [{"need_tools_kwargs": True, "tools_kwargs": given}])
    with pytest.raises(ValueError, match=named):
        load_prompts([file], renderer_of("hermes"), schemas, PromptOptions())
