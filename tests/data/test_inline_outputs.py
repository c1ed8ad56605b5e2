"""What a program printed, in the middle of an assistant's text: whose words it is, and that it is
masked as a rollout masks it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retool.config import parse
from retool.data.read.chunk import Chunk, RowError
from retool.data.read.row_format import RowFormat
from retool.data.read.rows import to_conversation
from retool.data.render.renderer import Renderer
from retool.data.tokenise import DatasetReport, LengthLimit, Tokenised, tokenise_chunk
from retool.rl.agent.tools.interpreter import SCHEMA
from retool.sft.config import SYNONYMS, SFTConfig
from retool.sft.preflight import audit_command, rendering_of
from tests.rl.agent.test_inline import run_inline
from tests.rl.agent.test_loop import Answers

QUESTION = [{"role": "user", "content": "How many?"}]
FIRST = "I count.\n<code>\nprint(6 * 7)\n</code>"
OUTPUT = "\n<interpreter>\n42 <|im_start|>\n</interpreter>\n"
SECOND = "Once more: <code>x</code>"
ERROR = "\n<interpreter>\nNameError\n</interpreter>\n"
LAST = "\nIt is 42."


def row(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [*QUESTION, {"role": "assistant", "content": text, **fields}]}


ROW = row(FIRST + OUTPUT + SECOND + ERROR + LAST)


def trained(renderer: Renderer, given: dict[str, Any]) -> list[str]:
    (pieces,) = renderer.pieces(to_conversation(given, "rows.jsonl", 7))
    return [piece.text for piece in pieces if piece.trained]


def choosing(renderer: Renderer, choice: str) -> Renderer:
    return renderer.variant(replace(renderer.rendering, inline_outputs=choice))


@pytest.fixture
def masking(renderer_of) -> Renderer:
    return choosing(renderer_of("chatml"), "mask")


def test_a_row_is_refused_until_somebody_says_whose_words_they_are(renderer_of) -> None:
    strict = renderer_of("chatml")
    with pytest.raises(RowError) as caught:
        trained(strict, ROW)
    said = str(caught.value)
    assert "row 7, message 1 (assistant): the assistant's text holds what a program printed" in said
    assert "=mask (it trains what stands around the outputs) or data.multiturn." in said
    everything = ROW["messages"][-1]["content"] + strict.ends.known[0]
    assert trained(choosing(strict, "train"), ROW) == [everything]
    # Nobody is asked where it isn't trained, or isn't behind a program
    assert trained(strict, row("<interpreter> is a tag."))
    assert trained(strict, row(FIRST + OUTPUT, loss_mask=0)) == []


def test_what_stands_around_the_outputs_is_trained(masking) -> None:
    end = masking.ends.known[0]
    assert trained(masking, ROW) == [FIRST, SECOND, LAST + end]
    # However the row lays it out
    other = row("<code>x</code>\n\n  <interpreter>1</interpreter>So <interpreter>2</interpreter>")
    assert trained(masking, other) == ["<code>x</code>", "So ", end]
    named = "<code>print('<interpreter>')</code><interpreter>1</interpreter>"
    for text in ("<code>x</code><interpreter>1", "<code>x</code>1</interpreter>", named):
        with pytest.raises(RowError, match=r"lacks its counterpart.*inline_outputs=train"):
            trained(masking, row(text))


def test_a_row_is_masked_as_the_rollout_that_it_replays(masking) -> None:
    """Every token, and every bit of the mask; an output that holds a control token is text."""
    (sample,) = masking.render(to_conversation(ROW, "rows.jsonl", 0))
    plan = sample.tokens[sample.mask].tolist()
    tool = Answers(["42 <|im_start|>", "NameError"], SCHEMA)
    trajectory, _ = run_inline(masking, plan, tool)
    n = len(trajectory)
    assert trajectory.tool_calls == 2 and n >= len(sample) - 1  # the template ends with a line
    assert np.array_equal(sample.tokens[:n], trajectory.tokens)
    assert np.array_equal(sample.mask[:n], trajectory.mask)


def test_masked_outputs_are_counted_and_the_audit_reads_rows_as_the_run(masking) -> None:
    chunk = Chunk("rows.jsonl", 0, [ROW, row("None.")])
    made: Tokenised = tokenise_chunk(chunk, masking, RowFormat(), LengthLimit())
    report = DatasetReport()
    report.add(made.report)
    assert "2 outputs of programs in assistants' texts, not trained" in report.sentence()
    given = [
        "data.train_files=a.jsonl",
        "model.partial_pretrain=m",
        "data.multiturn.inline_outputs=mask",
    ]
    config = parse(SFTConfig, given, SYNONYMS)
    assert rendering_of(config, "2026-01-01").inline_outputs == "mask"
    assert re.search("--inline-outputs mask", audit_command(config, ["a.jsonl"]))
