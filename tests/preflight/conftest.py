"""A tiny model and its data, made once for this folder."""

from tests.sft.conftest import work

__all__ = ["work"]
