"""Chunks of rows to tokenised samples, by worker processes.

Refused rows are collected and counted, never passed over.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from retool.batch import Sample
from retool.data.read.chunk import Chunk, RowError
from retool.data.read.row_format import RowFormat
from retool.data.read.rows import (
    TOO_DEEP,
    Conversation,
    to_conversation,
    undeclared_calls,
)
from retool.data.render.renderer import Renderer
from retool.data.template.completeness import unread_fields
from retool.data.template.time_and_memory import OutOfBounds, bounded
from retool.data.tokens.bounds import stuck_ends_process
from retool.processes import Spawn

SUMMED = (
    "rows",
    "samples",
    "split",
    "truncated",
    "dropped_long",
    "dropped_untrained",
    "tokens",
    "trained_tokens",
    "dropped_thoughts",
    "open_thoughts",
    "masked_outputs",
    "undeclared_calls",
    "switched_off",
    "unread_fields",
    "quoting",
)
TOO_SLOW = (
    "{}: a pattern of the tokenizer takes that long for it. Leave the row out, or use another "
    "tokenizer."
)
# So many are tokenised in this process first: workers take seconds to start.
INLINE_CHUNKS = 4
MOST_USUAL_WORKERS = 16  # more wait for the process that reads the files


TRUNCATIONS = ("error", "left", "right", "drop")


@dataclass(frozen=True)
class LengthLimit:
    """The longest sample, in tokens, and what becomes of longer ones.

    `truncation`: an error, cut on the left or on the right, or the sample is dropped.
    """

    max_length: int = 4096
    truncation: str = "error"

    def __post_init__(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise ValueError(
                f"data.truncation={self.truncation} is unknown: use {', '.join(TRUNCATIONS)}."
            )
        if self.max_length < 2:
            raise ValueError(
                f"data.max_length={self.max_length} must be at least 2: a token is trained by the "
                "one before it."
            )

    def cut(self, sample: Sample) -> Sample | None:
        """The sample with at most `max_length` tokens, mask aligned; None where it is dropped.

        Raises ValueError under `error`.
        """
        if len(sample) <= self.max_length:
            return sample
        if self.truncation == "error":
            raise ValueError(
                f"it has {len(sample):,} tokens, more than data.max_length={self.max_length}: raise "
                "that, or set data.truncation=drop (or left, right)."
            )
        if self.truncation == "drop":
            return None
        too_many = len(sample) - self.max_length
        kept = slice(too_many, None) if self.truncation == "left" else slice(self.max_length)
        return Sample(sample.tokens[kept], sample.mask[kept])


@dataclass
class DatasetReport:
    """What became of the rows, in counts; those of chunks add up."""

    files: tuple[str, ...] = ()
    rows: int = 0
    samples: int = 0
    split: int = 0  # rows that made several samples
    truncated: int = 0
    dropped_long: int = 0
    dropped_untrained: int = 0  # samples that have, or have left, no trained token
    undeclared_calls: int = 0  # calls to tools that the row's `tools` doesn't declare
    switched_off: int = 0  # assistant turns that their row makes context (loss_mask or weight 0)
    unread_fields: int = 0  # of messages: nothing reads them, nor does the template show them
    quoting: int = 0  # rows in which somebody's text holds a control token, which stays text
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens, before truncation
    # Trained turns without what the row says was thought (data.drop_reasoning)
    dropped_thoughts: int = 0
    open_thoughts: int = 0  # trained turns that open a thought and don't close it
    # Of programs, in the middle of trained turns (data.multiturn.inline_outputs=mask)
    masked_outputs: int = 0
    highest_id: int = -1  # of any token; the model's embedding must have a row for it
    content: str = ""  # hash of every sample's tokens and mask, in order; parts have none

    def add(self, part: DatasetReport) -> None:
        """Add the counts of some more rows."""
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.longest = max(self.longest, part.longest)
        self.highest_id = max(self.highest_id, part.highest_id)

    def sentence(self) -> str:
        """One line for the log."""
        share = self.trained_tokens / max(self.tokens, 1)
        counts = {
            "truncated": self.truncated,
            "dropped as too long": self.dropped_long,
            "dropped without a trained token": self.dropped_untrained,
            "turns trained without their reasoning": self.dropped_thoughts,
            "turns whose thought isn't closed (retool data audit names some)": self.open_thoughts,
            "outputs of programs in assistants' texts, not trained": self.masked_outputs,
            "assistant turns with loss_mask or weight 0, context only": self.switched_off,
            "calls to tools that their row doesn't declare": self.undeclared_calls,
            "fields of messages that nothing shows (retool data audit names them)": self.unread_fields,
            "rows whose texts hold control tokens, as text": self.quoting,
        }
        lost = [f"{count:,} {what}" for what, count in counts.items() if count]
        return (
            f"{self.rows:,} rows, {self.samples:,} samples, {self.tokens:,} tokens, {share:.1%} "
            f"trained, longest {self.longest:,}{'; ' if lost else ''}{', '.join(lost)}"
        )

    def ways_out(self) -> str:
        """What to change where no sample is left."""
        if not self.rows:
            return "Read some: data.train_max_samples and data.val_max_samples are -1 for all rows."
        ways: list[str] = []
        if self.dropped_long:
            ways.append("Raise data.max_length, or cut them (data.truncation=left or right).")
        if self.switched_off:
            ways.append("Have a turn of each row trained: loss_mask or weight 1, or neither.")
        elif self.dropped_untrained:
            ways.append("Raise data.max_length: what is trained was cut off.")
        return " ".join(ways)


@dataclass
class Tokenised:
    """What a chunk of rows became."""

    samples: list[Sample] = field(default_factory=list)  # those to keep
    rows: list[tuple[str, int]] = field(default_factory=list)  # (file, row) of each
    refusals: list[str] = field(default_factory=list)  # why other rows can't be used
    report: DatasetReport = field(default_factory=DatasetReport)


def tokenise_chunk(
    chunk: Chunk, renderer: Renderer, form: RowFormat, limit: LengthLimit
) -> Tokenised:
    """Render every row of a chunk; refused rows are collected, not raised."""
    out = Tokenised()
    for index, raw in chunk:
        out.report.rows += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            conversation = to_conversation(raw, chunk.file, index, form)
            # Once for all that is rendered of a row
            with bounded(), stuck_ends_process():
                samples = renderer.render(conversation)
            kept = [limit.cut(sample) for sample in samples]
        except RowError as error:
            out.refusals.append(str(error))
        except ValueError as error:
            out.refusals.append(f"{chunk.file}, row {index}: {error}")
        except RecursionError:
            out.refusals.append(f"{chunk.file}, row {index}: {TOO_DEEP}")
        except OutOfBounds as error:  # the template's own are told by it
            out.refusals.append(f"{chunk.file}, row {index}: {TOO_SLOW.format(error)}")
        else:
            _count_row(out.report, conversation, renderer)
            out.report.split += len(samples) > 1
            for whole, sample in zip(samples, kept, strict=True):
                if _count_sample(out.report, whole, sample) and sample is not None:
                    out.samples.append(sample)
                    out.rows.append((chunk.file, index))
    return out


def _count_row(report: DatasetReport, conversation: Conversation, renderer: Renderer) -> None:
    report.dropped_thoughts += renderer.dropped_thoughts(conversation)
    report.open_thoughts += len(renderer.open_thoughts(conversation))
    report.masked_outputs += renderer.masked_outputs(conversation)
    report.undeclared_calls += sum(undeclared_calls(conversation).values())
    switches = [conversation.messages[i].get("loss_mask", 1) for i in conversation.assistant_turns]
    report.switched_off += switches.count(0)
    report.unread_fields += sum(1 for _ in unread_fields(conversation, renderer.source))
    report.quoting += renderer.controls.quoted_in(conversation.messages, conversation.tools)


def _count_sample(report: DatasetReport, whole: Sample, sample: Sample | None) -> bool:
    """Whether a sample is kept; `sample` is what the limit has left of it."""
    report.longest = max(report.longest, len(whole))
    if sample is None:
        report.dropped_long += 1
        return False
    trained = sample.trained
    if trained == 0:
        report.dropped_untrained += 1
        return False
    report.samples += 1
    report.truncated += len(sample) < len(whole)
    report.tokens += len(sample)
    report.trained_tokens += trained
    report.highest_id = max(report.highest_id, int(sample.tokens.max()))
    return True


_task: Callable[[Chunk], Any]  # what a worker process does with a chunk; sent once, when it starts


def _start_worker(task: Callable[[Chunk], Any]) -> None:
    global _task
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _task = task


def _run_task(chunk: Chunk) -> Any:
    return _task(chunk)


def _killed(chunks: Sequence[Chunk]) -> str:
    """What to say when a process ended with these chunks in work."""
    rows = " or ".join(
        f"{chunk.file}, rows {chunk.start:,} to {chunk.start + len(chunk) - 1:,}"
        for chunk in chunks
    )
    return (
        f"a tokenising process was killed, at {rows or 'its start'}: by the system, if memory "
        "is short, or by retool, if a row takes ten minutes. Use fewer processes (data.num_workers; "
        "0: none), or shorter rows."
    )


def usual_workers() -> int:
    """Processes that render where nobody says how many: as many as cores are ours; 0 on a single one."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, MOST_USUAL_WORKERS) if cores > 1 else 0


def map_chunks(
    task: Callable[[Chunk], Any], chunks: Iterable[Chunk], num_workers: int | None
) -> Generator[Any]:
    """`task` of every chunk, in order, by `num_workers` processes (0: this one; None: as usual).

    They are a few chunks ahead at most. Close what you don't take to the end: that waits for them.
    Raises ValueError where one of them is killed.
    """
    num_workers = usual_workers() if num_workers is None else num_workers
    ahead = iter(chunks)
    for chunk in islice(ahead, INLINE_CHUNKS if num_workers > 0 else None):
        yield task(chunk)
    following = next(ahead, None)
    if following is None:
        return
    # Spawned, not forked: the parent may already hold CUDA and threads.
    pool = ProcessPoolExecutor(
        num_workers, mp_context=Spawn(), initializer=_start_worker, initargs=(task,)
    )
    waiting: deque[tuple[Chunk, Future[Any]]] = deque()
    try:
        for chunk in chain([following], ahead):
            waiting.append((chunk, pool.submit(_run_task, chunk)))
            if len(waiting) > 2 * num_workers:
                yield waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool as error:
        raise ValueError(_killed([chunk for chunk, _ in waiting][:num_workers])) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
