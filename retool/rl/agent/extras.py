"""Optional libraries (extras of retool): the message where one can't be imported.

One that isn't there is told from one that is there and broken: what it needs may be missing, or be
of another version since something else was installed.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Extra = Literal["mcp", "verifiers", "openenv"]

# By extra: who needs it, and the distribution that it is made of
NEEDED_BY: dict[Extra, tuple[str, str]] = {
    "mcp": ("MCP servers", "mcp"),
    "verifiers": ("verifiers environments", "verifiers"),
    "openenv": ("OpenEnv environments", "openenv-core"),
}
PYTHON = {"verifiers": " (it wants Python 3.11 or newer)"}


def import_failed(extra: Extra, error: ImportError) -> ValueError:
    """Why the library of an extra can't be used, with the way out."""
    who, package = NEEDED_BY[extra]
    install = f"pip install 'retool-train[{extra}]'"
    try:
        found = version(package)
    except PackageNotFoundError:
        wanted = PYTHON.get(extra, "")
        return ValueError(f"{who} need the package {package}{wanted}: {install}.")
    return ValueError(
        f"{who} need the package {package}. Version {found} is installed, and can't be imported "
        f"({type(error).__name__}: {error}): what it needs was removed, or is of another version. "
        f"`pip check` names it; {install} puts it right."
    )
