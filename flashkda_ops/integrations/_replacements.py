"""Functions of another library that ours stand in for, and how these come back.

Others replace the same functions, before us and after us: profilers, other packages, tests. So nothing is overwritten
that came after ours. And what is put in place hands its calls on while ``Replacements.active`` is False, since somebody
may go on calling it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["Replacements", "name_of", "place_of"]


class _Replacement(NamedTuple):
    owner: Any
    name: str
    theirs: Any
    ours: Any
    inherited: bool

    def is_within(self, current: Any) -> bool:
        """Whether ours is what is there now, or is called by it, as far as that can be seen."""
        ours = _function(self.ours)
        return any(x is ours for x in _layers(current))


class Replacements:
    """What an integration has put in place of functions of modules and classes.

    Args:
        logger: what was not put back is reported there.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self.active = False
        self._logger = logger
        self._made: list[_Replacement] = []

    def put(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace ``name`` of ``owner`` by ``make(what is there)``, unless ours is there or in what has wrapped it.

        A function that cannot be replaced ``make`` returns as it is.
        """
        inherited = name not in vars(owner)
        current = getattr(owner, name) if inherited else vars(owner)[name]
        if any(made.owner is owner and made.name == name and made.is_within(current) for made in self._made):
            return
        made = _Replacement(owner, name, current, make(current), inherited)
        if made.ours is not current:
            setattr(owner, name, made.ours)
            self._made.append(made)

    def undo(self) -> None:
        """Put back what was there, where ours still is; report the rest, once."""
        was_active, self.active = self.active, False
        kept = []
        for made in reversed(self._made):
            current = vars(made.owner).get(made.name)
            if current is made.ours:
                if made.inherited:
                    delattr(made.owner, made.name)
                else:
                    setattr(made.owner, made.name, made.theirs)
                continue
            called = made.is_within(current)
            if called:  # it may be put back once what has wrapped it is gone
                kept.append(made)
            if was_active:
                what = "wraps ours, which now hands its calls on" if called else "has replaced ours"
                self._logger.warning(
                    "%s.%s is left as it is: %s %s", name_of(made.owner), made.name, place_of(current), what
                )
        self._made = kept[::-1]


def name_of(x: Any) -> str:
    """Where a module, a class or a function is found, or how it describes itself."""
    x = _function(x)
    name = getattr(x, "__qualname__", None)
    if name is None:
        return getattr(x, "__name__", None) or repr(x)
    return f"{x.__module__}.{name}"


def place_of(x: Any) -> str:
    """Where a function was written: one that wraps another has that one's name."""
    code = getattr(_function(x), "__code__", None)
    return name_of(x) if code is None else f"{code.co_name} ({code.co_filename}, line {code.co_firstlineno})"


def _function(x: Any) -> Any:
    """What is called where a method or a partial application is."""
    while isinstance(x, functools.partial) or hasattr(x, "__func__"):
        x = x.func if isinstance(x, functools.partial) else x.__func__
    return x


def _layers(x: Any) -> Iterator[Any]:
    """The function, what it wraps, what that wraps, ..."""
    seen: set[int] = set()
    while x is not None and id(x) not in seen:
        seen.add(id(x))
        x = _function(x)
        yield x
        x = getattr(x, "__wrapped__", None)
