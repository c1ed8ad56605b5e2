"""Look before you train: every row of a dataset checked and counted, a few kept to be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from retool.data.audit.counts import Tally, tally_chunk
from retool.data.read.files import columns_of, rows_in
from retool.data.read.source import RowSource
from retool.data.render.renderer import Renderer
from retool.data.tokenise import LengthLimit, map_chunks


@dataclass(frozen=True)
class Audit:
    """What was audited, and what was found."""

    files: tuple[str, ...]
    prompts: bool
    limit: LengthLimit
    tally: Tally
    forms: tuple[str, ...] = ()  # which files were taken for what, in words


def audit(
    rows: RowSource,
    renderer: Renderer,
    limit: LengthLimit | None = None,
    *,
    num_workers: int | None = None,
    show: int = 3,
    progress: Callable[[int], None] | None = None,
) -> Audit:
    """Audit all rows; `show` of them, chosen by a hash of file and row, are kept with their tokens.

    A file that has prompts (`prompt_key`) and no messages or responses holds RL prompts. Raises
    ValueError for files that can't be read at all; a bad row is a counted refusal.
    """
    limit = limit or LengthLimit()
    prompts = _holds_prompts(rows)
    if prompts:
        form = replace(
            rows.form, multiturn=True, messages_key=rows.form.prompt_key, format="messages"
        )
        rows = replace(rows, form=form)
    rows.check_columns()
    task = partial(
        tally_chunk,
        renderer=renderer,
        form=rows.form,
        prompts=prompts,
        limit=limit,
        show=show,
    )
    total = Tally()
    with closing(map_chunks(task, rows.chunks(), num_workers)) as parts:
        for part in parts:
            total.add(part, show)
            if progress is not None:
                progress(total.rows)
    return Audit(tuple(rows.paths), prompts, limit, total, tuple(rows.words()))


def _holds_prompts(rows: RowSource) -> bool:
    """Whether the rows are RL prompts, which have no answers. Judged by the columns of the first
    file.
    """
    if rows.function is not None:
        return False
    columns = {*columns_of(rows.paths[0])}
    trained = any({*layout.needed} <= columns for layout in rows.form.layouts().values())
    return rows.form.prompt_key in columns and not trained


def count_rows(files: Sequence[str]) -> int | None:
    """Number of rows of parquet files and saved data sets; None if only reading them would tell."""
    rows = 0
    for file in files:
        found = rows_in(file)
        if found is None:
            return None
        rows += found
    return rows
