"""How a function of another library differs from the one that is known, as a release that came later may."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

__all__ = ["Drift", "Theirs", "drift"]


class Drift(NamedTuple):
    """What differs between a signature and the one that is known; false where nothing does.

    ``required``: new parameters without a default. Nothing can stand in for a function that has one.
    ``optional``: the other new parameters, with their defaults.
    ``changes``: what became of the known ones, in words.
    """

    required: tuple[str, ...] = ()
    optional: Mapping[str, object] = {}
    changes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.required or self.optional or self.changes)

    def __str__(self) -> str:
        new = [f"{name} is new and required" for name in self.required]
        new += [f"{name} is new, {value!r} by default" for name, value in self.optional.items()]
        return "; ".join((*new, *self.changes))


_Parameters = dict[str, inspect.Parameter]


def _named(function: Callable[..., Any]) -> _Parameters | None:
    """The parameters of a function by name, or None where it does not tell them: it may be written in another language,
    or be a wrapper that takes any."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return None
    return {name: p for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}


def _defaults(parameters: _Parameters) -> dict[str, Any]:
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _default(p: inspect.Parameter) -> str:
    return "required" if p.default is p.empty else f"{p.default!r} by default"


def drift(function: Callable[..., Any], known: Callable[..., Any], also: Collection[str] = ()) -> Drift:
    """How ``function`` differs from ``known`` in the names, the defaults and the order of its parameters.

    One that does not tell its parameters is taken for the known one.

    Args:
        also: further names that are known, of what ``known`` takes among its keywords.
    """
    theirs, ours = _named(function), _named(known)
    if theirs is None or ours is None:
        return Drift()
    new = [p for name, p in theirs.items() if name not in ours and name not in also]
    changes = [f"{name} is gone" for name in ours if name not in theirs]
    changes += [
        f"{name} is {_default(p)}, and was {_default(ours[name])}"
        for name, p in theirs.items()
        if name in ours and _default(p) != _default(ours[name])
    ]
    positional = [name for name, p in theirs.items() if p.kind is not p.KEYWORD_ONLY]
    was = [name for name in ours if name in positional]
    moved = next((pair for pair in zip(positional, was, strict=False) if pair[0] != pair[1]), None)
    if moved is not None:
        changes.append(f"{moved[0]} comes where {moved[1]} came")
    return Drift(
        tuple(p.name for p in new if p.default is p.empty),
        {p.name: p.default for p in new if p.default is not p.empty},
        tuple(changes),
    )


class Theirs:
    """A function of another library: its arguments by their names, whatever their order and their defaults are now.

    It does in plain Python what ``inspect.Signature.bind`` does, which the compiler does not trace.
    """

    def __init__(self, function: Callable[..., Any], known: Callable[..., Any], also: Collection[str] = ()) -> None:
        self.function = function
        self.drift = drift(function, known, also)
        told = _named(function)
        self.signature = inspect.signature(known if told is None else function)
        self.known_defaults = _defaults(_named(known) or {})
        parameters = _named(known) or {} if told is None else told
        self._positional = tuple(name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY)
        self._defaults = _defaults(parameters)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a (valid) call by name, defaults included."""
        return {**self._defaults, **dict(zip(self._positional, args, strict=False)), **kwargs}

    def unknown(self, arguments: Mapping[str, Any]) -> str | None:
        """The first new parameter that this call gives another value than its default, or None."""
        for name, default in self.drift.optional.items():
            if not is_default(arguments[name], default):
                return name
        return None


def is_default(value: Any, default: Any) -> bool:
    """Whether the value is the default; of a tensor this is not asked by comparing it."""
    return value is default or (
        type(value) is type(default) and isinstance(default, (bool, int, float, str)) and value == default
    )
