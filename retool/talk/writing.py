"""What `retool generate` does: read the questions, answer them, write the answers, tell how far it is."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from retool.config.command import INTERRUPTED
from retool.llm.folder import model_of
from retool.preflight.identity import weights_checksum
from retool.rl.agent.tools.load import close_tools
from retool.rl.agent.tools.state import run_alone
from retool.talk.agent import Talker, make_talker, open_llm, open_tools, open_worlds, sampling_of
from retool.talk.answers import AnswersFile
from retool.talk.batch import Completion, answer_all
from retool.talk.questions import Question, read_questions, read_worlds_rows

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
# What answers depend on; the number that is sampled at once changes none
SETTINGS = (
    "model files column max_rows n temperature top_p top_k max_tokens seed tools format "
    "session chat_template dtype max_model_len environment environment_kwargs"
).split()


@dataclass
class Tally:
    """What was done so far."""

    total: int
    answered: int = 0
    tokens: int = 0
    lost: int = 0  # answers that a tool's failure ended
    rewards: list[float] = field(default_factory=list)  # an environment's, of whole episodes
    begun: float = field(default_factory=time.perf_counter)
    told: float = field(default_factory=time.perf_counter)

    def sentence(self) -> str:
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        speed = f"{self.tokens:,} tokens, {self.tokens / seconds:,.0f} a second"
        lost = f"; {self.lost:,} answers lost to a tool that failed" if self.lost else ""
        worth = ""
        if self.rewards:
            worth = f"; mean reward {sum(self.rewards) / len(self.rewards):.3g}"
        return f"{self.answered:,} of {self.total:,} rows answered; {speed}{worth}{lost}"

    def add(self, completions: Sequence[Completion]) -> None:
        """One more row."""
        self.answered += 1
        self.tokens += sum(completion.tokens for completion in completions)
        given = [completion.reward for completion in completions]
        self.rewards += [reward for reward in given if reward is not None]
        self.lost += sum(bool(completion.tool_failure) for completion in completions)


def write_answers(options: argparse.Namespace) -> int:
    """Exit status. ValueError for what the user can mend."""
    sampling = sampling_of(options, options.n)
    # Before the model, whose loading takes minutes: the file may be there already
    settings = {name: getattr(options, name) for name in SETTINGS}
    # A run's folder may hold a newer model when the command goes on, or in a moment
    options.model = model_of(options.model)
    settings["weights"] = weights_checksum(options.model)
    out = AnswersFile(options.out, settings)
    tools = open_tools(options.tools, options.isolation, options.session)
    try:
        with (
            open_llm(options, options.max_num_seqs, enforce_eager=False) as llm,
            closing(out),
            ExitStack() as ending,
        ):
            talker = make_talker(llm, tools, sampling, options.format)
            if options.environment is not None:
                worlds = open_worlds(options.environment, options.environment_kwargs, llm)
                talker = replace(talker, worlds=worlds)
                ending.callback(worlds.let_go)
                questions = read_worlds_rows(options.files, talker, options.max_rows)
            else:
                questions = read_questions(options.files, talker, options.column, options.max_rows)
            # Not earlier: questions that can't be read should leave no part behind
            out.begin([question.row for question in questions])
            try:
                run_alone(_write(talker, questions, out))
            except KeyboardInterrupt:
                print(f"stopped: the same command goes on from {out.part}", file=sys.stderr)
                return INTERRUPTED
            out.finish()
    finally:
        run_alone(close_tools(tools))
    return 0


async def _write(talker: Talker, questions: Sequence[Question], out: AnswersFile) -> None:
    """Answer what isn't answered yet."""
    tally = Tally(len(questions), out.done)
    if out.done:
        print(f"going on from {out.part}: {out.done:,} rows are answered", file=sys.stderr)
    with _progress(tally) as tell:
        async for question, completions in answer_all(talker, questions[out.done :]):
            out.write(question.row, [completion.as_dict() for completion in completions])
            tally.add(completions)
            tell()
    print(f"{tally.sentence()}: {out.path}", file=sys.stderr)


@contextmanager
def _progress(tally: Tally) -> Iterator[Any]:
    """What to call when a row is done: on a terminal a bar moves, elsewhere a line comes at times."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:

        def tell_in_lines() -> None:
            if time.perf_counter() - tally.told >= LINE_SECONDS:
                tally.told = time.perf_counter()
                print(tally.sentence(), file=sys.stderr, flush=True)

        yield tell_in_lines
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows  {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=tally.total, completed=tally.answered)

        def move_bar() -> None:
            bar.update(task, completed=tally.answered, description=f"{tally.tokens:,} tokens")

        yield move_bar
