"""Code interpreters before the run: that programs run there, and that rows' files are texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from retool.config import Fault
from retool.rl.agent.tools.interpreter import CodeInterpreter, contents_of
from retool.rl.agent.tools.of_row import kwargs_of
from retool.rl.agent.tools.protocol import AnyTool
from retool.rl.agent.tools.session import InterpreterSession
from retool.rl.agent.tools.state import run_alone
from retool.rl.preflight.plan import RLReport
from retool.sandbox.fusion_client import unreachable


def sandbox_faults(tools: Sequence[AnyTool], first: bool) -> Iterator[Fault]:
    """Sandbox servers that take no connection; and, on the `first` process of a machine, sandboxes
    that don't run a program of ours.
    """
    remedy = (
        "Start one there (python -m retool.sandbox serve), correct the address, or leave it out: "
        "programs then run on this machine."
    )
    for tool in _interpreters(tools):
        url = tool.config.sandbox_fusion_url
        if url and (reason := unreachable(url)) is not None:
            yield Fault(
                f"sandbox_fusion_url={url}", f"no server can be reached there ({reason}).", remedy
            )
        elif first and (reason := run_alone(tool.trial())):
            where = (
                f"sandbox_fusion_url={url}"
                if url
                else "actor_rollout_ref.rollout.multi_turn.enable=true"
            )
            way_out = (
                remedy if url else "Run python -m retool.sandbox doctor for the whole picture."
            )
            yield Fault(where, f"programs don't run there: {reason}.", way_out)


def row_file_faults(report: RLReport) -> Iterator[Fault]:
    """The first row whose files for an interpreter have another form than name → text."""
    for key, questions in (("data.train_files", report.train), ("data.val_files", report.val)):
        for prompt in [] if questions is None else questions.prompts:
            if "tools_kwargs" not in prompt.extra_info:
                continue
            for tool in _interpreters(report.tools):
                given = kwargs_of(prompt.extra_info, tool.name, "execute_kwargs").get("files")
                try:
                    contents_of(given, tool.name)
                except ValueError as error:
                    yield Fault(key, f"{prompt.extra_info.get('row', 'a row')}: {error}")
                    return


def _interpreters(tools: Sequence[AnyTool]) -> Iterator[CodeInterpreter]:
    for given in tools:
        tool = given.interpreter if isinstance(given, InterpreterSession) else given
        if isinstance(tool, CodeInterpreter):
            yield tool
