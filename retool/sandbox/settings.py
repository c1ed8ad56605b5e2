"""What libraries remember outside of variables: random numbers, precision, the current folder.

Executes inside the cell.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import warnings
from collections.abc import Mapping
from typing import Any

# A module, what reads its setting, and what sets it
PAIRS = (
    ("sys", "getrecursionlimit", "setrecursionlimit"),
    ("sys", "get_int_max_str_digits", "set_int_max_str_digits"),
    ("random", "getstate", "setstate"),
    ("decimal", "getcontext", "setcontext"),
    ("numpy.random", "get_state", "set_state"),
    ("numpy", "get_printoptions", "set_printoptions"),
    ("numpy", "geterr", "seterr"),
)
PRECISION = "mpmath.mp.prec"
FILTERS = "warnings.filters"
FOLDER = "folder"
ENVIRONMENT = "environment"


def read(folder: str, environment: Mapping[str, str]) -> dict[str, bytes]:
    """Each setting by its name. `environment` are the variables that a program begins with."""
    found: dict[str, Any] = {}
    for module, get, _ in PAIRS:
        with contextlib.suppress(KeyError, AttributeError):  # it isn't there
            found[f"{module}.{get}"] = getattr(sys.modules[module], get)()
    if "mpmath" in sys.modules:
        found[PRECISION] = sys.modules["mpmath"].mp.prec
    found[FILTERS] = list(warnings.filters)
    with contextlib.suppress(OSError):  # the folder may be gone
        found[FOLDER] = os.path.relpath(os.getcwd(), folder)
    now = dict(os.environ)
    names = {*environment, *now}
    changed = {name for name in names if now.get(name) != environment.get(name)}
    found[ENVIRONMENT] = {name: now.get(name) for name in changed}
    settings: dict[str, bytes] = {}
    for name, value in found.items():
        with contextlib.suppress(BaseException):  # a program may have put anything there
            settings[name] = pickle.dumps(value)
    return settings


def restore(settings: Mapping[str, bytes], folder: str) -> None:
    """Set them again; one that can't be set stays as it is."""
    found: dict[str, Any] = {}
    for name, content in settings.items():
        with contextlib.suppress(BaseException):
            found[name] = pickle.loads(content)
    for module, get, put in PAIRS:
        with contextlib.suppress(BaseException):
            value = found[f"{module}.{get}"]
            set_it = getattr(sys.modules[module], put)
            set_it(**value) if isinstance(value, dict) else set_it(value)
    with contextlib.suppress(BaseException):
        sys.modules["mpmath"].mp.prec = found[PRECISION]
    with contextlib.suppress(BaseException):
        _filter(found[FILTERS])
    with contextlib.suppress(BaseException):
        os.chdir(os.path.join(folder, found[FOLDER]))
    for name, value in found.get(ENVIRONMENT, {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _filter(filters: list[Any]) -> None:
    warnings.resetwarnings()
    warnings.filters[:] = filters  # type: ignore[index]
