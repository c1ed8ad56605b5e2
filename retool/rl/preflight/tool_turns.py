"""How the model writes calls, and whether its chat template shows what answers them."""

from __future__ import annotations

from retool.config import Fault
from retool.preflight.plan import attempt
from retool.rl.agent.formats.choose import choose_format
from retool.rl.agent.formats.table import problem_of_name
from retool.rl.agent.reading.form import Format
from retool.rl.preflight.keys import FORMAT_KEY
from retool.rl.preflight.plan import RLReport


def show_tool_turn(report: RLReport) -> None:
    """Render a tool's answer, to see whether the chat template shows it.

    ValueError where the chat template can't, or leaves it out: it would be found out in mid-run, or
    never.
    """
    renderer = report.renderer
    if not report.tools or renderer is None:
        return
    said = "AnAnswer"
    asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    answer = {"role": "tool", "content": said, "name": report.tools[0].name}
    ids = renderer.render_tool_turn(asked, [answer], [tool.schema for tool in report.tools])
    if said not in renderer.tokenizer.decode(ids):
        raise ValueError(
            "the chat template leaves out what a tool answers. Use data.chat_template=hermes, or "
            "another file."
        )


def call_format(report: RLReport, faults: list[Fault]) -> tuple[str, Format] | None:
    """How the model writes calls; None if no tool could answer one, or the name was refused."""
    name = report.config.actor_rollout_ref.rollout.multi_turn.format
    renderer = report.renderer
    nobody_answers = not report.tools and report.environment is None
    if nobody_answers or renderer is None or problem_of_name(name) is not None:
        return None
    return attempt(FORMAT_KEY, lambda: choose_format(name, renderer), faults)
