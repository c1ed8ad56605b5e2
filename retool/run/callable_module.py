"""Packages that can be called: `retool.sft(…)` beside `from retool.sft import SFTConfig`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from retool.config.command import calm_while_loading
from retool.config.elsewhere import absent


class CallableModule(ModuleType):
    """A package that is called as the function of its own name in its module `api`, which is
    imported then. `OTHER_NAMES` there are what other libraries call that function's arguments.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in self.__signature__.parameters]
        if unknown:
            name = self.__name__.rpartition(".")[2]
            told = "; ".join(f"{word}: {self._meant(word)}" for word in unknown)
            raise TypeError(f"{name}() has no such arguments: {told}.")
        return self._function(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """What help() and notebooks show."""
        return inspect.signature(self._function)

    @property
    def _api(self) -> ModuleType:
        with calm_while_loading():
            return importlib.import_module(f"{self.__name__}.api")

    @property
    def _function(self) -> Callable[..., Any]:
        return getattr(self._api, self.__name__.rpartition(".")[2])

    def _meant(self, word: str) -> str:
        """What to write in the place of an unknown argument."""
        if "." in word or "__" in word:
            return f"write options={{{word.replace('__', '.')!r}: …}}"
        others: dict[str, str] = self._api.OTHER_NAMES
        if word not in others and (way_out := absent(word)):
            return way_out.removesuffix(".")
        known = [*self.__signature__.parameters]
        near = get_close_matches(word, [*known, *others], n=1, cutoff=0.6)
        if not near:
            return "options={…} takes every key of the command by its dotted name"
        return f"did you mean {others.get(near[0], near[0])}?"


def make_callable(name: str) -> None:
    """Let the package of this name be called."""
    sys.modules[name].__class__ = CallableModule
