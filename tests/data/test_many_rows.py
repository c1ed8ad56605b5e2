"""As many rows as data sets have: nothing takes a time that grows with their square, and what is in
memory stays small.
"""

from __future__ import annotations

import json
import resource
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool.batch import Sample
from retool.data import cache, loader
from retool.data.cache import open_dataset
from retool.data.loader import StepOrder, iterate_steps
from retool.data.packing import Budget, Packing
from retool.data.read.source import RowFormat, RowSource
from retool.data.render.renderer import make_renderer
from retool.data.render.rendering import Rendering
from retool.data.tokenise import DatasetReport, Tokenised
from retool.files import untrusted
from retool.metrics.jsonl import resume_jsonl

MILLION = 1_000_000
FOURS = Packing(Budget(micro_batch_size=4))


class Many:
    """A million samples of three tokens."""

    def __init__(self) -> None:
        self.lengths = np.full(MILLION, 3, np.int32)
        self.trained = np.full(MILLION, 1, np.int32)

    def __len__(self) -> int:
        return MILLION

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.full(3, index % 100, np.int32), np.array([False, False, True]))


def test_an_epoch_s_order_is_made_once_and_not_at_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader.epoch_order.cache_clear()
    sizes = list[int]()
    real = np.argsort

    def argsort(keys: np.ndarray, **named: Any) -> np.ndarray:
        sizes.append(len(keys))
        return real(keys, **named)

    monkeypatch.setattr(loader.np, "argsort", argsort)
    order = StepOrder(train_batch_size=8, seed=1)
    a_run = iterate_steps(Many(), order, FOURS, start_step=124_990, stop_step=125_010)
    assert len([step for step in a_run if step.epoch == 0]) == 10
    assert sizes.count(MILLION) == 2  # of two epochs
    with pytest.raises(ValueError, match="read-only"):
        loader.epoch_order(MILLION, 1, 0)[0] = 1
    loader.epoch_order.cache_clear()


def _parts(files: int, rows: int) -> Iterator[Tokenised]:
    sample = Sample(np.zeros(2, np.int32), np.ones(2, bool))
    for number in range(files):
        origins = [(f"{number}.jsonl", 1000 + row) for row in range(rows)]
        yield Tokenised([sample] * rows, origins, report=DatasetReport(rows=rows))


def test_what_is_kept_of_a_row_while_a_cache_is_made_is_a_few_bytes(tmp_path: Path) -> None:
    files = [f"{number}.jsonl" for number in range(50)]
    tracemalloc.start()
    cache._write(tmp_path, files, _parts(50, 1000), lambda rows: None)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60 * 50_000, f"{most / 50_000:.0f} bytes a row"
    assert np.load(tmp_path / "rows.npy")[-1].tolist() == [49, 1999]


def _rows(first: int, last: int) -> list[dict[str, Any]]:
    said = [(f"What is {i} plus {i % 7}?", f"It is {i + i % 7}.") for i in range(first, last)]
    return [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in said
    ]


def _write_rows(file: Path, count: int) -> str:
    with file.open("wb") as out:
        table = None
        for first in range(0, count, 10_000):
            rows = _rows(first, first + 10_000)
            if file.suffix == ".jsonl":
                out.writelines(json.dumps(row).encode() + b"\n" for row in rows)
                continue
            part = pa.Table.from_pylist(rows)
            table = table or pq.ParquetWriter(out, part.schema)
            table.write_table(part)
        if table is not None:
            table.close()
    return str(file)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_million_rows(tokenizer: Any, tmp_path: Path, suffix: str) -> None:
    """Tokenised, opened again, and gone on with near the end: the second half of the rows takes as
    long as the first, and next to no memory.
    """
    renderer = make_renderer(tokenizer, Rendering())
    rows = RowSource([_write_rows(tmp_path / f"rows.{suffix}", MILLION)], RowFormat())
    seen: list[tuple[int, float, int]] = []

    def note(done: int) -> None:
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen.append((done, time.process_time(), kilobytes))

    begin = time.process_time()
    note(0)
    data, said = open_dataset(rows, renderer, num_workers=0, cache_dir=tmp_path, progress=note)
    half = min(seen, key=lambda entry: abs(entry[0] - MILLION // 2))
    first = half[1] - begin
    second = seen[-1][1] - half[1]
    assert len(data) == said.rows == MILLION and second < 1.5 * first
    assert seen[-1][2] - seen[len(seen) // 10][2] < 200_000, "memory grows with the rows"

    begin = time.process_time()
    data, _ = open_dataset(rows, renderer, num_workers=0, cache_dir=tmp_path)
    steps = iterate_steps(
        data, StepOrder(8, 1), FOURS, start_step=MILLION // 8 - 100, stop_step=MILLION // 8
    )
    assert sum(len(step.samples) for step in steps) == 800
    assert time.process_time() - begin < 10


@pytest.mark.slow
def test_metrics_of_a_gigabyte_are_gone_on_with_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    numbers = {f"group/metric_{i}": i / 7 for i in range(60)}
    body = json.dumps({"step": 0, **numbers})[len('{"step": 0') :]
    with file.open("w") as out:
        steps = 0
        while out.tell() < 1 << 30:
            out.writelines(f'{{"step": {step}{body}\n' for step in range(steps, steps + 10_000))
            steps += 10_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resume_jsonl(file, steps // 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    *_, last = untrusted.read_lines(file, 1 << 20)
    assert json.loads(last or b"")["step"] == steps // 2
