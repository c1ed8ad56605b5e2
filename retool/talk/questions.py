"""Rows of any file that the reader knows → the questions in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retool.data.read.chunk import RowError
from retool.data.read.containers import plain
from retool.data.read.files import iter_chunks
from retool.data.read.library import IN_NAME
from retool.data.read.names import resolve_files
from retool.data.read.refused_rows import RefusedRows
from retool.data.read.row_format import RowFormat
from retool.data.read.rows import Conversation, to_conversation
from retool.rl.agent.tools.of_row import schemas_offered
from retool.rl.data import PromptOptions, to_prompt
from retool.rl.data import Question as Asked
from retool.rl.data import read_questions as rows_of_rl
from retool.rl.types import Prompt
from retool.talk.agent import Talker

# Where a row's question is, the first of these that it has: a text, or messages; a column of one of
# the forms that SFT reads; or a text again
PROMPT = "prompt"
FORMS = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca"}
TEXTS = ("question", "problem", "Problem", "text")


@dataclass(frozen=True)
class Question:
    """A row, and the prompt that it makes."""

    row: dict[str, Any]
    prompt: Prompt


def read_questions(
    files: Sequence[str], talker: Talker, column: str | None = None, most: int = -1
) -> list[Question]:
    """Every row of `files` (the first `most`; -1: all) as a question.

    `column`: where it stands (None: in the first of `PROMPT`, `FORMS` and `TEXTS` that there is).
    Of a conversation all up to the user's last message is asked. ValueError with every kind of
    fault where a row can't be.
    """
    found: list[Question] = []
    refused = RefusedRows()
    count = 0
    for where, row in _rows(files, most):
        count += 1
        try:
            if isinstance(row, RowError):
                raise row
            prompt = _prompt(row, where, talker, column, len(found))
            found.append(Question(row, prompt))
        except ValueError as error:
            refused.add(str(error) if str(error).startswith(where) else f"{where}: {error}")
    if refused.count:
        raise refused.error(count)
    return found


def read_worlds_rows(files: Sequence[str], talker: Talker, most: int = -1) -> list[Question]:
    """Every row of `files`, as reinforcement learning reads it, for an environment to begin with.
    ValueError likewise.
    """
    wanted = PromptOptions(needs_truth=False, keeps_rows=True, max_samples=most)
    found: list[Question] = []
    refused = RefusedRows()
    for number, row in enumerate(rows_of_rl(resolve_files(files, part=IN_NAME), wanted)):
        try:
            found.append(of_world(row, number, talker))
        except ValueError as error:
            refused.add(str(error))
    if refused.count:
        raise refused.error(len(found) + refused.count)
    return found


def of_world(asked: Asked | RowError, number: int, talker: Talker) -> Question:
    """A row of that number; raises what is wrong with it."""
    if isinstance(asked, RowError):
        raise asked
    offered = schemas_offered(talker.schemas, asked.extra_info)
    ids = talker.llm.renderer.render_prompt(asked.messages, offered)
    prompt = to_prompt(asked, number, offered, np.asarray(ids, np.int32))
    return Question(dict(asked.row), prompt)


def _rows(files: Sequence[str], most: int) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    for chunk in iter_chunks(resolve_files(files, part=IN_NAME), limit=most):
        for index, row in chunk:
            yield f"{chunk.file}, row {index}", row


def _prompt(
    row: Mapping[str, Any], where: str, talker: Talker, column: str | None, index: int
) -> Prompt:
    checked = _conversation(row, where, column)
    asking = _up_to_the_question(checked.messages, where)
    # Without tools of ours the row's own are shown to the model; its calls aren't run then.
    tools = talker.schemas or checked.tools
    ids = talker.llm.renderer.render_prompt(asking, tools, checked.enable_thinking)
    if len(ids) >= talker.llm.max_model_len:
        raise ValueError(
            f"{where}: the prompt has {len(ids):,} tokens, and the model takes "
            f"{talker.llm.max_model_len:,} with its answer (--max-model-len)."
        )
    source = where.rpartition(", row ")[0]
    return Prompt(index, asking, tools, np.asarray(ids, np.int32), source, "")


def _conversation(row: Mapping[str, Any], where: str, column: str | None) -> Conversation:
    """What a row holds, with the answers that it has."""
    file, _, number = where.rpartition(", row ")
    names = (column,) if column else (PROMPT, *FORMS, *TEXTS)
    asked = next((name for name in names if name in row), None)
    if asked is None:
        there = ", ".join(map(str, row))
        raise ValueError(
            f"{where}: there is no {' or '.join(map(repr, names))}; it has {there}. Name the column "
            "with --column."
        )
    if asked in FORMS and not column:
        # An instruction needn't have an output to be asked.
        whole = {"output": "", **row} if asked == "instruction" else row
        form = RowFormat(format=FORMS[asked])
        return to_conversation(whole, file, int(number), form, prompt_only=True)
    value = plain(row[asked])
    fields = {
        "messages": [{"role": "user", "content": value}] if isinstance(value, str) else value,
        "tools": row.get("tools"),
        "enable_thinking": row.get("enable_thinking"),
    }
    return to_conversation(fields, file, int(number), prompt_only=True)


def _up_to_the_question(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError(f"{where}: there is no user's message to answer.")
    return messages[: last + 1]
