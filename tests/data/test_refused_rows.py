"""Rows that can't be used: like ones together, the commonest first."""

from __future__ import annotations

from retool.data.read.refused_rows import SHOWN_KINDS, RefusedRows, kind_of


def test_like_reasons_are_said_once() -> None:
    refusals = RefusedRows()
    for row in range(5):
        refusals.add(
            f"a.parquet, row {row}: it has {100 + row} tokens, more than data.max_length=9."
        )
    refusals.add("a.parquet, row 7, message 2 (user): unknown role 'bot'.")
    assert kind_of("f, row 1: it isn't the tool's ('a b', \"c\")") == "it isn't the tool's (…, …)"
    lines = str(refusals.error(12)).splitlines()
    assert lines[0] == "6 of 12 rows can't be used:" and len(lines) == 3
    assert (
        lines[1]
        == "a.parquet, row 0: it has 100 tokens, more than data.max_length=9. … and 4 more rows like it."
    )
    assert lines[2] == "a.parquet, row 7, message 2 (user): unknown role 'bot'."


def test_no_more_kinds_than_can_be_read() -> None:
    refusals = RefusedRows()
    for letter in map(chr, range(ord("a"), ord("z") + 1)):
        refusals.add(f"f, row 1: {letter}")
    assert str(refusals.error(30)).splitlines()[SHOWN_KINDS + 1 :] == [
        f"… and {26 - SHOWN_KINDS} more rows."
    ]
