"""Objects and errors of somebody else's code, in words and numbers.

Their own methods run then, and may raise anything: that must not end a run.
"""

from __future__ import annotations

import copy
from typing import Any

CHARACTERS_SHOWN = 80
UNCHANGING = frozenset({str, int, float, bool, bytes, type(None)})


def words_of(error: BaseException) -> str:
    """The kind of an error, and what it says."""
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"
    except Exception as other:
        return f"{kind}, whose text can't be made ({type(other).__name__})"


def shown(value: Any) -> str:
    """The beginning of an object's `repr`."""
    try:
        return f"{value!r:.{CHARACTERS_SHOWN}}"
    except Exception:
        return f"a {type(value).__name__}"


def plain(value: Any) -> Any:
    """A single number or truth value of numpy's or torch's as Python's own; else `value` itself."""
    try:
        return value.item() if callable(getattr(value, "item", None)) else value
    except Exception:  # an array of several, say
        return value


def own_copy(given: dict[str, Any]) -> dict[str, Any]:
    """A copy for somebody's code, which may change it, of what others are given too.

    Only the outermost dict is copied where the rest can't be: it is nested too deeply, say.
    """
    try:
        return _copied(given)
    except Exception:
        return dict(given)


def _copied(value: Any) -> Any:
    """A deep copy. What can't change is shared.

    A row may have thousands of test cases. `copy.deepcopy` takes five times as long for them, on the
    thread that the engine waits for.
    """
    kind = type(value)
    if kind is list:
        if UNCHANGING.issuperset(map(type, value)):
            return value.copy()
        return [_copied(item) for item in value]
    if kind is dict:
        if UNCHANGING.issuperset(map(type, value.values())):
            return value.copy()
        return {key: _copied(item) for key, item in value.items()}
    return value if kind in UNCHANGING else copy.deepcopy(value)
