"""Chunks of rows to tokenised samples, by worker processes; refused rows are collected and counted,
never passed over.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from retool.batch import Sample
from retool.data.read.files import Chunk, RowError
from retool.data.read.rows import TOO_DEEP, RowFormat, to_conversation, undeclared_calls
from retool.data.render.limits import bounded
from retool.data.render.renderer import Renderer

TRUNCATIONS = ("error", "left", "right", "drop")
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
    "undeclared_calls",
    "quoting",
)
INLINE_CHUNKS = (
    4  # so many are tokenised in this process before workers, which take seconds to start, pay off
)


@dataclass(frozen=True)
class DatasetReport:
    """What became of the rows, in counts."""

    files: tuple[str, ...] = ()
    rows: int = 0
    samples: int = 0
    split: int = 0  # rows that made several samples
    truncated: int = 0
    dropped_long: int = 0
    dropped_untrained: int = 0  # samples that have, or have left, no trained token
    undeclared_calls: int = 0  # calls to tools that the row's `tools` doesn't declare
    quoting: int = 0  # rows in which somebody's text holds a control token, which stays text
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens, before truncation
    dropped_thoughts: int = (
        0  # trained turns without what the row says was thought (data.drop_reasoning)
    )
    highest_id: int = -1  # of any token; the model's embedding must have a row for it
    content: str = ""  # hash of every sample's tokens and mask, in order; parts have none

    def sentence(self) -> str:
        """One line for the log."""
        share = self.trained_tokens / max(self.tokens, 1)
        counts = {
            "truncated": self.truncated,
            "dropped as too long": self.dropped_long,
            "dropped without a trained token": self.dropped_untrained,
            "turns trained without their reasoning": self.dropped_thoughts,
            "calls to tools that their row doesn't declare": self.undeclared_calls,
            "rows whose texts hold control tokens, as text": self.quoting,
        }
        lost = [f"{count:,} {what}" for what, count in counts.items() if count]
        return (
            f"{self.rows:,} rows, {self.samples:,} samples, {self.tokens:,} tokens, {share:.1%} "
            f"trained, longest {self.longest:,}{'; ' if lost else ''}{', '.join(lost)}"
        )


@dataclass
class Tokenised:
    """What a chunk of rows became: the samples to keep, the (file, row) of each, and why other rows
    were refused.
    """

    samples: list[Sample] = field(default_factory=list)
    rows: list[tuple[str, int]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    report: DatasetReport = field(default_factory=DatasetReport)


def add_reports(total: DatasetReport, part: DatasetReport) -> DatasetReport:
    summed = {name: getattr(total, name) + getattr(part, name) for name in SUMMED}
    longest = max(total.longest, part.longest)
    return replace(
        total, **summed, longest=longest, highest_id=max(total.highest_id, part.highest_id)
    )


def truncate(sample: Sample, max_length: int, truncation: str) -> Sample | None:
    """Cut a sample to `max_length` tokens, mask aligned; None where it is dropped.

    Raises ValueError under `error`.
    """
    if len(sample) <= max_length:
        return sample
    if truncation == "error":
        raise ValueError(
            f"it has {len(sample):,} tokens, more than data.max_length={max_length}: raise that, or "
            "set data.truncation=drop (or left, right)."
        )
    if truncation == "drop":
        return None
    part = (
        slice(None, max_length) if truncation == "right" else slice(len(sample) - max_length, None)
    )
    return Sample(sample.tokens[part], sample.mask[part])


def tokenise_chunk(
    chunk: Chunk,
    renderer: Renderer,
    form: RowFormat,
    max_length: int,
    truncation: str,
    history: str,
) -> Tokenised:
    """Render every row of a chunk; refused rows are collected, not raised."""
    out = Tokenised()
    rows = 0
    split = 0
    truncated = 0
    long = 0
    untrained = 0
    longest = 0
    thoughts = undeclared = quoting = 0
    for index, raw in chunk:
        rows += 1
        try:
            if isinstance(raw, RowError):
                raise raw
            conversation = to_conversation(raw, chunk.file, index, form)
            with bounded():  # once for all that is rendered of a row
                samples = renderer.render(conversation, history)
            kept = [truncate(sample, max_length, truncation) for sample in samples]
        except RowError as error:
            out.refusals.append(str(error))
            continue
        except ValueError as error:
            out.refusals.append(f"{chunk.file}, row {index}: {error}")
            continue
        except RecursionError:
            out.refusals.append(f"{chunk.file}, row {index}: {TOO_DEEP}")
            continue
        split += len(samples) > 1
        thoughts += renderer.dropped_thoughts(conversation)
        undeclared += sum(undeclared_calls(conversation).values())
        quoting += renderer.controls.quoted_in(conversation.messages, conversation.tools)
        for whole, sample in zip(samples, kept, strict=True):
            longest = max(longest, len(whole))
            if sample is None:
                long += 1
            elif sample.trained == 0:
                untrained += 1
            else:
                truncated += len(sample) < len(whole)
                out.samples.append(sample)
                out.rows.append((chunk.file, index))
    out.report = DatasetReport(
        rows=rows,
        samples=len(out.samples),
        split=split,
        truncated=truncated,
        dropped_long=long,
        dropped_untrained=untrained,
        tokens=sum(map(len, out.samples)),
        trained_tokens=sum(sample.trained for sample in out.samples),
        longest=longest,
        highest_id=max((int(sample.tokens.max()) for sample in out.samples), default=-1),
        dropped_thoughts=thoughts,
        undeclared_calls=undeclared,
        quoting=quoting,
    )
    return out


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
        f"a tokenising process was killed, at {rows or 'its start'}: the system does that where "
        "memory is short. Take fewer of them (data.num_workers; 0: none), or shorter rows."
    )


def map_chunks(
    task: Callable[[Chunk], Any], chunks: Iterable[Chunk], num_workers: int
) -> Iterator[Any]:
    """`task` of every chunk, in order, by `num_workers` processes (0: this one); a few chunks ahead
    at most.
    """
    ahead = iter(chunks)
    for chunk in islice(ahead, INLINE_CHUNKS if num_workers > 0 else None):
        yield task(chunk)
    following = next(ahead, None)
    if following is None:
        return
    # Spawned, not forked: the parent may already hold CUDA and threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_start_worker, initargs=(task,)
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
