"""The audit as one self-contained page (see `files.html`)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from retool.data.audit.audit import Audit
from retool.data.audit.samples import KINDS, Shown
from retool.data.audit.summary import summary
from retool.data.audit.terminal import MEANINGS
from retool.files.html import content_policy, embed

TEMPLATE = Path(__file__).with_name("audit.html")
BARS = 32


def page(audit: Audit) -> str:
    """The page's HTML."""
    tally = audit.tally
    title = ", ".join(Path(file).name for file in audit.files[:4])
    if len(audit.files) > 4:
        title += " …"
    histograms = [
        ("Tokens in a sample", tally.lengths),
        ("Trained share, %", tally.shares),
        ("Assistant turns in a row", tally.turns),
        ("Tool calls in a row", tally.calls_per_row),
    ]
    if audit.prompts:
        del histograms[1]  # nothing of a prompt is trained
    data = {
        "title": title,
        "files": list(audit.files),
        "refused": tally.refused,
        "rows": tally.rows,
        "summary": summary(audit),
        "histograms": [{"title": name, "bars": bars(counts)} for name, counts in histograms],
        "reasons": tally.reasons.most_common(30),
        "refusals": tally.refusals,
        "kinds": [[name, MEANINGS[name]] for name in KINDS],
        "samples": [_sample(sample) for sample in tally.shown],
    }
    html = TEMPLATE.read_text(encoding="utf-8")
    script = _between(html, "<script>", "</script>")
    style = _between(html, "<style>", "</style>")
    policy = content_policy([script], [style])
    return html.replace("POLICY", policy, 1).replace("DATA", embed(data), 1)


def bars(histogram: Counter[int]) -> list[tuple[int, int, int]]:
    """A histogram in at most 32 bars of one whole width: (first value, last value, count)."""
    if not histogram:
        return []
    low = min(histogram)
    values = max(histogram) - low + 1
    width = -(-values // BARS)
    counts = [0] * -(-values // width)
    for value, count in histogram.items():
        counts[(value - low) // width] += count
    firsts = range(low, low + values, width)
    return [(first, first + width - 1, count) for first, count in zip(firsts, counts, strict=True)]


def _sample(sample: Shown) -> dict[str, Any]:
    return {
        "file": Path(sample.file).name,
        "row": sample.row,
        "length": sample.length,
        "trained": sample.trained,
        "turns": sample.turns,
        "calls": sample.calls,
        "texts": [text for text, _ in sample.tokens],
        "kinds": "".join(str(kind) for _, kind in sample.tokens),
    }


def _between(html: str, start: str, end: str) -> str:
    return html.split(start, 1)[1].split(end, 1)[0]
