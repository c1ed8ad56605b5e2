"""One self-contained page: no network, no build step, and nothing of a run is ever parsed as
markup.

The data goes in as JSON that can't close its element, is read by the page's scripts and set as
text. A content security policy allows these scripts and styles, by their hashes, and nothing else.
Charts are drawn by uPlot (MIT, `assets/uPlot.LICENSE.txt`).
"""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from retool import __version__
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
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src "
        f"{' '.join(map(_hash, styles))}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
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


def write_page(html: str, path: Path) -> None:
    """Write it whole or not at all; lone surrogates become question marks.

    ValueError where `path` can't be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(html, encoding="utf-8", errors="replace", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise ValueError(
            f"{path} can't be written ({error.strerror or error}). "
            "Give another place: --out report.html."
        ) from error


def embed(data: Any) -> str:
    """JSON that is safe inside a script element: no `<`, `>` or `&`, and no separator that old
    parsers take for a line's end.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _joined(names: tuple[str, ...]) -> str:
    texts = [(ASSETS / name).read_text(encoding="utf-8").strip() for name in names]
    return "\n" + "\n".join(texts) + "\n"


def _hash(source: str) -> str:
    """How a content security policy names a script or style."""
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return f"'sha256-{digest}'"
