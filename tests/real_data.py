"""Real weights, tokenizers, templates and data in ../shared/data. A clone elsewhere has none: what
needs them skips.
"""

from __future__ import annotations

from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
TEMPLATES = sorted(path.stem for path in (REAL / "chat-templates").glob("*.jinja")) or ["none"]


def real(name: str) -> Path:
    """Where something of it is; skips the test where it isn't there."""
    path = REAL / name
    if not path.exists():
        pytest.skip(f"there is no ../shared/data/{name}")
    return path


def real_template(name: str) -> str:
    return real(f"chat-templates/{name}.jinja").read_text(encoding="utf-8")
