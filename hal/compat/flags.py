"""Flags as scripts pass them: True and False, or the 1 and 0 that a command line gives."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

_Callable = TypeVar("_Callable", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)


def zero_or_one(function: _Callable) -> _Callable:
    """Let the parameters of a function that are annotated ``bool`` be given as 0 or 1 too."""
    parameters = list(inspect.signature(function).parameters.values())
    names = frozenset(one.name for one in parameters if "bool" in str(one.annotation).split(" | "))
    places = [place for place, one in enumerate(parameters) if one.name in names]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in names & kwargs.keys():
            kwargs[name] = _flag(kwargs[name])
        given = [place for place in places if place < len(args) and type(args[place]) is int]
        if given:
            args = tuple(_flag(one) if place in given else one for place, one in enumerate(args))
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def zero_or_one_methods(kind: _Class) -> _Class:
    """`zero_or_one` for all methods that a class defines and its callers use."""
    for name, method in list(vars(kind).items()):
        is_static = isinstance(method, staticmethod)
        function = method.__func__ if isinstance(method, staticmethod) else method
        if (name == "__init__" or not name.startswith("_")) and inspect.isfunction(function):
            made = zero_or_one(function)
            setattr(kind, name, staticmethod(made) if is_static else made)
    return kind


def _flag(value: Any) -> Any:
    return bool(value) if type(value) is int and value in (0, 1) else value
