"""The tool that searches texts: what it finds, in which order, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from retool.data.in_memory import _line
from retool.rl.agent.tools import TextSearch, text_search
from retool.rl.agent.tools.load import close_tools, load_tools, make_tools
from retool.rl.agent.tools.protocol import ToolResult

PAGES = ["the mole digs", "a mole, a mole and a vole", "the owl watches the vole", "Ähren im Wind"]


def ask(tool: TextSearch, query: object) -> ToolResult:
    return asyncio.run(tool.call({"query": query}))


def test_the_best_page_comes_first() -> None:
    tool = TextSearch(PAGES, results=3)
    assert tool.find("mole") == [PAGES[1], PAGES[0]]
    assert tool.find("who watches voles, an owl?") == [PAGES[2]]
    assert len(tool.find("the vole digs")) == 3
    assert ask(tool, "mole") == ToolResult(f"{PAGES[1]}\n\n{PAGES[0]}", "success")
    assert ask(tool, "ähren").text == PAGES[3]
    assert ask(TextSearch(PAGES), "vole mole").text == PAGES[1]
    assert ask(tool, 3).status == "bad_arguments"


@pytest.mark.parametrize("query", ["", '"', "?!", "wolf", "mole AND NOT (", "mole owl", "m*"])
def test_with_every_word_a_page_has_them_all(query: str) -> None:
    """Nothing in a query has a meaning but its words."""
    tool = TextSearch(PAGES, every_word=True)
    assert tool.find("digs MOLE") == [PAGES[0]]
    assert ask(tool, query).text == "nothing found"


def test_many_calls_at_once_are_answered_each() -> None:
    tool = TextSearch([f"page {i} of {i * i}" for i in range(50)], every_word=True)

    async def main() -> list[ToolResult]:
        return await asyncio.gather(*[tool.call({"query": f"page {i}"}) for i in range(50)])

    found = [result.text for result in asyncio.run(main())]
    assert all(f"page {i} " in text or f" {i}" in text for i, text in enumerate(found))


def test_pages_of_a_file_and_a_tool_of_the_file_of_tools(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"contents": page}) for page in PAGES))
    tools = tmp_path / "tools.yaml"
    config = f"{{files: {corpus}, column: contents, every_word: true}}"
    tools.write_text(f"tools: [{{class_name: retool.rl.agent.tools.TextSearch, config: {config}}}]")
    (tool,) = load_tools(tools)
    assert isinstance(tool, TextSearch) and ask(tool, "owl").text == PAGES[2]
    with pytest.raises(
        ValueError, match=r"corpus.jsonl, row 0: there is no text in the column 'te"
    ):
        TextSearch(files=[str(corpus)])


def test_files_are_named_as_in_training(tmp_path: Path) -> None:
    for number, page in enumerate(PAGES):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"text": page}))
    for name in (tmp_path, tmp_path / "*.jsonl"):
        assert ask(TextSearch(files=str(name)), "owl").text == PAGES[2]
    with pytest.raises(ValueError, match=r"none.jsonl"):
        TextSearch(files=str(tmp_path / "none.jsonl"))


def test_it_is_a_tool_in_python_and_in_rows_of_sft() -> None:
    tool = TextSearch(PAGES)
    assert make_tools([tool]) == [tool]
    row = json.loads(_line({"messages": [], "tools": [tool]}, 0))
    assert row["tools"] == [tool.schema]


def test_it_may_be_used_in_one_run_after_another() -> None:
    tool = TextSearch(PAGES)
    asyncio.run(close_tools([tool]))
    assert ask(tool, "digs").text == PAGES[0]


def test_what_it_cannot_search_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no page to search: give pages"):
        TextSearch([])
    with pytest.raises(ValueError, match="a page is a dict, not text"):
        TextSearch([{"text": "a"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="results=0 must be at least 1"):
        TextSearch(PAGES, results=0)

    class Index:
        def execute(self, _: str) -> None:
            raise sqlite3.OperationalError("no such module: fts5")

    monkeypatch.setattr(text_search.sqlite3, "connect", lambda *_, **__: Index())
    with pytest.raises(ValueError, match=r"no such module: fts5\): take another"):
        TextSearch(PAGES)
