"""A report as one self-contained page (see `files.html`).

Charts are drawn by uPlot (MIT, `assets/uPlot.LICENSE.txt`).
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from retool import __version__
from retool.files.html import content_policy, embed
from retool.report.runs import Run, about, choose_transcripts, default_config

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = (
    ("uPlot.iife.min.js",),
    ("elements.js", "charts.js", "sections.js", "transcripts.js", "main.js"),
)
STYLES = (("uPlot.min.css",), ("page.css",))
TRANSCRIPT_BYTES = 24 << 20


def make_page(runs: list[Run], transcript_bytes: int = TRANSCRIPT_BYTES) -> str:
    """The page's HTML."""
    transcripts, left_out, torn = choose_transcripts(runs, transcript_bytes)
    metric_names = dict.fromkeys(name for run in runs for name in run.metrics)
    data: dict[str, Any] = {
        "version": __version__,
        "made": datetime.now(timezone.utc).timestamp(),
        "runs": [{**vars(run), "folder": str(run.folder)} for run in runs],
        "defaults": [default_config(run.config) for run in runs],
        "about": about(metric_names),
        "transcripts": transcripts,
        "left_out": left_out,
        "torn": torn,
    }
    scripts = [_joined(names) for names in SCRIPTS]
    styles = [_joined(names) for names in STYLES]
    parts = {
        "POLICY": content_policy(scripts, styles),
        "STYLES": "".join(f"<style>{style}</style>\n" for style in styles),
        "DATA": embed(data),
        "SCRIPTS": "".join(f"<script>{script}</script>\n" for script in scripts),
    }
    rest = (ASSETS / "page.html").read_text(encoding="utf-8")
    pieces = []
    for name, content in parts.items():  # in the template's order: what is put in is never searched
        head, _, rest = rest.partition(f"{{{{{name}}}}}")
        pieces += [head, content]
    return "".join([*pieces, rest])


def _joined(names: tuple[str, ...]) -> str:
    texts = [(ASSETS / name).read_text(encoding="utf-8").strip() for name in names]
    return "\n" + "\n".join(texts) + "\n"
