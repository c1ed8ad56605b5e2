"""Every command that the results and the documents quote is one that the benchmark takes today, down
to the names of rows and shapes; and what the results link to is there.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.test_all import BENCHMARKS, benchmark

ROOT = BENCHMARKS.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    BENCHMARKS / "RESULTS.md",
    *sorted((BENCHMARKS / "results").glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
CODE = re.compile(r"```.*?```|`([^`]+)`", re.S)
SCRIPT = re.compile(r"\bbenchmarks/([a-z]\w*)\.py\b")
HEADING = re.compile(r"^#+ ", re.M)


def quoted(page: Path) -> Iterator[tuple[str, str]]:
    """(benchmark, its arguments) of each command. In the results, options without a command are of
    the last benchmark that their section names.
    """
    for section in HEADING.split(page.read_text()):
        last = ""
        for found in CODE.finditer(section):
            words = " ".join((found[1] or "").split())
            if script := SCRIPT.search(words):
                last = script[1]
                yield last, words[script.end() :]
            elif last and words.startswith("--") and BENCHMARKS in page.parents:
                yield last, words


def alternatives(words: str) -> list[list[str]]:
    """The command lines that `[--a | --b 1] --c` stands for."""
    found = re.search(r"\[([^\]]*)\]", words)
    if found is None or found[1].startswith("http"):
        return [shlex.split(words)]
    rest = words[: found.start()], words[found.end() :]
    return [line for way in found[1].split("|") for line in alternatives(way.join(rest))]


class Parsed(Exception):
    """The command line was understood."""


def understood(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Empty, or what the benchmark says of its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise Parsed

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise ValueError(message)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(argparse.ArgumentParser, "error", refuse)
        patched.setattr(sys, "argv", [name, *words])
        try:
            benchmark(name).main()
        except (Parsed, SystemExit):  # SystemExit: --help
            return ""
        except ValueError as error:
            return str(error)
    return "it reads no arguments"


# Their command stands without its required files: the page names the script, not a way to run it.
NAMED = {"peers", "parity", "learn", "rendering", "same_numbers"}


def test_quoted_commands_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    count = 0
    for page in PAGES:
        for name, rest in quoted(page):
            if not rest.strip() and name in NAMED:
                continue
            for words in alternatives(rest):
                count += 1
                if why := understood(name, words, monkeypatch):
                    wrong.append(f"{page.name}: {name}.py {shlex.join(words)}: {why}")
    assert not wrong, "\n".join(wrong)
    assert count > 20


FIGURE = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)+(?![\w.]*\d)")


def test_every_figure_that_the_readme_measured_is_in_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    measured = readme.split("\n## Measured\n")[1].split("\n## ")[0]
    assert len(found := FIGURE.findall(measured)) > 40
    known = set(FIGURE.findall((BENCHMARKS / "RESULTS.md").read_text()))
    assert not [figure for figure in found if figure not in known]


@pytest.mark.parametrize(
    ("name", "words", "why"),
    [
        ("sft", "--rows full,fuller", "no 'fuller' here; any of padded"),
        ("memory", "--rows 0.5b-nothing", "no '0.5b-nothing' here"),
        ("rollout", "--peers sglang", "no 'sglang' here; any of generate_batch"),
        ("host", "--shape wide", "invalid choice: 'wide'"),
        ("decode", "--when 1", "unrecognized arguments: --when"),
    ],
)
def test_what_a_benchmark_does_not_know_is_refused(
    name: str, words: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why in understood(name, words.split(), monkeypatch)
