"""A report as one self-contained page (see `files.html`).

Charts are drawn by uPlot (MIT, `assets/uPlot.LICENSE.txt`).
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from retool import __version__
from retool.files.html import LOOK, make_html
from retool.report.headline import how_it_trains, what_it_is
from retool.report.runs import Run, about, choose_transcripts, default_config, required_keys

ASSETS = Path(__file__).with_name("assets")
LIBRARY = (ASSETS / "uPlot.iife.min.js",)
OWN = (
    LOOK / "numbers.js",
    LOOK / "elements.js",
    LOOK / "shell.js",
    ASSETS / "charts.js",
    ASSETS / "phases.js",
    ASSETS / "sections.js",
    ASSETS / "validation.js",
    ASSETS / "transcripts.js",
    ASSETS / "configuration.js",
    ASSETS / "main.js",
)
STYLES = ((ASSETS / "uPlot.min.css",), (LOOK / "look.css", ASSETS / "report.css"))
TRANSCRIPT_BYTES = 24 << 20


def make_page(runs: list[Run], transcript_bytes: int = TRANSCRIPT_BYTES) -> str:
    """The page's HTML."""
    transcripts, left_out, torn = choose_transcripts(runs, transcript_bytes)
    metric_names = dict.fromkeys(name for run in runs for name in run.metrics)
    required = dict.fromkeys(key for run in runs for key in required_keys(run.config))
    data: dict[str, Any] = {
        "version": __version__,
        "made": datetime.now(timezone.utc).timestamp(),
        "runs": [_shown(run) for run in runs],
        "defaults": [default_config(run.config) for run in runs],
        "required": list(required),
        "about": about(metric_names),
        "transcripts": transcripts,
        "left_out": left_out,
        "torn": torn,
    }
    return make_html("run report", data, (LIBRARY, OWN), STYLES)


def _shown(run: Run) -> dict[str, Any]:
    """A run as the page's scripts read it."""
    return {
        **vars(run),
        "folder": str(run.folder),
        "about": what_it_is(run.config),
        "settings": how_it_trains(run.config),
    }
