"""The audit as one self-contained page (see `files.html`)."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from retool import __version__
from retool.data.audit.audit import Audit
from retool.data.audit.counts import percentile
from retool.data.audit.samples import KINDS, Shown
from retool.data.audit.summary import summary
from retool.data.audit.terminal import MEANINGS
from retool.files.html import LOOK, make_html

HERE = Path(__file__).parent
SCRIPTS = (LOOK / "numbers.js", LOOK / "elements.js", LOOK / "shell.js", HERE / "audit.js")
STYLES = (LOOK / "look.css", HERE / "audit.css")
BARS = 32
IN_TILES = ("files", "rows", "refused", "samples", "tokens")  # of the summary


def page(audit: Audit, model: str = "") -> str:
    """The page's HTML. `model` names the model whose tokenizer and template were used."""
    tally = audit.tally
    title = ", ".join(Path(file).name for file in audit.files[:4])
    if len(audit.files) > 4:
        title += " …"
    data: dict[str, Any] = {
        "version": __version__,
        "made": datetime.now(timezone.utc).timestamp(),
        "title": title,
        "files": list(audit.files),
        "model": model,
        "refused": tally.refused,
        "rows": tally.rows,
        "dropped": tally.dropped_long + tally.dropped_untrained,
        "tiles": _tiles(audit),
        "summary": [line for line in summary(audit) if line[0] not in IN_TILES],
        "histograms": _histograms(audit),
        "reasons": tally.reasons.most_common(30),
        "refusals": tally.refusals,
        "kinds": [[name, MEANINGS[name]] for name in KINDS],
        "samples": [_sample(sample) for sample in tally.shown],
    }
    return make_html("dataset audit", data, [SCRIPTS], [STYLES])


def _tiles(audit: Audit) -> list[tuple[str, str, str]]:
    """(what, how much, a remark) that one asks for first."""
    tally = audit.tally
    split = f"{tally.split:,} rows split by history" if tally.split else ""
    tiles = [
        ("rows", f"{tally.rows:,}", "RL prompts" if audit.prompts else ""),
        ("refused", f"{tally.refused:,}", ""),
        ("samples", f"{tally.samples:,}", split),
        ("tokens", f"{tally.tokens:,}", ""),
        ("median length", f"{percentile(tally.lengths, 0.5):,} tokens", ""),
        ("longest", f"{max(tally.lengths, default=0):,} tokens", ""),
    ]
    if not audit.prompts:
        share = tally.trained_tokens / max(tally.tokens, 1)
        trained = f"{tally.trained_tokens:,} tokens"
        tiles.insert(4, ("trained", f"{100 * share:.1f} %", trained))
    return tiles


def _histograms(audit: Audit) -> list[dict[str, Any]]:
    tally = audit.tally
    shown = [
        ("Length", "tokens", "sample", tally.lengths),
        ("Trained share", "% of a sample's tokens", "sample", tally.shares),
        ("Assistant turns", "turns in a row", "row", tally.turns),
        ("Tool calls", "calls in a row", "row", tally.calls_per_row),
    ]
    if audit.prompts:
        del shown[1]  # nothing of a prompt is trained
    return [
        {
            "title": title,
            "unit": unit,
            "of": of,
            "bars": bars(counts),
            "says": _spread(counts),
            "limit": audit.limit.max_length if counts is tally.lengths else None,
        }
        for title, unit, of, counts in shown
    ]


def _spread(histogram: Counter[int]) -> str:
    """The middle and the ends of a histogram, in words."""
    low = min(histogram, default=0)
    high = max(histogram, default=0)
    middle = percentile(histogram, 0.5)
    most = percentile(histogram, 0.95)
    if low == high:
        return f"all {low:,}"
    return f"{low:,} to {high:,}, half up to {middle:,}, 95 % up to {most:,}"


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
