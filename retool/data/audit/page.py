"""The audit as one self-contained page: no network, no build step, and nothing of a dataset is ever
parsed as markup.

The data goes in as JSON that can't close its element, is read by the page's one script and set as
text. A content security policy allows that script and style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from retool.data.audit.audit import MEANINGS, Audit, summary
from retool.data.audit.tally import KINDS, Shown

TEMPLATE = Path(__file__).with_name("audit.html")
BARS = 32


def write_page(audit: Audit, path: Path) -> None:
    """Write the page. Raises OSError where `path` can't be written."""
    path.write_text(page(audit), encoding="utf-8", errors="replace")


def page(audit: Audit) -> str:
    """The page's HTML."""
    tally = audit.tally
    data = {
        "title": ", ".join(Path(file).name for file in audit.files[:4])
        + (" …" if len(audit.files) > 4 else ""),
        "files": list(audit.files),
        "refused": tally.refused,
        "rows": tally.rows,
        "summary": summary(audit),
        "histograms": [
            {"title": "Tokens in a sample", "bars": bars(tally.lengths)},
            *([] if audit.prompts else [{"title": "Trained share, %", "bars": bars(tally.shares)}]),
            {"title": "Assistant turns in a row", "bars": bars(tally.turns)},
            {"title": "Tool calls in a row", "bars": bars(tally.calls_per_row)},
        ],
        "reasons": tally.reasons.most_common(30),
        "refusals": tally.refusals,
        "kinds": [[name, MEANINGS[name]] for name in KINDS],
        "samples": [_sample(sample) for sample in tally.shown],
    }
    html = TEMPLATE.read_text(encoding="utf-8")
    script = _between(html, "<script>", "</script>")
    style = _between(html, "<style>", "</style>")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri "
        "'none'; form-action 'none'"
    )
    return html.replace("POLICY", policy, 1).replace("DATA", embed(data), 1)


def embed(data: Any) -> str:
    """JSON that is safe inside a script element: no `<`, `>` or `&`, and no separator that old
    parsers take for a line's end.
    """
    text = json.dumps(data, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def bars(histogram: Counter[int]) -> list[tuple[int, int, int]]:
    """A histogram in at most 32 bars of one whole width: (first value, last value, count)."""
    if not histogram:
        return []
    low = min(histogram)
    high = max(histogram)
    width = -(-(high - low + 1) // BARS)
    counts: Counter[int] = Counter()
    for value, count in histogram.items():
        counts[(value - low) // width] += count
    return [
        (low + i * width, low + (i + 1) * width - 1, counts[i])
        for i in range((high - low) // width + 1)
    ]


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


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
