"""Which module a model is, and who may use it: torch.compile, and threads."""

from collections.abc import Callable, Iterator
from functools import wraps
from threading import Lock, RLock
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])
_LOCKS: "WeakKeyDictionary[nn.Module, RLock]" = WeakKeyDictionary()
_GUARD = Lock()


def exclusive(model: nn.Module) -> "RLock":
    """Return the lock of a model, whose parameters and hooks statistics change in place.

    Threads that collect from one model take turns.

    Examples
    --------
    >>> model = nn.Linear(3, 2)
    >>> exclusive(model) is exclusive(model)
    True
    """
    with _GUARD:
        return _LOCKS.setdefault(uncompiled(model), RLock())


def alone(function: F) -> F:
    """Let one thread at a time call a function of a model."""

    @wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with exclusive(model):
            return function(model, *args, **kwargs)

    return cast("F", call)


def in_turn(function: F) -> F:
    """Let one thread at a time make the next item; between items the model is whole."""

    @wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Any]:
        items = function(model, *args, **kwargs)
        while True:
            with exclusive(model):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    return cast("F", call)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that torch.compile was given, or the model itself.

    Statistics watch layers through hooks, at which a compiled graph breaks; so they are
    taken from this module, whose parameters are the same and have their plain names.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(3, 2)
    >>> uncompiled(torch.compile(model, backend="eager")) is model
    True
    """
    found = getattr(model, "_orig_mod", model)
    return found if isinstance(found, nn.Module) else model
