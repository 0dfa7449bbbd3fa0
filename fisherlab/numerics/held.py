"""Values that hold tensors: what follows from the tensors is read off their fields."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

H = TypeVar("H", bound="Held")
_FIELDS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {}  # by class
STAYS = {"stays": True}  # metadata of a field that keeps its precision under `to`


class Held:
    """A frozen dataclass whose fields hold tensors, or values that hold tensors.

    Precision, device, size and casts of every such value are said here once. A field may
    nest them in tuples, lists and mappings. One with the metadata `STAYS` keeps its
    precision; one that is a `torch.dtype` is the precision of results.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Pair(Held):
    ...     one: Tensor
    ...     rest: tuple[Tensor, ...]
    >>> pair = Pair(torch.ones(2), (torch.ones(3), torch.arange(4)))
    >>> half = pair.to(torch.float16)
    >>> half.dtype, half.nbytes, half.stored_numbers
    (torch.float16, 42, 5)
    """

    @property
    def dtype(self) -> torch.dtype:
        """The precision of what goes in and out."""
        parts = (getattr(self, name) for name in _fields(self)[1])
        found = (kind for part in parts for kind in _precisions(part))
        return next(found, None) or torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(_devices(_parts(self)), torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in tensors(self))

    @property
    def stored_numbers(self) -> int:
        """How many numbers the value stands on."""
        return _numbers(_parts(self))

    def to(self: H, dtype: torch.dtype) -> H:
        """Return the same value in another precision."""
        if dtype == self.dtype:
            return self
        cast = {n: _cast(getattr(self, n), dtype) for n in _fields(self)[1]}
        changed: Any = replace(self, **cast)  # type: ignore[type-var]
        return changed


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of a value, in the order of its fields."""
    if isinstance(value, Tensor):
        yield value
    for part in _parts(value):
        yield from tensors(part)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with each of its tensors changed, also those in tuples.

    Examples
    --------
    >>> mapped((torch.ones(2), "a", 3), lambda tensor: 2 * tensor)
    (tensor([2., 2.]), 'a', 3)
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Held):
        held = {n: mapped(getattr(value, n), change) for n in _fields(value)[0]}
        return replace(value, **held)  # type: ignore[type-var]
    return tuple(mapped(v, change) for v in value) if isinstance(value, tuple) else value


def _fields(value: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the fields of a value's class and those that are cast: every step asks."""
    kind = type(value)
    if kind not in _FIELDS:
        own = fields(kind)
        cast = (f.name for f in own if f.init and "stays" not in f.metadata)
        _FIELDS[kind] = tuple(field.name for field in own), tuple(cast)
    return _FIELDS[kind]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Held):
        return [getattr(value, name) for name in _fields(value)[0]]
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (tuple, list)) else []


def _precisions(value: Any) -> Iterator[torch.dtype]:
    if isinstance(value, torch.dtype):
        yield value
    elif isinstance(value, Held):
        yield value.dtype
    elif isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        yield value.dtype.to_real()
    elif isinstance(value, (tuple, list, Mapping)):
        for part in _parts(value):
            yield from _precisions(part)


def _devices(value: Any) -> Iterator[torch.device]:
    if isinstance(value, torch.device):
        yield value
    elif isinstance(value, (Held, Tensor)):
        yield value.device
    else:
        for part in _parts(value):
            yield from _devices(part)


def _numbers(value: Any) -> int:
    if isinstance(value, Held):
        return value.stored_numbers
    if isinstance(value, Tensor):
        real = value.numel() if value.is_floating_point() else 0
        return 2 * value.numel() if value.is_complex() else real
    return sum(map(_numbers, _parts(value)))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with its real and complex numbers in another precision."""
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(dtype.to_complex())
    if isinstance(value, Held) or (isinstance(value, Tensor) and value.is_floating_point()):
        return value.to(dtype)
    if isinstance(value, torch.dtype):
        return dtype
    if isinstance(value, Mapping):
        return {key: _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(part, dtype) for part in value)
    return value
