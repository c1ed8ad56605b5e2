"""Where the tokenised data goes when nobody says: the user's cache, or a temporary folder that is
nobody else's.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from retool.data.cache import default_cache_dir
from tests.bounded import bounded


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a home, in a container: no HOME, no entry in /etc/passwd.

    Returns where /tmp is for him.
    """

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"retool-{os.getuid()}"


def test_without_a_home_it_is_a_private_temporary_folder(temporary: Path) -> None:
    assert default_cache_dir() == temporary and default_cache_dir() == temporary
    assert temporary.stat().st_mode & 0o777 == 0o700


def test_the_users_cache_is_taken_where_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_cache_dir() == tmp_path / "cache" / "retool"


def test_a_folder_that_others_can_write_is_refused(temporary: Path) -> None:
    temporary.mkdir()
    temporary.chmod(0o777)
    with pytest.raises(
        ValueError, match=r"can be written by other users\. chmod 700 .*data\.cache_dir="
    ):
        default_cache_dir()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_folder_is_refused(temporary: Path, kind: str) -> None:
    if kind == "link":
        temporary.symlink_to(temporary.parent)
    else:
        temporary.touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir="):
        default_cache_dir()


def test_another_users_folder_is_refused(temporary: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a folder that is another user's")
    temporary.mkdir(mode=0o700)
    os.chown(temporary, 65534, 65534)
    with pytest.raises(ValueError, match=r"is another user's, or a link.*data\.cache_dir="):
        default_cache_dir()


def test_a_home_that_cannot_be_written_is_none(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an ordinary user: root may write everywhere."""
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    monkeypatch.setenv("HOME", str(home))
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:  # pytest's own, of several processes too
        parent.chmod(parent.stat().st_mode | 0o055)

    def as_nobody() -> str:
        if os.getuid() == 0:
            os.setuid(65534)
        return default_cache_dir().name

    outcome = bounded(as_nobody)
    assert outcome.value == f"retool-{65534 if os.getuid() == 0 else os.getuid()}", outcome
