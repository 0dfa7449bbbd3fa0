"""What a function or an object does, as a short text that every process finds alike."""

import hashlib
import inspect
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial, singledispatch
from types import CodeType, FunctionType, MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

# Their code is that of a version, which the record holds.
_LIBRARIES: Final = ("torch", "fisherlab", "builtins", "numpy", "xarray")
_PLAIN: Final = (bool, int, float, str, type(None))
_MADE_OF_PARTS: Final = (CodeType, MethodType, frozenset, Tensor, nn.Module)


def described(value: object) -> str:
    """Return a text that is the same in every process: no addresses.

    Examples
    --------
    >>> described(described)
    'fisherlab.codes.described'
    """
    if isinstance(value, partial):
        given = [described(a) for a in value.args]
        given += [f"{k}={described(v)}" for k, v in value.keywords.items()]
        return f"{described(value.func)}({', '.join(given)})"
    if inspect.isroutine(value) or inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def checksum(*tensors: Tensor) -> str:
    """Return a checksum of the numbers in tensors.

    Examples
    --------
    >>> checksum(torch.zeros(2)), checksum(torch.zeros(2)) == checksum(torch.ones(2))
    ('af5570f5a181', False)
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def made_with(value: object) -> dict[str, object]:
    """Return the attributes of an object that are called as what its class takes.

    Examples
    --------
    >>> made_with(torch.nn.Dropout(0.25))
    {'p': 0.25, 'inplace': False}
    """
    made_of: Mapping[str, object] = {}
    with suppress(ValueError, TypeError):
        made_of = inspect.signature(type(value)).parameters
    own = getattr(value, "__dict__", {})
    return {name: part for name, part in own.items() if name in made_of}


def codes(**values: object) -> dict[str, str]:
    """Return checksums of what functions and objects do, by their names.

    Bytecode is that of one version of Python, which is part of the names.

    Examples
    --------
    >>> codes(augment=partial(max, 1)) == codes(augment=partial(max, 2))
    False
    """
    version = ".".join(platform.python_version_tuple()[:2])
    return {f"code of {n} in Python {version}": _sum(v) for n, v in values.items()}


def _sum(value: object) -> str:
    traced = repr(_traced(value, {}))
    return hashlib.sha256(traced.encode()).hexdigest()[:12]


def _traced(value: Any, seen: dict[int, object]) -> object:
    """Return the code and the numbers that decide what a value does."""
    if isinstance(value, (list, tuple)):
        return [_traced(part, seen) for part in value]
    if not isinstance(value, _MADE_OF_PARTS) and _is_known(value):
        return described(value)
    if id(value) in seen:
        return "seen"
    seen[id(value)] = value  # held, so that no other value gets its id
    return _traced(_content(value), seen)


def _is_known(value: Any) -> bool:
    owner = value if isinstance(value, (type, FunctionType)) else type(value)
    return owner.__module__.partition(".")[0] in _LIBRARIES


@singledispatch
def _content(value: Any) -> object:
    """Return what decides what a value does; of an object of a user, class and settings."""
    return described(value), type(value), _items(made_with(value))


@_content.register
def _(value: FunctionType) -> object:
    named = _items(value.__kwdefaults__ or {})
    return value.__code__, value.__defaults__, named, _used(value)


@_content.register
def _(value: CodeType) -> object:
    return value.co_code.hex(), value.co_names, value.co_consts


@_content.register
def _(value: MethodType) -> object:
    return value.__func__, value.__self__


@_content.register
def _(value: partial) -> object:  # type: ignore[type-arg]
    return value.func, value.args, _items(value.keywords)


@_content.register
def _(value: frozenset) -> object:  # type: ignore[type-arg]
    return sorted(map(repr, value))  # texts in it have no order


@_content.register
def _(value: Tensor) -> object:
    return checksum(value)


@_content.register
def _(value: nn.Module) -> object:
    kinds = {described(type(module)): type(module) for module in value.modules()}
    return _items(kinds)


@_content.register
def _(value: type) -> object:
    own = {
        name: part
        for name, part in vars(value).items()
        if isinstance(part, FunctionType)
        or (isinstance(part, _PLAIN) and not name.startswith("__"))
    }
    return _items(own), value.__bases__


def _items(found: Mapping[str, object]) -> list[tuple[str, object]]:
    return sorted(found.items(), key=lambda item: item[0])


def _used(function: FunctionType) -> list[tuple[str, object]]:
    """Return what a function closes over, and of its module what it may depend on.

    Of the module numbers, texts, tensors and functions count, not other modules.
    """
    inner: Mapping[str, object] = {}
    outer: Mapping[str, object] = {}
    with suppress(ValueError):  # a name that has no value yet
        found = inspect.getclosurevars(function)
        inner, outer = found.nonlocals, found.globals
    plain = (*_PLAIN, tuple, partial, Tensor)
    kept = {
        name: value
        for name, value in outer.items()
        if isinstance(value, plain)
        or (isinstance(value, FunctionType) and value.__module__ == function.__module__)
    }
    return _items({**kept, **inner})
