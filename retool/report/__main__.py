"""`python -m retool.report RUN_DIR [RUN_DIR…]`: one page about a run, or a comparison of several."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retool.config.command import exit_status
from retool.files.html import write_page
from retool.metrics import printable
from retool.report.page import TRANSCRIPT_BYTES, make_page
from retool.report.runs import read_run
from retool.report.series import MOST_VALUES

PROGRAM = "python -m retool.report"
PAGE_VALUES = 2_000_000  # numbers on a page, of all runs together: some 20 MB

EPILOG = """The page is one file that opens without a network, on a phone too. It shows metrics.jsonl,
config.yaml and report/*.jsonl (transcripts) of each folder, as far as they are there: it works
while a run is going. Of a run with more values than a page can hold, neighbouring steps are put
together, which the page says.

examples:
  python -m retool.report checkpoints/retool-sft/test
  python -m retool.report runs/lr-1e-5 runs/lr-3e-5 --out comparison.html"""


def main(words: list[str] | None = None, program: str = PROGRAM) -> int:
    """Exit status: 0 written, 1 something is wrong and was said."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Write one self-contained HTML page about a run, or a comparison of several.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="folder of a run (trainer.default_local_dir)",
    )
    parser.add_argument(
        "--out", type=Path, help="where to write (default: report.html in the first folder)"
    )
    parser.add_argument(
        "--transcripts",
        type=float,
        default=TRANSCRIPT_BYTES / 2**20,
        metavar="MB",
        help="most megabytes of transcripts to take in (default: %(default)g)",
    )
    options = parser.parse_args(words)
    folders = list(dict.fromkeys(folder.resolve() for folder in options.folders))
    out = options.out or folders[0] / "report.html"
    try:
        values = min(MOST_VALUES, PAGE_VALUES // len(folders))
        runs = [
            read_run(folder, name, values)
            for folder, name in zip(folders, names_of(folders), strict=True)
        ]
        html = make_page(runs, int(options.transcripts * 2**20))
        write_page(html, out, "--out report.html")
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1
    for run in runs:
        facts = [f"{printable(run.name)}: {len(run.steps)} steps with metrics"]
        print("; ".join([*facts, *map(printable, run.notes)]))
    print(f"wrote {printable(str(out))} ({len(html) / 2**20:.1f} MB)")
    return 0


def names_of(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


if __name__ == "__main__":
    sys.exit(exit_status(main))
