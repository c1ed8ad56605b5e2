"""What an audit found, as a table: the first screen of the terminal and of the page."""

from __future__ import annotations

from collections import Counter

from retool.data.audit.audit import Audit
from retool.data.audit.counts import Tally, percentile
from retool.metrics import printable


def summary(audit: Audit) -> list[tuple[str, str]]:
    """The table of the first screen: (what, how much)."""
    return [*_of_rows(audit), *_of_tokens(audit), *_of_turns(audit), *_notes(audit.tally)]


def _of_rows(audit: Audit) -> list[tuple[str, str]]:
    tally = audit.tally
    samples = f"{tally.samples:,}"
    if tally.split:
        samples += f" ({tally.split:,} rows split by history)"
    lines = [
        ("files", f"{len(audit.files)}"),
        *(("read as", form) for form in audit.forms if not audit.prompts),
        ("rows", f"{tally.rows:,}{' RL prompts' if audit.prompts else ''}"),
        ("refused", f"{tally.refused:,}"),
        ("samples", samples),
        (f"longer than {audit.limit.max_length:,}", _longer(audit)),
    ]
    if not audit.prompts:
        lines.append(("without a trained token", f"{tally.dropped_untrained:,} dropped"))
    return lines


def _of_tokens(audit: Audit) -> list[tuple[str, str]]:
    tally = audit.tally
    lines = [("tokens", f"{tally.tokens:,}")]
    if not audit.prompts:
        share = tally.trained_tokens / max(tally.tokens, 1)
        spread = " · ".join(
            f"{name} {percentile(tally.shares, q)} %"
            for name, q in (("p5", 0.05), ("p50", 0.5), ("p95", 0.95))
        )
        lines.append(
            (
                "trained",
                f"{tally.trained_tokens:,} tokens, {100 * share:.1f} % (by sample: {spread})",
            )
        )
    lengths = " · ".join(
        f"{name} {percentile(tally.lengths, q):,}"
        for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
    )
    return [*lines, ("length", lengths)]


def _of_turns(audit: Audit) -> list[tuple[str, str]]:
    tally = audit.tally
    return [
        ("roles", _counts(tally.roles)),
        ("assistant turns a row", _spread(tally.turns)),
        ("tool calls", _sum_and_names(tally.calls) if tally.calls else "0"),
    ]


def _notes(tally: Tally) -> list[tuple[str, str]]:
    """What is allowed, and worth a look."""
    counted = [
        (
            "other tokens in one pass",
            tally.piecewise_differs,
            "samples: they are tokenised piece by piece, as at inference",
        ),
        (
            "control tokens in texts",
            tally.control_text,
            "rows: where a text only mentions them, they are tokenised as text",
        ),
        (
            "reasoning left out",
            tally.dropped_thoughts,
            "turns are trained without their reasoning (data.drop_reasoning)",
        ),
        (
            "thoughts left open",
            tally.open_thoughts,
            f"turns open a thought and don't close it, and are trained so: {_places(tally)}",
        ),
        (
            "outputs amid turns",
            tally.masked_outputs,
            "outputs of programs are shown and not trained (data.multiturn.inline_outputs)",
        ),
        (
            "empty assistant turns",
            tally.empty_turns,
            "turns without text or call: only their end is trained",
        ),
    ]
    notes = [(what, f"{count:,} {why}") for what, count, why in counted if count]
    if tally.unread:
        notes.append(("fields that nothing shows", _counts(tally.unread)))
    if tally.undeclared:
        notes.append(("calls of undeclared tools", _sum_and_names(tally.undeclared)))
    return notes


def _places(tally: Tally) -> str:
    more = "; …" if tally.open_thoughts > len(tally.open_places) else ""
    return printable("; ".join(tally.open_places)) + more


def _longer(audit: Audit) -> str:
    """What has become of samples that are longer than the limit."""
    tally = audit.tally
    truncation = audit.limit.truncation
    became = {
        "drop": f"{tally.dropped_long:,} dropped" if tally.dropped_long else "",
        "error": f"{tally.refused_long:,} refused" if tally.refused_long else "",
    }
    cut = f"{tally.truncated:,} cut on the {truncation}" if tally.truncated else ""
    said = became.get(truncation, cut)
    return f"{said} (data.truncation={truncation})" if said else "none"


def _sum_and_names(counter: Counter[str]) -> str:
    return f"{sum(counter.values()):,} ({_counts(counter, 5)})"


def _counts(counter: Counter[str], most: int = 8) -> str:
    shown = [f"{printable(name)[:40]} {count:,}" for name, count in counter.most_common(most)]
    return " · ".join([*shown, *(["…"] if len(counter) > most else [])]) or "none"


def _spread(histogram: Counter[int]) -> str:
    return (
        f"min {min(histogram, default=0)} · p50 {percentile(histogram, 0.5)} · max "
        f"{max(histogram, default=0)}"
    )
