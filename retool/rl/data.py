"""Questions from files to rendered prompts.

The general schema, three common pairs of columns, or a function of the user's.

data_source, prompt, ability, reward_model{ground_truth}, extra_info      the general schema
prompt (or messages, conversations) and, if any, ground_truth or answer   what else has prompts
Problem, Answer · problem, answer · question, answer                      by their columns (AIME 2024, MATH, GSM8K)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from retool.data.loader import epoch_order
from retool.data.read.chunk import RowError, RowFunction
from retool.data.read.containers import plain, without_nulls
from retool.data.read.files import iter_chunks
from retool.data.read.raw_messages import prompt_messages
from retool.data.read.refused_rows import RefusedRows
from retool.data.read.row_format import RowFormat
from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.data.tokens.bounds import stuck_ends_process
from retool.rl.agent.tools.of_row import schemas_offered
from retool.rl.types import Prompt

# Columns of questions and answers as widely used data sets call them, none of which has a `prompt`.
PAIRS = (("Problem", "Answer"), ("problem", "answer"), ("question", "answer"))
ASKED = ("messages", "conversations")  # columns of a prompt, where there is no `prompt`
TRUTHS = ("ground_truth", "answer")  # columns beside a prompt, where there is no `reward_model`
HOW_TO_ANSWER = re.compile(r"\\boxed|answer format|####", re.IGNORECASE)
NO_TRUTH = (
    "leave the row out, or use a reward of your own that needs none (custom_reward_function.path)"
)
MATHS = re.compile(r"math|aime|gsm|amc|olympiad", re.IGNORECASE)


@dataclass(frozen=True)
class PromptOptions:
    """How rows become prompts.

    `answer_format` is added to math questions that don't say how to answer (None: never).
    `needs_truth`: a row without an answer is refused; a reward of the user's own may do without.
    `keeps_rows`: whoever judges answers asks for the whole row.
    """

    prompt_key: str = "prompt"
    answer_format: str | None = None
    max_length: int = 2048
    filter_overlong: bool = True
    truncation: str = "error"
    max_samples: int = -1
    needs_truth: bool = True
    keeps_rows: bool = False


@dataclass(frozen=True)
class PromptReport:
    """What became of the rows. `columns` counts the rows by their columns of question and answer."""

    rows: int
    kept: int
    overlong: int
    truncated: int
    duplicates: int
    longest: int
    sources: Mapping[str, int]
    columns: Mapping[str, int] = field(default_factory=dict)

    def sentence(self) -> str:
        """For the start-up plan."""
        parts = [
            f"{self.kept:,} prompts ({', '.join(f'{name}: {n:,}' for name, n in self.sources.items())})",
            f"longest {self.longest:,}",
        ]
        if self.columns:
            parts.append(f"read from {', '.join(self.columns)}")
        if self.overlong:
            parts.append(f"{self.overlong:,} over-long left out")
        if self.truncated:
            parts.append(f"{self.truncated:,} truncated")
        if self.duplicates:
            parts.append(f"{self.duplicates:,} exact duplicates")
        return "; ".join(parts)


@dataclass(frozen=True)
class Question:
    """A checked row, before it is rendered."""

    messages: list[dict[str, Any]]
    ground_truth: Any
    data_source: str
    ability: str
    extra_info: dict[str, Any]
    where: str
    columns: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


def load_prompts(
    files: Sequence[str],
    renderer: Renderer,
    tools: list[dict[str, Any]] | None,
    options: PromptOptions,
    rows: RowFunction | None = None,
) -> tuple[list[Prompt], PromptReport]:
    """Read, check and render every question, tool schemas and generation prompt included.

    Over-long ones are left out and counted. A row may offer some of the `tools` only: see
    `retool.rl.agent.tools.of_row`.

    `rows` is the user's function (path) -> dicts. ValueError with the first faults when a row can't
    be used, or nothing is left.
    """
    prompts: list[Prompt] = []
    faults = RefusedRows()
    total = 0
    overlong = 0
    truncated = 0
    columns = Counter[str]()
    for question in read_questions(files, options, rows):
        total += 1
        try:
            if isinstance(question, RowError):
                raise question
            offered = schemas_offered(tools, question.extra_info)
            # A compiled tokenizer that hangs on some text can't be interrupted, only ended.
            with stuck_ends_process():
                rendered = renderer.render_prompt(question.messages, offered)
            ids = np.asarray(rendered, np.int32)
            if len(ids) > options.max_length:
                if options.filter_overlong:
                    overlong += 1
                    continue
                ids = truncate(ids, options, question.where)
                truncated += 1
        except ValueError as error:
            faults.add(_located(error, question))
            continue
        prompts.append(to_prompt(question, len(prompts), offered, ids))
        columns[question.columns] += 1
    if faults.count:
        raise faults.error(total)
    if not total:
        raise ValueError(
            f"no row of {', '.join(files)} was read: data.train_max_samples and "
            "data.val_max_samples are -1 for all rows."
        )
    if not prompts:
        raise ValueError(
            f"none of the {total} prompts fits data.max_prompt_length={options.max_length} "
            f"({overlong} are longer). Raise it."
        )
    report = PromptReport(
        rows=total,
        kept=len(prompts),
        overlong=overlong,
        truncated=truncated,
        duplicates=_duplicates(prompts),
        longest=max(len(prompt.ids) for prompt in prompts),
        sources=Counter(prompt.data_source for prompt in prompts),
        columns=columns,
    )
    return prompts, report


def to_prompt(
    question: Question, index: int, tools: list[dict[str, Any]] | None, ids: np.ndarray
) -> Prompt:
    """A checked row, of that number, with its render."""
    return Prompt(
        index,
        question.messages,
        tools,
        ids,
        question.data_source,
        question.ground_truth,
        {**question.extra_info, "row": question.where},
        question.ability,
        question.row,
    )


def _duplicates(prompts: Sequence[Prompt]) -> int:
    """How many prompts have the same question and the same truth as an earlier one."""
    different: set[bytes] = set()  # of hashes: the texts take as much memory as the prompts
    for prompt in prompts:
        asked = json.dumps([prompt.messages, prompt.ground_truth], sort_keys=True, default=str)
        different.add(hashlib.blake2b(asked.encode(), digest_size=16).digest())
    return len(prompts) - len(different)


def _located(error: ValueError, question: Question | RowError) -> str:
    where = question.where if isinstance(question, Question) else ""
    return str(error) if not where or where in str(error) else f"{where}: {error}"


def truncate(ids: np.ndarray, options: PromptOptions, where: str) -> np.ndarray:
    """`ids` cut to `max_length` tokens: `left` loses its beginning, `right` its end.

    ValueError under `error`.
    """
    if options.truncation == "error":
        raise ValueError(
            f"{where}: the prompt has {len(ids)} tokens, more than "
            f"data.max_prompt_length={options.max_length}. Raise it, or use "
            "data.filter_overlong_prompts=true."
        )
    return ids[-options.max_length :] if options.truncation == "left" else ids[: options.max_length]


def read_questions(
    files: Sequence[str], options: PromptOptions, rows: RowFunction | None = None
) -> Iterator[Question | RowError]:
    """Every row of `files` as a question, or why it isn't one."""
    for chunk in iter_chunks(files, None, rows, options.max_samples):
        for index, row in chunk:
            try:
                yield (
                    row
                    if isinstance(row, RowError)
                    else to_question(row, chunk.file, index, options)
                )
            except RowError as error:
                yield error


def to_question(row: Mapping[str, Any], file: str, index: int, options: PromptOptions) -> Question:
    """Check and convert one raw row. RowError names file, row and what is wrong."""
    where = f"{file}, row {index}"
    asked, answered, ability_of_columns = _columns_of(row, options, where)
    messages = prompt_messages(row[asked], asked, where)
    # The same reader as SFT's: both commands refuse the same malformed messages with the same
    # words.
    checked = to_conversation(
        {"messages": messages}, file, index, RowFormat(), prompt_only=True
    ).messages
    if checked[-1]["role"] == "assistant":
        raise RowError(
            f"{where}: the prompt ends with an assistant turn; there is nothing left to answer."
        )
    if answered is None:
        given = _ground_truth(row, where, options.needs_truth)
    else:
        given = plain(row[answered])
    truth = truth_of(given, where, options.needs_truth)
    source = str(row.get("data_source") or Path(file).stem)
    ability = str(row.get("ability") or ability_of_columns)
    extra = without_nulls(plain(row.get("extra_info"))) or {}
    if not isinstance(extra, dict):
        raise RowError(f"{where}: 'extra_info' is a {type(extra).__name__}, not a mapping.")
    if options.answer_format and (MATHS.search(ability) or MATHS.search(source)):
        checked = with_answer_format(checked, options.answer_format, where)
    columns = f"{asked} + {answered or 'reward_model'}"
    kept = {str(name): plain(value) for name, value in row.items()} if options.keeps_rows else {}
    return Question(checked, truth, source, ability, extra, where, columns, kept)


def _columns_of(
    row: Mapping[str, Any], options: PromptOptions, where: str
) -> tuple[str, str | None, str]:
    """The columns of the question and of its answer (None: the general schema's), and the ability."""
    for asked in (options.prompt_key, *ASKED):
        if asked in row:
            general = row.get("reward_model") is not None
            truths = [name for name in TRUTHS if not general and row.get(name) is not None]
            return asked, (truths or [None])[0], ""
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            return asked, answered, "math"
    wanted = " or ".join(f"{asked!r} and {answered!r}" for asked, answered in PAIRS)
    there = ", ".join(map(str, row))
    raise RowError(
        f"{where}: there is no {options.prompt_key!r}, nor {wanted}; it has {there}. Name the column with "
        "data.prompt_key."
    )


def _ground_truth(row: Mapping[str, Any], where: str, needed: bool) -> Any:
    judged = plain(row.get("reward_model"))
    if isinstance(judged, str):
        try:
            judged = json.loads(judged)
        except json.JSONDecodeError as error:
            raise RowError(f"{where}: 'reward_model' is text but not JSON: {error.msg}.") from error
    truth = judged.get("ground_truth") if isinstance(judged, dict) else None
    if truth is None and needed:
        raise RowError(
            f"{where}: there is no reward_model.ground_truth, so nothing to judge an answer by: {NO_TRUTH}."
        )
    return truth


def truth_of(value: Any, where: str, needed: bool = True) -> Any:
    """A list or dict as it is, for a reward of the user's; anything else as `answer_of` has it.

    Raises RowError where it is `needed`: ours compare a text.
    """
    if not isinstance(value, (list, dict)):
        return answer_of(value, where, needed)
    if needed:
        raise RowError(
            f"{where}: the truth is a {type(value).__name__}, and the built-in rewards compare a "
            "text. Give one, or use a reward of your own (custom_reward_function.path), which gets "
            "it as it is."
        )
    return value


def answer_of(value: Any, where: str, needed: bool = True) -> str:
    """A truth as text; of a worked GSM8K solution what follows `####`.

    Raises RowError where it is `needed` and nothing is left: an empty box would be right.
    """
    if value is None:
        text = ""
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # GSM8K writes 1,234 for 1234 behind the mark. Answers are compared as numbers without
    # separators.
    truth = text.rpartition("####")[2].strip().replace(",", "") if "####" in text else text
    if needed and not truth.strip():
        after = " after '####'" if "####" in text else ""
        raise RowError(f"{where}: the answer is empty{after}, so nothing to judge by: {NO_TRUTH}.")
    return truth


def with_answer_format(
    messages: list[dict[str, Any]], line: str, where: str
) -> list[dict[str, Any]]:
    """The messages with the line at the end of the last user message, unless some message says how
    to answer already.

    RowError without a user message.
    """
    asking = [message["content"] for message in messages if message["role"] != "assistant"]
    if any(HOW_TO_ANSWER.search(content) for content in asking):
        return messages
    of_users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not of_users:
        way_out = (
            "Add one, or say in a message how to answer (data.answer_format=null adds nothing)"
        )
        raise RowError(
            f"{where}: there is no user message that could be told how to answer. {way_out}."
        )
    last = of_users[-1]
    longer = {**messages[last], "content": messages[last]["content"].rstrip() + "\n" + line}
    return [*messages[:last], longer, *messages[last + 1 :]]


def prompts_at(
    prompts: Sequence[Prompt], position: int, count: int, seed: int, shuffle: bool
) -> list[Prompt]:
    """The `count` prompts after the first `position` of an endless stream of shuffled epochs.

    Their `index` is their place in it.
    """
    found: list[Prompt] = []
    while len(found) < count:
        epoch, start = divmod(position + len(found), len(prompts))
        rows = epoch_order(len(prompts), seed, epoch, shuffle)[start : start + count - len(found)]
        found += [
            replace(prompts[row], index=position + len(found) + i)
            for i, row in enumerate(rows.tolist())
        ]
    return found
