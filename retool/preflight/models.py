"""`retool models`: which models there are, what works with each, and which way a folder's model runs."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retool.config.command import calm_threads, exit_status
from retool.model.catalogue.figures import Figures, figures_of, written

PROGRAM = "python -m retool.preflight.models"
WIDTH = 100


@dataclass(frozen=True)
class Way:
    """How models run: what works, what doesn't, and the tests that show it."""

    title: str
    works: str
    lacks: str
    tests: tuple[str, ...]


OWN = Way(
    title="retool's own decoder",
    works=(
        "SFT, RL, sequence parallelism (1 to the number of query heads), the sampling engine with "
        "tensor parallelism, retool.LLM, chat, exports"
    ),
    lacks="LoRA",
    tests=(
        "tests/model/test_decoder.py",
        "tests/model/test_ranks.py",
        "tests/engine/test_engine.py",
    ),
)
BORROWED = Way(
    title="transformers' own module",
    works=(
        "SFT, sequence parallelism (1 to the number of query heads), exports; RL with rollout.name=hf, "
        "vllm or server"
    ),
    lacks="the sampling engine, retool.LLM, chat, LoRA, compiled blocks",
    tests=(
        "tests/model/test_borrowed.py",
        "tests/engine/test_hf.py",
        "tests/sft/test_borrowed.py",
    ),
)


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        program,
        description="Which models there are, and what works with each. Of a model's folder: which way "
        "it runs, or why it can't. Exit status 1 where it can't.",
    )
    top.add_argument(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="a Hugging Face model folder, or the id of a model of the hub",
    )
    return top


def main(words: list[str], program: str = PROGRAM) -> int:
    """Print the list, or what becomes of one model."""
    options = parser(program).parse_args(words)
    calm_threads()
    if options.folder is None:
        print("\n".join(listed()))
        return 0
    try:
        print("\n".join(of_folder(options.folder)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def listed() -> Iterator[str]:
    """Every family that has a file, with what its file says of it and what was measured; and the
    rest.
    """
    families = figures_of()
    yield f"As {OWN.title}:"
    widest = max(map(len, families))
    for name, row in families.items():
        yield from _hanging(f"  {name:{widest}}  ", row.about)
        yield from _hanging(f"  {'':{widest}}  ", _measured(row))
    yield "  On small random models, relative to transformers' in fp32; sp 2 to one process in fp64."
    yield from _abilities(OWN)
    yield ""
    yield f"As {BORROWED.title}: what else transformers has of causal language models, unless what"
    yield "it computes can't be done here. retool models FOLDER tries it."
    yield from _abilities(BORROWED)


def _measured(row: Figures) -> str:
    """A family's figures as a sentence."""
    off = {"logits": row.logits, "gradients": row.gradients, "sp 2": row.sp}
    numbers = ", ".join(f"{name} {written(number)}" for name, number in off.items())
    windows = "sliding windows" if row.windows else "sliding windows are refused"
    exports = "exports alike" if row.export else "exports differ"
    return f"→ {windows}; off by: {numbers}; greedy samples alike: {row.engine}; {exports}"


def of_folder(name: str) -> Iterator[str]:
    """Which way the model of a folder, or of the hub, runs.

    ValueError where it can't.
    """
    from retool.model.borrowed.config import BorrowedConfig
    from retool.model.borrowed.read import read_any_config
    from retool.model.hub import find_model
    from retool.preflight.show import shape_words, way_words

    model = read_any_config(find_model(name, weights=False))
    yield shape_words(model)
    yield way_words(model)
    limits: list[str] = []
    if model.max_position:
        limits.append(f"made for {model.max_position:,} positions")
    if model.windowed:
        limits.append(f"sliding windows of {max(model.windows):,} tokens")
    if model.steady_length:
        limits.append(f"sampled up to {model.steady_length:,} tokens: its rope changes there")
    borrowed = isinstance(model, BorrowedConfig)
    if isinstance(model, BorrowedConfig) and model.longest:
        limits.append(f"samples of at most {model.longest:,} tokens: {model.because}")
    yield from limits
    yield f"ulysses_sequence_parallel_size: 1 to {model.heads}"
    yield from _abilities(BORROWED if borrowed else OWN)


def _abilities(way: Way) -> Iterator[str]:
    yield from _hanging("  works:    ", way.works)
    yield from _hanging("  doesn't:  ", way.lacks)
    yield from _hanging("  shown by: ", ", ".join(way.tests))


def _hanging(begin: str, words: str) -> Sequence[str]:
    """`words` after `begin`, further lines below the first word."""
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent=begin,
        subsequent_indent=" " * len(begin),
    )


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
